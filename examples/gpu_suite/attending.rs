//! Attention at a 7B model's shape, ready to be timed: the suite's and the benches'.
#![allow(dead_code)] // each uses a part

use tensorpager::device::{Acts, AttnShape, Kv, KvShape, ListShape, Lists, PassRows, Rows, Span};
use tensorpager::error::Result;

use super::bed::Bed;

pub const HEAD: usize = 128;

/// A pass of `sequences` sequences, each of `new` tokens behind `cached` ones.
pub struct Attention<'b> {
    bed: &'b Bed,
    lists: Lists,
    kv: Kv,
    shape: AttnShape,
    tables: Vec<Vec<u32>>,
    cached: usize,
    new: usize,
    angles: Vec<f32>,
    q: Rows,
    k: Rows,
    v: Rows,
    out: Acts,
}

impl<'b> Attention<'b> {
    pub fn new(
        bed: &'b Bed,
        (heads, kv_heads): (usize, usize),
        sequences: usize,
        cached: usize,
        new: usize,
    ) -> Result<Attention<'b>> {
        let blocks = (cached + new).div_ceil(16);
        let tables: Vec<Vec<u32>> = (0..sequences)
            .map(|i| (0..blocks).map(|b| (b * sequences + i) as u32).collect())
            .collect();
        let rows = sequences * new;
        let d = &bed.device;
        Ok(Attention {
            lists: d.lists(&ListShape {
                rows,
                spans: sequences,
                table: sequences * blocks,
                context: cached + new,
                heads,
                kv_heads,
                head_size: HEAD,
                windows: vec![None],
            })?,
            kv: d.kv(&KvShape {
                layers: 1,
                blocks: sequences * blocks,
                kv_heads,
                head_size: HEAD,
                dtype: bed.half,
            })?,
            shape: AttnShape {
                heads,
                kv_heads,
                head_size: HEAD,
                scale: 0.088,
                window: None,
            },
            tables,
            cached,
            new,
            angles: vec![0.5; rows * HEAD / 2],
            q: d.rows(rows, heads * HEAD)?,
            k: d.rows(rows, kv_heads * HEAD)?,
            v: d.rows(rows, kv_heads * HEAD)?,
            out: d.acts(rows, heads * HEAD, bed.half)?,
            bed,
        })
    }

    /// Before the others.
    pub fn begin(&mut self) -> Result<()> {
        let new = self.new;
        let spans: Vec<Span<'_>> = self
            .tables
            .iter()
            .enumerate()
            .map(|(i, table)| Span {
                first_row: i * new,
                rows: new,
                start_pos: self.cached,
                table,
            })
            .collect();
        let rows = PassRows {
            spans: &spans,
            cos: &self.angles,
            sin: &self.angles,
        };
        self.bed.device.begin(&mut self.lists, &rows)
    }

    pub fn append(&mut self) -> Result<()> {
        let d = &self.bed.device;
        let (q, k) = (&mut self.q, &mut self.k);
        d.rope_append(&mut self.lists, &SENT, q, k, &self.v, &mut self.kv, 0)
    }

    pub fn attend(&mut self) -> Result<()> {
        let d = &self.bed.device;
        d.attention(
            &self.lists,
            &SENT,
            &self.q,
            &self.kv,
            0,
            &self.shape,
            &mut self.out,
        )
    }

    /// What merges decode's partial sums, by itself; of how many chunks of keys.
    pub fn merge(&mut self) -> Result<usize> {
        let cuda = self.bed.device.as_cuda().expect("a GPU");
        cuda.merge_again(&self.lists, &self.shape, &mut self.out)
    }
}

/// A GPU was told of the rows by `begin`.
const SENT: PassRows<'static> = PassRows {
    spans: &[],
    cos: &[],
    sin: &[],
};
