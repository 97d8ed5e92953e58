use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::*;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// What parsers stumble over.
const WORDS: [&str; 24] = [
    "0",
    "-1",
    "1e308",
    "18446744073709551615",
    "18446744073709551616",
    "4294967296",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "\\u0000",
    "\\ud800",
    "\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "../",
    "__metadata__",
    "{{",
    "%}",
];

/// One to eight changes of an input that is accepted.
fn mutate(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(8) {
        let at = random.below(bytes.len() + 1);
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => drop(bytes.drain(at..end)),
            3 => bytes.truncate(at),
            4 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            5 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let to = (from + random.below(64)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
            6 => {
                let word = WORDS[random.below(WORDS.len())].bytes();
                bytes.splice(at..end, word);
            }
            // A number of the text, replaced whole.
            _ => {
                let digit = |b: &u8| b.is_ascii_digit();
                if let Some(from) = bytes[at.min(bytes.len())..].iter().position(digit) {
                    let from = at + from;
                    let len = bytes[from..].iter().take_while(|b| digit(b)).count();
                    let word = WORDS[random.below(6)].bytes();
                    bytes.splice(from..from + len, word);
                }
            }
        }
    }
    bytes
}

/// As many inputs for each parser as `FUZZ_EXECUTIONS` says, from `FUZZ_SEED` on; an input is named by its number.
// hazard: hostile-files: an error for each mutation of a sound file, never a panic, within its time
#[test]
fn every_parser_answers_whatever_it_is_given() {
    let number = |name: &str, default: u64| {
        let text = std::env::var(name).ok();
        text.map_or(default, |t| t.parse().expect("a number"))
    };
    let (executions, first) = (number("FUZZ_EXECUTIONS", 1500), number("FUZZ_SEED", 1));
    let only = std::env::var("FUZZ_TARGET").ok();
    for target in TARGETS {
        if only.as_ref().is_some_and(|name| name != target.name) {
            continue;
        }
        let seeds = (target.seeds)();
        assert!(seeds.iter().any(|s| (target.run)(s)), "{}", target.name);
        let started = Instant::now();
        let (mut accepted, mut slowest) = (0, 0);
        for number in first..first + executions {
            let bytes = mutate(&seeds, &mut Random(number));
            let began = Instant::now();
            match catch_unwind(AssertUnwindSafe(|| (target.run)(&bytes))) {
                Ok(taken) => accepted += u64::from(taken),
                Err(_) => panic!(
                    "{} falls over input {number}: {:?}",
                    target.name,
                    String::from_utf8_lossy(&bytes)
                ),
            }
            slowest = slowest.max(began.elapsed().as_millis());
        }
        println!(
            "{}: {executions} inputs from {first}, {accepted} accepted, {:.1} s, slowest {slowest} ms",
            target.name,
            started.elapsed().as_secs_f64()
        );
        assert!(
            slowest < 5_000,
            "{}: {slowest} ms for one input",
            target.name
        );
    }
    if let Some(packs) = packed().dir.parent() {
        let _ = std::fs::remove_dir_all(packs);
    }
}

/// What the mutations of job lines reach: the template, the parts, the pictures' headers.
#[test]
fn a_row_with_pictures_is_understood() {
    let row = chat_row();
    assert!(job_line(row.to_string().as_bytes()));
    let mut broken = row.clone();
    let part = &mut broken["body"]["messages"][1]["content"][0];
    part["image_url"]["url"] = "data:image/png;base64,aGk=".into();
    assert!(!job_line(broken.to_string().as_bytes()));
}

/// Writes the seeds where a fuzzer begins: `FUZZ_CORPUS=fuzz/corpus cargo test --lib fuzzing::tests::corpus`.
#[test]
fn corpus() {
    let Some(dir) = std::env::var_os("FUZZ_CORPUS") else {
        return;
    };
    for target in TARGETS {
        let dir = Path::new(&dir).join(target.name);
        std::fs::create_dir_all(&dir).unwrap();
        for (i, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{i}")), seed).unwrap();
        }
    }
}
