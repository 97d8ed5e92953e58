//! Every field of a body does what it says, and what a row asks for is not changed by the job around it.

use serde_json::{Value, json};

use super::{batch, done, read_rows, write_rows};

/// The bodies (completions of `prompt` "the sea", end-of-text ignored) answered in one job.
fn answers(bodies: &[Value], more: &[&str]) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let rows: Vec<Value> = bodies
        .iter()
        .enumerate()
        .map(|(i, fields)| {
            let mut body = json!({"prompt": "the sea", "max_tokens": 12, "ignore_eos": true});
            for (key, value) in fields.as_object().unwrap() {
                body[key] = value.clone();
            }
            json!({"custom_id": format!("r{i}"), "url": "/v1/completions", "body": body})
        })
        .collect();
    write_rows(&input, &rows);
    done(batch(&input, &output, more), 0);
    let answered = read_rows(&output);
    answered
        .iter()
        .map(|r| r["response"]["body"].clone())
        .collect()
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

/// The ids of the answer's tokens: the same answer asked for with nothing else does not tell them.
fn tokens(answer: &Value) -> Vec<String> {
    let tokens = answer["choices"][0]["logprobs"]["tokens"]
        .as_array()
        .unwrap();
    tokens.iter().map(Value::to_string).collect()
}

#[test]
fn what_makes_sampling_certain_gives_the_greedy_answer() {
    let a = answers(
        &[
            json!({}),
            json!({"temperature": 1, "top_k": 1}),
            json!({"temperature": 1, "min_p": 1}),
            json!({"temperature": 1, "top_p": 1e-6}),
            json!({"temperature": 0, "seed": 5}),
            json!({"temperature": 1e-5}),
        ],
        &[],
    );
    for (i, answer) in a.iter().enumerate() {
        assert_eq!(text(answer), text(&a[0]), "row {i}");
    }
}

