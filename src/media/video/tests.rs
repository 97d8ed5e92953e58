use super::*;
use std::os::unix::fs::PermissionsExt;

/// A stand-in for a program: a shell script.
fn script(dir: &Path, name: &str, body: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

const PROBED: &str =
    r#"echo '{"streams":[{"nb_read_packets":"3","avg_frame_rate":"6/2","r_frame_rate":"3/1"}]}'"#;

struct Fake {
    _dir: tempfile::TempDir,
    clip: PathBuf,
    tools: VideoTools,
}

fn fake(probe: &str, decode: &str) -> Fake {
    let dir = tempfile::tempdir().unwrap();
    let clip = dir.path().join("clip.mp4");
    std::fs::write(&clip, "not looked at").unwrap();
    let tools = VideoTools {
        ffprobe: script(dir.path(), "ffprobe", probe),
        ffmpeg: script(dir.path(), "ffmpeg", decode),
        time_limit: Duration::from_secs(20),
    };
    Fake {
        _dir: dir,
        clip,
        tools,
    }
}

fn frames(f: &Fake, indices: &[usize]) -> Result<Vec<Rgb>> {
    f.tools.open(&f.clip)?.decode(indices)?.collect()
}

#[test]
fn frames_are_picked_from_the_stream() {
    let f = fake(
        PROBED,
        r"printf 'P6\n1 1\n255\nabcP6\n1 1\n255\ndefP6\n2 1\n255\nghijkl'",
    );
    let clip = f.tools.open(&f.clip).unwrap();
    assert_eq!((clip.frames, clip.fps), (3, 3.0));
    let got = frames(&f, &[0, 2]).unwrap();
    assert_eq!(
        (got[0].data.as_slice(), got[1].data.as_slice()),
        (&b"abc"[..], &b"ghijkl"[..])
    );
    // A container that counts one frame too many: the last one stands for it.
    assert_eq!(frames(&f, &[1, 3]).unwrap()[1].data, b"ghijkl");
}

#[test]
fn a_failing_decoder_is_an_error_with_its_words() {
    for (probe, decode, says) in [
        (
            PROBED,
            "echo 'moov atom not found' >&2; exit 1",
            "moov atom",
        ),
        (PROBED, r"printf 'P6\n9 9\n255\nabc'", "cut off"),
        (PROBED, "printf 'P5\\n1 1\\n255\\na'", "not a frame"),
        (PROBED, r"printf 'P6\n99999 99999\n255\n'", "too large"),
        (PROBED, "true", "no frame"),
        ("exit 3", "true", "exit status: 3"),
        ("echo '{}'", "true", "no video stream"),
        ("exec cat /dev/zero", "true", "no video stream"),
    ] {
        let f = fake(probe, decode);
        let e = frames(&f, &[0]).unwrap_err();
        assert_eq!(e.code(), Code::Media);
        assert!(
            e.cause().contains(says) || probe.starts_with("exec cat"),
            "{decode}: {e}"
        );
        assert!(e.what().contains("clip.mp4"), "{e}");
    }
}

// hazard: videos: ended at its time limit; an error names the video
#[test]
fn a_decoder_that_hangs_is_ended() {
    for decode in ["exec sleep 60", "exec 1>&-; exec sleep 60"] {
        let mut f = fake(PROBED, decode);
        f.tools.time_limit = Duration::from_millis(300);
        // The probe is a shell that may be slow to start on a loaded machine; only the decoder is to be late.
        let clip = Clip {
            tools: &f.tools,
            path: f.clip.clone(),
            frames: 3,
            fps: 1.0,
        };
        let started = std::time::Instant::now();
        let got: Result<Vec<Rgb>> = clip.decode(&[0]).unwrap().collect();
        assert!(got.unwrap_err().cause().contains("longer than"));
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}

/// Does what a decoder must not be able to do, at once: the limits stand before it begins.
const TRIES: &str = r#"
echo "limits: $(ulimit -v) $(ulimit -f) $(ulimit -t) $(ulimit -c)" >&2
echo "args: $*" >&2
echo "secret: ${CARGO_MANIFEST_DIR-none}" >&2
(trap "" XFSZ; echo written > "$0.out") 2>/dev/null
[ -s "$0.out" ] && echo "wrote a file" >&2
read -r line && echo "read stdin" >&2
exit 1"#;

// hazard: videos: no file can be written, nothing but files read, bounded memory and processor time, no environment
#[test]
fn a_decoder_is_confined() {
    assert!(
        std::env::var_os("CARGO_MANIFEST_DIR").is_some(),
        "cargo sets it, so there is something to hide"
    );
    let f = fake(PROBED, TRIES);
    let cause = frames(&f, &[0]).unwrap_err().cause().to_string();
    let wrote = f.tools.ffmpeg.with_extension("out");
    assert!(!wrote.exists() || std::fs::metadata(wrote).unwrap().len() == 0);
    // The error keeps the last three lines.
    assert!(
        !cause.contains("wrote a file") && !cause.contains("read stdin"),
        "{cause}"
    );
    assert!(cause.contains("secret: none"), "{cause}");
    let limits = format!("limits: {} 0 {} 0", CHILD_MEMORY_BYTES / 1024, 4 * 20);
    assert!(cause.contains(&limits), "{cause}");
    for word in [
        "-protocol_whitelist file,pipe",
        "-format_whitelist",
        "-nostdin",
        "-i file:/",
    ] {
        assert!(cause.contains(word), "{word}: {cause}");
    }
}

#[test]
fn old_and_new_spellings_of_one_option() {
    let old = r#"case "$*" in *fps_mode*) echo "Unrecognized option 'fps_mode'." >&2; exit 1;; esac; printf 'P6\n1 1\n255\nabc'"#;
    assert_eq!(frames(&fake(PROBED, old), &[0]).unwrap()[0].data, b"abc");
}

#[test]
fn a_missing_program_is_named_with_what_to_do() {
    let mut f = fake(PROBED, "true");
    f.tools.ffprobe = "/nowhere/ffprobe".into();
    let e = f.tools.open(&f.clip).unwrap_err();
    assert!(
        e.cause().contains("not installed") && e.fix().contains("install ffmpeg"),
        "{e}"
    );
}

#[test]
fn real_clips_where_ffmpeg_is_installed() {
    let tools = VideoTools::default();
    let dir = tempfile::tempdir().unwrap();
    let clip = dir.path().join("odd name: 1.mp4");
    let made = Command::new("ffmpeg")
        .args([
            "-v",
            "error",
            "-f",
            "lavfi",
            "-i",
            "testsrc=size=64x48:rate=10:duration=2",
        ])
        .args(["-c:v", "mpeg4", "-q:v", "1", "-y"])
        .arg(url(&clip))
        .status();
    if !made.is_ok_and(|s| s.success()) {
        println!("skipped: no ffmpeg that can write a test clip");
        return;
    }
    let opened = tools.open(&clip).unwrap();
    assert_eq!((opened.frames, opened.fps), (20, 10.0));
    let got: Vec<Rgb> = opened
        .decode(&[0, 10, 19])
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert!(got.iter().all(|f| (f.width, f.height) == (64, 48)));
    assert_ne!(got[0], got[1]);
    // A playlist may name other files; the whitelist of formats keeps it out.
    let list = dir.path().join("list.m3u8");
    let text = "#EXTM3U\n#EXTINF:2,\nodd name: 1.mp4\n#EXT-X-ENDLIST\n";
    std::fs::write(&list, text).unwrap();
    assert_eq!(tools.open(&list).unwrap_err().code(), Code::Media);
    std::fs::write(&list, "garbage").unwrap();
    assert!(tools.open(&list).is_err());
}
