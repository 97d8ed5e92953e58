//! Weights on their way to the GPU: slots that travel by value between the side that fills them and the side that computes with them,
//! and the copies between, each of which owns its frame until the GPU has taken it.
//!
//! A slot carries the place in the other side's stream up to which it is in use. Whoever takes it lets its own stream wait for that place,
//! so the host never waits for the GPU to be done with a slot.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use super::CudaDevice;
use super::context::Context;
use super::memory::{Address, DeviceBuffer, cut};
use super::stream::{Event, Fence, Stream};
use crate::device::{Bytes, DeviceBytes};
use crate::error::{Error, Result};

/// Room for one unit on the device.
pub struct Slot {
    buffer: DeviceBuffer,
    mark: Mark,
}

/// How far the other side's stream must be before the slot may be touched.
enum Mark {
    /// Nobody uses it.
    Clear(Event),
    Until(Fence),
    /// A driver call failed half way: the run is over.
    Lost,
}

impl Slot {
    /// `what` names it in errors.
    pub fn new(context: &Arc<Context>, bytes: u64, what: &str) -> Result<Slot> {
        Ok(Slot {
            buffer: DeviceBuffer::new(context, bytes, what)?,
            mark: Mark::Clear(Event::new(context)?),
        })
    }

    /// What [`Slot::new`] takes of the device.
    pub fn device_bytes(bytes: u64) -> u64 {
        DeviceBuffer::rounded(bytes)
    }

    /// As weights are handed to ops.
    pub fn bytes(&self) -> Bytes<'_> {
        Bytes::Device(DeviceBytes {
            address: self.buffer.address().0,
            len: self.buffer.bytes() as usize,
            slot: std::marker::PhantomData,
        })
    }

    /// What is given to the stream from now on comes after the slot's last use.
    fn take(&mut self, stream: &Stream) -> Result<()> {
        self.mark = match std::mem::replace(&mut self.mark, Mark::Lost) {
            Mark::Until(fence) => Mark::Clear(stream.wait(fence)?),
            clear => clear,
        };
        Ok(())
    }

    /// The slot is in use by what was given to the stream so far.
    fn give(&mut self, stream: &Stream) -> Result<()> {
        let event = match std::mem::replace(&mut self.mark, Mark::Lost) {
            Mark::Clear(event) => event,
            Mark::Until(fence) => fence.into_event(),
            Mark::Lost => return Err(Error::internal("a slot was used after a failure")),
        };
        self.mark = Mark::Until(stream.record(event)?);
        Ok(())
    }

    fn at(&self, piece: &Piece) -> Address {
        self.buffer.at(piece.to, piece.bytes)
    }
}

/// Bytes of a frame and where they go in the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub from: usize,
    pub to: usize,
    pub bytes: usize,
}

/// A copy under way. Its frame belongs to it.
struct Flight<F> {
    frame: F,
    start: Event,
    end: Fence,
    bytes: u64,
}

/// The filling side: the copy stream, and the frames whose copies are not done.
pub struct Copier<F> {
    // Before the frames' own drop, `Drop` has waited for the stream.
    flights: VecDeque<Flight<F>>,
    /// A pair a flight.
    events: Vec<(Event, Event)>,
    stream: Stream,
    /// Copies given to the stream, and done, so far.
    given: u64,
    done: u64,
    done_bytes: u64,
    busy: Duration,
    clock: Option<Arc<Clock>>,
    /// No copy reaches over a multiple of it.
    cut: usize,
    /// When the copy last reclaimed began, by that clock.
    began: Duration,
}

impl<F: Deref<Target = [u8]>> Copier<F> {
    /// `most`: copies under way at once.
    pub fn new(context: &Arc<Context>, most: usize) -> Result<Copier<F>> {
        let pair = |_| Ok((Event::timing(context)?, Event::timing(context)?));
        Ok(Copier {
            flights: VecDeque::with_capacity(most),
            events: (0..most).map(pair).collect::<Result<_>>()?,
            stream: Stream::new(context, 0)?,
            given: 0,
            done: 0,
            done_bytes: 0,
            busy: Duration::ZERO,
            clock: None,
            cut: usize::MAX,
            began: Duration::ZERO,
        })
    }

    /// From now on [`Copier::began`] tells the time by this clock.
    pub fn tell_time(&mut self, clock: Arc<Clock>) {
        self.clock = Some(clock);
    }

    /// Frames may lie in memory that was pinned in pieces of so many bytes ([`super::Pin`]): copies are cut where these meet.
    pub fn cut_at(&mut self, bytes: usize) {
        self.cut = bytes;
    }

    /// When the copy last reclaimed began; zero without a clock.
    pub fn began(&self) -> Duration {
        self.began
    }

    /// To be called once on the thread that copies.
    pub fn bind(&self) -> Result<()> {
        self.stream.context().bind()
    }

    /// Copies may be given now.
    pub fn has_room(&self) -> bool {
        !self.events.is_empty()
    }

    /// Copies not yet known to be done.
    pub fn under_way(&self) -> usize {
        self.flights.len()
    }

    /// The slot is about to be filled: copies come after what still computes with it.
    pub fn begin(&self, slot: &mut Slot) -> Result<()> {
        slot.take(&self.stream)
    }

