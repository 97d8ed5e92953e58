//! Readers where the system refuses something: no io_uring (containers, gVisor), no locked memory (plain users). Root on a plain kernel
//! never meets either, so the test runs itself again in a child that is refused.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use tensorpager::error::Code;
use tensorpager::io::{Arena, Flights, OpenFile, ReadOp, Reader, ReaderKind, open_reader};

const SYS_IO_URING_SETUP: u32 = 425;
const BYTES: usize = 16 << 20;

/// Reads a file larger than any default limit on locked memory and prints the reader's description: run by the tests below.
#[test]
#[ignore = "run by the other tests, in a sandbox"]
fn child() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights");
    let content: Vec<u8> = (0..BYTES)
        .map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8)
        .collect();
    std::fs::write(&path, &content).unwrap();
    let arena = Arena::new(BYTES as u64).unwrap();
    let open = |kind| open_reader(kind, vec![OpenFile::open(&path, true).unwrap()], &arena, 8);
    match open(ReaderKind::IoUring) {
        Ok(reader) => println!("asked: {}", reader.describe()),
        Err(error) => {
            assert_eq!(error.code(), Code::Unsupported);
            assert!(error.fix().contains("--io threads"), "{error}");
            println!("refused: {}", error.cause());
        }
    }
    let reader: Box<dyn Reader> = open(ReaderKind::Auto).unwrap();
    println!("auto: {}", reader.describe());
    let mut flights = Flights::new(reader, vec![path.clone()], Duration::from_secs(20));
    let mut region = arena.take(BYTES as u64).unwrap();
    for at in (0..BYTES).step_by(2 << 20) {
        flights.submit(ReadOp {
            file: 0,
            offset: at as u64,
            frame: region.lend(2 << 20),
            want: 2 << 20,
            tag: 0,
        });
    }
    let mut out = Vec::new();
    while flights.in_flight() > 0 {
        flights.reap(Duration::from_secs(20), &mut out).unwrap();
        out.clear();
    }
    assert!(region.bytes() == content);
    println!("all bytes read");
}

/// What the child does to itself before it starts.
type Confine = fn() -> std::io::Result<()>;

/// The child's output; `None`, with the reason printed, where the sandbox itself cannot be made.
fn run(confine: Confine) -> Option<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "sandboxed::child", "--ignored", "--nocapture"]);
    // SAFETY: `confine` makes system calls only; it neither allocates nor takes locks between fork and exec.
    unsafe { command.pre_exec(confine) };
    match command.output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}\n{errors}");
            assert!(text.contains("all bytes read"), "{text}\n{errors}");
            Some(text)
        }
        Err(error) => {
            println!("skipped: cannot make the sandbox: {error}");
            None
        }
    }
}

fn check(status: i32) -> std::io::Result<()> {
    match status {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// From now on `io_uring_setup` answers `errno`, as a container's seccomp profile has it.
fn refuse_io_uring(errno: i32) -> std::io::Result<()> {
    let op = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        // The number of the system call is the first word.
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            SYS_IO_URING_SETUP,
        ),
        op(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the filter is well formed and outlives the calls; it binds this process (the child) only.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &program,
        ))
    }
}

/// A plain user with the smallest limit on locked memory that systems set.
fn lock_no_memory() -> std::io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: 64 << 10,
        rlim_max: 64 << 10,
    };
    // SAFETY: system calls on this process (the child) alone.
    unsafe {
        check(libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit))?;
        if libc::geteuid() == 0 {
            check(libc::setgid(65534))?;
            check(libc::setuid(65534))?;
        }
    }
    Ok(())
}

// hazard: no-io-uring: threads read, and say why
#[test]
fn without_io_uring_threads_read_and_say_why() {
    let sandboxes: [(&str, Confine); 2] = [
        ("ENOSYS", || refuse_io_uring(libc::ENOSYS)),
        ("EPERM", || refuse_io_uring(libc::EPERM)),
    ];
    for (name, confine) in sandboxes {
        let Some(text) = run(confine) else { continue };
        assert!(
            text.contains(&format!("refused: the system refuses io_uring: {name}")),
            "{text}"
        );
        assert!(
            text.contains("auto: threads")
                && text.contains(&format!(
                    "not io_uring: the system refuses io_uring: {name}"
                )),
            "{text}"
        );
    }
}

// hazard: memlock: plain buffers, and said so
#[test]
fn without_locked_memory_buffers_are_plain_and_everything_is_read() {
    let Some(text) = run(lock_no_memory) else {
        return;
    };
    if text.contains("refused:") {
        println!("skipped: {text}");
        return;
    }
    assert!(text.contains("auto: io_uring"), "{text}");
    assert!(text.contains("plain buffers (ENOMEM"), "{text}");
}
