//! The order of patches in the tower: windows of merged cells, one frame after the other.

use crate::spec::VisionSpec;

/// A temporal slice of a picture: what full attention sees at once. Slices do not see one another, so any mix of them may go through the tower
/// together, or one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slice {
    /// Patches along height and width; multiples of the merge.
    pub h: usize,
    pub w: usize,
}

impl Slice {
    pub fn patches(&self) -> usize {
        self.h * self.w
    }
}

/// Where each cell of a slice goes, and how windows cut the slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// Cell (in picture order) at each place of the window order.
    pub cells: Vec<u32>,
    /// Ends of the windows, in patches from the slice's start.
    pub window_ends: Vec<usize>,
}

impl Order {
    /// Windows of `window / merge / patch` cells a side, row by row; those at the right and lower edges may be smaller.
    pub fn new(slice: Slice, spec: &VisionSpec) -> Order {
        let side = (spec.window / spec.merge / spec.patch).max(1);
        let (rows, cols) = (slice.h / spec.merge, slice.w / spec.merge);
        let unit = spec.merge * spec.merge;
        let mut cells = Vec::with_capacity(rows * cols);
        let mut window_ends = Vec::new();
        for top in (0..rows).step_by(side) {
            for left in (0..cols).step_by(side) {
                for row in top..(top + side).min(rows) {
                    for col in left..(left + side).min(cols) {
                        cells.push((row * cols + col) as u32);
                    }
                }
                window_ends.push(cells.len() * unit);
            }
        }
        Order { cells, window_ends }
    }

    /// Row and column (in patches) of the patch at place `index` of the window order.
    pub fn patch_at(&self, index: usize, slice: Slice, merge: usize) -> (usize, usize) {
        let unit = merge * merge;
        let cell = self.cells[index / unit] as usize;
        let cols = slice.w / merge;
        let inside = index % unit;
        (
            cell / cols * merge + inside / merge,
            cell % cols * merge + inside % merge,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(window: usize) -> VisionSpec {
        VisionSpec {
            window,
            ..VisionSpec::tiny()
        }
    }

    #[test]
    fn windows_at_the_edges_are_smaller() {
        // 3 rows and 5 columns of cells, windows of two cells a side.
        let slice = Slice { h: 6, w: 10 };
        let order = Order::new(slice, &spec(56));
        assert_eq!(
            order.cells,
            [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
        );
        assert_eq!(order.window_ends, [16, 32, 40, 48, 56, 60]);
        assert_eq!(order.patch_at(0, slice, 2), (0, 0));
        assert_eq!(order.patch_at(3, slice, 2), (1, 1));
        assert_eq!(order.patch_at(8, slice, 2), (2, 0));
        assert_eq!(order.patch_at(59, slice, 2), (5, 9));
    }

    #[test]
    fn a_window_larger_than_the_picture_holds_it_whole() {
        let order = Order::new(Slice { h: 4, w: 4 }, &spec(112));
        assert_eq!(order.cells, [0, 1, 2, 3]);
        assert_eq!(order.window_ends, [16]);
    }
}
