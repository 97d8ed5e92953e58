//! Video files, decoded by the system's ffmpeg as a confined child: a bounded time, bounded memory, no network, no writing of files, known
//! containers only. Frames come back through a pipe, each with its own size (PPM), and only those asked for are kept.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;

use super::Rgb;
use crate::error::{Code, Error, Result};

/// Containers a video may be in: none of them can name another file or a URL, as playlists can.
const FORMATS: &str = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,gif,ogg,asf,h264,hevc,ivf,apng";
/// Address space of the child.
const CHILD_MEMORY_BYTES: u64 = 4 << 30;
/// Most pixels of a frame.
const MAX_FRAME_PIXELS: u64 = 1 << 27;
/// What is kept of the child's complaints.
const MAX_STDERR_BYTES: u64 = 4096;
const MAX_PROBE_BYTES: u64 = 1 << 20;
const CUT_OFF: &str = "the last frame is cut off";

/// Which programs decode videos, and how long they may take.
#[derive(Clone, Debug)]
pub struct VideoTools {
    pub ffmpeg: PathBuf,
    pub ffprobe: PathBuf,
    /// Bound on each run of either.
    pub time_limit: Duration,
}

impl Default for VideoTools {
    fn default() -> VideoTools {
        VideoTools {
            ffmpeg: "ffmpeg".into(),
            ffprobe: "ffprobe".into(),
            time_limit: Duration::from_secs(300),
        }
    }
}

/// A video file whose length is known.
#[derive(Debug)]
pub(super) struct Clip<'t> {
    tools: &'t VideoTools,
    path: PathBuf,
    /// Frames of the first video stream.
    pub frames: usize,
    pub fps: f64,
}

impl VideoTools {
    /// Counts the file's frames. Errors (Code::Media, Code::Io) name the file.
    pub(super) fn open(&self, path: &Path) -> Result<Clip<'_>> {
        // Absolute, so that no name looks like an option or a protocol.
        let path = std::fs::canonicalize(path)
            .map_err(|e| Error::io(format!("cannot read the video {}", path.display()), &e))?;
        if !path.is_file() {
            return Err(unusable(&path, "it is not a regular file".into()));
        }
        let mut command = self.command(&self.ffprobe);
        command.args(["-select_streams", "v:0", "-count_packets", "-of", "json"]);
        command.args([
            "-show_entries",
            "stream=nb_read_packets,avg_frame_rate,r_frame_rate",
        ]);
        command.arg("-i").arg(url(&path));
        let mut run = Run::start(command, &self.ffprobe, self.time_limit)?;
        let mut json = Vec::new();
        let read = match &mut run.stdout {
            Some(stdout) => stdout.take(MAX_PROBE_BYTES).read_to_end(&mut json),
            None => Ok(0),
        };
        let said = run.finish();
        if let Err(cause) = said {
            return Err(unusable(&path, cause));
        }
        read.map_err(|e| unusable(&path, e.to_string()))?;
        let json: Value = serde_json::from_slice(&json).unwrap_or_default();
        let stream = &json["streams"][0];
        let text = |key: &str| stream[key].as_str().unwrap_or("");
        let fps = [text("avg_frame_rate"), text("r_frame_rate")]
            .iter()
            .find_map(|r| ratio(r));
        match (text("nb_read_packets").parse::<usize>(), fps) {
            (Ok(frames), Some(fps)) if frames > 0 => Ok(Clip {
                tools: self,
                path,
                frames,
                fps,
            }),
            _ => Err(unusable(
                &path,
                "ffprobe finds no video stream with frames in it".into(),
            )),
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.args(["-v", "error", "-protocol_whitelist", "file,pipe"]);
        command.args(["-format_whitelist", FORMATS]);
        command
    }
}

