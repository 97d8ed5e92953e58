//! Logits → token id.
//!
//! The order is that of transformers' processors: logit bias, repetition penalty (then OpenAI's frequency and presence
//! penalties, which transformers lacks), and where a token is drawn rather than the best one taken: temperature, top-k,
//! top-p, min-p. A draw depends on [`Draw`] alone, so that a batch, a resumed job and a single run agree.

mod exp;
mod params;
mod philox;
#[cfg(test)]
mod tests;

use exp::weights;
pub use params::SamplingParams;
pub use philox::{Draw, philox4x32};

use crate::error::{Code, Error, Result};

/// The tokens before the one to be chosen, as the penalties see them.
#[derive(Clone, Copy, Debug, Default)]
pub struct History<'a> {
    pub prompt: &'a [u32],
    pub generated: &'a [u32],
}

/// Log-probability (natural logarithm) of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
}

#[derive(Clone, Copy)]
struct Candidate {
    score: f32,
    id: u32,
    /// Unnormalised probability: exp((score − best) / temperature), see [`exp::weight`].
    weight: f64,
}

/// Room for the work on one row of logits, kept between calls: after the first call of a kind nothing is allocated.
/// It holds no state that a result depends on; one per thread serves any number of sequences.
pub struct Sampler {
    limit: usize,
    scores: Vec<f32>,
    order: Vec<f32>,
    candidates: Vec<Candidate>,
    /// Weights of each [`STRIDE`] scores together.
    masses: Vec<f64>,
    /// Per token: how often it was generated, and `SEEN` where it stands anywhere in the history. All zero between calls.
    counts: Vec<u32>,
}

const SEEN: u32 = 1 << 31;

impl Sampler {
    /// `limit`: ids from here on are never chosen. Models pad their vocabulary; the tokenizer knows where it ends
    /// ([`super::Tokenizer::id_limit`]).
    pub fn new(limit: usize) -> Sampler {
        Sampler {
            limit,
            scores: Vec::new(),
            order: Vec::new(),
            candidates: Vec::new(),
            masses: Vec::new(),
            counts: Vec::new(),
        }
    }

