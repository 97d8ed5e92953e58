//! The tiles of a product (`kernels/linear.cu`), and which of them a launch takes. All give the same bits.

/// Name, columns and rows of a block, and how well it fills the tensor cores where they are the bound (a first guess, to be measured).
pub(super) const TILES: [(&str, usize, usize, f64); 8] = [
    ("linear_t8", 32, 8, 0.0),
    ("linear_t16", 32, 16, 0.0),
    ("linear_t32", 64, 32, 0.0),
    ("linear_t32n", 32, 32, 0.0),
    ("linear_t64", 64, 64, 0.55),
    ("linear_t128", 128, 128, 0.8),
    ("linear_t256", 256, 128, 1.0),
    ("linear_any", 64, 32, 0.0),
];
const T8: usize = 0;
const T16: usize = 1;
const T32: usize = 2;
const T32_NARROW: usize = 3;
const T64: usize = 4;
pub(super) const T256: usize = 6;
const ANY: usize = 7;

/// A launch: rows of activations, the columns that each of its matrices gives, and whether all rows begin at multiples of 16 bytes.
pub(super) struct Work<'w> {
    pub rows: usize,
    pub columns: &'w [usize],
    pub aligned: bool,
}

impl Work<'_> {
    /// Blocks of the launch with tile `i`.
    pub fn blocks(&self, i: usize) -> usize {
        let (_, columns, rows, _) = TILES[i];
        let across = self.columns.iter().map(|n| n.div_ceil(columns));
        across.sum::<usize>() * self.rows.div_ceil(rows)
    }

    /// The fastest tile, as far as is known, on a GPU of so many multiprocessors. `largest`: whether [`T256`] is there.
    pub fn tile(&self, multiprocessors: usize, largest: bool) -> usize {
        let cost = |i: usize| {
            let (_, columns, rows, share) = TILES[i];
            let waves = self.blocks(i).div_ceil(multiprocessors);
            (waves * columns * rows) as f64 / share
        };
        match self.rows {
            _ if !self.aligned => ANY,
            0..=8 => T8,
            9..=16 => T16,
            // Half as wide, twice as many: where there would be multiprocessors with nothing to fetch.
            17..=32 if self.blocks(T32) < multiprocessors => T32_NARROW,
            17..=32 => T32,
            _ => (T64..ANY)
                .filter(|i| *i != T256 || largest)
                .min_by(|a, b| cost(*a).total_cmp(&cost(*b)))
                .unwrap_or(T64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a card of 132 multiprocessors.
    fn chosen(rows: usize, columns: &[usize]) -> (&'static str, usize) {
        let work = Work {
            rows,
            columns,
            aligned: true,
        };
        let tile = work.tile(132, true);
        (TILES[tile].0, work.blocks(tile))
    }

    #[test]
    fn names_are_where_the_choice_looks_for_them() {
        for (i, name) in [
            (T8, "t8"),
            (T16, "t16"),
            (T32, "t32"),
            (T32_NARROW, "t32n"),
            (T64, "t64"),
            (T256, "t256"),
            (ANY, "any"),
        ] {
            assert_eq!(TILES[i].0, format!("linear_{name}"));
        }
    }

    /// The launches of a 7B layer.
    #[test]
    fn matrices_that_share_a_launch_share_its_blocks() {
        let (qkv, up): (&[usize], &[usize]) = (&[3584, 512, 512], &[18944, 18944]);
        assert_eq!(chosen(1, &[512]), ("linear_t8", 16));
        assert_eq!(chosen(1, qkv), ("linear_t8", 144));
        assert_eq!(chosen(16, qkv), ("linear_t16", 144));
        assert_eq!(chosen(1, up), ("linear_t8", 1184));
        assert_eq!(chosen(64, &[100, 1]).1, 2 + 1);
    }

    #[test]
    fn between_17_and_32_rows_no_multiprocessor_is_left_idle_for_the_width_of_a_block() {
        assert_eq!(chosen(32, &[3584]), ("linear_t32n", 112));
        assert_eq!(chosen(17, &[3584, 512, 512]), ("linear_t32n", 144));
        assert_eq!(chosen(32, &[18944, 18944]), ("linear_t32", 592));
        assert_eq!(chosen(33, &[3584]).0, "linear_t64");
    }

    #[test]
    fn what_is_not_aligned_or_too_large_is_not_chosen() {
        let work = |rows, aligned| Work {
            rows,
            columns: &[18944, 18944],
            aligned,
        };
        assert_eq!(TILES[work(1, false).tile(132, true)].0, "linear_any");
        assert_eq!(TILES[work(4096, true).tile(132, true)].0, "linear_t256");
        assert_eq!(TILES[work(4096, true).tile(132, false)].0, "linear_t128");
    }
}
