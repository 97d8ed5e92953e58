//! `generation_config.json`: where a model's answer ends, and how its makers would sample it.

use std::path::Path;

use serde_json::Value;

use super::read_json;
use super::sampler::SamplingParams;
use crate::error::{Code, Error, Result};

/// Bytes a generation config or model config may have; the largest known are a few kilobytes.
const MAX_BYTES: u64 = 16 << 20;

/// What the model's makers recommend. `None`: they do not say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a sequence, in the file's order.
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
    pub pad_token_id: Option<u32>,
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<usize>,
    /// Prompt and answer together; `max_new_tokens` goes before it.
    pub max_length: Option<usize>,
    /// Texts that end an answer.
    pub stop_strings: Vec<String>,
    /// Keys set to something that would change the answer, and that this engine does not know.
    pub unheeded: Vec<String>,
}

/// How long an answer may be, as transformers reads a model's generation_config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerLength {
    Tokens(usize),
    /// Prompt and answer in all: the model's `max_length`.
    Together(usize),
}

impl AnswerLength {
    /// What is `asked` for, else what the model's file says, else `usual` tokens.
    pub fn new(asked: Option<usize>, generation: &GenerationConfig, usual: usize) -> AnswerLength {
        match (asked.or(generation.max_new_tokens), generation.max_length) {
            (Some(n), _) => AnswerLength::Tokens(n),
            (None, Some(all)) => AnswerLength::Together(all),
            (None, None) => AnswerLength::Tokens(usual),
        }
    }

    /// Tokens that may follow a prompt of `prompt`.
    ///
    /// # Errors
    /// `Usage`: the model's `max_length` leaves none.
    pub fn after(self, prompt: usize) -> Result<usize> {
        let all = match self {
            AnswerLength::Tokens(n) => return Ok(n),
            AnswerLength::Together(all) => all,
        };
        all.checked_sub(prompt).filter(|n| *n > 0).ok_or_else(|| {
            Error::new(
                Code::Usage,
                format!("the prompt of {prompt} tokens leaves no room for an answer"),
                format!(
                    "the model's generation_config.json has max_length {all}, the prompt included"
                ),
                "shorten the prompt, or give --max-tokens, which goes before it",
            )
        })
    }

    /// A prompt of `prompt` tokens and its answer, at most.
    pub fn in_all(self, prompt: usize) -> usize {
        match self {
            AnswerLength::Tokens(n) => prompt.saturating_add(n),
            AnswerLength::Together(all) => all.max(prompt),
        }
    }
}

/// Keys of transformers' `GenerationConfig` that change what is generated in ways not followed here, each with what leaves it
/// without effect (`null`, `[]` and `{}` always do).
const UNHEEDED: [(&str, f64); 19] = [
    ("bad_words_ids", f64::NAN),
    ("begin_suppress_tokens", f64::NAN),
    ("constraints", f64::NAN),
    ("dola_layers", f64::NAN),
    ("exponential_decay_length_penalty", f64::NAN),
    ("force_words_ids", f64::NAN),
    ("forced_bos_token_id", f64::NAN),
    ("forced_decoder_ids", f64::NAN),
    ("forced_eos_token_id", f64::NAN),
    ("guidance_scale", 1.0),
    ("max_time", f64::NAN),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("sequence_bias", f64::NAN),
    ("suppress_tokens", f64::NAN),
    ("watermarking_config", f64::NAN),
];
/// Those that do so only where tokens are drawn.
const UNHEEDED_SAMPLING: [(&str, f64); 3] = [
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("typical_p", 1.0),
];

