//! Text ↔ token ids: `tokenizer.json` through the `tokenizers` crate, with the special tokens of `tokenizer_config.json`
//! put in as transformers puts them in.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::{read_json, read_text};
use crate::error::{Code, Error, Result};

/// The largest published tokenizer.json has 34 MB.
const MAX_BYTES: u64 = 256 << 20;

/// The special tokens that transformers knows by name, in its order.
const NAMED: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A loaded tokenizer. Cloning it is cheap; it can be used from several threads.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    backend: tokenizers::Tokenizer,
    /// `bos_token` → `<s>` and the like.
    named: BTreeMap<String, String>,
    id_limit: usize,
    byte_level: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size())
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and, where an old folder has it, `special_tokens_map.json`.
    /// Errors are Code::Text and say what to do where only another format (`tokenizer.model`, …) is there.
    pub fn load(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let Some(text) = read_text(&path, MAX_BYTES)? else {
            return Err(missing(dir));
        };
        let config = read_json(&dir.join("tokenizer_config.json"), MAX_BYTES)?;
        let legacy = read_json(&dir.join("special_tokens_map.json"), MAX_BYTES)?;
        Tokenizer::build(
            text.as_bytes(),
            config.as_ref(),
            legacy.as_ref(),
            &path.display().to_string(),
        )
    }

    /// From the contents of `tokenizer.json` and `tokenizer_config.json`; `place` names the former in errors.
    pub fn from_json(tokenizer: &[u8], config: Option<&Value>, place: &str) -> Result<Tokenizer> {
        Tokenizer::build(tokenizer, config, None, place)
    }

    fn build(
        json: &[u8],
        config: Option<&Value>,
        legacy: Option<&Value>,
        place: &str,
    ) -> Result<Tokenizer> {
        let broken = |cause: String| {
            Error::new(
                Code::Text,
                format!("cannot use {place}"),
                cause,
                "copy the file again from the model's source",
            )
        };
        // The crate indexes into hostile files in places: a panic there is a broken file, not a bug of ours.
        let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json));
        let mut backend = match parsed {
            Ok(Ok(backend)) => backend,
            Ok(Err(e)) => return Err(broken(format!("it is not a valid tokenizer: {e}"))),
            Err(_) => return Err(broken("the tokenizers library failed on it".into())),
        };
        // A prompt is never cut or padded behind the user's back, whatever the file was saved with.
        backend.with_padding(None);
        backend
            .with_truncation(None)
            .map_err(|e| broken(e.to_string()))?;
        let empty = Map::new();
        let config = config.and_then(Value::as_object).unwrap_or(&empty);
        let legacy = legacy.and_then(Value::as_object).unwrap_or(&empty);
        let special = Special::read(config, legacy);
        special
            .add_to(&mut backend)
            .map_err(|e| broken(format!("its special tokens cannot be added: {e}")))?;
        if config.get("split_special_tokens").and_then(Value::as_bool) == Some(true) {
            backend.set_encode_special_tokens(true);
        }
        let id_limit = backend
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |&id| id as usize + 1);
        if id_limit == 0 {
            return Err(broken("its vocabulary is empty".into()));
        }
        let byte_level = is_byte_level(&backend);
        let named = special.named.into_iter().map(|(k, t)| (k, t.content));
        Ok(Tokenizer(Arc::new(Inner {
            backend,
            named: named.collect(),
            id_limit,
            byte_level,
        })))
    }

    /// Token ids of `text`. `add_special_tokens` puts in what the tokenizer puts around a text (a beginning-of-sequence
    /// token, say): wanted for raw text, not for a rendered chat, which brings its own.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        match self.0.backend.encode_fast(text, add_special_tokens) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(e) => Err(Error::new(
                Code::Text,
                "the text cannot be tokenized",
                e.to_string(),
                "check that tokenizer.json belongs to this model",
            )),
        }
    }

    /// A lower bound on the tokens of a long text, about: it is cut into pieces, each of which is tokenized alone, until there are more
    /// than `enough`. Takes little memory, where [`Tokenizer::encode`] takes some two hundred bytes for each of the text.
    pub fn count_up_to(&self, text: &str, enough: usize) -> Result<usize> {
        const PIECE_BYTES: usize = 16 << 10;
        let (mut rest, mut tokens) = (text, 0);
        while !rest.is_empty() && tokens <= enough {
            let (piece, others) = rest.split_at(rest.floor_char_boundary(PIECE_BYTES));
            // Whatever is cut in two may be a token more on either side.
            tokens += self.encode(piece, false)?.len().saturating_sub(2);
            rest = others;
        }
        Ok(tokens)
    }

    /// The text of whole sequences of ids; ids without a token are left out. For text as it is generated: [`super::TokenStream`].
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.0
            .backend
            .decode(ids, skip_special_tokens)
            .map_err(|e| {
                Error::new(
                    Code::Text,
                    "token ids cannot be turned into text",
                    e.to_string(),
                    "check that tokenizer.json belongs to this model",
                )
            })
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.0.backend.get_vocab_size(true)
    }

    /// One more than the highest id. The model's own vocabulary is often padded beyond it: such ids mean nothing.
    pub fn id_limit(&self) -> usize {
        self.0.id_limit
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.backend.token_to_id(token)
    }

    /// The token as the vocabulary spells it: bytes and spaces may be coded.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.backend.id_to_token(id)
    }

    /// Special tokens are left out of the text an answer is shown as.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.0.backend.get_added_vocabulary();
        added
            .simple_id_to_token(id)
            .is_some_and(|token| added.is_special_token(&token))
    }

    /// Ids of all special tokens, ascending.
    pub fn special_ids(&self) -> Vec<u32> {
        let added = self.0.backend.get_added_tokens_decoder();
        let mut ids: Vec<u32> = added.keys().copied().collect();
        ids.retain(|&id| self.is_special(id));
        ids.sort_unstable();
        ids
    }

    pub fn bos_token(&self) -> Option<&str> {
        self.named("bos_token")
    }

    pub fn eos_token(&self) -> Option<&str> {
        self.named("eos_token")
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos_token().and_then(|t| self.token_to_id(t))
    }

    pub fn eos_id(&self) -> Option<u32> {
        self.eos_token().and_then(|t| self.token_to_id(t))
    }

    /// A special token by the name transformers gives it: `bos_token`, `eos_token`, `pad_token`, …
    pub fn named(&self, name: &str) -> Option<&str> {
        self.0.named.get(name).map(String::as_str)
    }

    /// Tokens spell bytes in GPT-2's alphabet, and decoding is their concatenation.
    pub(super) fn is_byte_level(&self) -> bool {
        self.0.byte_level
    }
}

