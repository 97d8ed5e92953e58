//! Memory that a thread works in, allocated when the thread starts.

use super::simd::MAX_LANES;

/// One cache line of float32: gives `Vec` its alignment.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; MAX_LANES]);

/// Zeroed float32, 64-byte aligned.
pub(crate) struct Floats(Vec<Line>);

impl Floats {
    /// Room for `len`, rounded up to whole lines.
    pub(crate) fn new(len: usize) -> Floats {
        Floats(vec![Line([0.0; MAX_LANES]); len.div_ceil(MAX_LANES)])
    }
    pub(crate) fn len(&self) -> usize {
        self.0.len() * MAX_LANES
    }
    pub(crate) fn as_ptr(&self) -> *const f32 {
        self.0.as_ptr().cast()
    }
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Activation rows × weight rows that a task of a product works on at a time, at most (see `linear.rs`).
pub(crate) const SWEEP_ROWS: usize = 128;
pub(crate) const SWEEP_COLS: usize = 128;
/// Sums from one row to the next: a cache line more than a sweep, so that the rows do not share a few sets of a cache.
pub(crate) const SUMS_STRIDE: usize = SWEEP_COLS + MAX_LANES;
/// Elements of K summed in one go; the sums of the blocks are added in order. Part of the definition of a product.
pub(crate) const K_BLOCK: usize = 2048;

/// Query vectors an attention task holds × padded head size, at most.
pub(crate) const QUERY_FLOATS: usize = 48 * 128;
/// Query vectors an attention task holds, at most.
pub(crate) const MAX_QUERIES: usize = 48;
/// The largest head size attention takes.
pub const MAX_HEAD_SIZE: usize = 512;
/// Keys whose softmax is computed in one go, at absolute positions. Part of the definition of attention.
pub const ATTENTION_CHUNK: usize = 256;
/// Tokens of a KV block.
pub const KV_BLOCK_TOKENS: usize = 16;

/// What one thread needs for any op: about 0.5 MB.
pub(crate) struct Scratch {
    /// [SWEEP_ROWS][SUMS_STRIDE]: sums of products.
    pub(crate) sums: Floats,
    /// [queries][padded head size]: scaled queries.
    pub(crate) queries: Floats,
    /// [queries][padded head size]: the sums of the chunks so far.
    pub(crate) merged: Floats,
    /// [queries][padded head size]: the sum of this chunk.
    pub(crate) chunk: Floats,
    /// [queries][ATTENTION_CHUNK]: scores, then weights.
    pub(crate) scores: Floats,
    /// [KV_BLOCK_TOKENS][padded head size]: keys or values of one block as float32.
    pub(crate) block: Floats,
}

impl Scratch {
    pub(crate) fn new() -> Scratch {
        Scratch {
            sums: Floats::new(SWEEP_ROWS * SUMS_STRIDE),
            queries: Floats::new(QUERY_FLOATS),
            merged: Floats::new(QUERY_FLOATS),
            chunk: Floats::new(QUERY_FLOATS),
            scores: Floats::new(MAX_QUERIES * ATTENTION_CHUNK),
            block: Floats::new(KV_BLOCK_TOKENS * MAX_HEAD_SIZE),
        }
    }
}
