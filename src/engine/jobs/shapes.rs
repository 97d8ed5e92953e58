//! What the sequences of a job look like, in their order, in bounded memory: what the model of its passes goes through.

/// Runs kept at most: where every sequence is unlike its neighbours, jobs of so many are known exactly.
const MOST_RUNS: usize = 4096;

/// One sequence: a row, or one of its choices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Tokens.
    pub prompt: usize,
    /// KV blocks of the prompt that the sequence before it has too.
    pub shared_blocks: usize,
    /// Tokens at most.
    pub answer: usize,
}

/// Sequences that follow one another: how many, and what they come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Run {
    sequences: u64,
    prompt: u64,
    shared_blocks: u64,
    answer: u64,
}

impl Run {
    fn of(s: Shape) -> Run {
        Run {
            sequences: 1,
            prompt: s.prompt as u64,
            shared_blocks: s.shared_blocks as u64,
            answer: s.answer as u64,
        }
    }

    fn and(self, other: Run) -> Run {
        Run {
            sequences: self.sequences + other.sequences,
            prompt: self.prompt + other.prompt,
            shared_blocks: self.shared_blocks + other.shared_blocks,
            answer: self.answer + other.answer,
        }
    }

    /// On average exactly like `other`.
    fn is_like(&self, other: &Run) -> bool {
        let same = |a: u64, b: u64| {
            u128::from(a) * u128::from(other.sequences)
                == u128::from(b) * u128::from(self.sequences)
        };
        same(self.prompt, other.prompt)
            && same(self.shared_blocks, other.shared_blocks)
            && same(self.answer, other.answer)
    }

    /// The `i`th of its sequences. All of them together come to exactly what the run does.
    fn shape(&self, i: u64) -> Shape {
        let part = |sum: u64| {
            let up_to = |i: u64| u128::from(sum) * u128::from(i) / u128::from(self.sequences);
            (up_to(i + 1) - up_to(i)) as usize
        };
        Shape {
            prompt: part(self.prompt),
            shared_blocks: part(self.shared_blocks),
            answer: part(self.answer),
        }
    }
}

/// The sequences of a job. Alike neighbours are one run; where there are too many runs neighbours are taken together, and only their mean is
/// known from then on: their order and sums stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shapes {
    runs: Vec<Run>,
    /// Sequences that are taken together whether they are alike or not.
    together: u64,
}

impl Default for Shapes {
    fn default() -> Shapes {
        Shapes {
            runs: Vec::new(),
            together: 1,
        }
    }
}

impl Shapes {
    pub fn push(&mut self, shape: Shape) {
        self.add(Run::of(shape));
        while self.runs.len() > MOST_RUNS {
            self.together *= 2;
            let runs = std::mem::take(&mut self.runs);
            runs.into_iter().for_each(|r| self.add(r));
        }
    }

    fn add(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.is_like(&run) || last.sequences + run.sequences <= self.together => {
                *last = last.and(run);
            }
            _ => self.runs.push(run),
        }
    }

    pub fn sequences(&self) -> u64 {
        self.runs.iter().map(|r| r.sequences).sum()
    }

    /// In their order.
    pub fn iter(&self) -> impl Iterator<Item = Shape> + '_ {
        let shapes = |r: &'_ Run| {
            let r = *r;
            (0..r.sequences).map(move |i| r.shape(i))
        };
        self.runs.iter().flat_map(shapes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unlike(i: usize) -> Shape {
        Shape {
            prompt: 10 + i * 7919 % 100,
            shared_blocks: i % 3,
            answer: 1 + i * 31 % 57,
        }
    }

    fn sums(shapes: impl Iterator<Item = Shape>) -> (usize, usize, usize, usize) {
        shapes.fold((0, 0, 0, 0), |(n, p, s, a), x| {
            (n + 1, p + x.prompt, s + x.shared_blocks, a + x.answer)
        })
    }

    #[test]
    fn few_sequences_are_known_exactly() {
        let mut shapes = Shapes::default();
        (0..MOST_RUNS).for_each(|i| shapes.push(unlike(i)));
        assert!(shapes.iter().eq((0..MOST_RUNS).map(unlike)));
    }

    #[test]
    fn alike_ones_take_no_room() {
        let mut shapes = Shapes::default();
        (0..1_000_000).for_each(|_| shapes.push(unlike(5)));
        assert_eq!((shapes.runs.len(), shapes.sequences()), (1, 1_000_000));
        assert!(shapes.iter().all(|s| s == unlike(5)));
    }

    #[test]
    fn of_many_the_sums_and_the_order_stay() {
        const N: usize = 300_000;
        let mut shapes = Shapes::default();
        // The second half asks for ten times as much.
        let shape = |i: usize| Shape {
            answer: unlike(i).answer * if i < N / 2 { 1 } else { 10 },
            ..unlike(i)
        };
        (0..N).for_each(|i| shapes.push(shape(i)));
        assert!(shapes.runs.len() <= MOST_RUNS && shapes.runs.len() > MOST_RUNS / 4);
        assert_eq!(sums(shapes.iter()), sums((0..N).map(shape)));
        let half = sums(shapes.iter().take(N / 2)).3 as f64;
        let expected = sums((0..N / 2).map(shape)).3 as f64;
        assert!((half / expected - 1.0).abs() < 0.01, "{half} {expected}");
    }
}
