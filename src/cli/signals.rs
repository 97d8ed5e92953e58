//! Ctrl-C: the first asks to stop at the next unit, the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Result};

/// A flag that SIGINT and SIGTERM raise. A second one exits with 130 at once: nothing durable is half written then, because
/// packs count only with their manifest.
pub fn cancel_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let wire = |e: std::io::Error| Error::io("signals could not be wired", &e);
        // Order matters: the conditional exit must look at the flag before this signal raises it.
        signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone()).map_err(wire)?;
        signal_hook::flag::register(signal, flag.clone()).map_err(wire)?;
    }
    Ok(flag)
}
