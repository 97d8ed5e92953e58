//! The arithmetic of attention over one tile of query vectors: see `attention.rs` for its definition.

// Indices walk several arrays of registers at once.
#![allow(clippy::needless_range_loop)]

use super::act::ActRows;
use super::linear::tile4;
use super::math::exp;
use super::prefetch::Asked;
use super::scratch::{ATTENTION_CHUNK, KV_BLOCK_TOKENS, MAX_QUERIES, QUERY_FLOATS, Scratch};
use super::simd::{F32, MAX_LANES, Op, Simd};

/// Head sizes in scratch are padded with zeros to whole vectors of any instruction set.
pub(super) const fn padded(head_size: usize) -> usize {
    head_size.next_multiple_of(MAX_LANES)
}

/// The query vectors of a tile: vector i is row i / heads, head i % heads.
pub(super) struct Queries<'a> {
    pub(super) q: &'a [f32],
    pub(super) q_stride: usize,
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) first_head: usize,
    pub(super) heads: usize,
    pub(super) head_size: usize,
    pub(super) scale: f32,
}

/// Which keys a row of a tile sees.
#[derive(Clone, Copy)]
pub(super) enum Ranges {
    /// Row i of the tile is at position `first + i`.
    Causal { first: usize, window: Option<usize> },
    /// All of `0..len`.
    All { len: usize },
}

impl Ranges {
    #[inline(always)]
    fn of(self, row: usize) -> (usize, usize) {
        match self {
            Ranges::Causal { first, window } => {
                let end = first + row + 1;
                (window.map_or(0, |w| end.saturating_sub(w)), end)
            }
            Ranges::All { len } => (0, len),
        }
    }
}

/// Where keys and values come from, a block of 16 positions at a time.
pub(super) trait Keys {
    /// Keys (or values) `block·16..block·16 + n` as float32 [n][padded], zeros after each head: where they lie so already, or written to `to`.
    /// Up to three rows more may be read.
    ///
    /// # Safety
    /// `to` holds 16 × padded float32, and the positions exist.
    unsafe fn block<S: Simd>(
        &self,
        s: S,
        values: bool,
        block: usize,
        n: usize,
        to: *mut f32,
    ) -> *const f32;
}

/// # Safety
/// `to` holds `end` float32.
#[inline(always)]
pub(super) unsafe fn zero_pad(to: *mut f32, from: usize, end: usize) {
    for i in from..end {
        // SAFETY: the caller's promise.
        unsafe { *to.add(i) = 0.0 }
    }
}

/// One task: a few rows, the heads of one group.
pub(super) struct Tile<'a, K> {
    pub(super) queries: Queries<'a>,
    pub(super) ranges: Ranges,
    pub(super) keys: K,
    pub(super) out: ActRows,
    pub(super) scratch: &'a mut Scratch,
}

/// The softmax of the keys so far, for each query vector: maximum and sum of exp(score − maximum).
struct Running {
    max: [f32; MAX_QUERIES],
    sum: [f32; MAX_QUERIES],
}

/// The state of a tile while it walks its keys.
struct Walk<'a, K> {
    keys: &'a K,
    count: usize,
    padded: usize,
    /// Keys that query vector i sees.
    ranges: [(usize, usize); MAX_QUERIES],
    queries: *mut f32,
    scores: *mut f32,
    chunk: *mut f32,
    merged: *mut f32,
    block: *mut f32,
}

impl<K: Keys> Op for Tile<'_, K> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let q = &self.queries;
        let mut walk = Walk {
            keys: &self.keys,
            count: q.rows * q.heads,
            padded: padded(q.head_size),
            ranges: [(0, 0); MAX_QUERIES],
            queries: self.scratch.queries.as_mut_ptr(),
            scores: self.scratch.scores.as_mut_ptr(),
            chunk: self.scratch.chunk.as_mut_ptr(),
            merged: self.scratch.merged.as_mut_ptr(),
            block: self.scratch.block.as_mut_ptr(),
        };
        assert!(walk.count <= MAX_QUERIES && walk.count * walk.padded <= QUERY_FLOATS);
        for i in 0..walk.count {
            walk.ranges[i] = self.ranges.of(i / q.heads);
        }
        // SAFETY: scratch holds MAX_QUERIES vectors and QUERY_FLOATS elements (asserted), the op checked the shapes of q and
        // out, and this task alone has these rows and heads.
        unsafe {
            load_queries(s, q, &walk);
            let running = walk.all_chunks(s);
            store_output(s, q, &walk, &running, self.out);
        }
    }
}

