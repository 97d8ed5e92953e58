//! The schedule of the pager, walked on paper: one disk, one bus, slots, and where a GPU computes the ring of frames between them.
//!
//! On a CPU a unit is read into its slot, so reading begins when computing has left the slot. On a GPU it is read into frames: reading needs
//! a slot that the host has given back, which it does as soon as the unit's kernels are in the queue, and frames that copies have left; only
//! the copy waits until the GPU has computed with what the slot held before.

/// Passes simulated before one is taken as the steady state: the first fills the slots.
const WARM_PASSES: usize = 3;
/// Parts of a unit that are told apart, at most, where the ring is not so short that it takes more.
const PIECES: u64 = 16;
const MOST_PIECES: u64 = 256;

/// What a unit of the pass takes, seconds: `fill` where it goes through a slot, `kv` where keys and values must be copied first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub fill: Option<Fill>,
    pub kv: f64,
    pub compute: f64,
}

/// Reading (0 where it rests in host memory) and copying to the GPU (0 where there is none), piece by piece: the two overlap.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fill {
    pub read: f64,
    pub copy: f64,
    /// Bytes that go through the ring of frames.
    pub framed: u64,
}

/// What units go through.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path {
    pub slots: usize,
    /// Bytes of frames and of one of them, where a GPU computes.
    pub ring: Option<(u64, u64)>,
}

impl Path {
    fn pieces(&self, fill: &Fill) -> u64 {
        let Some((ring, frame)) = self.ring.filter(|_| fill.framed > 0) else {
            return 1;
        };
        let usual = fill.framed.div_ceil(frame.max(1)).min(PIECES);
        usual
            .max(fill.framed.div_ceil((ring / 2).max(1)))
            .min(MOST_PIECES)
    }
}

/// Part of a unit.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Number of its unit among those of a pass that go through slots.
    fill: usize,
    first: bool,
    read: f64,
    copy: f64,
    /// Bytes through frames in this pass, up to its end.
    framed: u64,
}

/// The disk and the bus, filling slots in order. Units and pieces are numbered through all passes.
struct Filling {
    pieces: Vec<Piece>,
    fills: usize,
    /// Pieces of all passes.
    total: usize,
    slots: usize,
    ring: u64,
    disk: f64,
    bus: f64,
    /// By piece: when it is in host memory, and when it is in its slot.
    landed: Vec<f64>,
    there: Vec<f64>,
    /// By unit: when its slot may be read for again, and when computing has left it.
    released: Vec<f64>,
    left: Vec<f64>,
    /// Pieces whose frames the next piece to be read does not need.
    freed: usize,
}

impl Filling {
    fn new(fills: &[Fill], path: &Path) -> Filling {
        let mut pieces = Vec::new();
        let (mut framed, mut largest) = (0, 0);
        for (number, fill) in fills.iter().enumerate() {
            let n = path.pieces(fill);
            largest = largest.max(fill.framed.div_ceil(n));
            for i in 1..=n {
                pieces.push(Piece {
                    fill: number,
                    first: i == 1,
                    read: fill.read / n as f64,
                    copy: fill.copy / n as f64,
                    framed: framed + fill.framed * i / n,
                });
            }
            framed += fill.framed;
        }
        let total = pieces.len() * (WARM_PASSES + 1);
        Filling {
            fills: fills.len(),
            total,
            slots: path.slots,
            // Two pieces at least: one is read while the other is copied.
            ring: path
                .ring
                .map_or(u64::MAX, |(ring, _)| ring.max(2 * largest)),
            disk: 0.0,
            bus: 0.0,
            landed: Vec::with_capacity(total),
            there: Vec::with_capacity(total),
            released: Vec::new(),
            left: Vec::new(),
            freed: 0,
            pieces,
        }
    }

    fn piece(&self, number: usize) -> Piece {
        let passes = number / self.pieces.len();
        let piece = self.pieces[number % self.pieces.len()];
        let a_pass = self.pieces[self.pieces.len() - 1].framed;
        Piece {
            fill: passes * self.fills + piece.fill,
            framed: passes as u64 * a_pass + piece.framed,
            ..piece
        }
    }

    /// When the slot of unit `fill` is no longer held by the one before, as `marks` say. `None`: that is not known yet.
    fn slot(&self, fill: usize, marks: &[f64]) -> Option<f64> {
        match fill.checked_sub(self.slots) {
            Some(before) => marks.get(before).copied(),
            None => Some(0.0),
        }
    }