fn unheeded(json: &Value) -> Vec<String> {
    let samples = json.get("do_sample") == Some(&Value::Bool(true));
    let changes = |(key, neutral): &&(&str, f64)| match json.get(*key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(value) => value.as_f64() != Some(*neutral),
    };
    let drawn = UNHEEDED_SAMPLING.iter().filter(|_| samples);
    let mut keys: Vec<String> = UNHEEDED
        .iter()
        .chain(drawn)
        .filter(changes)
        .map(|(key, _)| (*key).to_string())
        .collect();
    keys.sort();
    keys
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir`; token ids it does not give come from `config.json`, as in transformers.
    /// Neither file has to be there. A value of the wrong kind is an error that names its key (Code::Config).
    pub fn load(dir: &Path) -> Result<GenerationConfig> {
        let path = dir.join("generation_config.json");
        let mut config = match read_json(&path, MAX_BYTES)? {
            Some(json) => GenerationConfig::parse(&json, &path.display().to_string())?,
            None => GenerationConfig::default(),
        };
        let path = dir.join("config.json");
        if let Some(json) = read_json(&path, MAX_BYTES)? {
            let place = path.display().to_string();
            // Multi-modal configs nest the language model's.
            for part in [Some(&json), json.get("text_config")].into_iter().flatten() {
                let fallback = Fields(part, &place);
                if config.eos_token_ids.is_empty() {
                    config.eos_token_ids = fallback.ids("eos_token_id")?;
                }
                if config.bos_token_id.is_none() {
                    config.bos_token_id = fallback.id("bos_token_id")?;
                }
                if config.pad_token_id.is_none() {
                    config.pad_token_id = fallback.id("pad_token_id")?;
                }
            }
        }
        Ok(config)
    }

    /// `place` names the file in errors.
    pub fn parse(json: &Value, place: &str) -> Result<GenerationConfig> {
        if !json.is_object() {
            return Err(Fields(json, place).wrong("", "a JSON object"));
        }
        let f = Fields(json, place);
        Ok(GenerationConfig {
            eos_token_ids: f.ids("eos_token_id")?,
            bos_token_id: f.id("bos_token_id")?,
            pad_token_id: f.id("pad_token_id")?,
            do_sample: f.read("do_sample", "true or false", Value::as_bool)?,
            temperature: f.number("temperature")?,
            top_k: f.count("top_k")?,
            top_p: f.number("top_p")?,
            min_p: f.number("min_p")?,
            repetition_penalty: f.number("repetition_penalty")?,
            max_new_tokens: f.count("max_new_tokens")?,
            max_length: f.count("max_length")?,
            stop_strings: f.texts("stop_strings")?,
            unheeded: unheeded(json),
        })
    }

    /// The sampling that transformers' `generate` would do by default: greedy unless `do_sample` is true, and then at
    /// temperature 1 with the 50 likeliest tokens where the file is silent. The repetition penalty counts either way.
    pub fn sampling(&self) -> SamplingParams {
        let mut params = SamplingParams {
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            ..SamplingParams::greedy()
        };
        if self.do_sample == Some(true) {
            params.temperature = self.temperature.unwrap_or(1.0);
            params.top_k = self.top_k.unwrap_or(50);
            params.top_p = self.top_p.unwrap_or(1.0);
            params.min_p = self.min_p.unwrap_or(0.0);
        }
        params
    }
}

struct Fields<'a>(&'a Value, &'a str);

impl Fields<'_> {
    fn wrong(&self, key: &str, wanted: &str) -> Error {
        let what = match key {
            "" => format!("cannot use {}", self.1),
            key => format!("cannot use `{key}` in {}", self.1),
        };
        let shown: String = self.0.get(key).unwrap_or(self.0).to_string();
        let shown: String = shown.chars().take(60).collect();
        Error::new(
            Code::Config,
            what,
            format!("it must be {wanted}, and is {shown}"),
            "correct the file, or copy it again from the model's source",
        )
    }

    /// A key that is missing or null is `None`.
    fn read<T>(
        &self,
        key: &str,
        wanted: &str,
        get: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => get(value).map(Some).ok_or_else(|| self.wrong(key, wanted)),
        }
    }

    fn id(&self, key: &str) -> Result<Option<u32>> {
        // A few published files list several ids even for bos or pad: the first one is meant.
        self.read(key, "a token id", |v| {
            let first = v.as_array().and_then(|list| list.first()).unwrap_or(v);
            // transformers writes −1 for "none".
            match first.as_i64() {
                Some(-1) => Some(None),
                _ => as_id(first).map(Some),
            }
        })
        .map(Option::flatten)
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let wanted = "a token id or a list of token ids";
        let ids = self.read(key, wanted, |v| match v {
            Value::Array(list) => list.iter().map(as_id).collect(),
            v if v.as_i64() == Some(-1) => Some(Vec::new()),
            v => as_id(v).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    fn texts(&self, key: &str) -> Result<Vec<String>> {
        let text = |v: &Value| v.as_str().filter(|t| !t.is_empty()).map(String::from);
        let texts = self.read(key, "a text or a list of texts", |v| match v {
            Value::Array(list) => list.iter().map(text).collect(),
            v => text(v).map(|t| vec![t]),
        })?;
        Ok(texts.unwrap_or_default())
    }

    fn number(&self, key: &str) -> Result<Option<f32>> {
        self.read(key, "a number", |v| v.as_f64().map(|x| x as f32))
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a whole number, 0 or above", |v| {
            v.as_u64().map(|x| x as usize)
        })
    }
}

fn as_id(v: &Value) -> Option<u32> {
    v.as_u64().and_then(|id| u32::try_from(id).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(v: Value) -> Result<GenerationConfig> {
        GenerationConfig::parse(&v, "generation_config.json")
    }

    #[test]
    fn eos_is_an_id_or_a_list() {
        assert_eq!(
            parse(json!({"eos_token_id": 2})).unwrap().eos_token_ids,
            [2]
        );
        let c = parse(json!({"eos_token_id": [5, 3], "bos_token_id": null})).unwrap();
        assert_eq!((c.eos_token_ids, c.bos_token_id), (vec![5, 3], None));
        assert!(parse(json!({})).unwrap().eos_token_ids.is_empty());
    }

    #[test]
    fn greedy_unless_told_to_sample() {
        let c = parse(json!({"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05}));
        let p = c.unwrap().sampling();
        assert!(p.is_greedy());
        assert_eq!((p.repetition_penalty, p.top_p), (1.05, 1.0));
        let c = parse(
            json!({"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05}),
        );
        let p = c.unwrap().sampling();
        assert_eq!(
            (p.temperature, p.top_p, p.top_k, p.min_p),
            (0.7, 0.8, 20, 0.05)
        );
        let p = parse(json!({"do_sample": true})).unwrap().sampling();
        assert_eq!((p.temperature, p.top_k, p.top_p), (1.0, 50, 1.0));
        assert!(
            parse(json!({"do_sample": false, "temperature": 0.5}))
                .unwrap()
                .sampling()
                .is_greedy()
        );
    }

    #[test]
    fn what_ends_an_answer_and_what_is_not_followed() {
        let c = parse(json!({"max_length": 40, "stop_strings": "END"})).unwrap();
        assert_eq!(
            (c.max_length, c.stop_strings),
            (Some(40), vec!["END".into()])
        );
        let c = parse(json!({"stop_strings": ["a", "b"]})).unwrap();
        assert_eq!(c.stop_strings, ["a", "b"]);
        let c = parse(json!({
            "no_repeat_ngram_size": 3, "suppress_tokens": [7], "bad_words_ids": [[1, 2]],
            "typical_p": 0.9, "num_beams": 4
        }));
        let all = [
            "bad_words_ids",
            "no_repeat_ngram_size",
            "num_beams",
            "suppress_tokens",
        ];
        assert_eq!(
            c.unwrap().unheeded,
            all,
            "nothing is drawn, so typical_p is idle"
        );
        let c = parse(json!({"do_sample": true, "typical_p": 0.9, "unknown_key": 1}));
        assert_eq!(c.unwrap().unheeded, ["typical_p"]);
        // What transformers writes for "off".
        let off = parse(json!({
            "no_repeat_ngram_size": 0, "suppress_tokens": null, "bad_words_ids": [], "num_beams": 1,
            "typical_p": 1.0, "do_sample": true, "sequence_bias": {}, "min_length": 0,
            "guidance_scale": null, "epsilon_cutoff": 0.0, "penalty_alpha": null
        }));
        assert!(off.unwrap().unheeded.is_empty());
    }

    #[test]
    fn wrong_kinds_name_the_key() {
        for (key, v) in [
            ("eos_token_id", json!({"eos_token_id": "x"})),
            ("eos_token_id", json!({"eos_token_id": [1, -7]})),
            ("eos_token_id", json!({"eos_token_id": 4294967296u64})),
            ("temperature", json!({"temperature": "hot"})),
            ("top_k", json!({"top_k": -5})),
            ("do_sample", json!({"do_sample": 1})),
            ("stop_strings", json!({"stop_strings": [1]})),
            ("stop_strings", json!({"stop_strings": ""})),
            ("max_length", json!({"max_length": "long"})),
        ] {
            let e = parse(v).unwrap_err();
            assert_eq!(e.code(), Code::Config);
            assert!(e.what().contains(key), "{e}");
        }
        assert!(parse(json!([1])).is_err());
    }

    #[test]
    fn ids_fall_back_to_the_model_config() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            GenerationConfig::load(dir.path()).unwrap(),
            GenerationConfig::default()
        );
        let write = |name: &str, v: Value| {
            std::fs::write(dir.path().join(name), v.to_string()).unwrap();
        };
        write(
            "config.json",
            json!({"bos_token_id": 1, "text_config": {"eos_token_id": [7, 8], "bos_token_id": 9}}),
        );
        let c = GenerationConfig::load(dir.path()).unwrap();
        assert_eq!((c.eos_token_ids, c.bos_token_id), (vec![7, 8], Some(1)));
        write("generation_config.json", json!({"eos_token_id": 4}));
        assert_eq!(
            GenerationConfig::load(dir.path()).unwrap().eos_token_ids,
            [4]
        );
        std::fs::write(dir.path().join("generation_config.json"), "{").unwrap();
        let e = GenerationConfig::load(dir.path()).unwrap_err();
        assert!(e.what().contains("generation_config.json"), "{e}");
    }
}