#[inline(always)]
unsafe fn load_queries<S: Simd, K>(s: S, q: &Queries<'_>, walk: &Walk<'_, K>) {
    let scale = s.splat(q.scale);
    for i in 0..walk.count {
        let (row, head) = (q.first_row + i / q.heads, q.first_head + i % q.heads);
        // SAFETY: the caller's promise.
        unsafe {
            let from = q.q.as_ptr().add(row * q.q_stride + head * q.head_size);
            let to = walk.queries.add(i * walk.padded);
            let mut c = 0;
            while c < q.head_size {
                let n = (q.head_size - c).min(S::LANES);
                s.store(to.add(c), s.mul(s.load_upto(from.add(c), n), scale));
                c += S::LANES;
            }
            zero_pad(to, c, walk.padded);
        }
    }
}

#[inline(always)]
unsafe fn store_output<S: Simd, K>(
    s: S,
    q: &Queries<'_>,
    walk: &Walk<'_, K>,
    running: &Running,
    out: ActRows,
) {
    for i in 0..walk.count {
        let (row, head) = (q.first_row + i / q.heads, q.first_head + i % q.heads);
        let sum = s.splat(running.sum[i]);
        let mut c = 0;
        while c < q.head_size {
            let n = (q.head_size - c).min(S::LANES);
            // SAFETY: the caller's promise.
            unsafe {
                let o = s.div(s.load(walk.merged.add(i * walk.padded + c)), sum);
                out.put(s, row, head * q.head_size + c, o, n);
            }
            c += n;
        }
    }
}