impl Clip<'_> {
    /// The frames with these ascending numbers, as they are decoded. Where the file ends early, its last frame stands for those missing.
    pub fn decode(&self, indices: &[usize]) -> Result<Frames> {
        Ok(Frames {
            run: Some(self.start(&["-fps_mode", "passthrough"])?),
            old: Some(self.start_later()),
            path: self.path.clone(),
            wanted: indices.to_vec(),
            given: 0,
            decoded: 0,
            last: None,
        })
    }

    /// ffmpeg before 5.1 knows `-vsync` only, ffmpeg 8 knows `-fps_mode` only.
    fn start_later(&self) -> Box<dyn FnOnce() -> Result<Run> + Send> {
        let (tools, path) = (self.tools.clone(), self.path.clone());
        Box::new(move || start(&tools, &path, &["-vsync", "passthrough"]))
    }

    fn start(&self, sync: &[&str]) -> Result<Run> {
        start(self.tools, &self.path, sync)
    }
}

fn start(tools: &VideoTools, path: &Path, sync: &[&str]) -> Result<Run> {
    let mut command = tools.command(&tools.ffmpeg);
    command
        .args(["-nostdin", "-threads", "2", "-i"])
        .arg(url(path));
    command
        .args(["-map", "0:v:0", "-an", "-sn", "-dn"])
        .args(sync);
    command.args([
        "-f",
        "image2pipe",
        "-c:v",
        "ppm",
        "-pix_fmt",
        "rgb24",
        "pipe:1",
    ]);
    Run::start(command, &tools.ffmpeg, tools.time_limit)
}

/// Iterates over decoded frames.
pub(super) struct Frames {
    run: Option<Run>,
    old: Option<Box<dyn FnOnce() -> Result<Run> + Send>>,
    path: PathBuf,
    wanted: Vec<usize>,
    given: usize,
    decoded: usize,
    last: Option<Rgb>,
}

impl Iterator for Frames {
    type Item = Result<Rgb>;

    fn next(&mut self) -> Option<Result<Rgb>> {
        let index = *self.wanted.get(self.given)?;
        self.given += 1;
        let frame = self.advance_to(index);
        if frame.is_err() {
            self.given = self.wanted.len();
        }
        Some(frame)
    }
}

impl Frames {
    fn advance_to(&mut self, index: usize) -> Result<Rgb> {
        while self.decoded <= index {
            let Some(run) = &mut self.run else {
                break;
            };
            let frame = match &mut run.stdout {
                Some(stdout) => read_ppm(stdout),
                None => Ok(None),
            };
            match frame {
                Ok(Some(frame)) => {
                    self.last = Some(frame);
                    self.decoded += 1;
                }
                Ok(None) => self.at_end()?,
                Err(cause) => {
                    // A child that died says why better than the half frame it left; one that goes on is ended.
                    let run = self.run.take().filter(|_| cause == CUT_OFF);
                    let said = run.and_then(|r| r.finish().err());
                    return Err(unusable(&self.path, said.unwrap_or(cause)));
                }
            }
        }
        self.last
            .clone()
            .ok_or_else(|| unusable(&self.path, "no frame could be decoded".into()))
    }

    fn at_end(&mut self) -> Result<()> {
        let Some(run) = self.run.take() else {
            return Ok(());
        };
        match (run.finish(), self.old.take()) {
            (Ok(()), _) => Ok(()),
            (Err(cause), Some(old)) if self.decoded == 0 && cause.contains("fps_mode") => {
                self.run = Some(old()?);
                Ok(())
            }
            (Err(cause), _) => Err(unusable(&self.path, cause)),
        }
    }
}

/// A running child with its bounds. Dropping it ends the child.
struct Run {
    child: Arc<Mutex<Child>>,
    stdout: Option<BufReader<ChildStdout>>,
    stderr: Option<JoinHandle<String>>,
    watch: Option<(Sender<()>, JoinHandle<bool>)>,
    limit: Duration,
}

