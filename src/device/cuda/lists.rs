//! The work lists of attention: which block of a launch computes which rows and keys. Pure; kernels/README.md is the contract.
//!
//! With `group` query heads a kv head, a segment has tokens · group rows per kv head: row i is token i / group, head i % group of the group.

use std::ops::Range;

use crate::device::{KV_BLOCK_TOKENS, Span};

/// Keys of a chunk.
pub(super) const CHUNK: usize = 256;
/// Rows of a decode tile.
const DECODE_ROWS: usize = 16;
/// Decode items of one launch, at least: what their partial sums take is bounded by it.
pub const ITEMS_AT_ONCE: usize = 512;

/// What the lists of a pass may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListShape {
    /// Rows of a pass.
    pub rows: usize,
    /// Segments of a pass.
    pub spans: usize,
    /// Entries of all their block tables together.
    pub table: usize,
    /// Positions of a sequence.
    pub context: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    /// The windows that occur, each once; `None` for layers that see everything.
    pub windows: Vec<Option<usize>>,
}

impl ListShape {
    fn group(&self) -> usize {
        (self.heads / self.kv_heads).max(1)
    }

    /// Query rows of a prefill tile.
    fn tile_rows(&self) -> usize {
        match self.head_size {
            256 => 32,
            _ => 64,
        }
    }

    /// Decode items a launch may have: at least those of one segment.
    pub fn items(&self) -> usize {
        let tiles = (DECODE_ROWS / self.group()).max(1) * self.group();
        let of_one = tiles.div_ceil(DECODE_ROWS) * (self.context.div_ceil(CHUNK) + 1);
        of_one.max(ITEMS_AT_ONCE.min(self.most_items()))
    }

    /// Items of all segments for one window: a chunk each, and one where a segment begins within a chunk.
    fn most_items(&self) -> usize {
        self.table * KV_BLOCK_TOKENS / CHUNK + 2 * self.spans
    }

    /// 32-bit numbers that the lists of a pass take at most.
    pub fn numbers(&self) -> usize {
        let tiles = (self.rows * self.group()).div_ceil(self.tile_rows()) + self.spans;
        let per_window = 3 * self.most_items() + 4 * self.spans + 2 * PAD;
        let fixed = self.rows + 4 * self.spans + self.table + 2 * tiles + 4 * PAD;
        fixed + self.windows.len() * per_window
    }
}

/// Each list begins on a border of 16 bytes.
const PAD: usize = 4;

/// A decode launch and the merge behind it: places in the numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeBatch {
    /// Of `{segment, tile, chunk}`.
    pub items: Range<usize>,
    /// Of `{segment, tile, first item, items}`, the first counted from the batch's own.
    pub merges: Range<usize>,
}

impl DecodeBatch {
    pub fn item_count(&self) -> usize {
        self.items.len() / 3
    }

    pub fn merge_count(&self) -> usize {
        self.merges.len() / 4
    }
}

/// The lists of one pass, one behind the other in `numbers`.
#[derive(Debug, Default)]
pub struct Lists {
    pub numbers: Vec<i32>,
    /// Of the pass's rows: block · 16 + place in it.
    pub slots: Range<usize>,
    /// Of `{first row, tokens, start position, index in the tables}`.
    pub segments: Range<usize>,
    pub tables: Range<usize>,
    /// Of `{segment, tile}`: prefill.
    pub tiles: Range<usize>,
    /// By window, in the order of [`ListShape::windows`].
    pub decodes: Vec<Vec<DecodeBatch>>,
    /// Rows of the pass.
    pub rows: usize,
    order: Vec<(usize, i32, i32)>,
}

impl Lists {
    /// Room for every pass of this shape.
    pub fn new(shape: &ListShape) -> Lists {
        Lists {
            numbers: Vec::with_capacity(shape.numbers()),
            decodes: shape.windows.iter().map(|_| Vec::new()).collect(),
            ..Lists::default()
        }
    }

