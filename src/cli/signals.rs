//! Ctrl-C, and its like from other programs: the first asks to stop at the next unit, the second ends the process at once.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Relaxed, SeqCst},
};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::{Error, Result};

/// Ends what a line editor asks of a terminal about pastes, and its line.
const PASTES_AS_BEFORE: &[u8] = b"\x1b[?2004l\r\n";

/// What asks to stop: Ctrl-C, `kill`, and a terminal that is closed, unless whoever started this (nohup) wants that ignored.
fn heeded() -> Vec<i32> {
    let mut signals = vec![SIGINT, SIGTERM];
    if !is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    signals
}

/// As the kernel lists it: a mask in hexadecimal, signal 1 its lowest bit.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok());
    mask.unwrap_or(0) >> (signal - 1) & 1 == 1
}

/// A flag that these signals raise. A second one exits with 130 at once: nothing durable is half written then, because
/// packs count only with their manifest.
pub fn cancel_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in heeded() {
        // Order matters: the conditional exit must look at the flag before this signal raises it.
        signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone())
            .map_err(wire)?;
        signal_hook::flag::register(signal, flag.clone()).map_err(wire)?;
    }
    Ok(flag)
}

/// The flags of a command that first prepares and then has work worth finishing.
pub struct TwoStage {
    /// Raised by the first signal while preparing: stop at the next unit.
    pub cancel: Arc<AtomicBool>,
    /// Raised by the first signal in any case: begin nothing new.
    pub stop: Arc<AtomicBool>,
    working: Arc<AtomicBool>,
}

impl TwoStage {
    /// From here on the first signal no longer cancels what runs. A second one still exits with 130 at once: a result counts
    /// only once it is whole on disk, and a torn one is cut off at the next start.
    pub fn working(&self) {
        self.working.store(true, Relaxed);
    }
}

/// The flags of a chat, whose answers Ctrl-C ends one by one.
#[derive(Clone)]
pub struct ChatSignals {
    /// Ends what the engine does, and with it the chat.
    pub cancel: Arc<AtomicBool>,
    /// Ends the answer under way. To be lowered before the next prompt: there it says that a signal came.
    pub turn: Arc<AtomicBool>,
    /// Up while a line is waited for: there is nothing to stop, so any signal ends the process.
    pub at_prompt: Arc<AtomicBool>,
}

impl TwoStage {
    /// From here on Ctrl-C raises `stop` only; other signals end the chat. Twice while an answer is under way still exits at once.
    pub fn into_chat(self) -> Result<ChatSignals> {
        self.working();
        // Raised before anybody hears of the signal below.
        for signal in heeded() {
            if signal != SIGINT {
                signal_hook::flag::register(signal, self.cancel.clone()).map_err(wire)?;
            }
        }
        let flags = ChatSignals {
            cancel: self.cancel,
            turn: self.stop,
            at_prompt: Arc::default(),
        };
        end_at_prompt(flags.clone())?;
        Ok(flags)
    }
}

/// A line editor takes the terminal's echo and its line ends away. Who ends the process meanwhile gives them back: the shell behind it
/// shows nothing that is typed otherwise.
///
/// A signal that only asked for an answer's end may be heard of late: `turn` was lowered since.
fn end_at_prompt(flags: ChatSignals) -> Result<()> {
    let terminal = tcgetattr(std::io::stdin()).ok();
    let mut signals = Signals::new(heeded()).map_err(wire)?;
    let wait = move || {
        for _ in signals.forever() {
            let asked = || flags.turn.load(SeqCst) || flags.cancel.load(SeqCst);
            if flags.at_prompt.load(SeqCst) && asked() {
                if let Some(before) = &terminal {
                    give_back(before);
                }
                signal_hook::low_level::exit(130);
            }
        }
    };
    std::thread::Builder::new()
        .name("prompt".into())
        .spawn(wait)
        .map(|_| ())
        .map_err(wire)
}

/// A terminal that is gone wants nothing back, nor does one that others have now: who sets it from behind is stopped instead (SIGTTOU).
/// That stays possible where it is taken away just after the question, and where the editor of a chat that was suspended wakes and sets it
/// before this is reached. Such a chat ends with the next signal, in its handler.
fn give_back(before: &Termios) {
    if tcgetpgrp(std::io::stdin()).ok() != Some(getpgrp()) {
        return;
    }
    let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
    let mut out = std::io::stdout();
    if out.is_terminal() {
        let _ = out.write_all(PASTES_AS_BEFORE).and_then(|()| out.flush());
    }
}

pub fn two_stage() -> Result<TwoStage> {
    let flags = TwoStage {
        cancel: Arc::new(AtomicBool::new(false)),
        stop: Arc::new(AtomicBool::new(false)),
        working: Arc::new(AtomicBool::new(false)),
    };
    let heeded = heeded();
    for signal in &heeded {
        // Looks at the flag before the thread below, or this very signal, can have raised it.
        signal_hook::flag::register_conditional_shutdown(*signal, 130, flags.stop.clone())
            .map_err(wire)?;
        signal_hook::flag::register(*signal, flags.stop.clone()).map_err(wire)?;
    }
    let mut signals = Signals::new(&heeded).map_err(wire)?;
    let (cancel, working) = (flags.cancel.clone(), flags.working.clone());
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                if !working.load(Relaxed) {
                    cancel.store(true, Relaxed);
                }
            }
        })
        .map_err(wire)?;
    Ok(flags)
}

fn wire(e: std::io::Error) -> Error {
    Error::io("signals could not be wired", &e)
}
