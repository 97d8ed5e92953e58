//! Rotary position embedding (Su et al. 2021): frequencies, and the cos and sin that [`crate::device`] turns heads with.
//!
//! Frequencies follow transformers 5.17 (`modeling_rope_utils.py`) step by step in float32, so that a model is turned
//! by the angles it was trained with; only the power, the cosine and the sine are computed wider and rounded once.

use std::f64::consts::PI;

use crate::spec::{RopeScaling, RopeSpec};

/// The rotary embedding of one model. Element i of a head is paired with element i + head_size/2 (halves, not neighbours).
#[derive(Clone, Debug)]
pub struct Rope {
    /// Angle per position, [head_size/2].
    inv_freq: Vec<f32>,
    /// The axis (0: t, 1: h, 2: w) each frequency takes its position from, [head_size/2]; all 0 without M-RoPE.
    axis: Vec<u8>,
    /// Multiplies cos and sin, and so the logits of attention by its square (YaRN); 1 for the other types.
    attention_factor: f32,
}

impl Rope {
    /// `head_size` must be even, and the sections must add up to half of it: [`crate::spec::parse_config`] sees to both.
    pub fn new(spec: &RopeSpec, head_size: usize) -> Rope {
        let (inv_freq, attention_factor) = match &spec.scaling {
            RopeScaling::Default => (default_frequencies(spec.theta, head_size), 1.0),
            RopeScaling::Linear { factor } => {
                let mut inv = default_frequencies(spec.theta, head_size);
                inv.iter_mut().for_each(|f| *f /= *factor as f32);
                (inv, 1.0)
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_positions,
            } => {
                let stretch = Llama3 {
                    factor: *factor as f32,
                    low_freq_factor: *low_freq_factor as f32,
                    high_freq_factor: *high_freq_factor as f32,
                    original: *original_max_positions as f32,
                };
                let mut inv = default_frequencies(spec.theta, head_size);
                inv.iter_mut().for_each(|f| *f = stretch.apply(*f));
                (inv, 1.0)
            }
            yarn @ RopeScaling::Yarn { .. } => yarn_frequencies(yarn, spec.theta, head_size),
        };
        let axis = match spec.mrope_section {
            None => vec![0; inv_freq.len()],
            Some(section) => (0..3u8)
                .flat_map(|a| std::iter::repeat_n(a, section[a as usize]))
                .collect(),
        };
        debug_assert_eq!(axis.len(), inv_freq.len());
        Rope {
            inv_freq,
            axis,
            attention_factor,
        }
    }

    /// Angle per position of each pair, [head_size/2].
    pub fn inv_freq(&self) -> &[f32] {
        &self.inv_freq
    }

    /// What cos and sin are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        self.attention_factor
    }

    /// cos and sin of each row's angles, both [rows][head_size/2]. `positions`: (t, h, w) of each row; of text all three
    /// are equal. Each row depends on its own positions alone. Panics if a buffer is shorter than that.
    pub fn cos_sin(&self, positions: &[[u32; 3]], out_cos: &mut [f32], out_sin: &mut [f32]) {
        let half = self.inv_freq.len();
        let cos_rows = out_cos[..positions.len() * half].chunks_exact_mut(half);
        let sin_rows = out_sin[..positions.len() * half].chunks_exact_mut(half);
        for ((position, cos), sin) in positions.iter().zip(cos_rows).zip(sin_rows) {
            for i in 0..half {
                // The product is rounded to float32 as the model saw it in training; what follows need not be.
                let angle = position[self.axis[i] as usize] as f32 * self.inv_freq[i];
                let (s, c) = f64::from(angle).sin_cos();
                cos[i] = c as f32 * self.attention_factor;
                sin[i] = s as f32 * self.attention_factor;
            }
        }
    }
}

/// theta^(2i/head_size) in float32, [head_size/2]: positions per radian.
fn position_frequencies(theta: f64, head_size: usize) -> impl Iterator<Item = f32> {
    let base = f64::from(theta as f32);
    (0..head_size / 2).map(move |i| {
        let exponent = (2 * i) as f32 / head_size as f32;
        base.powf(f64::from(exponent)) as f32
    })
}

fn default_frequencies(theta: f64, head_size: usize) -> Vec<f32> {
    position_frequencies(theta, head_size)
        .map(|f| 1.0 / f)
        .collect()
}

/// Llama 3.1's stretch: short waves stay, long ones are slowed by `factor`, those between are blended.
struct Llama3 {
    factor: f32,
    low_freq_factor: f32,
    high_freq_factor: f32,
    /// Positions the model was first trained with.
    original: f32,
}

impl Llama3 {
    fn apply(&self, inv: f32) -> f32 {
        let wavelength = (2.0 * PI) as f32 / inv;
        if wavelength > self.original / self.low_freq_factor {
            inv / self.factor
        } else if wavelength < self.original / self.high_freq_factor {
            inv
        } else {
            let smooth = (self.original / wavelength - self.low_freq_factor)
                / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - smooth) * inv / self.factor + smooth * inv
        }
    }
}

/// YaRN (Peng et al. 2023): pairs that turn more than `beta_fast` times within the original length keep their
/// frequency, those below `beta_slow` turns are interpolated, a ramp lies between. Returns frequencies and attention factor.
fn yarn_frequencies(scaling: &RopeScaling, theta: f64, head_size: usize) -> (Vec<f32>, f32) {
    let RopeScaling::Yarn {
        factor,
        original_max_positions,
        beta_fast,
        beta_slow,
        attention_factor,
        mscale,
        mscale_all_dim,
        truncate,
    } = scaling
    else {
        unreachable!("called with YaRN only");
    };
    let mscale_of = |mscale: f64| match *factor {
        f if f <= 1.0 => 1.0,
        f => 0.1 * mscale * f.ln() + 1.0,
    };
    let attention = attention_factor.unwrap_or_else(|| match (mscale, mscale_all_dim) {
        (Some(m), Some(all)) => mscale_of(*m) / mscale_of(*all),
        _ => mscale_of(1.0),
    });

    // The pair (as a real number) that turns `turns` times within the original length.
    let pair_of = |turns: f64| {
        let wave = *original_max_positions as f64 / (turns * 2.0 * PI);
        head_size as f64 * wave.ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
    if *truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let low = low.max(0.0);
    let mut high = high.min((head_size - 1) as f64);
    if low == high {
        high += 0.001; // no division by zero; the width transformers gives the step
    }

    let inv = position_frequencies(theta, head_size)
        .enumerate()
        .map(|(i, f)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            1.0 / (*factor as f32 * f) * (1.0 - keep) + 1.0 / f * keep
        });
    (inv.collect(), attention as f32)
}

#[cfg(test)]
mod tests;