    /// When the next piece may be read. `None`: its slot or its frames are still wanted, or all are read.
    fn next_read(&mut self) -> Option<f64> {
        if self.landed.len() == self.total {
            return None;
        }
        let piece = self.piece(self.landed.len());
        let mut start = self.slot(piece.fill, &self.released)?;
        // Frames of everything up to here but what the ring holds must be back.
        let back = piece.framed.saturating_sub(self.ring);
        while self.freed < self.there.len() && self.piece(self.freed).framed < back {
            self.freed += 1;
        }
        if back > 0 {
            start = start.max(*self.there.get(self.freed)?);
        }
        Some(match piece.read > 0.0 {
            true => start.max(self.disk),
            false => start,
        })
    }

    /// When the next piece may be copied. `None`: it is not in host memory, or its slot is still computed with.
    fn next_copy(&self) -> Option<f64> {
        let number = self.there.len();
        let landed = *self.landed.get(number)?;
        let piece = self.piece(number);
        let start = self.bus.max(landed);
        match piece.first {
            true => Some(start.max(self.slot(piece.fill, &self.left)?)),
            false => Some(start),
        }
    }

    /// Begins what may begin first, if that is not after `now`. False where there is nothing.
    fn turn(&mut self, now: f64) -> bool {
        let (read, copy) = (self.next_read(), self.next_copy());
        let within = |t: &f64| *t <= now;
        match (read.filter(within), copy.filter(within)) {
            (Some(read), copy) if copy.is_none_or(|copy| read <= copy) => {
                let piece = self.piece(self.landed.len());
                if piece.read > 0.0 {
                    self.disk = read + piece.read;
                }
                self.landed.push(read + piece.read);
            }
            (_, Some(copy)) => {
                let piece = self.piece(self.there.len());
                if piece.copy > 0.0 {
                    self.bus = copy + piece.copy;
                }
                self.there.push(copy + piece.copy);
            }
            _ => return false,
        }
        true
    }

    fn until(&mut self, now: f64) {
        while self.turn(now) {}
    }

    /// When unit `fill` is in host memory, and when in its slot. `None`: never.
    fn arrival(&mut self, fill: usize) -> Option<(f64, f64)> {
        let (pass, number) = (fill / self.fills, fill % self.fills);
        let upto = self.pieces.partition_point(|p| p.fill <= number);
        let last = pass * self.pieces.len() + upto - 1;
        while self.there.len() <= last {
            if !self.turn(f64::INFINITY) {
                return None;
            }
        }
        Some((self.landed[last], self.there[last]))
    }

    /// When keys and values are there that are asked for at `now`. They have a stream of their own, so they wait for no weights; but the bus
    /// has so much less time for those.
    fn beside(&mut self, now: f64, seconds: f64) -> f64 {
        if seconds > 0.0 {
            self.until(now);
            self.bus = self.bus.max(now) + seconds;
        }
        now + seconds
    }
}

/// The period of a pass. Computing goes in order, each layer behind its keys and values where these are copied. Embedding rows are read before
/// the first unit computes, behind the reads under way; a pass begins when the one before has ended.
pub(super) fn period(steps: &[Step], path: &Path, gather_s: f64) -> f64 {
    let fills: Vec<Fill> = steps.iter().filter_map(|s| s.fill).collect();
    let mut filling = Filling::new(&fills, path);
    let mut clock = 0.0f64;
    let mut ends = Vec::with_capacity(WARM_PASSES + 1);
    for _ in 0..=WARM_PASSES {
        if gather_s > 0.0 {
            filling.until(clock);
            filling.disk = filling.disk.max(clock) + gather_s;
            clock = filling.disk;
        }
        // The host, which gives a GPU its work as soon as weights are in host memory.
        let mut host = clock;
        let mut kv_there = filling.beside(clock, steps.first().map_or(0.0, |s| s.kv));
        for (i, step) in steps.iter().enumerate() {
            if step.fill.is_some() {
                let Some((landed, there)) = filling.arrival(filling.left.len()) else {
                    return 0.0;
                };
                host = host.max(landed);
                clock = clock.max(there);
            }
            // The next layer's are asked for when this one's are there.
            clock = clock.max(kv_there);
            kv_there = filling.beside(clock, steps.get(i + 1).map_or(0.0, |s| s.kv));
            clock += step.compute;
            if step.fill.is_some() {
                filling.left.push(clock);
                filling.released.push(match path.ring {
                    Some(_) => host,
                    None => clock,
                });
            }
            filling.until(clock);
        }
        ends.push(clock);
    }
    match ends.as_slice() {
        [.., before, last] => last - before,
        _ => 0.0,
    }
}
