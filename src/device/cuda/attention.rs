//! Attention on the GPU: what a pass shares is sent once, then each layer turns, appends and attends.

use super::CudaDevice;
use super::buffers::{CudaActs, CudaDense, CudaLists, CudaRows, F32, HALF};
use super::kernels::{
    AttentionDecode, AttentionDense, AttentionMerge, AttentionPrefill, RopeAppend, RopeDense,
};
use super::kv::CudaKv;
use super::lists::DecodeBatch;
use super::memory::{Address, DeviceBuffer, bytes_of};
use super::ops::int;
use crate::device::{Acts, AttnShape, DenseShape, Lists, Span};
use crate::error::{Error, Result};

/// Rows of a tile of vision's attention.
const DENSE_ROWS: usize = 64;

impl CudaDevice {
    /// Sends what the ops of a pass share: work lists and angles.
    pub fn begin(
        &self,
        lists: &mut CudaLists,
        spans: &[Span<'_>],
        cos: &[f32],
        sin: &[f32],
    ) -> Result<()> {
        self.context.bind()?;
        lists.lists.fill(&lists.shape, spans);
        let staging = &mut *self.staging.borrow_mut();
        let numbers = &lists.lists.numbers;
        let at = lists.numbers.at(0, numbers.len() * 4);
        staging.send(&self.compute, at, bytes_of(numbers))?;
        staging.send(
            &self.compute,
            lists.cos.at(0, cos.len() * F32),
            bytes_of(cos),
        )?;
        staging.send(
            &self.compute,
            lists.sin.at(0, sin.len() * F32),
            bytes_of(sin),
        )
    }

    /// Turns q and k; k and v go into the cache, q into the lists' own room.
    pub fn rope_append(
        &self,
        lists: &mut CudaLists,
        q: &CudaRows,
        k: &CudaRows,
        v: &CudaRows,
        kv: &mut CudaKv,
        layer: usize,
    ) -> Result<()> {
        let s = &lists.shape;
        let rows = lists.lists.rows;
        let (q_cols, kv_cols) = (s.heads * s.head_size, s.kv_heads * s.head_size);
        let half = rows * s.head_size / 2 * F32;
        self.kernels.rope_append.launch(
            &self.compute,
            (rows, 1),
            RopeAppend {
                q: q.at(0, rows * q_cols),
                k: k.at(0, rows * kv_cols),
                v: v.at(0, rows * kv_cols),
                cos: lists.cos.at(0, half),
                sin: lists.sin.at(0, half),
                slots: lists.list(&lists.lists.slots),
                q_out: lists.q.at(0, rows * q_cols * HALF),
                kv: kv.enter(&self.compute, layer)?,
                q_stride: q_cols as i64,
                k_stride: kv_cols as i64,
                v_stride: kv_cols as i64,
                heads: int(s.heads)?,
                kv_heads: int(s.kv_heads)?,
                head_size: int(s.head_size)?,
            },
        )
    }

    /// Attention of the rows that [`CudaDevice::rope_append`] turned last.
    pub fn attention(
        &self,
        lists: &CudaLists,
        kv: &CudaKv,
        layer: usize,
        shape: &AttnShape,
        out: &mut CudaActs,
    ) -> Result<()> {
        let l = &lists.lists;
        let q_cols = shape.heads * shape.head_size;
        let out = out.begin(l.rows, q_cols);
        let q = lists.q.at(0, l.rows * q_cols * HALF);
        let (segments, tables) = (lists.list(&l.segments), lists.list(&l.tables));
        let (heads, kv_heads) = (int(shape.heads)?, int(shape.kv_heads)?);
        let window = int(shape.window.unwrap_or(0))?;
        let cache = kv;
        let kv = cache.layer(layer);
        self.kernels.prefill.launch(
            &self.compute,
            (l.tiles.len() / 2, shape.kv_heads),
            AttentionPrefill {
                q,
                kv,
                segments,
                tables,
                tiles: lists.list(&l.tiles),
                out,
                heads,
                kv_heads,
                window,
                scale: shape.scale,
            },
        )?;
        let which = lists.shape.windows.iter().position(|w| *w == shape.window);
        let which = which.ok_or_else(|| Error::internal("a window that has no lists"))?;
        let (sums, maxima) = (lists.sums.address(), lists.maxima.address());
        for batch in &l.decodes[which] {
            self.kernels.decode.launch(
                &self.compute,
                (batch.item_count(), shape.kv_heads),
                AttentionDecode {
                    q,
                    kv,
                    segments,
                    tables,
                    items: lists.list(&batch.items),
                    sums,
                    maxima,
                    heads,
                    kv_heads,
                    window,
                    scale: shape.scale,
                },
            )?;
            self.merge(lists, batch, shape, out)?;
        }
        cache.leave(&self.compute, layer)
    }

    /// The last merge of [`CudaDevice::attention`] of decoding rows, once more, for timing it by itself; of how many chunks of keys.
    pub fn merge_again(&self, lists: &Lists, shape: &AttnShape, out: &mut Acts) -> Result<usize> {
        let (lists, out) = (lists.0.cuda(), out.data.cuda_mut());
        let out = out.begin(lists.lists.rows, shape.heads * shape.head_size);
        let which = lists.shape.windows.iter().position(|w| *w == shape.window);
        let batches = which.map_or(&[][..], |w| &lists.lists.decodes[w]);
        match batches.last() {
            Some(batch) => {
                self.merge(lists, batch, shape, out)?;
                Ok(batch.item_count())
            }
            None => Ok(0),
        }
    }

    fn merge(
        &self,
        lists: &CudaLists,
        batch: &DecodeBatch,
        s: &AttnShape,
        out: Address,
    ) -> Result<()> {
        self.kernels.merge.launch(
            &self.compute,
            (batch.merge_count(), s.kv_heads),
            AttentionMerge {
                sums: lists.sums.address(),
                maxima: lists.maxima.address(),
                segments: lists.list(&lists.lists.segments),
                merges: lists.list(&batch.merges),
                out,
                heads: int(s.heads)?,
                kv_heads: int(s.kv_heads)?,
                head_size: int(s.head_size)?,
            },
        )
    }

    /// RoPE of rows `[q | k | v]`, rounded into `dense`.
    pub fn rope_dense(
        &self,
        qkv: &CudaRows,
        rows: usize,
        shape: &DenseShape,
        cos: &[f32],
        sin: &[f32],
        dense: &mut CudaDense,
    ) -> Result<()> {
        let kernels = self.vision()?;
        self.context.bind()?;
        let staging = &mut *self.staging.borrow_mut();
        staging.send(
            &self.compute,
            dense.cos.at(0, cos.len() * F32),
            bytes_of(cos),
        )?;
        staging.send(
            &self.compute,
            dense.sin.at(0, sin.len() * F32),
            bytes_of(sin),
        )?;
        let cols = shape.heads * shape.head_size;
        let half = rows * shape.head_size / 2 * F32;
        let part = |i: usize| qkv.at(i * cols, (rows.max(1) - 1) * 3 * cols + cols);
        let value = |b: &DeviceBuffer| b.at(0, rows * cols * HALF);
        kernels.rope.launch(
            &self.compute,
            (rows, 1),
            RopeDense {
                q: part(0),
                k: part(1),
                v: part(2),
                cos: dense.cos.at(0, half),
                sin: dense.sin.at(0, half),
                q_out: value(&dense.q),
                k_out: value(&dense.k),
                v_out: value(&dense.v),
                stride: 3 * cols as i64,
                heads: int(shape.heads)?,
                head_size: int(shape.head_size)?,
            },
        )
    }

    /// Attention within windows of the rows that [`CudaDevice::rope_dense`] turned.
    pub fn attention_dense(
        &self,
        shape: &DenseShape,
        ends: &[usize],
        dense: &mut CudaDense,
        out: &mut CudaActs,
    ) -> Result<()> {
        let kernels = self.vision()?;
        self.context.bind()?;
        let rows = ends.last().copied().unwrap_or(0);
        let cols = shape.heads * shape.head_size;
        let windows = ends.len().saturating_sub(1);
        dense.list.clear();
        dense.list.extend(ends.iter().map(|e| *e as i32));
        dense.list.resize(ends.len().next_multiple_of(4), 0);
        let first_tile = dense.list.len();
        for window in 0..windows {
            let tiles = (ends[window + 1] - ends[window]).div_ceil(DENSE_ROWS);
            dense
                .list
                .extend((0..tiles).flat_map(|tile| [window as i32, tile as i32]));
        }
        let tiles = (dense.list.len() - first_tile) / 2;
        let numbers = dense.numbers.at(0, dense.list.len() * 4);
        let staging = &mut *self.staging.borrow_mut();
        staging.send(&self.compute, numbers, bytes_of(&dense.list))?;
        let value = |b: &DeviceBuffer| b.at(0, rows * cols * HALF);
        kernels.attention.launch(
            &self.compute,
            (tiles, shape.heads),
            AttentionDense {
                q: value(&dense.q),
                k: value(&dense.k),
                v: value(&dense.v),
                windows: numbers,
                tiles: numbers.plus(first_tile * 4),
                out: out.begin(rows, cols),
                heads: int(shape.heads)?,
                scale: shape.scale,
            },
        )
    }
}
