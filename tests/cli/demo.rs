//! The demo: right answers, the same bytes whatever the number of sequences, and nothing left behind.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::process::{Place, Ran};
use super::signals::signal;

/// What lies in the offload folder, and rates on record under the cache.
fn left(p: &Place) -> Vec<PathBuf> {
    let list = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let rates = list(p.path("cache/tensorpager")).map(|e| e.path());
    let rates = rates.filter(|f| f.to_str().unwrap().contains("rates-"));
    list(p.offload()).map(|e| e.path()).chain(rates).collect()
}

#[test]
fn the_small_model_answers_what_it_never_saw() {
    let p = Place::new();
    let shown = p
        .run(&["demo", "--small", "--problems", "200"])
        .done()
        .stdout;
    let line = shown.lines().find(|l| l.contains(" of 200 right")).unwrap();
    let right: usize = line.trim().split(' ').next().unwrap().parse().unwrap();
    assert!(right >= 198, "{line}");
    let tasks = ["=", "sort: "].map(|task| shown.matches(task).count());
    assert!(tasks.iter().all(|n| *n > 0), "both tasks: {shown}");
    assert_eq!(left(&p), [] as [PathBuf; 0]);
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
    let files = std::fs::read_dir(model).unwrap();
    let bytes: u64 = files.map(|f| f.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 4_000_000, "{bytes} bytes are embedded");
}

#[test]
fn a_pass_takes_the_same_bytes_for_any_number_of_sequences() {
    let p = Place::new();
    let shown = p
        .run(&["demo", "--size", "1", "--problems", "2"])
        .done()
        .stdout;
    assert!(shown.contains("least there can be"), "{shown}");
    let rows: Vec<Vec<&str>> = shown
        .lines()
        .map(|l| l.split_whitespace().collect())
        .skip_while(|words: &Vec<&str>| words.first() != Some(&"sequences"))
        .skip(1)
        .take(3)
        .collect();
    let number = |row: usize, column: usize| rows[row][column].parse::<f64>().unwrap();
    for (row, sequences) in [1.0, 8.0, 64.0].into_iter().enumerate() {
        assert_eq!(number(row, 0), sequences, "{shown}");
        // Bytes a pass; the rows of the embedding that are gathered come on top, a few blocks a sequence.
        assert_eq!(rows[row][2], "MB", "{shown}");
        let more = number(row, 1) / number(0, 1) - 1.0;
        assert!((0.0..0.01).contains(&more), "{more}: {shown}");
        assert!((number(row, 1) - 495.5).abs() < 5.0, "{shown}");
    }
    assert!(
        number(2, 4) > 4.0 * number(0, 4),
        "tokens a second: {shown}"
    );
    assert_eq!(left(&p), [] as [PathBuf; 0]);
}

// hazard: sigint: `demo`: nothing is left of it
#[test]
fn a_demo_that_is_stopped_leaves_nothing_and_one_that_is_killed_is_swept() {
    let p = Place::new();
    for which in [libc::SIGINT, libc::SIGHUP, libc::SIGKILL] {
        let child = p.command(&["demo", "--problems", "1"]).spawn().unwrap();
        let work = p.offload().join(format!("demo-{}/work", child.id()));
        let weights = work.join("synthetic-7b-layers/model.safetensors");
        let started = Instant::now();
        // Once real weights are being written.
        let taken = || {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(&weights).map_or(0, |m| m.blocks())
        };
        while taken() < 2048 && started.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(taken() >= 2048, "it never came to the weights");
        signal(&child, which);
        let ran = Ran::from(child.wait_with_output().unwrap());
        if which == libc::SIGKILL {
            assert_eq!(left(&p).len(), 1);
            continue;
        }
        assert_eq!(ran.code, 130, "{}", ran.stderr);
        assert_eq!(left(&p), [] as [PathBuf; 0]);
    }
    let listed = p.run(&["inspect"]).done().stdout;
    assert!(listed.contains("left behind by a demo"), "{listed}");
    let next = p.run(&["demo", "--small", "--problems", "1"]).done();
    assert!(next.stderr.contains("removed "), "{}", next.stderr);
    assert_eq!(left(&p), [] as [PathBuf; 0]);
}

#[test]
fn what_it_cannot_do_is_refused_before_anything_is_written() {
    let p = Place::new();
    p.run(&["demo", "--threads", "99999"])
        .refused(2, &["--threads", "1024"]);
    p.run(&["demo", "--problems", "0"])
        .refused(2, &["--problems"]);
    assert!(left(&p).is_empty());
    let ran = p.run(&["demo", "--problems", "1", "--cpu-memory", "100MiB"]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("fix: give --cpu-memory ") && !ran.stderr.contains("--context"),
        "{}",
        ran.stderr
    );
    assert!(!ran.stdout.contains("A synthetic"), "{}", ran.stdout);
    assert!(left(&p).is_empty());
}
