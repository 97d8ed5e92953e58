//! Downloads from a hub on this machine, whole and with everything that goes wrong on the way.

use std::fs;
use std::sync::atomic::Ordering::Relaxed;

use super::{DownloadProgress, is_complete};
use crate::checkpoint::hub::{HubId, resolve_in};
use crate::checkpoint::testing;
use crate::error::Code;

mod bed;
use bed::hub_server::{self, Fault, etag};
use bed::{WEIGHTS, bed, names, weights};

#[test]
fn a_model_comes_whole_and_only_what_is_needed_of_it() {
    let bed = bed();
    let id = HubId::parse("org/tiny").unwrap();
    assert!(!is_complete(&bed.store(), &id));
    let mut told = Vec::new();
    let hub = bed.hub(&[("HF_TOKEN", " secret\n")]);
    let got = hub
        .download("org/tiny", &mut |p| {
            if let DownloadProgress::Bytes { done, total } = p
                && total > 0
            {
                told.push((done, total));
            }
        })
        .unwrap();
    bed.whole();
    let size = weights().len() as u64;
    assert_eq!(told.last(), Some(&(size, size)));
    assert!(got.bytes == got.total && got.bytes > size);
    let wanted = [
        "additional_chat_templates",
        "config.json",
        WEIGHTS,
        "tokenizer.json",
    ];
    assert_eq!(names(&got.dir), wanted);
    assert!(
        got.dir
            .join("additional_chat_templates/tool.jinja")
            .is_file()
    );
    let link = fs::read_link(got.dir.join(WEIGHTS)).unwrap();
    let expected = format!("../../blobs/{}", etag(WEIGHTS, &weights()));
    assert_eq!(link.to_str().unwrap(), expected);
    for request in bed.server.seen() {
        let secret = request.token.as_deref() == Some("Bearer secret");
        assert_eq!(secret, !request.storage, "{request:?}");
        assert!(!request.path.contains("pytorch_model"), "{request:?}");
    }
    // Again: nothing is left to get.
    assert_eq!(bed.download().unwrap().bytes, 0);
    // A blob that is gone is missed.
    fs::remove_file(bed.store().join("blobs").join(etag(WEIGHTS, &weights()))).unwrap();
    assert!(!is_complete(&bed.store(), &id));
    assert_eq!(bed.download().unwrap().bytes, size);
    bed.whole();
}

#[test]
fn shards_come_with_their_index() {
    let bed = bed();
    let bytes = weights();
    let index = serde_json::json!({"weight_map": {"a.weight": "m-1.safetensors", "b.weight": "m-2.safetensors"}});
    bed.server.change(|s| {
        s.files.remove(WEIGHTS);
    });
    bed.server.put("m-1.safetensors", bytes.clone());
    bed.server.put("m-2.safetensors", bytes.clone());
    bed.server
        .put("m-3.safetensors", b"not in the index".to_vec());
    bed.server.put(
        "model.safetensors.index.json",
        index.to_string().into_bytes(),
    );
    let got = bed.download().unwrap();
    assert!(got.dir.join("m-1.safetensors").is_file() && got.dir.join("m-2.safetensors").is_file());
    assert!(!got.dir.join("m-3.safetensors").exists());
    // The same content is one blob, fetched once.
    assert_eq!(bed.server.ranges("m-1.safetensors").len(), 1);
    assert_eq!(bed.server.ranges("m-2.safetensors").len(), 0);
    let id = HubId::parse("org/tiny").unwrap();
    assert!(is_complete(&bed.store(), &id));
    fs::remove_file(got.dir.join("m-2.safetensors")).unwrap();
    assert!(!is_complete(&bed.store(), &id));
    // An index that names what the repository lacks.
    bed.server.change(|s| {
        s.files.remove("m-2.safetensors");
    });
    let error = bed.download().unwrap_err();
    assert!(error.code() == Code::Checkpoint && error.what().contains("m-2.safetensors"));
}