impl Run {
    fn start(command: Command, program: &Path, limit: Duration) -> Result<Run> {
        if !is_there(program) {
            return Err(not_started(program, &std::io::ErrorKind::NotFound.into()));
        }
        let mut command = match Path::new(SHELL).exists() {
            true => behind_limits(&command, limit),
            false => command,
        };
        command
            .env_clear()
            .envs(std::env::var_os("PATH").map(|p| ("PATH", p)))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| not_started(program, &e))?;
        // Once more from outside: there may be no shell, or one that does not know every limit.
        confine(&child, limit);
        let (stdout, stderr) = match (child.stdout.take(), child.stderr.take()) {
            (Some(o), Some(e)) => (o, e),
            _ => return Err(Error::internal("a child without its pipes")),
        };
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            let mut stderr = stderr;
            let _ = stderr
                .by_ref()
                .take(MAX_STDERR_BYTES)
                .read_to_end(&mut text);
            // Read on, so that a talkative child is not held up.
            let _ = std::io::copy(&mut stderr, &mut std::io::sink());
            String::from_utf8_lossy(&text).into_owned()
        });
        let child = Arc::new(Mutex::new(child));
        let (done, wait) = bounded::<()>(1);
        let watched = child.clone();
        let watch = std::thread::spawn(move || {
            let late =
                wait.recv_timeout(limit) == Err(crossbeam_channel::RecvTimeoutError::Timeout);
            if late {
                kill(&watched);
            }
            late
        });
        Ok(Run {
            child,
            stdout: Some(BufReader::with_capacity(1 << 16, stdout)),
            stderr: Some(stderr),
            watch: Some((done, watch)),
            limit,
        })
    }

    /// Waits for the end; the cause where it was not a good one.
    fn finish(mut self) -> std::result::Result<(), String> {
        // A child that still writes is told that nobody reads on.
        drop(self.stdout.take());
        let status = loop {
            // Not `wait`: it would hold the lock that the watch needs to end a child that hangs.
            let ended = lock(&self.child).try_wait();
            match ended {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Ok(Some(status)) => break Ok(status),
                Err(e) => break Err(e),
            }
        };
        let late = self.stop_watching();
        let said = match self.stderr.take().map(JoinHandle::join) {
            Some(Ok(text)) => text,
            _ => String::new(),
        };
        if late {
            return Err(format!(
                "decoding took longer than {} s",
                self.limit.as_secs()
            ));
        }
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(match said.trim() {
                "" => format!("the decoder ended with {status}"),
                text => text.lines().rev().take(3).collect::<Vec<_>>().join("; "),
            }),
            Err(e) => Err(e.to_string()),
        }
    }

    fn stop_watching(&mut self) -> bool {
        let Some((done, watch)) = self.watch.take() else {
            return false;
        };
        drop(done);
        watch.join().unwrap_or(false)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.watch.is_some() {
            kill(&self.child);
            self.stop_watching();
        }
    }
}

fn lock(child: &Mutex<Child>) -> std::sync::MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the child and collects it. It may have ended already.
fn kill(child: &Mutex<Child>) {
    let mut child = lock(child);
    let _ = child.kill();
    let _ = child.wait();
}

/// Sets limits on itself and becomes the decoder: they hold from its first instruction on, and nothing of this process runs
/// between fork and exec, which would have to be `unsafe`.
const SHELL: &str = "/bin/sh";

fn behind_limits(command: &Command, limit: Duration) -> Command {
    let set: String = limits(limit)
        .into_iter()
        .map(|(flag, _, most)| {
            // Address space is counted in KiB; of files none may be written, so their unit does not matter.
            let most = if flag == 'v' { most / 1024 } else { most };
            format!("ulimit -{flag} {most} 2>/dev/null; ")
        })
        .collect();
    let mut shell = Command::new(SHELL);
    shell
        .arg("-c")
        .arg(format!("{set}exec \"$0\" \"$@\""))
        .arg(command.get_program())
        .args(command.get_args());
    shell
}