impl<K: Keys> Walk<'_, K> {
    #[inline(always)]
    unsafe fn all_chunks<S: Simd>(&self, s: S) -> Running {
        let mut running = Running {
            max: [f32::NEG_INFINITY; MAX_QUERIES],
            sum: [0.0; MAX_QUERIES],
        };
        let (mut first, mut end) = (usize::MAX, 0);
        for range in &self.ranges[..self.count] {
            first = first.min(range.0);
            end = end.max(range.1);
        }
        let mut chunk = first / ATTENTION_CHUNK * ATTENTION_CHUNK;
        while chunk < end {
            let from = first.max(chunk) / KV_BLOCK_TOKENS;
            let to = end.min(chunk + ATTENTION_CHUNK);
            // SAFETY: the caller's promise; blocks from..=to/16 hold positions that some row sees.
            unsafe {
                self.score_blocks(s, chunk, from, to);
                let mut softmax = [None; MAX_QUERIES];
                for i in 0..self.count {
                    softmax[i] = self.softmax(s, i, chunk);
                }
                self.sum_blocks(s, chunk, from, to);
                for i in 0..self.count {
                    if let Some(c) = softmax[i] {
                        self.merge(s, i, c, &mut running);
                    }
                }
            }
            chunk += ATTENTION_CHUNK;
        }
        running
    }

    /// scores[i][key − chunk] for the keys of the blocks `from..` below position `to`.
    #[inline(always)]
    unsafe fn score_blocks<S: Simd>(&self, s: S, chunk: usize, from: usize, to: usize) {
        let mut block = from;
        while block * KV_BLOCK_TOKENS < to {
            let key = block * KV_BLOCK_TOKENS;
            let n = (to - key).min(KV_BLOCK_TOKENS);
            // SAFETY: the caller's promise.
            unsafe {
                let keys = self.keys.block(s, false, block, n, self.block);
                let mut i = 0;
                while self.count - i >= 3 && self.count - i != 4 {
                    self.score_tile::<S, 3>(s, i, keys, key - chunk, n);
                    i += 3;
                }
                while self.count - i >= 2 {
                    self.score_tile::<S, 2>(s, i, keys, key - chunk, n);
                    i += 2;
                }
                if self.count - i == 1 {
                    self.score_tile::<S, 1>(s, i, keys, key - chunk, n);
                }
            }
            block += 1;
        }
    }

    /// R query vectors against the `n` keys of a block.
    #[inline(always)]
    unsafe fn score_tile<S: Simd, const R: usize>(
        &self,
        s: S,
        i: usize,
        block: *const f32,
        at: usize,
        n: usize,
    ) {
        // SAFETY: the caller's promise: i + R <= count, at + 16 <= ATTENTION_CHUNK. A group of four keys that is cut short
        // reads whatever lies behind them; those scores are outside every row's range.
        unsafe {
            let mut acts = [self.queries.cast_const().cast::<u8>(); R];
            for (r, a) in acts.iter_mut().enumerate() {
                *a = a.add((i + r) * self.padded * 4);
            }
            let mut j = 0;
            while j < n {
                let mut keys = [block.cast::<u8>(); 4];
                for (g, k) in keys.iter_mut().enumerate() {
                    *k = k.add((j + g) * self.padded * 4);
                }
                let mut sums = [[0f32; 4]; R];
                tile4::<S, F32, R>(s, acts, keys, self.padded, Asked::NOTHING, &mut sums);
                for (r, row) in sums.iter().enumerate() {
                    let to = self.scores.add((i + r) * ATTENTION_CHUNK + at + j);
                    std::ptr::copy_nonoverlapping(row.as_ptr(), to, 4);
                }
                j += 4;
            }
        }
    }

    /// The part of `chunk` that query vector i sees, relative to it.
    #[inline(always)]
    fn part(&self, i: usize, chunk: usize) -> (usize, usize) {
        let (first, end) = self.ranges[i];
        (
            first.max(chunk) - chunk,
            end.min(chunk + ATTENTION_CHUNK).saturating_sub(chunk),
        )
    }

    /// Scores become exp(score − max), zero outside the vector's range. Gives max and sum, nothing when it sees no key here.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, s: S, i: usize, chunk: usize) -> Option<(f32, f32)> {
        let (a, b) = self.part(i, chunk);
        if a >= b {
            return None;
        }
        let from = a / S::LANES * S::LANES;
        let to = b.next_multiple_of(S::LANES);
        // SAFETY: from..to lies inside the vector's row of scores.
        unsafe {
            let scores = self.scores.add(i * ATTENTION_CHUNK);
            fill(scores, from, a, f32::NEG_INFINITY);
            fill(scores, b, to, f32::NEG_INFINITY);
            let mut largest = s.splat(f32::NEG_INFINITY);
            for c in (from..to).step_by(S::LANES) {
                largest = s.max(largest, s.load(scores.add(c)));
            }
            let max = s.largest(largest);
            for c in (from..to).step_by(S::LANES) {
                let p = exp(s, s.sub(s.load(scores.add(c)), s.splat(max)));
                s.store(scores.add(c), p);
            }
            fill(scores, from, a, 0.0);
            fill(scores, b, to, 0.0);
            let mut sum = s.zero();
            for c in (from..to).step_by(S::LANES) {
                sum = s.add(sum, s.load(scores.add(c)));
            }
            Some((max, s.sum(sum)))
        }
    }

    /// chunk[i] = Σ p·v over the keys that vector i sees in this chunk.
    #[inline(always)]
    unsafe fn sum_blocks<S: Simd>(&self, s: S, chunk: usize, from: usize, to: usize) {
        // SAFETY: the caller's promise: count × padded elements are this walk's.
        unsafe {
            fill(self.chunk, 0, self.count * self.padded, 0.0);
            let mut block = from;
            while block * KV_BLOCK_TOKENS < to {
                let key = block * KV_BLOCK_TOKENS;
                let n = (to - key).min(KV_BLOCK_TOKENS);
                let values = self.keys.block(s, true, block, n, self.block);
                let at = key - chunk;
                let mut i = 0;
                while i < self.count {
                    if i + 3 <= self.count && (i..i + 3).all(|i| self.sees(i, chunk, at, n)) {
                        self.sum_tile::<S, 3>(s, i, values, at, (0, n));
                        i += 3;
                        continue;
                    }
                    let (a, b) = self.part(i, chunk);
                    let (a, b) = (a.max(at) - at, b.min(at + n).saturating_sub(at));
                    if a < b {
                        self.sum_tile::<S, 1>(s, i, values, at, (a, b));
                    }
                    i += 1;
                }
                block += 1;
            }
        }
    }

    /// Whether vector i sees all of the `n` keys at `at` in this chunk.
    #[inline(always)]
    fn sees(&self, i: usize, chunk: usize, at: usize, n: usize) -> bool {
        let (a, b) = self.part(i, chunk);
        a <= at && at + n <= b
    }

    /// chunk[i..i + R] += Σ p·v over some keys of a block, in order.
    #[inline(always)]
    unsafe fn sum_tile<S: Simd, const R: usize>(
        &self,
        s: S,
        i: usize,
        values: *const f32,
        at: usize,
        keys: (usize, usize),
    ) {
        let mut c = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while c + 4 * S::LANES <= self.padded {
                self.sum_columns::<S, R, 4>(s, i, values, at, keys, c);
                c += 4 * S::LANES;
            }
            while c < self.padded {
                self.sum_columns::<S, R, 1>(s, i, values, at, keys, c);
                c += S::LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn sum_columns<S: Simd, const R: usize, const C: usize>(
        &self,
        s: S,
        i: usize,
        values: *const f32,
        at: usize,
        keys: (usize, usize),
        c: usize,
    ) {
        // SAFETY: the caller's promise: columns c..c + C·LANES are inside padded, keys inside the block.
        unsafe {
            let mut acc = [[s.zero(); C]; R];
            for r in 0..R {
                for v in 0..C {
                    let from = self.chunk.add((i + r) * self.padded + c + v * S::LANES);
                    acc[r][v] = s.load(from);
                }
            }
            for j in keys.0..keys.1 {
                let mut p = [s.zero(); R];
                for r in 0..R {
                    p[r] = s.splat(*self.scores.add((i + r) * ATTENTION_CHUNK + at + j));
                }
                for v in 0..C {
                    let value = s.load(values.add(j * self.padded + c + v * S::LANES));
                    for r in 0..R {
                        acc[r][v] = s.fma(p[r], value, acc[r][v]);
                    }
                }
            }
            for r in 0..R {
                for v in 0..C {
                    let to = self.chunk.add((i + r) * self.padded + c + v * S::LANES);
                    s.store(to, acc[r][v]);
                }
            }
        }
    }

    /// Takes a chunk's softmax and sum into the running ones.
    #[inline(always)]
    unsafe fn merge<S: Simd>(&self, s: S, i: usize, chunk: (f32, f32), running: &mut Running) {
        let (max, sum) = chunk;
        let first = running.sum[i] == 0.0;
        let to_max = s.largest(s.max(s.splat(running.max[i]), s.splat(max)));
        // SAFETY: the caller's promise.
        unsafe {
            let merged = self.merged.add(i * self.padded);
            let chunk = self.chunk.add(i * self.padded);
            if first {
                std::ptr::copy_nonoverlapping(chunk, merged, self.padded);
                running.max[i] = max;
                running.sum[i] = sum;
                return;
            }
            let old = exp(s, s.splat(running.max[i] - to_max));
            let new = exp(s, s.splat(max - to_max));
            for c in (0..self.padded).step_by(S::LANES) {
                let scaled = s.mul(s.load(merged.add(c)), old);
                s.store(merged.add(c), s.fma(s.load(chunk.add(c)), new, scaled));
            }
            let sums = s.mul(s.splat(running.sum[i]), old);
            running.sum[i] = s.largest(s.fma(s.splat(sum), new, sums));
            running.max[i] = to_max;
        }
    }
}

/// # Safety
/// `from..to` are writable at `p`.
#[inline(always)]
unsafe fn fill(p: *mut f32, from: usize, to: usize, x: f32) {
    for i in from..to {
        // SAFETY: the caller's promise.
        unsafe { *p.add(i) = x }
    }
}
