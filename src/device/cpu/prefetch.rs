//! What a product asks memory for while it computes on what is there already.

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Memory to ask for, chunk by chunk: addresses, never read from here.
#[derive(Clone, Copy, Default)]
pub(super) struct Ahead {
    pub(super) at: usize,
    pub(super) end: usize,
    /// This one included.
    pub(super) chunks: usize,
    pub(super) chunk_bytes: usize,
    /// Bytes between two chunks.
    pub(super) skip: usize,
    pub(super) lines_per_step: usize,
    /// From, to: after the chunks.
    pub(super) acts: (usize, usize),
}

impl Ahead {
    /// What a tile of so many steps asks for.
    #[inline(always)]
    pub(super) fn take(&mut self, steps: usize) -> Asked {
        if self.at >= self.end {
            if self.chunks > 1 {
                self.chunks -= 1;
                self.at = self.end + self.skip;
                self.end = self.at + self.chunk_bytes;
            } else {
                (self.at, self.end) = std::mem::take(&mut self.acts);
                if self.at >= self.end {
                    return Asked::NOTHING;
                }
            }
        }
        let asked = Asked {
            at: self.at as *const u8,
            lines_per_step: self.lines_per_step,
        };
        self.at += steps * self.lines_per_step * LINE;
        asked
    }
}

/// Cache lines that a tile asks for while it computes, `lines_per_step` each step.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) at: *const u8,
    pub(super) lines_per_step: usize,
}

impl Asked {
    pub(super) const NOTHING: Asked = Asked {
        at: std::ptr::null(),
        lines_per_step: 0,
    };
}