/// The special tokens of a folder, with their names where they have one.
pub(super) struct Special {
    /// Tokens that `tokenizer_config.json` lists with their ids, in the order of those.
    listed: BTreeMap<u32, AddedToken>,
    named: BTreeMap<String, AddedToken>,
    unnamed: Vec<AddedToken>,
}

impl Special {
    pub(super) fn read(config: &Map<String, Value>, legacy: &Map<String, Value>) -> Special {
        let mut special = Special {
            listed: BTreeMap::new(),
            named: BTreeMap::new(),
            unnamed: Vec::new(),
        };
        let decoder = config
            .get("added_tokens_decoder")
            .and_then(Value::as_object);
        for (id, token) in decoder.into_iter().flatten() {
            if let (Ok(id), Some(token)) = (id.parse(), added_token(token, false)) {
                special.listed.insert(id, token);
            }
        }
        // transformers looks at special_tokens_map.json only where the config lists no added tokens, and then it wins.
        let legacy = legacy.iter().filter(|_| decoder.is_none());
        for (key, value) in config.iter().chain(legacy) {
            match key.as_str() {
                "additional_special_tokens" | "extra_special_tokens" => {
                    let list = match value {
                        Value::Array(list) => list.iter().collect(),
                        Value::Object(map) => map.values().collect(),
                        _ => Vec::new(),
                    };
                    let tokens = list.into_iter().filter_map(|t| added_token(t, true));
                    special.unnamed.extend(tokens);
                }
                // Model-specific ones (`image_token`, …) are special tokens too.
                name if name.ends_with("_token") => {
                    if let Some(token) = added_token(value, true) {
                        special.named.insert(name.to_owned(), token);
                    }
                }
                _ => {}
            }
        }
        special
    }