    /// Chooses the next token from one row of logits ([vocab], float32). `params` must be valid
    /// ([`SamplingParams::validate`]). A NaN or infinite logit is an error that names its token id (Code::Checkpoint).
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        history: History<'_>,
        draw: Draw,
    ) -> Result<u32> {
        let logits = usable(logits, self.limit)?;
        if params.is_greedy() && params.leaves_logits_alone() {
            return Ok(argmax(logits));
        }
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        for &(id, bias) in &params.logit_bias {
            if let Some(score) = self.scores.get_mut(id as usize) {
                *score = (*score + bias).clamp(f32::MIN, f32::MAX);
            }
        }
        if params.penalises() {
            self.penalise(params, history);
        }
        if params.is_greedy() {
            return Ok(argmax(&self.scores));
        }
        if params.truncates() {
            self.truncate(params);
            return Ok(pick(&self.candidates, draw.uniform()));
        }
        let best = largest(&self.scores) + 0.0;
        let total = self.weigh_all(best, params.temperature);
        Ok(self.pick_any(best, params.temperature, draw.uniform() * total))
    }

    /// Ids from here on are never chosen.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// As [`Sampler::sample`], from the [`SamplingParams::candidates`] best logits alone (or more): the best first, of equals the lowest id. The
    /// same token, to the bit, except where more logits than were given are equal to the last that top-k keeps.
    pub fn sample_best(
        &mut self,
        best: &[(u32, f32)],
        params: &SamplingParams,
        draw: Draw,
    ) -> Result<u32> {
        let Some(&(first, _)) = best.first() else {
            return Err(Error::internal("no logits to sample from"));
        };
        if let Some((id, value)) = best.iter().find(|(_, v)| !v.is_finite()) {
            return Err(not_a_number(*id as usize, *value));
        }
        if params.is_greedy() {
            return Ok(first);
        }
        let floor = best[params.top_k.clamp(1, best.len()) - 1].1;
        let mut kept: Vec<(u32, f32)> = best.iter().copied().filter(|b| b.1 >= floor).collect();
        // In the order in which a whole row would be walked: sums are rounded in that order.
        kept.sort_unstable_by_key(|b| b.0);
        self.weigh(kept.into_iter(), best[0].1 + 0.0, params);
        Ok(pick(&self.candidates, draw.uniform()))
    }

    /// Repetition penalty over prompt and answer; frequency and presence penalties over the answer.
    fn penalise(&mut self, params: &SamplingParams, history: History<'_>) {
        self.counts.resize(self.scores.len(), 0);
        let (scores, counts) = (&mut self.scores, &mut self.counts);
        let known = |id: &&u32| (**id as usize) < scores.len();
        for &id in history.prompt.iter().chain(history.generated).filter(known) {
            counts[id as usize] |= SEEN;
        }
        for &id in history.generated.iter().filter(known) {
            // A count that reached the flag bit would need 2^31 generated tokens.
            counts[id as usize] += 1;
        }
        for &id in history.prompt.iter().chain(history.generated) {
            let Some(count) = counts.get_mut(id as usize).filter(|c| **c != 0) else {
                continue;
            };
            let times = *count & !SEEN;
            // Zero again at once: a token is penalised at its first appearance, and the table is clean for the next call.
            *count = 0;
            let score = &mut scores[id as usize];
            *score = if *score < 0.0 {
                *score * params.repetition_penalty
            } else {
                *score / params.repetition_penalty
            };
            if times > 0 {
                *score -= params.frequency_penalty * times as f32 + params.presence_penalty;
            }
            *score = score.clamp(f32::MIN, f32::MAX);
        }
    }

    /// Fills `candidates` with what temperature, top-k, top-p and min-p leave. At least one stays.
    fn truncate(&mut self, params: &SamplingParams) {
        let k = params.top_k;
        if k == 0 || k >= self.scores.len() {
            return self.truncate_all(params);
        }
        let scores = std::mem::take(&mut self.scores);
        let floor = kth_largest(&scores, k, &mut self.order);
        let parts = scores.chunks(STRIDE).enumerate();
        let kept = parts
            .filter(|(_, part)| largest(part) >= floor)
            .flat_map(|(i, part)| (i * STRIDE..).zip(part.iter().copied()))
            .filter(|(_, score)| *score >= floor);
        self.weigh(
            kept.map(|(id, s)| (id as u32, s)),
            largest(&scores) + 0.0,
            params,
        );
        self.scores = scores;
    }

    /// Without top-k: only scores that top-p and min-p can leave become candidates. Those so light that all of a row of them would
    /// weigh less than top-p leaves out are no part of the nucleus.
    fn truncate_all(&mut self, params: &SamplingParams) {
        // Adding zero turns −0 into +0, so that total_cmp agrees with equality.
        let best = largest(&self.scores) + 0.0;
        let total = self.weigh_all(best, params.temperature);
        let (top_p, n) = (f64::from(params.top_p), self.scores.len());
        // Half, and never the best itself: sums are rounded.
        let light = (0.5 * (1.0 - top_p).max(0.0) * total / n as f64).min(0.5);
        let least = light.max(f64::from(params.min_p)) as f32;
        self.candidates.clear();
        for (i, part) in self.scores.chunks(STRIDE).enumerate() {
            if self.masses[i] < f64::from(least) {
                continue;
            }
            let found = weights(part, best, params.temperature);
            for (j, (&score, &weight)) in part.iter().zip(&found).enumerate() {
                if weight >= least {
                    self.candidates.push(Candidate {
                        score: score + 0.0,
                        id: (i * STRIDE + j) as u32,
                        weight: f64::from(weight),
                    });
                }
            }
        }
        if top_p < 1.0 {
            let kept = nucleus(&mut self.candidates, top_p * total);
            self.candidates.truncate(kept);
        }
    }

    /// Fills `masses`; their sum.
    fn weigh_all(&mut self, best: f32, temperature: f32) -> f64 {
        self.masses.clear();
        for part in self.scores.chunks(STRIDE) {
            let mass: f32 = exp::sum(&weights(part, best, temperature));
            self.masses.push(f64::from(mass));
        }
        self.masses.iter().sum()
    }

    /// Inverse transform over all scores in their order, after [`Sampler::weigh_all`].
    fn pick_any(&self, best: f32, temperature: f32, target: f64) -> u32 {
        let mut before = 0.0;
        let mut at = 0;
        for (i, mass) in self.masses.iter().enumerate().filter(|(_, m)| **m > 0.0) {
            at = i;
            if before + mass > target {
                break;
            }
            before += mass;
        }
        let part = &self.scores[at * STRIDE..][..STRIDE.min(self.scores.len() - at * STRIDE)];
        let mut last = 0;
        for (j, weight) in weights(part, best, temperature)[..part.len()]
            .iter()
            .enumerate()
        {
            before += f64::from(*weight);
            if *weight > 0.0 {
                last = j;
                if before > target {
                    break;
                }
            }
        }
        // Reached the end: rounding put the target on the total, and the last token with any weight is meant.
        (at * STRIDE + last) as u32
    }

    /// Fills `candidates` with those of `kept`, in order of ids, that temperature, top-p and min-p leave.
    fn weigh(
        &mut self,
        kept: impl Iterator<Item = (u32, f32)>,
        best: f32,
        params: &SamplingParams,
    ) {
        let candidates = &mut self.candidates;
        candidates.clear();
        let mut total = 0.0;
        for (id, score) in kept {
            let weight = f64::from(exp::weight(score, best, params.temperature));
            total += weight;
            candidates.push(Candidate {
                score: score + 0.0,
                id,
                weight,
            });
        }
        if params.top_p < 1.0 {
            let kept = nucleus(candidates, f64::from(params.top_p) * total);
            candidates.truncate(kept);
        }
        if params.min_p > 0.0 {
            let least = f64::from(params.min_p);
            candidates.retain(|c| c.weight >= least);
        }
    }

    /// Log-probability of `token` under the model's own distribution (before bias, penalties and temperature, as OpenAI
    /// and vLLM report it), and into `top` the `n` most likely tokens, best first, ties by lowest id.
    pub fn logprobs(
        &mut self,
        logits: &[f32],
        token: u32,
        n: usize,
        top: &mut Vec<TokenLogprob>,
    ) -> Result<f32> {
        let logits = usable(logits, self.limit)?;
        top.clear();
        let Some(&chosen) = logits.get(token as usize) else {
            return Err(Error::internal(format!(
                "log-probability of token id {token} asked for, but there are {} logits",
                logits.len()
            )));
        };
        let norm = log_sum_exp(logits);
        if n > 0 {
            self.candidates.clear();
            self.candidates
                .extend(logits.iter().enumerate().map(|(id, &score)| Candidate {
                    score: score + 0.0,
                    id: id as u32,
                    weight: 0.0,
                }));
            let n = n.min(logits.len());
            self.candidates
                .select_nth_unstable_by(n - 1, by_score_then_id);
            self.candidates[..n].sort_unstable_by(by_score_then_id);
            top.extend(self.candidates[..n].iter().map(|c| TokenLogprob {
                id: c.id,
                logprob: (f64::from(c.score) - norm) as f32,
            }));
        }
        Ok((f64::from(chosen) - norm) as f32)
    }
}