#[test]
fn a_dropped_connection_goes_on_where_it_stopped() {
    let bed = bed();
    bed.server.fault(
        WEIGHTS,
        &[
            Fault::Drop(1000),
            Fault::Status(503),
            Fault::Drop(500),
            Fault::Silence(500),
        ],
    );
    let got = bed.download().unwrap();
    bed.whole();
    assert_eq!(bed.server.ranges(WEIGHTS), [0, 1000, 1000, 1500, 1500]);
    assert_eq!(got.bytes, got.total, "no byte came twice");
}

#[test]
fn an_earlier_attempt_is_gone_on_with_and_checked() {
    let bed = bed();
    bed.server.fault(WEIGHTS, &vec![Fault::Drop(700); 9]);
    // Each attempt brings something: no failure, until nothing comes any more.
    bed.server.fault(
        WEIGHTS,
        &[
            Fault::Drop(700),
            Fault::Drop(0),
            Fault::Drop(0),
            Fault::Drop(0),
        ],
    );
    let error = bed.refused();
    assert_eq!(error.code(), Code::Hub, "{error}");
    assert!(error.fix().contains("goes on where it stopped"), "{error}");
    assert_eq!(fs::metadata(bed.partial()).unwrap().len(), 700);
    let got = bed.download().unwrap();
    bed.whole();
    assert_eq!(got.bytes, weights().len() as u64 - 700);
    // What lies there may be anything: too much, or other bytes.
    for junk in [
        vec![7; 300],
        vec![7; weights().len() + 5],
        vec![7; weights().len()],
    ] {
        fs::remove_file(bed.store().join("blobs").join(etag(WEIGHTS, &weights()))).unwrap();
        fs::write(bed.partial(), junk).unwrap();
        bed.download().unwrap();
        bed.whole();
    }
}

#[test]
fn a_server_without_ranges_starts_over() {
    let bed = bed();
    bed.server
        .fault(WEIGHTS, &[Fault::Drop(1000), Fault::IgnoreRange]);
    bed.download().unwrap();
    bed.whole();
    assert_eq!(bed.server.ranges(WEIGHTS), [0, 1000]);
}

#[test]
fn damaged_bytes_are_never_named() {
    let bed = bed();
    bed.server.fault(WEIGHTS, &[Fault::Flip]);
    bed.download().unwrap();
    bed.whole();
    let bed = self::bed();
    bed.server.fault(WEIGHTS, &[Fault::Flip, Fault::Flip]);
    let error = bed.refused();
    assert_eq!(error.code(), Code::Corrupt, "{error}");
    assert!(!bed.partial().exists());
    // Git's hash guards the small files.
    let bed = self::bed();
    bed.server.fault("config.json", &[Fault::Flip, Fault::Flip]);
    assert_eq!(bed.refused().code(), Code::Corrupt);
}

#[test]
fn sizes_that_are_not_true_are_refused() {
    // Longer than what comes, in every place that says a size.
    let bed = bed();
    let size = weights().len() as u64;
    bed.server.say_size(WEIGHTS, size + 10);
    let error = bed.refused();
    assert_eq!(error.code(), Code::Hub, "{error}");
    // Shorter: what comes within it has another hash.
    let bed = self::bed();
    bed.server.say_size(WEIGHTS, size - 10);
    assert_eq!(bed.refused().code(), Code::Corrupt);
}

