//! Streams, and the events that order them against one another and against the host.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::context::{Context, Doing};
use super::ffi;
use super::memory::{Address, HostBuffer};
use crate::error::Result;

/// Work in order. Work of two streams is in no order but what fences make.
pub struct Stream {
    context: Arc<Context>,
    handle: ffi::Stream,
}

/// A place in a stream can be marked with it.
pub struct Event {
    context: Arc<Context>,
    handle: ffi::Event,
}

/// A marked place in a stream. Waiting for it gives the event back.
#[must_use = "nothing waits for this place in the stream"]
pub struct Fence(Event);

impl Stream {
    /// The lower the number, the more urgent.
    pub fn new(context: &Arc<Context>, priority: i32) -> Result<Stream> {
        context.bind()?;
        Ok(Stream {
            handle: ffi::stream_create(priority).doing("making a stream")?,
            context: context.clone(),
        })
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn handle(&self) -> ffi::Stream {
        self.handle
    }

    /// As other libraries take it.
    pub(super) fn raw(&self) -> *mut c_void {
        ffi::raw_stream(self.handle)
    }

    /// Marks what was given so far.
    pub fn record(&self, event: Event) -> Result<Fence> {
        self.mark(&event)?;
        Ok(Fence(event))
    }

    /// As [`Stream::record`], for events that only measure time.
    pub fn mark(&self, event: &Event) -> Result<()> {
        ffi::event_record(event.handle, self.handle).doing("marking a place in a stream")
    }

    /// What is given from now on waits until the other stream has passed the fence. The host does not wait.
    pub fn wait(&self, fence: Fence) -> Result<Event> {
        ffi::stream_wait(self.handle, fence.0.handle).doing("ordering two streams")?;
        Ok(fence.0)
    }

    /// The host waits until everything given is done. What went wrong on the GPU shows here.
    pub fn synchronize(&self) -> Result<()> {
        self.context.bind()?;
        ffi::stream_synchronize(self.handle).doing("waiting for the GPU")
    }

    /// # Safety
    /// `from` stays as it is until the stream has passed this point; `to` and as many bytes belong to one owner that lives as long.
    pub unsafe fn copy_in(&self, to: Address, from: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { ffi::copy_to_device(to.0, from.as_ptr(), from.len(), self.handle) }
            .doing("copying to the GPU")
    }

    /// Copies into the buffer from byte `at` on.
    ///
    /// # Safety
    /// The buffer is not looked at until the stream has passed this point, and it and `from` live as long.
    pub unsafe fn copy_out(
        &self,
        to: &mut HostBuffer,
        at: usize,
        from: Address,
        bytes: usize,
    ) -> Result<()> {
        assert!(at + bytes <= to.len(), "a read past its mirror");
        // SAFETY: in bounds (asserted); the rest is the caller's promise.
        unsafe { ffi::copy_to_host(to.pointer().add(at), from.0, bytes, self.handle) }
            .doing("copying from the GPU")
    }

    /// # Safety
    /// Both places and as many bytes belong to owners that live until the stream has passed this point, and do not overlap.
    pub unsafe fn copy_within(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { ffi::copy_on_device(to.0, from.0, bytes, self.handle) }.doing("copying on the GPU")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.synchronize();
        let _ = ffi::stream_destroy(self.handle);
    }
}

impl Event {
    pub fn new(context: &Arc<Context>) -> Result<Event> {
        Event::create(context, false)
    }

    /// Whose distance from another can be asked for.
    pub fn timing(context: &Arc<Context>) -> Result<Event> {
        Event::create(context, true)
    }

    fn create(context: &Arc<Context>, timing: bool) -> Result<Event> {
        context.bind()?;
        Ok(Event {
            handle: ffi::event_create(timing).doing("making an event")?,
            context: context.clone(),
        })
    }

    /// Time on the GPU from `earlier` to this. Both were marked and are done.
    pub fn since(&self, earlier: &Event) -> Result<Duration> {
        let ms = ffi::event_elapsed_ms(earlier.handle, self.handle).doing("timing the GPU")?;
        Ok(Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.bind();
        let _ = ffi::event_destroy(self.handle);
    }
}

impl Fence {
    /// Whether the stream has passed.
    pub fn is_passed(&self) -> Result<bool> {
        ffi::event_is_done(self.0.handle).doing("looking after a copy")
    }

    /// The host waits until the stream has passed.
    pub fn wait_on_host(self) -> Result<Event> {
        ffi::event_synchronize(self.0.handle).doing("waiting for a copy")?;
        Ok(self.0)
    }

    /// For a fence known to be passed, or whose order is given otherwise.
    pub fn into_event(self) -> Event {
        self.0
    }
}
