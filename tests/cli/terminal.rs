//! A terminal for a program that wants one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// What answers should take at most, on a busy machine too.
const LIMIT: Duration = Duration::from_secs(60);

/// A program at a terminal of its own, and what it has shown so far.
pub struct Terminal {
    pub child: Child,
    /// What it was set to before the program came.
    pub before: Modes,
    keys: File,
    shown: Receiver<Vec<u8>>,
    pub text: String,
    /// What was looked at already.
    seen: usize,
}

/// Both ends: the person's and the program's.
fn open() -> (OwnedFd, OwnedFd) {
    let (mut ours, mut theirs) = (0, 0);
    let size = libc::winsize {
        ws_row: 40,
        ws_col: 200,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the first two are written on success, the rest is read or null.
    let status = unsafe {
        libc::openpty(
            &mut ours,
            &mut theirs,
            std::ptr::null_mut(),
            std::ptr::null(),
            &size,
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: both were just opened, for nobody else.
    unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) }
}

impl Terminal {
    pub fn start(mut command: Command) -> Terminal {
        let (ours, theirs) = open();
        let end = || Stdio::from(theirs.try_clone().unwrap());
        command
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end());
        // SAFETY: system calls of the child on itself, nothing that allocates: the terminal becomes its own, so that Ctrl-C is for it.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let keys = File::from(ours);
        let before = Screen(keys.try_clone().unwrap()).modes();
        let child = command.spawn().unwrap();
        // The command holds the program's end, too.
        drop((command, theirs));
        let mut screen = keys.try_clone().unwrap();
        let (tell, shown) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0u8; 4096];
            // An error is how a terminal without a program answers.
            while let Ok(n @ 1..) = screen.read(&mut buffer) {
                if tell.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Terminal {
            child,
            before,
            keys,
            shown,
            text: String::new(),
            seen: 0,
        }
    }

    /// For what the terminal is set to when the program is gone.
    pub fn screen(&self) -> Screen {
        Screen(self.keys.try_clone().unwrap())
    }

    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until `what` is shown, after what was waited for last.
    #[track_caller]
    pub fn wait_for(&mut self, what: &str) {
        let started = Instant::now();
        loop {
            if let Some(at) = self.text[self.seen..].find(what) {
                self.seen += at + what.len();
                return;
            }
            match self
                .shown
                .recv_timeout(LIMIT.saturating_sub(started.elapsed()))
            {
                Ok(bytes) => self.text += &String::from_utf8_lossy(&bytes),
                Err(_) => panic!("`{what}` was never shown: {}", &self.text[self.seen..]),
            }
        }
    }

    /// The exit code, and everything shown.
    pub fn ended(mut self) -> (Option<i32>, String) {
        let started = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if started.elapsed() > LIMIT => panic!("it did not end: {}", self.text),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        while let Ok(bytes) = self.shown.recv_timeout(Duration::from_secs(1)) {
            self.text += &String::from_utf8_lossy(&bytes);
        }
        (status.code(), std::mem::take(&mut self.text))
    }
}

/// A terminal, whoever is at it.
pub struct Screen(File);

/// Its flags: of input, output, lines and echo.
type Modes = [libc::tcflag_t; 4];

impl Screen {
    pub fn modes(&self) -> Modes {
        // SAFETY: plain data that the kernel fills, of a file that is open.
        let modes = unsafe {
            let mut modes: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.0.as_raw_fd(), &mut modes), 0);
            modes
        };
        [modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag]
    }
}

/// No test leaves its program behind, where it fails either.
impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
