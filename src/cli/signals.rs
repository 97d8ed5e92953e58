//! Ctrl-C: the first asks to stop at the next unit, the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::{Error, Result};

/// A flag that SIGINT and SIGTERM raise. A second one exits with 130 at once: nothing durable is half written then, because
/// packs count only with their manifest.
pub fn cancel_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
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

pub fn two_stage() -> Result<TwoStage> {
    let flags = TwoStage {
        cancel: Arc::new(AtomicBool::new(false)),
        stop: Arc::new(AtomicBool::new(false)),
        working: Arc::new(AtomicBool::new(false)),
    };
    for signal in [SIGINT, SIGTERM] {
        // Looks at the flag before the thread below, or this very signal, can have raised it.
        signal_hook::flag::register_conditional_shutdown(signal, 130, flags.stop.clone())
            .map_err(wire)?;
        signal_hook::flag::register(signal, flags.stop.clone()).map_err(wire)?;
    }
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(wire)?;
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