    /// Starts copying pieces of the frame, which comes back through [`Copier::reclaim`].
    ///
    /// # Panics
    /// Without room, or where a piece lies outside.
    pub fn send(&mut self, frame: F, pieces: &[Piece], slot: &Slot) -> Result<()> {
        let (start, end) = self.events.pop().expect("the caller asks for room first");
        self.stream.mark(&start)?;
        let mut bytes = 0;
        for piece in pieces {
            let mut to = slot.at(piece);
            for from in cut(&frame[piece.from..piece.from + piece.bytes], self.cut) {
                // SAFETY: the flight owns the frame and gives it back only behind its fence; the slot's taker lets its stream wait for the
                // mark that `finish` records behind this copy, and the slot waits for the GPU before it goes.
                if let Err(e) = unsafe { self.stream.copy_in(to, from) } {
                    // Earlier pieces may be under way.
                    let _ = self.stream.synchronize();
                    return Err(e);
                }
                to = to.plus(from.len());
            }
            bytes += piece.bytes as u64;
        }
        self.flights.push_back(Flight {
            frame,
            start,
            end: self.stream.record(end)?,
            bytes,
        });
        self.given += 1;
        Ok(())
    }

    /// The slot's last copy has been given: whoever takes the slot comes after it.
    pub fn finish(&self, slot: &mut Slot) -> Result<()> {
        slot.give(&self.stream)
    }

    /// The frame of the oldest copy, if that is done; and how long the GPU took for it. With `wait` the host waits for it.
    pub fn reclaim(&mut self, wait: bool) -> Result<Option<(F, Duration)>> {
        let Some(front) = self.flights.front() else {
            return Ok(None);
        };
        if !wait && !front.end.is_passed()? {
            return Ok(None);
        }
        let Some(flight) = self.flights.pop_front() else {
            return Ok(None);
        };
        let end = flight.end.wait_on_host()?;
        let took = end.since(&flight.start)?;
        if let Some(clock) = &self.clock {
            self.began = clock.at(&flight.start)?;
        }
        self.done += 1;
        self.done_bytes += flight.bytes;
        self.busy += took;
        self.events.push((flight.start, end));
        Ok(Some((flight.frame, took)))
    }

    /// Copies given so far, and those of them that were reclaimed.
    pub fn counts(&self) -> (u64, u64) {
        (self.given, self.done)
    }

    /// Bytes of reclaimed copies, and the time the GPU took for them.
    pub fn totals(&self) -> (u64, Duration) {
        (self.done_bytes, self.busy)
    }
}

impl<F> Drop for Copier<F> {
    /// The GPU must have let go of the frames before they go. A lost GPU never says so: then they stay until the process ends.
    fn drop(&mut self) {
        if self.stream.synchronize().is_err() {
            self.flights
                .drain(..)
                .for_each(|f| std::mem::forget(f.frame));
        }
    }
}

/// When the compute stream reached and left a unit.
pub struct Ticks {
    idle: Event,
    go: Event,
    done: Event,
}

impl Ticks {
    pub fn new(context: &Arc<Context>) -> Result<Ticks> {
        Ok(Ticks {
            idle: Event::timing(context)?,
            go: Event::timing(context)?,
            done: Event::timing(context)?,
        })
    }

    /// How long the compute stream waited for the unit, and how long it computed. Only after both are done.
    pub fn spent(&self) -> Result<(Duration, Duration)> {
        Ok((self.go.since(&self.idle)?, self.done.since(&self.go)?))
    }

    /// When the compute stream was there. Only after it was.
    pub fn reached(&self, clock: &Clock) -> Result<Duration> {
        clock.at(&self.idle)
    }
}

/// The GPU's clock, from a moment that the host knows: when [`Compute::clock`] returned. In milliseconds as float32, so a quarter of one after
/// an hour: durations are to be taken between near events.
pub struct Clock(Event);

impl Clock {
    /// When the GPU passed a place that it has passed.
    pub(super) fn at(&self, event: &Event) -> Result<Duration> {
        event.since(&self.0)
    }
}

/// The computing side, as the pager sees it: a handle that needs no device at hand.
#[derive(Clone)]
pub struct Compute(Arc<Stream>);

impl CudaDevice {
    pub fn compute(&self) -> Compute {
        Compute(self.compute.clone())
    }
}

impl Compute {
    pub fn context(&self) -> &Arc<Context> {
        self.0.context()
    }

    /// A clock that begins now. Waits for everything given so far.
    pub fn clock(&self) -> Result<Clock> {
        let zero = Event::timing(self.context())?;
        self.0.synchronize()?;
        self.0.mark(&zero)?;
        self.0.synchronize()?;
        Ok(Clock(zero))
    }

    /// To be called before the host waits for the unit.
    pub fn reach(&self, ticks: &Ticks) -> Result<()> {
        self.context().bind()?;
        self.0.mark(&ticks.idle)
    }

    /// What is computed from now on comes after the slot was filled.
    pub fn acquire(&self, slot: &mut Slot, ticks: &Ticks) -> Result<()> {
        slot.take(&self.0)?;
        self.0.mark(&ticks.go)
    }

    /// What is computed from now on comes after the slot was filled.
    pub fn await_slot(&self, slot: &mut Slot) -> Result<()> {
        self.context().bind()?;
        slot.take(&self.0)
    }

    /// As [`Compute::acquire`], for a unit that stays.
    pub fn enter(&self, ticks: &Ticks) -> Result<()> {
        self.0.mark(&ticks.go)
    }

    /// What was computed so far is all that uses the slot.
    pub fn release(&self, slot: &mut Slot, ticks: &Ticks) -> Result<()> {
        self.leave(ticks)?;
        slot.give(&self.0)
    }

    /// As [`Compute::release`], for a unit that stays.
    pub fn leave(&self, ticks: &Ticks) -> Result<()> {
        self.0.mark(&ticks.done)
    }

    /// The host waits until everything given is computed.
    pub fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }
}
