//! Page-aligned host memory, reserved once at start: what slots, frames and resident units are made of.
//!
//! One anonymous mapping serves the CPU device, the ring (registered buffers) and CUDA (pinned memory), so that no byte is copied
//! between them. Who may touch which bytes is decided here and nowhere else: a [`Region`] owns a piece of the arena, and a [`Frame`] is
//! a piece of a region lent to one read. The kernel or a thread may write into a frame at any time until the frame is dropped,
//! therefore the region's own view ([`Region::bytes`]) asserts that no frame is out, and a frame keeps the mapping alive
//! whatever else has been dropped before it.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use memmap2::{Advice, MmapMut, MmapRaw};

use super::errno;
use crate::error::{Code, Error, Result};
use crate::units::{ALIGN_BYTES, align_up, flag_size, human_bytes};

/// No more of an arena is registered by one call: a ring's buffer may not be larger (the kernel answers EFAULT), and a GPU's driver
/// refuses to pin one huge piece on some systems.
pub const SEGMENT_BYTES: usize = 1 << 30;

/// A handle on one mapping; clones share it. The mapping goes when the last handle, region and frame have gone.
#[derive(Clone)]
pub struct Arena(Arc<Mapping>);

struct Mapping {
    map: MmapRaw,
    /// Bytes handed out so far: the arena only grows its use, regions are never given back.
    taken: AtomicU64,
}

/// One piece of at most [`SEGMENT_BYTES`]: a buffer that is registered with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub address: usize,
    pub bytes: usize,
}

impl Arena {
    /// Reserves `bytes` (rounded up to 4096) and touches every page, so that later reads meet no page fault.
    ///
    /// Errors: [`Code::Memory`] when the system refuses.
    pub fn new(bytes: u64) -> Result<Arena> {
        let bytes = align_up(bytes.max(1), ALIGN_BYTES);
        let refused = |error: std::io::Error| {
            Error::new(
                Code::Memory,
                format!("cannot reserve {} of host memory", human_bytes(bytes)),
                errno::describe_error(&error),
                format!(
                    "give a --cpu-memory of which {} less is used for weights, or free some memory",
                    flag_size(bytes)
                ),
            )
        };
        let len = usize::try_from(bytes)
            .map_err(|_| refused(std::io::Error::from_raw_os_error(libc::ENOMEM)))?;
        let map = MmapRaw::from(MmapMut::map_anon(len).map_err(refused)?);
        // Both are wishes. Huge pages make a large read few segments instead of a thousand: drives that bound the segments of a request
        // then take it whole (several times the rate on a virtual disk), and the kernel has less to pin and to walk. And a forked
        // child must not turn pages the kernel is reading into into copies.
        let _ = map.advise(Advice::HugePage);
        let _ = map.advise(Advice::DontFork);
        if let Err(error) = map.advise(Advice::PopulateWrite) {
            match error.raw_os_error() {
                // Kernels before 5.14 do not know the advice.
                Some(libc::EINVAL) => touch(&map),
                _ => return Err(refused(error)),
            }
        }
        Ok(Arena(Arc::new(Mapping {
            map,
            taken: AtomicU64::new(0),
        })))
    }

    /// Size of the mapping, a multiple of 4096.
    pub fn bytes(&self) -> u64 {
        self.0.map.len() as u64
    }

    /// Bytes not yet taken.
    pub fn left(&self) -> u64 {
        self.bytes() - self.0.taken.load(Ordering::Relaxed)
    }

    /// Takes the next unused `bytes` (rounded up to 4096). `None` when that many are not left. For the start of a run only: it allocates.
    pub fn take(&self, bytes: u64) -> Option<Region> {
        if bytes > self.bytes() {
            return None;
        }
        let len = align_up(bytes, ALIGN_BYTES);
        let start = self
            .0
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                (len <= self.bytes() - taken).then_some(taken + len)
            })
            .ok()?;
        Some(Region {
            home: Arc::new(Home {
                mapping: self.0.clone(),
                lent: AtomicUsize::new(0),
            }),
            start: start as usize,
            len: len as usize,
            cursor: 0,
        })
    }

    /// The whole arena in pieces of [`SEGMENT_BYTES`] counted from its beginning, the last one shorter: buffer `i` of a ring. Whoever
    /// registers them keeps a clone of the arena until they are unregistered.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + use<> {
        let address = self.0.map.as_mut_ptr() as usize;
        let bytes = self.0.map.len();
        (0..bytes).step_by(SEGMENT_BYTES).map(move |at| Segment {
            address: address + at,
            bytes: SEGMENT_BYTES.min(bytes - at),
        })
    }
}