#[test]
fn refusals_say_what_to_do() {
    let cases: [(u16, &str, Code, &str); 7] = [
        (401, "GatedRepo", Code::Hub, "accept the terms"),
        (403, "GatedRepo", Code::Hub, "accept the terms"),
        (403, "", Code::Hub, "accept the terms"),
        (401, "RepoNotFound", Code::Usage, "check the spelling"),
        (404, "RepoNotFound", Code::Usage, "check the spelling"),
        (404, "RevisionNotFound", Code::Usage, "branches"),
        (410, "", Code::Hub, "try again later"),
    ];
    for (status, code, expected, fix) in cases {
        let bed = bed();
        bed.server.change(|s| s.refuse = Some((status, code)));
        let error = bed.refused();
        assert_eq!(error.code(), expected, "{error}");
        assert!(error.fix().contains(fix), "{error}");
    }
    // Gated models list their files and refuse the files themselves.
    let bed = bed();
    bed.server
        .change(|s| s.refuse_files = Some((401, "GatedRepo")));
    let error = bed.refused();
    assert!(error.what().contains("gated"), "{error}");
    let error = bed
        .hub(&[("HF_HUB_OFFLINE", "1")])
        .download("org/tiny", &mut |_| {})
        .unwrap_err();
    assert!(error.code() == Code::Usage && error.fix().contains("HF_HUB_OFFLINE"));
    for bad in ["", "../x", "a/b/c", "./x"] {
        let error = bed.hub(&[]).download(bad, &mut |_| {}).unwrap_err();
        assert_eq!(error.code(), Code::Usage, "{bad}: {error}");
    }
}

#[test]
fn a_hub_that_is_not_there_is_said_after_a_few_attempts() {
    let bed = bed();
    // A port that was free a moment ago.
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let nowhere = format!("http://127.0.0.1:{port}");
    let mut retries = 0;
    let error = bed
        .hub(&[("HF_ENDPOINT", &nowhere)])
        .download("org/tiny", &mut |p| {
            retries += usize::from(matches!(p, DownloadProgress::Retrying { .. }));
        })
        .unwrap_err();
    assert_eq!((error.code(), retries), (Code::Hub, 2), "{error}");
    assert!(error.fix().contains("HTTPS_PROXY"), "{error}");
}

#[test]
fn what_cannot_run_is_refused_before_its_weights_come() {
    let mut config = testing::config();
    config["model_type"] = "hyena".into();
    let bed = bed();
    bed.server
        .put("config.json", config.to_string().into_bytes());
    let error = bed.refused();
    assert!(
        error.code() == Code::Unsupported && error.what().contains("hyena"),
        "{error}"
    );
    assert!(bed.server.ranges(WEIGHTS).is_empty());

    let without = |names: &[&str], more: &[(&str, &[u8])]| {
        let bed = self::bed();
        bed.server.change(|s| {
            names.iter().for_each(|n| drop(s.files.remove(*n)));
        });
        more.iter().for_each(|(n, b)| bed.server.put(n, b.to_vec()));
        bed.refused()
    };
    let error = without(&[WEIGHTS], &[]);
    assert!(error.cause().contains("pickles"), "{error}");
    let error = without(&[WEIGHTS, "config.json"], &[("q4.gguf", b"GGUF")]);
    assert!(error.cause().contains("GGUF"), "{error}");
    let error = without(&[WEIGHTS, "pytorch_model.bin"], &[]);
    assert!(error.cause().contains("neither"), "{error}");
    let error = without(&["config.json"], &[]);
    assert_eq!(error.code(), Code::Config, "{error}");
}

#[test]
fn room_is_asked_for_before_the_first_weight() {
    let bed = bed();
    bed.server.say_size(WEIGHTS, 1 << 52);
    let error = bed.refused();
    assert_eq!(error.code(), Code::Space, "{error}");
    assert!(error.fix().contains("HF_HUB_CACHE"), "{error}");
    assert!(bed.server.ranges(WEIGHTS).is_empty());
}

#[test]
fn a_hostile_hub_leads_nowhere() {
    let refused = |how: &dyn Fn(&mut hub_server::State)| {
        let bed = bed();
        bed.server.change(how);
        let error = bed.refused();
        assert_eq!(error.code(), Code::Hub, "{error}");
        assert_eq!(names(bed.dir.path()), ["hub"]);
    };
    for etag in ["../../../x", "..", "", "a/b", "x y"] {
        refused(&|s| drop(s.etags.insert(WEIGHTS.into(), etag.into())));
        refused(&|s| drop(s.etags.insert("config.json".into(), etag.into())));
    }
    refused(&|s| s.commit = Some("f".repeat(40)));
    let index = |name: &str| {
        let text = format!("{{\"weight_map\": {{\"a\": \"{name}\"}}}}");
        move |s: &mut hub_server::State| {
            s.files.remove(WEIGHTS);
            s.files.insert(
                "model.safetensors.index.json".into(),
                text.clone().into_bytes(),
            );
        }
    };
    refused(&index("../../x.safetensors"));
    refused(&index("x.bin"));
    // A config without end.
    let bed = bed();
    bed.server.put("config.json", vec![b' '; 2 << 20]);
    assert_eq!(bed.refused().code(), Code::Checkpoint);
}