/// log Σ exp(x), accumulated in float64.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let best = f64::from(largest(x));
    let sum: f64 = x.iter().map(|&v| (f64::from(v) - best).exp()).sum();
    best + sum.ln()
}

fn by_score_then_id(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// The logits that may be chosen, all finite.
fn usable(logits: &[f32], limit: usize) -> Result<&[f32]> {
    let logits = &logits[..logits.len().min(limit)];
    if logits.is_empty() {
        return Err(Error::internal("no logits to sample from"));
    }
    // Branch-free first pass: an exponent of all ones is NaN or infinity.
    let finite = logits.iter().fold(true, |ok, x| {
        ok & (x.to_bits() & 0x7f80_0000 != 0x7f80_0000)
    });
    if finite {
        return Ok(logits);
    }
    let (id, value) = logits
        .iter()
        .enumerate()
        .find(|(_, x)| !x.is_finite())
        .unwrap_or((0, &f32::NAN));
    Err(not_a_number(id, *value))
}

fn not_a_number(id: usize, value: f32) -> Error {
    Error::new(
        Code::Checkpoint,
        format!("the logit of token id {id} is {value}"),
        "the weights hold NaN or infinite values, or an activation overflowed the 16-bit type",
        "run `tensorpager verify`; for float16 weights try --dtype bfloat16 or float32",
    )
}

/// Values looked at together: one comparison for all of them where none matters.
const STRIDE: usize = 64;

/// Index of the largest value, the lowest one among equals.
fn argmax(x: &[f32]) -> u32 {
    let (mut best, mut at) = (f32::MIN, 0);
    for (i, part) in x.chunks(STRIDE).enumerate() {
        let most = largest(part);
        if most > best {
            (best, at) = (most, i * STRIDE);
        }
    }
    let among = x[at..].iter().position(|v| *v == best);
    (at + among.unwrap_or(0)) as u32
}

/// The largest of some finite values. Sixteen running maxima side by side: one would be a chain of dependent steps.
fn largest(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::MIN; 16];
    let (whole, rest) = x.as_chunks::<16>();
    for part in whole {
        for (lane, v) in lanes.iter_mut().zip(part) {
            *lane = larger(*lane, *v);
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::MIN, |a, b| larger(a, *b))
}

/// The `k`-th largest value; `room` is scratch. Few candidates are ever kept: most of a row lies below the largest so far.
fn kth_largest(x: &[f32], k: usize, room: &mut Vec<f32>) -> f32 {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    room.clear();
    let mut floor = f32::MIN;
    for part in x.chunks(STRIDE) {
        if room.len() >= k && largest(part) <= floor {
            continue;
        }
        room.extend(part.iter().filter(|v| **v >= floor));
        if room.len() >= 2 * k + STRIDE {
            floor = *room.select_nth_unstable_by(k - 1, descending).1;
            room.truncate(k);
        }
    }
    *room.select_nth_unstable_by(k - 1, descending).1
}

/// Moves the nucleus (Holtzman et al. 2020) to the front, best first, and returns its size: a token belongs to it while
/// the tokens before it hold less than `mass`. Sorts no more than it needs.
fn nucleus(candidates: &mut [Candidate], mass: f64) -> usize {
    let (mut sorted, mut before, mut step) = (0, 0.0, 128);
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let n = step.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, by_score_then_id);
        }
        rest[..n].sort_unstable_by(by_score_then_id);
        for (i, c) in rest[..n].iter().enumerate() {
            // The best token stays even where `mass` underflowed to nothing.
            if before >= mass && sorted + i > 0 {
                return sorted + i;
            }
            before += c.weight;
        }
        sorted += n;
        step *= 8;
    }
    sorted
}

/// Inverse transform over the candidates in their order.
fn pick(candidates: &[Candidate], u: f64) -> u32 {
    let total: f64 = candidates.iter().map(|c| c.weight).sum();
    let target = u * total;
    let mut mass = 0.0;
    let mut last = 0;
    for c in candidates {
        mass += c.weight;
        if c.weight > 0.0 {
            last = c.id;
            if mass > target {
                break;
            }
        }
    }
    // Reached the end: rounding put the target on the total, and the last token with any weight is meant.
    last
}