/// Whether a program of this name can be found, here or on the PATH.
fn is_there(program: &Path) -> bool {
    if program.components().count() > 1 {
        return program.exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// What a decoder may take: the shell's letter, the system's name, the most.
fn limits(limit: Duration) -> [(char, Resource, u64); 4] {
    // Two decoding threads, and what starts and ends them.
    let cpu_s = limit.as_secs().saturating_mul(4).max(1);
    [
        ('v', Resource::As, CHILD_MEMORY_BYTES),
        ('f', Resource::Fsize, 0),
        ('c', Resource::Core, 0),
        ('t', Resource::Cpu, cpu_s),
    ]
}

/// Limits that hold whatever the file makes the decoder do. Setting them may fail where a container forbids it; the watch on time remains.
fn confine(child: &Child, limit: Duration) {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
        return;
    };
    let at_most = |n: u64| Rlimit {
        current: Some(n),
        maximum: Some(n),
    };
    for (_, resource, most) in limits(limit) {
        let _ = prlimit(Some(pid), resource, at_most(most));
    }
}

/// One frame, `None` at the end.
fn read_ppm(from: &mut impl Read) -> std::result::Result<Option<Rgb>, String> {
    let broken = || "the decoder sent something that is not a frame".to_string();
    let mut header = Vec::with_capacity(32);
    let mut byte = [0u8];
    // Magic, width, height, 255: each ends in one white space, and then come the bytes.
    while header.iter().filter(|b| u8::is_ascii_whitespace(b)).count() < 4 {
        match from.read(&mut byte) {
            Ok(0) if header.is_empty() => return Ok(None),
            Ok(1) if header.len() < 64 => header.push(byte[0]),
            Ok(_) => return Err(broken()),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.to_string()),
        }
    }
    let text = std::str::from_utf8(&header).map_err(|_| broken())?;
    let mut words = text.split_ascii_whitespace();
    let (magic, width, height, depth) = (words.next(), words.next(), words.next(), words.next());
    let size = |w: Option<&str>| w.and_then(|w| w.parse::<u32>().ok()).filter(|n| *n > 0);
    let (Some("P6"), Some(width), Some(height), Some("255")) =
        (magic, size(width), size(height), depth)
    else {
        return Err(broken());
    };
    if u64::from(width) * u64::from(height) > MAX_FRAME_PIXELS {
        return Err(format!("a frame of {width} x {height} pixels is too large"));
    }
    let (width, height) = (width as usize, height as usize);
    let mut data = vec![0; width * height * 3];
    from.read_exact(&mut data)
        .map_err(|_| CUT_OFF.to_string())?;
    Ok(Some(Rgb {
        width,
        height,
        data,
    }))
}

/// `30000/1001` → 29.97; none where it is 0/0.
fn ratio(text: &str) -> Option<f64> {
    let (a, b) = text.split_once('/')?;
    let (a, b): (f64, f64) = (a.parse().ok()?, b.parse().ok()?);
    let r = a / b;
    (r.is_finite() && r > 0.0).then_some(r)
}

fn url(path: &Path) -> std::ffi::OsString {
    let mut url = std::ffi::OsString::from("file:");
    url.push(path);
    url
}

fn unusable(path: &Path, cause: String) -> Error {
    Error::new(
        Code::Media,
        format!("cannot use the video {}", path.display()),
        cause,
        "give a whole video file that ffmpeg can read, or a folder of frames",
    )
}

fn not_started(program: &Path, e: &std::io::Error) -> Error {
    let name = program.display();
    if e.kind() == std::io::ErrorKind::NotFound {
        return Error::new(
            Code::Media,
            "videos cannot be decoded",
            format!("`{name}` is not installed"),
            "install ffmpeg (apt install ffmpeg), or give a folder of frames: --video frames/ --fps 2",
        );
    }
    Error::io(format!("`{name}` cannot be started"), e)
}

#[cfg(test)]
mod tests;