#[test]
fn seeds_and_choices() {
    let hot = |seed: i64, n: usize| json!({"temperature": 1.5, "seed": seed, "n": n});
    let a = answers(
        &[
            hot(1, 1),
            hot(2, 1),
            hot(1, 1),
            hot(1, 4),
            json!({"temperature": 1.5}),
            json!({"temperature": 1.5}),
        ],
        &[],
    );
    assert_eq!(text(&a[0]), text(&a[2]), "a seed is the row's own");
    assert_ne!(text(&a[0]), text(&a[1]));
    assert_ne!(
        text(&a[4]),
        text(&a[5]),
        "rows without one differ all the same"
    );
    let choices = a[3]["choices"].as_array().unwrap();
    let mut texts: Vec<&str> = choices
        .iter()
        .map(|c| c["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts[0], text(&a[0]), "the first of n is the one of one");
    texts.sort_unstable();
    texts.dedup();
    assert_eq!(texts.len(), 4);
    assert_eq!(a[3]["usage"]["completion_tokens"], 48);
}

#[test]
fn stops_and_lengths() {
    let plain = answers(&[json!({})], &[]);
    let whole = text(&plain[0]).to_owned();
    // Some characters from the middle.
    let middle: Vec<char> = whole.chars().collect();
    let stop: String = middle[middle.len() / 2..][..2].iter().collect();
    let before = &whole[..whole.find(&stop).unwrap()];
    let a = answers(
        &[
            json!({"stop": stop}),
            json!({"stop": ["never said", stop]}),
            json!({"max_tokens": 3}),
            json!({"stop": []}),
        ],
        &[],
    );
    for answer in &a[..2] {
        assert_eq!(text(answer), before);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() <= 12);
    }
    assert_eq!(a[2]["usage"]["completion_tokens"], 3);
    assert_eq!(a[2]["choices"][0]["finish_reason"], "length");
    assert_eq!(text(&a[3]), whole);
}

#[test]
fn biases_and_penalties() {
    // Tokens 32 and 33 (A and B) far above all others, A a little higher.
    let bias = json!({"32": 100, "33": 99.5});
    let with = |field: &str, value: f64| json!({"logit_bias": bias, "logprobs": 1, field: value});
    let a = answers(
        &[
            json!({"logit_bias": bias, "logprobs": 1}),
            with("presence_penalty", 2.0),
            with("frequency_penalty", 2.0),
            with("repetition_penalty", 1.5),
            json!({"logit_bias": {"32": -100}, "logprobs": 1}),
        ],
        &[],
    );
    let said: Vec<Vec<String>> = a.iter().map(tokens).collect();
    let distinct = |i: usize| {
        let mut t = said[i].clone();
        t.sort();
        t.dedup();
        t.len()
    };
    assert_eq!(said[0].len(), 12);
    for (i, penalty) in [(1, "presence"), (2, "frequency"), (3, "repetition")] {
        assert_ne!(said[i], said[0], "{penalty}");
        assert!(distinct(i) > 1, "{penalty}");
    }
    assert!(distinct(0) <= 2, "{:?}", said[0]);
    // It grows with each use: the two tokens are used about equally often, whatever the model prefers.
    let uses = said[2].iter().filter(|t| **t == said[0][0]).count();
    assert!((4..=8).contains(&uses), "{:?}", said[2]);
    assert!(!said[4].contains(&said[0][0]));
    // Log-probabilities are the model's own, before bias and penalties.
    let first = |i: usize| {
        a[i]["choices"][0]["logprobs"]["token_logprobs"][0]
            .as_f64()
            .unwrap()
    };
    assert!(first(0) < -0.5 && first(0) == first(1));
}

#[test]
fn a_job_pads_nothing_and_computes_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let rows: Vec<Value> = (0..50)
        .map(|i| {
            let prompt = format!("{} and number {i}", "a common beginning ".repeat(i % 4));
            json!({"custom_id": format!("r{i}"),
                   "body": {"prompt": prompt, "max_tokens": 1 + i % 9, "ignore_eos": true}})
        })
        .collect();
    write_rows(&input, &rows);
    for sequences in ["3", "50"] {
        let report = done(
            batch(
                &input,
                &output,
                &["--overwrite", "--max-sequences", sequences],
            ),
            0,
        );
        let of = |key: &str| report["this_run"][key].as_u64().unwrap();
        assert!(of("shared_prompt_tokens") > 0);
        // The last token of an answer goes through no layer.
        let needed = of("prompt_tokens") - of("shared_prompt_tokens") + of("output_tokens") - 50;
        assert_eq!(of("computed_tokens"), needed, "{sequences} at once");
    }
}

#[test]
fn bytes_that_are_no_text_fail_their_row_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let good =
        json!({"custom_id": "é \u{1F30A}", "body": {"prompt": "héllo \u{1F30A}", "max_tokens": 2}});
    let lines: [&[u8]; 6] = [
        b"{\"custom_id\": \"bad \xff\", \"body\": {\"prompt\": \"x\"}}",
        b"{\"custom_id\": \"in the prompt\", \"body\": {\"prompt\": \"\xc3\x28\"}}",
        b"\x00\x01\x02",
        b"{\"custom_id\": \"half a pair\", \"body\": {\"prompt\": \"\\ud800\"}}",
        b"{\"custom_id\": \"deep\", \"body\": {\"prompt\": [[[[[[[[[[[[1]]]]]]]]]]]]}}",
        b"{\"custom_id\": \"twice\", \"custom_id\": \"twice\"}",
    ];
    let mut file = lines.join(&b'\n');
    file.extend(format!("\n{good}").bytes());
    std::fs::write(&input, file).unwrap();
    let report = done(batch(&input, &output, &[]), 3);
    assert_eq!(
        (&report["rows_done"], &report["rows_failed"]),
        (&json!(1), &json!(6))
    );
    assert_eq!(read_rows(&output)[0]["custom_id"], "é \u{1F30A}");
    let errors = read_rows(&dir.path().join("out.errors.jsonl"));
    let told: Vec<u64> = errors.iter().map(|e| e["line"].as_u64().unwrap()).collect();
    assert_eq!(told, [1, 2, 3, 4, 5, 6]);
    for e in &errors[..4] {
        assert_eq!(e["error"]["code"], "invalid_json", "{e}");
    }
}