#[test]
fn an_interrupted_download_stops_and_goes_on_later() {
    let bed = bed();
    bed.server.put(WEIGHTS, weights());
    let cancel = bed.cancel.clone();
    bed.server.fault(WEIGHTS, &[Fault::Drop(600)]);
    let error = bed
        .hub(&[])
        .download("org/tiny", &mut |p| {
            let weights = matches!(p, DownloadProgress::Bytes { total, .. } if total > 0);
            if weights {
                cancel.store(true, Relaxed);
            }
        })
        .unwrap_err();
    assert_eq!(error.code(), Code::Interrupted);
    bed.nothing_trusted();
    assert_eq!(fs::metadata(bed.partial()).unwrap().len(), 600);
    bed.cancel.store(false, Relaxed);
    bed.download().unwrap();
    bed.whole();
}

#[test]
fn two_at_once_fetch_each_byte_once() {
    let bed = bed();
    std::thread::scope(|scope| {
        let both: Vec<_> = (0..2).map(|_| scope.spawn(|| bed.download())).collect();
        for one in both {
            one.join().unwrap().unwrap();
        }
    });
    bed.whole();
    assert_eq!(bed.server.ranges(WEIGHTS), [0]);
}

#[test]
fn the_token_that_was_stored_is_used() {
    let bed = bed();
    let home = bed.dir.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("token"), "stored\n").unwrap();
    bed.hub(&[("HF_HOME", home.to_str().unwrap())])
        .download("org/tiny", &mut |_| {})
        .unwrap();
    let seen = bed.server.seen();
    assert_eq!(seen[0].token.as_deref(), Some("Bearer stored"));
}

#[test]
fn a_full_disk_is_said_and_what_came_is_kept() {
    let bed = bed();
    let mount = bed.dir.path().join("small");
    fs::create_dir(&mount).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
        .arg(&mount)
        .output()
        .is_ok_and(|o| o.status.success());
    if !mounted {
        println!("skipped: a small file system cannot be mounted (needs root)");
        return;
    }
    // The hub says less than there is, so that the check beforehand lets it through.
    let large: Vec<u8> = (0..1u32 << 20).map(|i| (i >> 3) as u8).collect();
    bed.server.put(WEIGHTS, large);
    let run = || {
        let cache = mount.to_str().unwrap().to_string();
        let hub = bed.hub(&[("HF_HUB_CACHE", &cache)]);
        // Filled while the download runs.
        hub.download("org/tiny", &mut |_| {})
    };
    let before = run().unwrap_err();
    assert_eq!(before.code(), Code::Space, "{before}");
    let small = weights();
    bed.server.put(WEIGHTS, small);
    let filler = mount.join("filler");
    let error = {
        let cache = mount.to_str().unwrap().to_string();
        bed.hub(&[("HF_HUB_CACHE", &cache)])
            .download("org/tiny", &mut |p| {
                if matches!(p, DownloadProgress::Plan { .. }) {
                    let _ = fs::write(&filler, vec![1; 1 << 20]);
                }
            })
    };
    let error = error.map(|_| ());
    let _ = fs::remove_file(&filler);
    let later = run();
    let trusted = resolve_in("org/tiny", Some(&mount)).is_ok();
    let unmounted = std::process::Command::new("umount")
        .arg(&mount)
        .status()
        .is_ok_and(|s| s.success());
    assert!(unmounted);
    let error = error.unwrap_err();
    assert_eq!(error.code(), Code::Space, "{error}");
    assert!(
        error.fix().contains("run the same command again"),
        "{error}"
    );
    assert!(later.is_ok() && trusted);
}
