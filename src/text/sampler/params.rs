//! What a user may ask of the sampler, and what of it makes sense.

use crate::error::{Code, Error, Result};

/// Settings of one request. The neutral value of each leaves the logits alone; see [`SamplingParams::default`].
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; 1 leaves the distribution as it is.
    pub temperature: f32,
    /// Keep the `k` most likely tokens (ties with the k-th stay, as in transformers); 0 is off.
    pub top_k: usize,
    /// Keep the most likely tokens until their mass reaches `top_p`; 1 is off.
    pub top_p: f32,
    /// Drop tokens less likely than `min_p` times the most likely one; 0 is off.
    pub min_p: f32,
    /// Divide positive and multiply negative logits of tokens already in prompt or answer (Keskar et al. 2019); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token already in the answer; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token for each time it is in the answer; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids before everything else.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy, nothing else switched on.
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    pub fn greedy() -> SamplingParams {
        SamplingParams::default()
    }

    /// The most likely token is taken; `top_k`, `top_p`, `min_p` and `seed` do not matter then.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// True where the logits are used as the model gave them, up to temperature and truncation.
    pub(super) fn leaves_logits_alone(&self) -> bool {
        self.logit_bias.is_empty() && !self.penalises()
    }

    /// True where not every token may be drawn.
    pub(super) fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// How many of the best logits decide the token; `None` where it takes all of them. More than one is always the most there can be, so that
    /// logits equal to the last that top-k keeps are among them.
    pub fn candidates(&self) -> Option<usize> {
        const MOST: usize = 64;
        match self.leaves_logits_alone() {
            true if self.is_greedy() => Some(1),
            true if (1..=MOST).contains(&self.top_k) => Some(MOST),
            _ => None,
        }
    }

    pub(super) fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// Checks every value; the error names the first that makes no sense and the range that does. Code::Usage.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, name: &str, value: f32, range: &str| {
            if ok {
                return Ok(());
            }
            Err(Error::new(
                Code::Usage,
                format!("{name} {value} makes no sense"),
                format!("{name} must be {range}"),
                format!("choose {name} {range}"),
            ))
        };
        let (t, p, m, r) = (
            self.temperature,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
        );
        check(
            t.is_finite() && t >= 0.0,
            "temperature",
            t,
            "a finite number, 0 (greedy) or above",
        )?;
        check(p > 0.0 && p <= 1.0, "top_p", p, "above 0 and at most 1")?;
        check((0.0..=1.0).contains(&m), "min_p", m, "between 0 and 1")?;
        check(
            r.is_finite() && r > 0.0,
            "repetition_penalty",
            r,
            "a finite number above 0",
        )?;
        for (name, v) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            check((-2.0..=2.0).contains(&v), name, v, "between -2 and 2")?;
        }
        for &(_, bias) in &self.logit_bias {
            check(
                (-100.0..=100.0).contains(&bias),
                "logit_bias",
                bias,
                "between -100 and 100",
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_are_named() {
        let base = SamplingParams::default;
        let bad: Vec<(&str, SamplingParams)> = vec![
            (
                "temperature",
                SamplingParams {
                    temperature: -0.1,
                    ..base()
                },
            ),
            (
                "temperature",
                SamplingParams {
                    temperature: f32::NAN,
                    ..base()
                },
            ),
            (
                "temperature",
                SamplingParams {
                    temperature: f32::INFINITY,
                    ..base()
                },
            ),
            (
                "top_p",
                SamplingParams {
                    top_p: 0.0,
                    ..base()
                },
            ),
            (
                "top_p",
                SamplingParams {
                    top_p: 1.1,
                    ..base()
                },
            ),
            (
                "top_p",
                SamplingParams {
                    top_p: f32::NAN,
                    ..base()
                },
            ),
            (
                "min_p",
                SamplingParams {
                    min_p: -0.1,
                    ..base()
                },
            ),
            (
                "repetition_penalty",
                SamplingParams {
                    repetition_penalty: 0.0,
                    ..base()
                },
            ),
            (
                "presence_penalty",
                SamplingParams {
                    presence_penalty: 2.1,
                    ..base()
                },
            ),
            (
                "frequency_penalty",
                SamplingParams {
                    frequency_penalty: f32::NAN,
                    ..base()
                },
            ),
            (
                "logit_bias",
                SamplingParams {
                    logit_bias: vec![(1, 101.0)],
                    ..base()
                },
            ),
        ];
        for (name, params) in bad {
            let error = params.validate().expect_err(name);
            assert_eq!(error.code(), Code::Usage);
            assert!(error.what().starts_with(name), "{error}");
        }
        assert!(base().validate().is_ok());
    }
}
