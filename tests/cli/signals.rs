//! Ctrl-C: exit code 130, and nothing durable half written.

use std::io::Read;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::json;
use tensorpager::checkpoint::write_synthetic;

use super::process::{Place, Ran, str};

/// A model large enough to be caught at work.
pub fn large(p: &Place) -> String {
    let dir = p.path("large");
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4096,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    });
    write_synthetic(&dir, &config, &mut |_, _| Ok(())).unwrap();
    let fixture = super::process::fixture("llama3-bf16");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(name), dir.join(name)).unwrap();
    }
    str(&dir).to_string()
}

fn interrupt(child: &Child) {
    signal(child, libc::SIGINT);
}

pub fn signal(child: &Child, which: i32) {
    // SAFETY: a signal to a child of this process that has not been waited for, so its id is its own.
    unsafe { libc::kill(child.id() as libc::pid_t, which) };
}

/// Interrupts and waits: the exit code, and that it came soon.
fn ended(child: Child) -> Ran {
    let asked = Instant::now();
    interrupt(&child);
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert!(
        asked.elapsed() < Duration::from_secs(20),
        "it took {:?}",
        asked.elapsed()
    );
    ran
}

// hazard: sigint: `run`: stops at the next unit, 130
#[test]
fn run_stops_at_the_next_unit_with_130() {
    let p = Place::new();
    let model = large(&p);
    for more in [&["--device-map", "disk"][..], &["--device-map", "cpu"]] {
        let args = [
            "run",
            &model,
            "--in-place",
            "-p",
            "hi",
            "--raw",
            "-n",
            "30000",
            "--ignore-eos",
        ];
        let mut child = p.command(&[&args[..], more].concat()).spawn().unwrap();
        let mut first = [0u8; 1];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        let ran = ended(child);
        assert_eq!(ran.code, 130, "{}", ran.stderr);
        assert!(
            ran.stderr.contains("error: interrupted") && !ran.stderr.contains("panicked"),
            "{}",
            ran.stderr
        );
    }
}

// hazard: sigint: while a prompt is waited for that nobody writes: ends at once
#[test]
fn waiting_for_a_prompt_ends_with_the_first_signal() {
    let p = Place::new();
    let fifo = p.fifo("fifo");
    let model = super::process::fixture("qwen2-bf16");
    for args in [
        ["run", str(&model), "--prompt-file", &fifo],
        ["score", str(&model), "--input", &fifo],
    ] {
        let child = p.command(&args).spawn().unwrap();
        // Long enough to come to the waiting: earlier it would end just as well.
        std::thread::sleep(Duration::from_millis(300));
        let asked = Instant::now();
        interrupt(&child);
        let ended = child.wait_with_output().unwrap().status;
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&ended),
            Some(libc::SIGINT)
        );
        assert!(asked.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn an_interrupted_score_leaves_no_output() {
    let p = Place::new();
    let model = large(&p);
    let output = p.path("logits.safetensors");
    let ids: Vec<usize> = (0..400).collect();
    let input = p.file(
        "in.jsonl",
        format!("{}\n", json!({"input_ids": ids})).repeat(200),
    );
    let mut child = p
        .command(&[
            "score",
            &model,
            "--in-place",
            "--input",
            &input,
            "--output",
            str(&output),
        ])
        .spawn()
        .unwrap();
    let mut first = [0u8; 1];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    let ran = ended(child);
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    let left: Vec<String> = std::fs::read_dir(output.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.starts_with("logits"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

// hazard: sigint: `pack`: never a pack that is half trusted
#[test]
fn an_interrupted_pack_is_never_trusted() {
    let p = Place::new();
    let model = large(&p);
    let mut interrupted = 0;
    for wait_ms in [0, 5, 15, 40, 90] {
        // A folder made anew says that the program has begun, and listens.
        let _ = std::fs::remove_dir_all(p.offload());
        let child = p.command(&["pack", &model]).spawn().unwrap();
        let started = Instant::now();
        // As soon as there is something to leave behind, and a little later each time.
        while !p.offload().is_dir() && started.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(wait_ms));
        let ran = ended(child);
        match ran.code {
            // It had finished already.
            0 => {}
            130 => interrupted += 1,
            code => panic!("{code}: {}", ran.stderr),
        }
        let listed = p.run(&["inspect", "--json"]).json();
        for pack in listed["packs"].as_array().unwrap() {
            let ready = pack["state"] == "ready" || pack["state"] == "Ready";
            assert!(ran.code == 130 || ready, "{pack}");
        }
        assert!(p.run(&["verify"]).code == 0 || ran.code == 130);
    }
    assert!(interrupted > 0, "no pack was caught at work");
    p.run(&["run", &model, "-p", "hi", "--raw", "-n", "2", "-q"])
        .done();
    assert!(p.run(&["verify"]).done().stdout.contains("good"));
}
