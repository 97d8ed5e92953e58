//! Philox 4×32 with ten rounds: a counter-based generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy
//! as 1, 2, 3", SC 2011). A draw is a pure function of key and counter, so nothing needs to be stored, resumed or ordered.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::planted::{self, Bug};

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The 128 random bits at `counter` of the stream `key`.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key[0] = key[0].wrapping_add(WEYL[0]);
        key[1] = key[1].wrapping_add(WEYL[1]);
    }
    counter
}

/// What one draw depends on, and nothing else: the same three numbers give the same draw, whatever ran before or beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    pub seed: u64,
    /// Index among the choices sampled for one request (`n` > 1); 0 otherwise.
    pub choice: u32,
    /// Position of the token to be drawn, counted from the start of the sequence (prompt included).
    pub position: u64,
}

impl Draw {
    /// Uniform in [0, 1) with 53 random bits.
    pub fn uniform(self) -> f64 {
        let bits = philox4x32(
            [
                self.position as u32,
                (self.position >> 32) as u32,
                self.choice,
                drawn_before(),
            ],
            [self.seed as u32, (self.seed >> 32) as u32],
        );
        let word = u64::from(bits[0]) | u64::from(bits[1]) << 32;
        (word >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// 0, but for [`Bug::SamplerRemembers`].
fn drawn_before() -> u32 {
    static DRAWN: AtomicU32 = AtomicU32::new(0);
    match planted::is(Bug::SamplerRemembers) {
        true => DRAWN.fetch_add(1, Relaxed),
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (kat_vectors, philox 4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn every_field_of_the_key_matters() {
        let base = Draw {
            seed: 7,
            choice: 1,
            position: 3,
        };
        let variants = [
            Draw { seed: 8, ..base },
            Draw {
                seed: 7 | 1 << 40,
                ..base
            },
            Draw { choice: 2, ..base },
            Draw {
                position: 4,
                ..base
            },
            Draw {
                position: 3 | 1 << 40,
                ..base
            },
        ];
        for v in variants {
            assert_ne!(v.uniform(), base.uniform(), "{v:?}");
        }
        assert_eq!(base.uniform(), Draw { ..base }.uniform());
    }

    #[test]
    fn uniform_fills_the_unit_interval_evenly() {
        let mut bins = [0u32; 16];
        let n = 64_000;
        for position in 0..n {
            let u = Draw {
                seed: 42,
                choice: 0,
                position,
            }
            .uniform();
            assert!((0.0..1.0).contains(&u));
            bins[(u * 16.0) as usize] += 1;
        }
        let expected = n as f64 / 16.0;
        let chi2: f64 = bins
            .iter()
            .map(|&b| (f64::from(b) - expected).powi(2) / expected)
            .sum();
        assert!(chi2 < 37.7, "chi-square {chi2} (15 degrees, p = 0.001)");
    }
}
