//! Tests only: the channels of `sync`, which a model checker may schedule. Waiting is trying again after letting others run, so that
//! whoever waits for something that never comes shows as a run without end.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

pub(crate) use crossbeam_channel::{RecvTimeoutError, SendError, TryRecvError, TrySendError};

/// Who schedules the threads of what is made from here on, on this thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheduler {
    System,
    Loom,
    Shuttle,
}

thread_local! {
    static SCHEDULER: Cell<Scheduler> = const { Cell::new(Scheduler::System) };
}

/// To be called first within the model.
pub(crate) fn schedule_by(scheduler: Scheduler) {
    SCHEDULER.set(scheduler);
}

pub(crate) struct State<T> {
    queue: VecDeque<T>,
    room: usize,
    senders: usize,
    receivers: usize,
}

pub(crate) enum Shared<T> {
    Loom(loom::sync::Mutex<State<T>>),
    Shuttle(shuttle::sync::Mutex<State<T>>),
}

impl<T> Shared<T> {
    fn with<R>(&self, work: impl FnOnce(&mut State<T>) -> R) -> R {
        match self {
            Shared::Loom(m) => work(&mut m.lock().unwrap()),
            // Poisoned by the panic that is the finding: it is told once.
            Shared::Shuttle(m) => work(&mut m.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    fn let_others_run(&self) {
        match self {
            Shared::Loom(_) => loom::thread::yield_now(),
            Shared::Shuttle(_) => shuttle::thread::yield_now(),
        }
    }
}

pub(crate) enum Sender<T> {
    Real(crossbeam_channel::Sender<T>),
    Modelled(Arc<Shared<T>>),
}

pub(crate) enum Receiver<T> {
    Real(crossbeam_channel::Receiver<T>),
    Modelled(Arc<Shared<T>>),
}

pub(crate) fn bounded<T>(room: usize) -> (Sender<T>, Receiver<T>) {
    let state = || State {
        queue: VecDeque::new(),
        room,
        senders: 1,
        receivers: 1,
    };
    let shared = match SCHEDULER.get() {
        Scheduler::System => {
            let (tx, rx) = crossbeam_channel::bounded(room);
            return (Sender::Real(tx), Receiver::Real(rx));
        }
        Scheduler::Loom => Shared::Loom(loom::sync::Mutex::new(state())),
        Scheduler::Shuttle => Shared::Shuttle(shuttle::sync::Mutex::new(state())),
    };
    let shared = Arc::new(shared);
    (Sender::Modelled(shared.clone()), Receiver::Modelled(shared))
}

impl<T> Sender<T> {
    pub fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
        match self {
            Sender::Real(tx) => tx.try_send(value),
            Sender::Modelled(shared) => shared.with(|s| {
                if s.receivers == 0 {
                    return Err(TrySendError::Disconnected(value));
                }
                if s.queue.len() == s.room {
                    return Err(TrySendError::Full(value));
                }
                s.queue.push_back(value);
                Ok(())
            }),
        }
    }

    pub fn send(&self, mut value: T) -> Result<(), SendError<T>> {
        if let Sender::Real(tx) = self {
            return tx.send(value);
        }
        loop {
            match self.try_send(value) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(v)) => return Err(SendError(v)),
                Err(TrySendError::Full(v)) => value = v,
            }
            if let Sender::Modelled(shared) = self {
                shared.let_others_run();
            }
        }
    }

    pub fn is_full(&self) -> bool {
        match self {
            Sender::Real(tx) => tx.is_full(),
            Sender::Modelled(shared) => shared.with(|s| s.queue.len() == s.room),
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if let Sender::Modelled(shared) = self
            && !std::thread::panicking()
        {
            shared.with(|s| s.senders -= 1);
        }
    }
}

impl<T> Receiver<T> {
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        match self {
            Receiver::Real(rx) => rx.try_recv(),
            Receiver::Modelled(shared) => shared.with(|s| match s.queue.pop_front() {
                Some(value) => Ok(value),
                None if s.senders == 0 => Err(TryRecvError::Disconnected),
                None => Err(TryRecvError::Empty),
            }),
        }
    }