    /// The lists of a pass of these segments, whose rows follow one another from row 0 on.
    pub fn fill(&mut self, shape: &ListShape, spans: &[Span<'_>]) {
        self.numbers.clear();
        self.rows = spans.iter().map(|s| s.rows).sum();
        self.slots = self.list(|to| {
            for s in spans {
                to.extend((s.start_pos..s.start_pos + s.rows).map(|p| {
                    let block = s.table[p / KV_BLOCK_TOKENS] as usize;
                    (block * KV_BLOCK_TOKENS + p % KV_BLOCK_TOKENS) as i32
                }));
            }
        });
        self.segments = self.list(|to| {
            let mut table = 0;
            for s in spans {
                to.extend([s.first_row, s.rows, s.start_pos, table].map(|n| n as i32));
                table += s.table.len();
            }
        });
        self.tables = self.list(|to| {
            for s in spans {
                to.extend(s.table.iter().map(|b| *b as i32));
            }
        });
        self.fill_tiles(shape, spans);
        for window in 0..shape.windows.len() {
            self.fill_decodes(shape, spans, window);
        }
        debug_assert!(self.numbers.len() <= shape.numbers());
    }

    /// Appends a list on a border, and says where it lies.
    fn list(&mut self, fill: impl FnOnce(&mut Vec<i32>)) -> Range<usize> {
        self.numbers
            .resize(self.numbers.len().next_multiple_of(PAD), 0);
        let first = self.numbers.len();
        fill(&mut self.numbers);
        first..self.numbers.len()
    }

    /// Tiles with many keys come first: the last blocks of a launch should be short.
    fn fill_tiles(&mut self, shape: &ListShape, spans: &[Span<'_>]) {
        let (group, rows) = (shape.group(), shape.tile_rows());
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        for (i, s) in spans.iter().enumerate().filter(|(_, s)| !decodes(s, group)) {
            for tile in 0..(s.rows * group).div_ceil(rows) {
                let last = ((tile + 1) * rows).div_ceil(group).min(s.rows);
                order.push((s.start_pos + last, i as i32, tile as i32));
            }
        }
        order.sort_unstable_by(|a, b| b.cmp(a));
        self.tiles = self.list(|to| {
            for (_, segment, tile) in &order {
                to.extend([*segment, *tile]);
            }
        });
        self.order = order;
    }

    fn fill_decodes(&mut self, shape: &ListShape, spans: &[Span<'_>], window: usize) {
        let mut batches = std::mem::take(&mut self.decodes[window]);
        batches.clear();
        let (group, most) = (shape.group(), shape.items());
        let mut next = 0;
        while next < spans.len() {
            let mut end = next;
            let mut items = 0;
            while end < spans.len() {
                let more = match decodes(&spans[end], group) {
                    true => tiles(&spans[end], group, shape.windows[window])
                        .map(|t| t.1.len())
                        .sum(),
                    false => 0,
                };
                if items + more > most && end > next {
                    break;
                }
                items += more;
                end += 1;
            }
            let part = next..end;
            next = end;
            if items > 0 {
                batches.push(self.batch(group, spans, part, shape.windows[window]));
            }
        }
        self.decodes[window] = batches;
    }

    fn batch(
        &mut self,
        group: usize,
        spans: &[Span<'_>],
        part: Range<usize>,
        window: Option<usize>,
    ) -> DecodeBatch {
        let work = || {
            part.clone()
                .filter(|i| decodes(&spans[*i], group))
                .flat_map(|i| {
                    tiles(&spans[i], group, window)
                        .map(move |(tile, chunks)| (i as i32, tile as i32, chunks))
                })
        };
        let items = self.list(|to| {
            for (segment, tile, chunks) in work() {
                to.extend(chunks.flat_map(|chunk| [segment, tile, chunk as i32]));
            }
        });
        let merges = self.list(|to| {
            let mut first = 0;
            for (segment, tile, chunks) in work() {
                to.extend([segment, tile, first, chunks.len() as i32]);
                first += chunks.len() as i32;
            }
        });
        DecodeBatch { items, merges }
    }
}

/// A segment of few rows is spread over its keys; others go by tiles of rows. The bits are the same.
fn decodes(span: &Span<'_>, group: usize) -> bool {
    span.rows <= DECODE_ROWS / group
}

/// A segment's decode tiles, each with the chunks of keys that some row of it sees.
fn tiles(
    span: &Span<'_>,
    group: usize,
    window: Option<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
    let (rows, start) = (span.rows, span.start_pos);
    (0..(rows * group).div_ceil(DECODE_ROWS)).map(move |tile| {
        let first = DECODE_ROWS * tile / group;
        let last = ((DECODE_ROWS * tile + DECODE_ROWS - 1) / group).min(rows - 1);
        let low = window.map_or(0, |w| (start + first + 1).saturating_sub(w));
        (tile, low / CHUNK..(start + last) / CHUNK + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(heads: usize, kv_heads: usize, windows: &[Option<usize>]) -> ListShape {
        ListShape {
            rows: 4096,
            spans: 64,
            table: 64 * 80,
            context: 1280,
            heads,
            kv_heads,
            head_size: 64,
            windows: windows.to_vec(),
        }
    }

    fn span(first_row: usize, rows: usize, start_pos: usize, table: &[u32]) -> Span<'_> {
        Span {
            first_row,
            rows,
            start_pos,
            table,
        }
    }

    #[test]
    fn a_prompt_goes_by_tiles_and_a_decode_step_by_chunks() {
        let s = shape(8, 2, &[None, Some(300)]);
        let table: Vec<u32> = (100..160).collect();
        let spans = [span(0, 100, 0, &table), span(100, 1, 800, &table)];
        let mut lists = Lists::new(&s);
        lists.fill(&s, &spans);
        let numbers = |r: &Range<usize>| lists.numbers[r.clone()].to_vec();
        assert_eq!(numbers(&lists.slots)[17], 101 * 16 + 1);
        assert_eq!(numbers(&lists.slots)[100], 150 * 16);
        assert_eq!(numbers(&lists.segments), [0, 100, 0, 0, 100, 1, 800, 60]);
        assert_eq!(numbers(&lists.tables).len(), 120);
        // 400 rows a kv head in tiles of 64; the last has the most keys.
        let tiles = numbers(&lists.tiles);
        assert_eq!((tiles.len(), &tiles[..2]), (14, &[0, 6][..]));
        let all = &lists.decodes[0];
        assert_eq!(all.len(), 1);
        assert_eq!(numbers(&all[0].items), [1, 0, 0, 1, 0, 1, 1, 0, 2, 1, 0, 3]);
        assert_eq!(numbers(&all[0].merges), [1, 0, 0, 4]);
        // Keys 501..=800 lie in chunks 1, 2, 3.
        assert_eq!(numbers(&lists.decodes[1][0].merges), [1, 0, 0, 3]);
        for list in [&lists.slots, &lists.segments, &lists.tables, &lists.tiles] {
            assert_eq!(list.start % PAD, 0);
        }
    }

    #[test]
    fn many_items_are_cut_into_launches_and_every_segment_is_merged_once() {
        let mut s = shape(4, 4, &[None]);
        s.spans = 300;
        s.table = 300 * 80;
        let table: Vec<u32> = (0..80).collect();
        let spans: Vec<Span<'_>> = (0..300)
            .map(|i| span(i, 1, 1000 + i % 200, &table))
            .collect();
        let mut lists = Lists::new(&s);
        lists.fill(&s, &spans);
        let batches = &lists.decodes[0];
        assert!(batches.len() > 1);
        let mut merged = Vec::new();
        for b in batches {
            assert!(b.item_count() <= s.items());
            let items = &lists.numbers[b.items.clone()];
            for m in lists.numbers[b.merges.clone()].chunks(4) {
                merged.push(m[0]);
                for i in m[2]..m[2] + m[3] {
                    assert_eq!(items[i as usize * 3], m[0]);
                    assert_eq!(items[i as usize * 3 + 2], i - m[2]);
                }
            }
        }
        assert_eq!(merged, (0..300).collect::<Vec<i32>>());
        assert!(lists.numbers.len() <= s.numbers());
    }

    #[test]
    fn more_than_sixteen_heads_a_group_are_no_decode() {
        let s = shape(40, 2, &[None]);
        let table = [3];
        let mut lists = Lists::new(&s);
        lists.fill(&s, &[span(0, 1, 2, &table)]);
        assert!(lists.decodes[0].is_empty());
        assert_eq!(lists.numbers[lists.tiles.clone()], [0, 0]);
    }
}
