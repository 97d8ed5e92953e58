//! What a run takes of the GPU's memory, as the driver tells everybody: by how much what is free fell while it ran.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use tensorpager::device::cuda::Context;
use tensorpager::error::Result;

const LOOKS: Duration = Duration::from_millis(20);
/// For an answer of the driver.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks from a thread of its own: a driver call that never returns keeps nobody else. It holds a context meanwhile, which takes GPU
/// memory and counts to the budget of what runs, so that nothing is timed beside it.
pub struct Watch {
    stop: Arc<AtomicBool>,
    said: Receiver<Result<u64>>,
}

impl Watch {
    /// `None` where the driver does not answer, as after an error that spoilt this process.
    pub fn begin() -> Option<Watch> {
        let stop = Arc::new(AtomicBool::new(false));
        let (tells, said) = channel();
        let stopped = stop.clone();
        std::thread::spawn(move || {
            if let Err(why) = look(&stopped, &tells) {
                let _ = tells.send(Err(why));
            }
        });
        match said.recv_timeout(PATIENCE) {
            Ok(Ok(_)) => Some(Watch { stop, said }),
            _ => {
                stop.store(true, Relaxed);
                None
            }
        }
    }

    /// Bytes taken since; `None` where the driver did not tell. The context is gone then.
    pub fn end(self) -> Option<u64> {
        self.stop.store(true, Relaxed);
        self.said.recv_timeout(PATIENCE).ok()?.ok()
    }
}

/// Tells what is free at first and, once it is stopped, by how much that fell.
fn look(stop: &AtomicBool, tells: &Sender<Result<u64>>) -> Result<()> {
    let context = Context::new(0)?;
    let (before, _) = context.memory()?;
    let _ = tells.send(Ok(before));
    let mut least = before;
    while !stop.load(Relaxed) {
        least = least.min(context.memory()?.0);
        std::thread::sleep(LOOKS);
    }
    drop(context);
    let _ = tells.send(Ok(before - least));
    Ok(())
}

/// Whether a run kept to its budget; `None` where nothing was seen of it.
pub fn within(taken: u64, budget: u64) -> Option<bool> {
    (taken > 0).then_some(taken <= budget)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_run_that_takes_more_than_its_budget_is_told() {
        assert_eq!(within(8 * GIB, 8 * GIB), Some(true));
        assert_eq!(within(8 * GIB + 1, 8 * GIB), Some(false));
        assert_eq!(within(0, 8 * GIB), None);
    }

    #[test]
    fn what_the_thread_says_is_what_is_told_and_silence_is_none() {
        let watch = |said: Option<Result<u64>>| {
            let (tells, hears) = channel();
            said.into_iter().for_each(|s| tells.send(s).unwrap());
            let stop = Arc::new(AtomicBool::new(false));
            let told = Watch {
                stop: stop.clone(),
                said: hears,
            };
            drop(tells);
            let taken = told.end();
            assert!(stop.load(Relaxed));
            taken
        };
        assert_eq!(watch(Some(Ok(GIB))), Some(GIB));
        assert_eq!(watch(None), None);
    }
}
