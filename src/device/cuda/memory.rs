//! Memory the GPU works with: its own, and the host's pinned.

use std::sync::Arc;

use super::context::{Context, Doing, failure};
use super::ffi::{self, Failure};
use crate::error::{Error, Result};

/// An address on the device, as a kernel takes it. 0 stands for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Address(pub u64);

impl Address {
    pub const NONE: Address = Address(0);

    pub fn plus(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// A piece of device memory. Its content is undefined until something is written.
pub struct DeviceBuffer {
    context: Arc<Context>,
    address: u64,
    bytes: u64,
}

/// Blocks of at least so many bytes have pages of the GPU to themselves.
const LARGE_BYTES: u64 = 1 << 20;
/// A page of the GPU.
const PAGE_BYTES: u64 = 2 << 20;
/// Of what the driver cuts out of its pages for smaller blocks.
const SMALL_BYTES: u64 = 512;

impl DeviceBuffer {
    /// `what` names it in errors. Counted against the context's limit.
    pub fn new(context: &Arc<Context>, bytes: u64, what: &str) -> Result<DeviceBuffer> {
        let bytes = bytes.max(1).next_multiple_of(SMALL_BYTES);
        let charged = DeviceBuffer::rounded(bytes);
        context.bind()?;
        context.take(charged, what)?;
        let address = ffi::device_alloc(bytes).doing(&format!("allocating {what}"));
        if address.is_err() {
            context.give_back(charged);
        }
        Ok(DeviceBuffer {
            address: address?,
            context: context.clone(),
            bytes,
        })
    }

    /// What [`DeviceBuffer::new`] takes for so many bytes: whole pages for large blocks, multiples of 512 for those that share pages, whose
    /// unfilled rest is part of the slack. No document of NVIDIA's says so: it is what others' allocators were built on and what free memory
    /// before and after shows elsewhere; it has not been looked at on a GPU here.
    pub fn rounded(bytes: u64) -> u64 {
        match bytes.max(1).next_multiple_of(SMALL_BYTES) {
            large if large >= LARGE_BYTES => large.next_multiple_of(PAGE_BYTES),
            small => small,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn address(&self) -> Address {
        Address(self.address)
    }

    /// The address of `bytes` bytes from `offset` on.
    ///
    /// # Panics
    /// Past the end: a kernel would write into somebody else's memory.
    pub fn at(&self, offset: usize, bytes: usize) -> Address {
        assert!(
            (offset + bytes) as u64 <= self.bytes,
            "{bytes} bytes at {offset} of a device buffer of {}",
            self.bytes
        );
        Address(self.address + offset as u64)
    }
}

impl Drop for DeviceBuffer {
    /// Waits for the GPU first: what it was given may still use the memory.
    fn drop(&mut self) {
        // After a lost device nothing can be freed; the process's end frees it.
        if self.context.synchronize().is_ok() {
            let _ = ffi::device_free(self.address);
        }
        self.context.give_back(DeviceBuffer::rounded(self.bytes));
    }
}

/// Pinned host memory, zeroed: the GPU copies from and to it without the CPU.
pub struct HostBuffer {
    context: Arc<Context>,
    address: *mut u8,
    bytes: usize,
}

// SAFETY: owned memory like a Vec's; reached through `&` and `&mut` alone.
unsafe impl Send for HostBuffer {}
// SAFETY: as above.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    pub fn new(context: &Arc<Context>, bytes: usize, what: &str) -> Result<HostBuffer> {
        let bytes = bytes.max(1).next_multiple_of(64);
        context.bind()?;
        let address =
            ffi::host_alloc(bytes as u64).doing(&format!("allocating pinned memory for {what}"))?;
        // SAFETY: the driver just gave `bytes` writable bytes at `address` to us alone.
        unsafe { address.write_bytes(0, bytes) };
        Ok(HostBuffer {
            context: context.clone(),
            address,
            bytes,
        })
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Part of it, which the GPU does not write meanwhile.
    pub fn piece(&self, first: usize, len: usize) -> &[u8] {
        assert!(first + len <= self.bytes);
        // SAFETY: in bounds (asserted), initialised, our own. Whoever lets the GPU write here waits for it before looking.
        unsafe { std::slice::from_raw_parts(self.address.add(first), len) }
    }

    /// Part of it, which the GPU neither reads nor writes meanwhile.
    pub fn piece_mut(&mut self, first: usize, len: usize) -> &mut [u8] {
        assert!(first + len <= self.bytes);
        // SAFETY: as in `piece`, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address.add(first), len) }
    }

    pub fn pointer(&self) -> *mut u8 {
        self.address
    }

    /// The first `count` elements of a plain type.
    pub fn elements<T: Plain>(&self, count: usize) -> &[T] {
        assert!(count * size_of::<T>() <= self.bytes);
        // SAFETY: in bounds (asserted), aligned (pages), and any bits are a value of a plain type.
        unsafe { std::slice::from_raw_parts(self.address.cast(), count) }
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // A lost GPU may still read or write it.
        if self.context.synchronize().is_ok() {
            let _ = ffi::host_free(self.address);
        }
    }
}

/// Types of 32 bits any of whose bits are a value.
pub trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for i32 {}
impl Plain for u32 {}

/// The bytes of plain values, as the GPU reads them: both sides are little-endian.
pub fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain values have no padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The memory in pieces that end where an address is a multiple of `bytes`: so pieces of parts end where those of the whole do.
pub(super) fn cut(memory: &[u8], bytes: usize) -> impl Iterator<Item = &[u8]> {
    let mut rest = memory;
    std::iter::from_fn(move || {
        let most = bytes - rest.as_ptr() as usize % bytes;
        let (piece, after) = rest.split_at(most.min(rest.len()));
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Why memory was not pinned.
#[derive(Debug)]
pub struct Refusal {
    pub why: Error,
    /// This system pins nothing, however little and whenever it is asked.
    pub for_good: bool,
}

impl From<Error> for Refusal {
    fn from(why: Error) -> Refusal {
        Refusal {
            why,
            for_good: false,
        }
    }
}

impl From<Failure> for Refusal {
    fn from(f: Failure) -> Refusal {
        /// CUDA_ERROR_NOT_SUPPORTED
        const NOT_SUPPORTED: u32 = 801;
        Refusal {
            why: failure(f, "pinning host memory"),
            for_good: [NOT_SUPPORTED, ffi::NEWER_DRIVER].contains(&f.number()),
        }
    }
}

/// Host memory of somebody else that is pinned as long as this lives.
pub struct Pin {
    context: Arc<Context>,
    /// Of the pieces, each of which the driver knows by itself: no copy may reach from one into another.
    pieces: Vec<*const u8>,
    /// Keeps the memory where it is.
    owner: Option<Box<dyn Send + Sync>>,
}

// SAFETY: the addresses are only handed back to the driver.
unsafe impl Send for Pin {}
// SAFETY: as above.
unsafe impl Sync for Pin {}

impl Pin {
    /// Pins whole pages as one piece. `owner` keeps them mapped.
    pub fn new(context: &Arc<Context>, memory: &[u8], owner: Box<dyn Send + Sync>) -> Result<Pin> {
        Pin::in_pieces(context, memory, usize::MAX, owner).map_err(|refusal| refusal.why)
    }

    /// The same in pieces that meet at multiples of `piece_bytes`.
    pub fn in_pieces(
        context: &Arc<Context>,
        memory: &[u8],
        piece_bytes: usize,
        owner: Box<dyn Send + Sync>,
    ) -> Result<Pin, Refusal> {
        context.bind()?;
        let mut pin = Pin {
            context: context.clone(),
            pieces: Vec::new(),
            owner: Some(owner),
        };
        for piece in cut(memory, piece_bytes) {
            // What is pinned already is unpinned where a later piece is refused.
            ffi::host_register(piece.as_ptr(), piece.len())?;
            pin.pieces.push(piece.as_ptr());
        }
        Ok(pin)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        match self.context.synchronize() {
            Ok(()) => {
                for piece in &self.pieces {
                    let _ = ffi::host_unregister(*piece);
                }
            }
            // A lost GPU may still read it: it stays where it is.
            Err(_) => std::mem::forget(self.owner.take()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_part_end_where_those_of_the_whole_do() {
        let memory = vec![7u8; 1000];
        let borders = |part: &[u8]| -> Vec<usize> {
            assert_eq!(cut(part, 64).map(<[u8]>::len).sum::<usize>(), part.len());
            cut(part, 64).map(|p| p.as_ptr() as usize).collect()
        };
        let whole = borders(&memory);
        assert!(whole[1..].iter().all(|a| a % 64 == 0));
        assert!(whole.len() >= 1000 / 64);
        let part = borders(&memory[100..900]);
        assert!(part[1..].iter().all(|a| whole.contains(a)));
        assert!(cut(&[], 64).next().is_none());
    }

    #[test]
    fn large_blocks_take_whole_pages() {
        for (bytes, takes) in [
            (0, 512),
            (513, 1024),
            ((1 << 20) - 512, (1 << 20) - 512),
            ((1 << 20) - 511, 2 << 20),
            (2 << 20, 2 << 20),
            ((2 << 20) + 1, 4 << 20),
        ] {
            assert_eq!(DeviceBuffer::rounded(bytes), takes);
        }
    }
}
