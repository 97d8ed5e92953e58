//! Ops that want a pass around them: attention over a cache, and the selection of logits.

use tensorpager::device::{AttnShape, KvShape, ListShape, PassRows, Span};
use tensorpager::error::Result;

use super::bed::{Bed, Random};

/// Whether the `k` best are those that the host finds, of equals the lowest id.
pub fn selects(bed: &Bed, rows: usize, cols: usize, k: usize) -> Result<bool> {
    let mut values = Random::new(cols as u64).values(rows * cols, 8.0);
    // Ties, at both ends of a row too.
    values[cols - 1] = 9.0;
    values[0] = 9.0;
    let x = bed.rows(&values, cols)?;
    let mut best = bed
        .device
        .best(1, rows)?
        .expect("a GPU selects where it computes");
    bed.device.select(&x, rows, cols, k, 0, &mut best)?;
    let (ids, got) = bed.device.selected(&mut best, rows * k)?;
    Ok((0..rows).all(|r| {
        let row = &values[r * cols..][..cols];
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
        (0..k).all(|i| match order.get(i) {
            Some(id) => ids[r * k + i] == *id as u32 && got[r * k + i] == row[*id],
            None => ids[r * k + i] == u32::MAX,
        })
    }))
}

/// cos and sin of positions.
pub fn angles(positions: std::ops::Range<usize>, head: usize) -> (Vec<f32>, Vec<f32>) {
    let angle = |p: usize, i: usize| p as f32 * 10_000f32.powf(-2.0 * i as f32 / head as f32);
    let all: Vec<f32> = positions
        .flat_map(|p| (0..head / 2).map(move |i| angle(p, i)))
        .collect();
    (
        all.iter().map(|a| a.cos()).collect(),
        all.iter().map(|a| a.sin()).collect(),
    )
}

/// Attention of the new tokens of sequences whose earlier ones were put into the cache by a pass of their own.
pub fn attend(
    bed: &Bed,
    head: usize,
    heads: usize,
    kv_heads: usize,
    window: Option<usize>,
    sequences: &[(usize, usize)],
) -> Result<Vec<f32>> {
    let d = &bed.device;
    let blocks: Vec<usize> = sequences
        .iter()
        .map(|(c, n)| (c + n).div_ceil(16))
        .collect();
    let total: usize = blocks.iter().sum();
    // Scattered, and no sequence's blocks in order.
    let mut free: Vec<u32> = (0..total as u32)
        .map(|b| (b * 7 + 3) % total as u32)
        .collect();
    free.sort_by_key(|b| (b.wrapping_mul(2_654_435_761)) >> 7);
    let tables: Vec<Vec<u32>> = blocks.iter().map(|n| free.drain(..*n).collect()).collect();
    let cached: usize = sequences.iter().map(|s| s.0).sum();
    let new: usize = sequences.iter().map(|s| s.1).sum();
    let most = cached.max(new).max(1);
    let shape = ListShape {
        rows: most,
        spans: sequences.len(),
        table: total,
        context: sequences.iter().map(|(c, n)| c + n).max().unwrap_or(1),
        heads,
        kv_heads,
        head_size: head,
        windows: vec![window],
    };
    let mut lists = d.lists(&shape)?;
    let mut kv = d.kv(&KvShape {
        layers: 1,
        blocks: total,
        kv_heads,
        head_size: head,
        dtype: bed.half,
    })?;
    let attn = AttnShape {
        heads,
        kv_heads,
        head_size: head,
        scale: (head as f32).powf(-0.5),
        window,
    };
    let (q_cols, kv_cols) = (heads * head, kv_heads * head);
    let mut out = d.acts(most, q_cols, bed.half)?;
    let mut pass =
        |from: &dyn Fn(usize) -> usize, count: &dyn Fn(usize) -> usize| -> Result<usize> {
            let (mut spans, mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            let (mut cos, mut sin, mut first) = (Vec::new(), Vec::new(), 0);
            for (i, table) in tables.iter().enumerate() {
                let (start, rows) = (from(i), count(i));
                for p in start..start + rows {
                    // A token's values depend on sequence and position alone.
                    let mut random = Random::new((i * 100_003 + p) as u64 + 1);
                    q.extend(random.values(q_cols, 2.0));
                    k.extend(random.values(kv_cols, 2.0));
                    v.extend(random.values(kv_cols, 1.0));
                }
                let (c, s) = angles(start..start + rows, head);
                cos.extend(c);
                sin.extend(s);
                if rows > 0 {
                    spans.push(Span {
                        first_row: first,
                        rows,
                        start_pos: start,
                        table,
                    });
                }
                first += rows;
            }
            let rows = PassRows {
                spans: &spans,
                cos: &cos,
                sin: &sin,
            };
            if first > 0 {
                let (mut q, mut k) = (bed.rows(&q, q_cols)?, bed.rows(&k, kv_cols)?);
                let v = bed.rows(&v, kv_cols)?;
                d.begin(&mut lists, &rows)?;
                d.rope_append(&mut lists, &rows, &mut q, &mut k, &v, &mut kv, 0)?;
                d.attention(&lists, &rows, &q, &kv, 0, &attn, &mut out)?;
            }
            Ok(first)
        };
    pass(&|_| 0, &|i| sequences[i].0)?;
    let rows = pass(&|i| sequences[i].0, &|i| sequences[i].1)?;
    bed.read_acts(&out, rows, q_cols)
}