    /// The strings a chat template sees under their names: those that transformers knows.
    pub(super) fn for_templates(&self) -> impl Iterator<Item = (&str, &str)> {
        NAMED.iter().filter_map(|name| {
            let token = self.named.get(*name)?;
            Some((*name, token.content.as_str()))
        })
    }

    fn add_to(&self, backend: &mut tokenizers::Tokenizer) -> tokenizers::Result<()> {
        backend.add_tokens(self.listed.values().cloned())?;
        let mut known: BTreeMap<String, AddedToken> = backend
            .get_added_tokens_decoder()
            .into_values()
            .map(|t| (t.content.clone(), t))
            .collect();
        known.extend(self.listed.values().map(|t| (t.content.clone(), t.clone())));
        let first = NAMED.iter().filter_map(|name| self.named.get(*name));
        let others = self
            .named
            .iter()
            .filter(|(name, _)| !NAMED.contains(&name.as_str()))
            .map(|(_, token)| token);
        let tokens: Vec<AddedToken> = first
            .chain(others)
            .chain(&self.unnamed)
            // A token that is already there keeps its way of matching (lstrip, normalized, …).
            .map(|t| known.get(&t.content).unwrap_or(t).clone().special(true))
            .collect();
        backend.add_special_tokens(tokens)?;
        Ok(())
    }
}

/// A token as configs write it: the string, or an AddedToken object.
fn added_token(value: &Value, special: bool) -> Option<AddedToken> {
    let (content, object) = match value {
        Value::String(s) => (s.as_str(), None),
        Value::Object(o) => (o.get("content")?.as_str()?, Some(o)),
        _ => return None,
    };
    if content.is_empty() {
        return None;
    }
    let flag = |name: &str, default: bool| {
        object
            .and_then(|o| o.get(name))
            .and_then(Value::as_bool)
            .unwrap_or(default)
    };
    let special = special || flag("special", false);
    Some(
        AddedToken::from(content, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)),
    )
}

fn is_byte_level(backend: &tokenizers::Tokenizer) -> bool {
    matches!(
        backend.get_decoder(),
        Some(tokenizers::DecoderWrapper::ByteLevel(_))
    )
}

impl Tokenizer {
    /// Whether a folder holds a tokenizer, without reading it.
    ///
    /// # Errors
    /// `Text`: it has none, or one of another format.
    pub fn expect_in(dir: &Path) -> Result<()> {
        match dir.join("tokenizer.json").exists() {
            true => Ok(()),
            false => Err(missing(dir)),
        }
    }
}

fn missing(dir: &Path) -> Error {
    let other = [
        "tokenizer.model",
        "tekken.json",
        "tiktoken.model",
        "vocab.json",
    ]
    .into_iter()
    .find(|name| dir.join(name).is_file());
    let shown = dir.display();
    match other {
        Some(name) => Error::new(
            Code::Text,
            format!("{shown} has no tokenizer.json"),
            format!("it has {name}, a format that is not read here"),
            format!(
                "convert it once: python -c \"from transformers import AutoTokenizer as T; \
                 T.from_pretrained('{shown}').save_pretrained('{shown}')\""
            ),
        ),
        None => Error::new(
            Code::Text,
            format!("{shown} has no tokenizer.json"),
            "the folder holds no tokenizer",
            "copy tokenizer.json and tokenizer_config.json from the model's source into that folder",
        ),
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
pub(super) mod tests;