/// Writes one byte of each page: the mapping is fresh, so zero is what is there already.
fn touch(map: &MmapRaw) {
    for at in (0..map.len()).step_by(ALIGN_BYTES as usize) {
        // SAFETY: `at < map.len()`, the mapping is writable, and nobody else knows of it yet.
        unsafe { map.as_mut_ptr().add(at).write_volatile(0) };
    }
}

/// What keeps a region's memory alive and counts its frames. Shared by the region and the frames it lends.
struct Home {
    mapping: Arc<Mapping>,
    lent: AtomicUsize,
}

/// An exclusively owned contiguous piece of an arena: a slot's memory, a frame of the ring, or the buffer of a resident unit.
pub struct Region {
    home: Arc<Home>,
    start: usize,
    len: usize,
    cursor: usize,
}

impl Region {
    /// Bytes, a multiple of 4096.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Lends the next `len` bytes (a multiple of 4096) to a read; the cursor only moves forward until [`Region::rewind`]. No allocation.
    ///
    /// # Panics
    /// When `len` is no multiple of 4096 or more than what is left: the caller lays out the reads, so that is a bug.
    pub fn lend(&mut self, len: usize) -> Frame {
        assert!(
            len.is_multiple_of(ALIGN_BYTES as usize) && len <= self.len - self.cursor,
            "a frame of {len} bytes does not fit a region of {} of which {} are used",
            self.len,
            self.cursor
        );
        let start = self.start + self.cursor;
        self.cursor += len;
        self.home.lent.fetch_add(1, Ordering::Relaxed);
        Frame {
            home: self.home.clone(),
            start,
            len,
            room: len,
        }
    }

    /// A second owner of the same bytes, which must never be: [`crate::planted::Bug::SlotFreedEarly`].
    #[cfg(feature = "testing")]
    pub(crate) fn alias(&self) -> Region {
        Region {
            home: Arc::new(Home {
                mapping: self.home.mapping.clone(),
                lent: AtomicUsize::new(0),
            }),
            start: self.start,
            len: self.len,
            cursor: 0,
        }
    }

    /// Frames not yet given back.
    pub fn lent(&self) -> usize {
        // Acquire, with the release in Frame's drop: what was written through a frame is visible once it no longer counts.
        self.home.lent.load(Ordering::Acquire)
    }

    /// Bytes lent since the last rewind.
    pub fn used(&self) -> usize {
        self.cursor
    }

    /// The cursor back to 0: the memory may be lent again.
    ///
    /// # Panics
    /// When a frame is still out: a read into it would meet the next read.
    pub fn rewind(&mut self) {
        assert_eq!(self.lent(), 0, "region rewound while reads are in flight");
        self.cursor = 0;
    }

    /// # Panics
    /// When a frame is still out.
    pub fn bytes(&self) -> &[u8] {
        assert_eq!(self.lent(), 0, "region looked at while reads are in flight");
        // SAFETY: the arena gave `start..start+len` to this region alone, it lies inside the mapping that `home` keeps alive, and is
        // initialised (anonymous memory is zero). No frame is out, and none can be lent while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.len) }
    }

    /// # Panics
    /// When a frame is still out.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        assert_eq!(
            self.lent(),
            0,
            "region written to while reads are in flight"
        );
        // SAFETY: as in `bytes`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.len) }
    }

    fn pointer(&self) -> *mut u8 {
        // SAFETY: `start` was bounded by the mapping's length when the arena handed out the region.
        unsafe { self.home.mapping.map.as_mut_ptr().add(self.start) }
    }
}

/// A piece of a region owned by one read in flight. Dropping it gives it back.
pub struct Frame {
    home: Arc<Home>,
    start: usize,
    len: usize,
    /// What was lent: `len` at most.
    room: usize,
}

impl Frame {
    /// Uses the first `len` bytes of what was lent (a multiple of 4096): for frames that go from read to read.
    ///
    /// # Panics
    /// When that is more than was lent.
    pub fn resize(&mut self, len: usize) {
        assert!(
            len.is_multiple_of(ALIGN_BYTES as usize) && len <= self.room,
            "a frame of {} bytes cannot hold {len}",
            self.room
        );
        self.len = len;
    }

    /// Index of the one segment the whole frame lies in; `None` when it crosses a segment's border (such a frame is read plainly).
    pub(super) fn segment(&self) -> Option<u16> {
        let first = self.start / SEGMENT_BYTES;
        let last = (self.start + self.len.max(1) - 1) / SEGMENT_BYTES;
        (first == last).then(|| u16::try_from(first).ok()).flatten()
    }

