//! The channels between the pager and its reading thread, and the thread itself.
//!
//! They are crossbeam's and std's. In this crate's own tests a scheduler may take their place: loom, which runs every interleaving of a
//! small case, or shuttle, which runs many of a larger one. The code that uses them is the same.

#[cfg(not(test))]
pub(super) use crossbeam_channel::{
    Receiver, RecvTimeoutError, Select, Sender, TryRecvError, bounded,
};

/// A running thread.
#[cfg(not(test))]
pub(super) type JoinHandle = std::thread::JoinHandle<()>;

/// Starts a thread of that name.
#[cfg(not(test))]
pub(super) fn spawn(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> std::io::Result<JoinHandle> {
    std::thread::Builder::new().name(name.into()).spawn(work)
}

#[cfg(test)]
#[path = "sync_modelled.rs"]
mod modelled;
#[cfg(test)]
pub(super) use modelled::*;
