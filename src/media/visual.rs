//! One image or video, resized and ready to be cut into patches.

use super::Rgb;
use super::processor::Normalize;
use super::resize::resize;

/// Patches along time, height and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    pub t: usize,
    pub h: usize,
    pub w: usize,
}

impl Grid {
    /// Patches of one temporal slice.
    pub fn slice(&self) -> usize {
        self.h * self.w
    }

    pub fn patches(&self) -> usize {
        self.t * self.slice()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Image,
    Video {
        /// Seconds that one temporal patch spans, as positions count them: see [`Clock`](super::Clock).
        seconds_per_grid: f64,
    },
}

/// Resized frames of an image or a video. Patches are float32 rows of `channels · temporal patch · patch²` values, in the order
/// (t, row of cells, column of cells, row in the cell, column in the cell), a cell being the `merge × merge` patches that become one token.
#[derive(Clone, Debug)]
pub struct Visual {
    pub kind: Kind,
    pub grid: Grid,
    /// RGB of each frame, one behind the other. An odd end is repeated by `frame`, not stored twice.
    frames: Vec<u8>,
    count: usize,
    shape: Shape,
    normalize: Normalize,
    hash: u128,
}

/// What the model's patches look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub patch: usize,
    pub temporal: usize,
    pub merge: usize,
}

impl Shape {
    /// Sides are multiples of this.
    pub fn factor(&self) -> usize {
        self.patch * self.merge
    }
}

/// Collects frames of one size, one at a time, so that a video is never in memory at its own size.
pub(super) struct Collector {
    width: usize,
    height: usize,
    frames: Vec<u8>,
    count: usize,
}

impl Collector {
    pub fn new((height, width): (usize, usize)) -> Collector {
        Collector {
            width,
            height,
            frames: Vec::new(),
            count: 0,
        }
    }

    pub fn push(&mut self, frame: &Rgb) {
        let resized = resize(frame, self.width, self.height);
        self.frames.extend_from_slice(&resized.data);
        self.count += 1;
    }

    /// At least one frame must have been pushed.
    pub fn finish(self, kind: Kind, shape: Shape, normalize: Normalize) -> Visual {
        assert!(self.count > 0, "a visual needs a frame");
        let grid = Grid {
            t: self.count.div_ceil(shape.temporal),
            h: self.height / shape.patch,
            w: self.width / shape.patch,
        };
        let mut hasher = twox_hash::XxHash3_128::new();
        hasher.write(&self.frames);
        for n in [grid.t, grid.h, grid.w, self.count] {
            hasher.write(&(n as u64).to_le_bytes());
        }
        Visual {
            kind,
            grid,
            frames: self.frames,
            count: self.count,
            shape,
            normalize,
            hash: hasher.finish_128(),
        }
    }
}

impl Visual {
    /// Equal for equal pixels and grids, whatever file they came from.
    pub fn content_hash(&self) -> u128 {
        self.hash
    }

    /// Frames looked at (1 for an image).
    pub fn frames(&self) -> usize {
        self.count
    }

    /// Tokens it becomes in the prompt.
    pub fn tokens(&self) -> usize {
        self.grid.patches() / (self.shape.merge * self.shape.merge)
    }

    /// Values of one patch row.
    pub fn patch_len(&self) -> usize {
        3 * self.shape.temporal * self.shape.patch * self.shape.patch
    }

    /// Host memory it holds.
    pub fn bytes(&self) -> u64 {
        self.frames.len() as u64
    }

    fn frame(&self, index: usize) -> &[u8] {
        let bytes = self.grid.slice() * self.shape.patch * self.shape.patch * 3;
        &self.frames[index.min(self.count - 1) * bytes..][..bytes]
    }

    /// Writes patch rows `first..` into `out`, which holds whole rows of [`Visual::patch_len`].
    ///
    /// # Panics
    /// When there are fewer rows.
    pub fn write_patches(&self, first: usize, out: &mut [f32]) {
        let len = self.patch_len();
        for (i, row) in out.chunks_exact_mut(len).enumerate() {
            self.write_patch(first + i, row);
        }
    }

    fn write_patch(&self, index: usize, out: &mut [f32]) {
        assert!(
            index < self.grid.patches(),
            "patch {index} of {:?}",
            self.grid
        );
        let Shape {
            patch,
            temporal,
            merge,
        } = self.shape;
        let (t, inside) = (index / self.grid.slice(), index % self.grid.slice());
        let (cell, inside) = (inside / (merge * merge), inside % (merge * merge));
        let cells = self.grid.w / merge;
        let row = cell / cells * merge + inside / merge;
        let col = cell % cells * merge + inside % merge;
        let width = self.grid.w * patch;
        for (block, out) in out.chunks_exact_mut(patch * patch).enumerate() {
            let (channel, frame) = (block / temporal, t * temporal + block % temporal);
            let table = self.normalize.table(channel);
            let frame = self.frame(frame);
            for (y, out) in out.chunks_exact_mut(patch).enumerate() {
                let at = ((row * patch + y) * width + col * patch) * 3 + channel;
                for (x, out) in out.iter_mut().enumerate() {
                    *out = table[frame[at + 3 * x] as usize];
                }
            }
        }
    }
}