    /// Whether the frame lies in that arena.
    pub(super) fn is_of(&self, arena: &Arena) -> bool {
        Arc::ptr_eq(&self.home.mapping, &arena.0)
    }

    /// Where the kernel is to write: valid for `len` bytes, aligned to 4096, as long as the frame lives.
    pub(super) fn pointer(&mut self) -> *mut u8 {
        self.address()
    }

    fn address(&self) -> *mut u8 {
        // SAFETY: `start + len` was bounded by the region, which lies inside the mapping.
        unsafe { self.home.mapping.map.as_mut_ptr().add(self.start) }
    }
}

impl Deref for Frame {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the region's cursor gave `start..start+len` to this frame alone and the region itself does not look while frames are
        // out; `home` keeps the mapping alive. Readers own the frame (and nobody else can reach it) while they write to it.
        unsafe { std::slice::from_raw_parts(self.address(), self.len) }
    }
}

impl DerefMut for Frame {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the frame is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len) }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        self.home.lent.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn regions_are_aligned_disjoint_and_bounded() {
        let arena = Arena::new(3 * 4096 + 1).unwrap();
        assert_eq!(arena.bytes(), 4 * 4096);
        let mut a = arena.take(1).unwrap();
        let mut b = arena.take(8192).unwrap();
        assert_eq!((a.len(), b.len(), arena.left()), (4096, 8192, 4096));
        assert!(arena.take(4097).is_none());
        assert!(arena.take(u64::MAX).is_none());
        assert_eq!(a.bytes().as_ptr() as usize % 4096, 0);
        a.bytes_mut().fill(1);
        b.bytes_mut().fill(2);
        assert!(a.bytes().iter().all(|&x| x == 1));
        assert_eq!(arena.take(4096).unwrap().len(), 4096);
        assert!(arena.take(1).is_none());
        assert_eq!(arena.take(0).unwrap().len(), 0);
    }

    #[test]
    fn a_region_is_out_of_reach_while_frames_are_out() {
        let arena = Arena::new(8192).unwrap();
        let mut region = arena.take(8192).unwrap();
        let mut first = region.lend(4096);
        let second = region.lend(4096);
        assert_eq!((region.lent(), region.used()), (2, 8192));
        first.fill(7);
        drop(first);
        assert!(catch_unwind(AssertUnwindSafe(|| region.bytes().len())).is_err());
        assert!(catch_unwind(AssertUnwindSafe(|| region.rewind())).is_err());
        drop(second);
        assert_eq!(region.bytes()[4095..4097], [7, 0]);
        region.rewind();
        assert_eq!(region.lend(8192).len(), 8192);
        assert!(catch_unwind(AssertUnwindSafe(|| region.lend(4096))).is_err());
    }

    #[test]
    fn frames_must_be_whole_pages() {
        let mut region = Arena::new(8192).unwrap().take(8192).unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| region.lend(100))).is_err());
    }

    #[test]
    fn a_frame_outlives_its_region_and_arena() {
        let arena = Arena::new(4096).unwrap();
        let mut region = arena.take(4096).unwrap();
        let mut frame = region.lend(4096);
        drop(region);
        drop(arena);
        frame.fill(3);
        assert!(
            std::thread::spawn(move || frame.iter().all(|&b| b == 3))
                .join()
                .unwrap()
        );
    }

    #[test]
    fn segments_cover_the_arena() {
        let arena = Arena::new(10 * 4096).unwrap();
        let all: Vec<Segment> = arena.segments().collect();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].bytes, 10 * 4096);
        let mut region = arena.take(4096).unwrap();
        let frame = region.lend(4096);
        assert_eq!(frame.segment(), Some(0));
        assert!(frame.is_of(&arena.clone()));
        assert!(!frame.is_of(&Arena::new(1).unwrap()));
    }

    #[test]
    fn frames_across_a_border_name_no_segment() {
        // Arithmetic only: a gibibyte need not be touched to see where the border lies.
        let mapping = Arena::new(4096).unwrap().0;
        let frame = |start, len| Frame {
            home: Arc::new(Home {
                mapping: mapping.clone(),
                lent: AtomicUsize::new(1),
            }),
            start,
            len,
            room: len,
        };
        assert_eq!(frame(SEGMENT_BYTES - 4096, 4096).segment(), Some(0));
        assert_eq!(frame(SEGMENT_BYTES, 4096).segment(), Some(1));
        assert_eq!(frame(SEGMENT_BYTES - 4096, 8192).segment(), None);
    }

    #[test]
    fn too_much_memory_is_an_error() {
        let error = Arena::new(1 << 60).err().unwrap();
        assert_eq!(error.code(), Code::Memory);
        assert!(error.cause().contains("ENOMEM"), "{error}");
    }
}