    /// Modelled, the time never comes.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<T, RecvTimeoutError> {
        match self {
            Receiver::Real(rx) => rx.recv_timeout(timeout),
            Receiver::Modelled(shared) => loop {
                match self.try_recv() {
                    Ok(value) => return Ok(value),
                    Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                    Err(TryRecvError::Empty) => shared.let_others_run(),
                }
            },
        }
    }

    pub fn recv(&self) -> Result<T, crossbeam_channel::RecvError> {
        match self {
            Receiver::Real(rx) => rx.recv(),
            Receiver::Modelled(_) => {
                let got = self.recv_timeout(Duration::MAX);
                got.map_err(|_| crossbeam_channel::RecvError)
            }
        }
    }

    /// Something is there, or never will be.
    fn is_ready(&self) -> bool {
        match self {
            Receiver::Real(rx) => !rx.is_empty(),
            Receiver::Modelled(shared) => shared.with(|s| !s.queue.is_empty() || s.senders == 0),
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        if let Receiver::Modelled(shared) = self
            && !std::thread::panicking()
        {
            // What is left goes now, and not under the lock.
            let left = shared.with(|s| {
                s.receivers -= 1;
                std::mem::take(&mut s.queue)
            });
            drop(left);
        }
    }
}

/// Waits for the first of several receivers.
pub(crate) struct Select<'a> {
    real: crossbeam_channel::Select<'a>,
    modelled: Vec<Box<dyn Fn() -> bool + 'a>>,
    let_others_run: Option<Box<dyn Fn() + 'a>>,
}

impl<'a> Select<'a> {
    pub fn new() -> Select<'a> {
        Select {
            real: crossbeam_channel::Select::new(),
            modelled: Vec::new(),
            let_others_run: None,
        }
    }

    pub fn recv<T>(&mut self, receiver: &'a Receiver<T>) -> usize {
        match receiver {
            Receiver::Real(rx) => self.real.recv(rx),
            Receiver::Modelled(shared) => {
                self.modelled.push(Box::new(|| receiver.is_ready()));
                self.let_others_run = Some(Box::new(|| shared.let_others_run()));
                self.modelled.len() - 1
            }
        }
    }

    /// Modelled, the time never comes.
    pub fn ready_timeout(
        &mut self,
        timeout: Duration,
    ) -> Result<usize, crossbeam_channel::ReadyTimeoutError> {
        let Some(let_others_run) = &self.let_others_run else {
            return self.real.ready_timeout(timeout);
        };
        loop {
            if let Some(i) = self.modelled.iter().position(|ready| ready()) {
                return Ok(i);
            }
            let_others_run();
        }
    }
}

pub(crate) enum JoinHandle {
    Real(std::thread::JoinHandle<()>),
    Loom(loom::thread::JoinHandle<()>),
    Shuttle(shuttle::thread::JoinHandle<()>),
}

impl JoinHandle {
    pub fn join(self) -> std::thread::Result<()> {
        match self {
            JoinHandle::Real(h) => h.join(),
            // A panic is the finding: the threads of its model do not go on, and waiting for one would hide it.
            JoinHandle::Loom(_) if std::thread::panicking() => Ok(()),
            JoinHandle::Loom(h) => h.join(),
            JoinHandle::Shuttle(h) => h.join(),
        }
    }
}

pub(crate) fn spawn(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> std::io::Result<JoinHandle> {
    Ok(match SCHEDULER.get() {
        Scheduler::System => {
            JoinHandle::Real(std::thread::Builder::new().name(name.into()).spawn(work)?)
        }
        Scheduler::Loom => JoinHandle::Loom(loom::thread::spawn(work)),
        Scheduler::Shuttle => JoinHandle::Shuttle(shuttle::thread::spawn(work)),
    })
}
