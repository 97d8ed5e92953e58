//! How attention is cut into tasks. Only speed depends on it.

use super::attention_tile::padded;
use super::scratch::{MAX_HEAD_SIZE, MAX_QUERIES, QUERY_FLOATS};

/// Query heads a kv head serves; asserts that heads and head size are possible.
pub(super) fn group_of(heads: usize, kv_heads: usize, head_size: usize) -> usize {
    assert!(
        kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} heads over {kv_heads}"
    );
    assert!((1..=MAX_HEAD_SIZE).contains(&head_size), "head size");
    heads / kv_heads
}

/// Tasks are (segment, kv head, heads of its group, rows).
pub(super) struct Tiling {
    kv_heads: usize,
    group: usize,
    heads: usize,
    rows: usize,
    pub(super) tasks: usize,
}

pub(super) struct TileAt {
    pub(super) segment: usize,
    pub(super) kv_head: usize,
    /// Within the group.
    pub(super) first_head: usize,
    pub(super) heads: usize,
    /// Within the segment.
    pub(super) first_row: usize,
    pub(super) rows: usize,
}

impl Tiling {
    pub(super) fn new(
        group: usize,
        kv_heads: usize,
        head_size: usize,
        threads: usize,
        segment_rows: impl Iterator<Item = usize>,
    ) -> Tiling {
        let most = MAX_QUERIES.min(QUERY_FLOATS / padded(head_size));
        let mut heads = group.min(most);
        let rows = (most / heads).max(1);
        let tiles: usize = segment_rows.map(|r| r.div_ceil(rows)).sum();
        // One sequence, few kv heads, many threads: the heads of a group part ways.
        while heads > 1 && tiles * kv_heads * group.div_ceil(heads) < threads {
            heads = heads.div_ceil(2);
        }
        let tasks = tiles * kv_heads * group.div_ceil(heads);
        Tiling {
            kv_heads,
            group,
            heads,
            rows,
            tasks,
        }
    }

    pub(super) fn tile(
        &self,
        task: usize,
        segment_rows: impl Iterator<Item = usize>,
    ) -> Option<TileAt> {
        let parts = self.group.div_ceil(self.heads);
        let (mut tile, rest) = (
            task / (self.kv_heads * parts),
            task % (self.kv_heads * parts),
        );
        let first_head = rest % parts * self.heads;
        for (segment, rows) in segment_rows.enumerate() {
            let tiles = rows.div_ceil(self.rows);
            if tile < tiles {
                let first_row = tile * self.rows;
                return Some(TileAt {
                    segment,
                    kv_head: rest / parts,
                    first_head,
                    heads: self.heads.min(self.group - first_head),
                    first_row,
                    rows: self.rows.min(rows - first_row),
                });
            }
            tile -= tiles;
        }
        None
    }
}
