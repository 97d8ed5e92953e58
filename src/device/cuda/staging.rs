//! What the host sends in small pieces each pass: lists, angles, embedding rows. They go through a small ring of pinned memory, so that the
//! caller may reuse its own at once and the GPU takes them in the stream's order.

use std::sync::Arc;

use super::context::Context;
use super::memory::{Address, HostBuffer};
use super::stream::{Event, Fence, Stream};
use crate::error::{Error, Result};

/// Of each half of the ring.
const HALF_BYTES: usize = 4 << 20;

pub struct Staging {
    buffer: HostBuffer,
    /// Next free byte of the half in use.
    at: usize,
    half: usize,
    /// Until the GPU has taken what a half holds.
    fences: [Option<Fence>; 2],
    events: Vec<Event>,
}

impl Staging {
    pub fn new(context: &Arc<Context>) -> Result<Staging> {
        Ok(Staging {
            buffer: HostBuffer::new(context, 2 * HALF_BYTES, "what is sent each pass")?,
            at: 0,
            half: 0,
            fences: [None, None],
            events: vec![Event::new(context)?, Event::new(context)?],
        })
    }

    /// Copies `bytes` to the device, in the stream's order.
    pub fn send(&mut self, stream: &Stream, to: Address, bytes: &[u8]) -> Result<()> {
        for (i, piece) in bytes.chunks(HALF_BYTES).enumerate() {
            let to = to.plus(i * HALF_BYTES);
            self.send_piece(stream, to, piece)?;
        }
        Ok(())
    }

    /// At most half the ring.
    fn send_piece(&mut self, stream: &Stream, to: Address, piece: &[u8]) -> Result<()> {
        let len = piece.len();
        if self.at + len > HALF_BYTES {
            self.turn(stream)?;
        }
        let first = self.half * HALF_BYTES + self.at;
        self.buffer.piece_mut(first, len).copy_from_slice(piece);
        self.at = (self.at + len).next_multiple_of(64);
        // SAFETY: this part of the ring is written again only after its half's fence, which `turn` records behind this copy and waits for.
        unsafe { stream.copy_in(to, self.buffer.piece(first, len)) }
    }

    /// The other half, once the GPU has taken what it held.
    fn turn(&mut self, stream: &Stream) -> Result<()> {
        let event = self
            .events
            .pop()
            .ok_or_else(|| Error::internal("the staging ring has lost an event"))?;
        self.fences[self.half] = Some(stream.record(event)?);
        self.half = 1 - self.half;
        self.at = 0;
        if let Some(fence) = self.fences[self.half].take() {
            self.events.push(fence.wait_on_host()?);
        }
        Ok(())
    }
}
