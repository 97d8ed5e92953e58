//! Reference bits printed by transformers 5.17 (`LlamaRotaryEmbedding`, torch 2.11 on x86-64) for the same parameters.

use super::*;

fn rope(theta: f64, head_size: usize, scaling: RopeScaling) -> Rope {
    let spec = RopeSpec {
        theta,
        scaling,
        mrope_section: None,
    };
    Rope::new(&spec, head_size)
}

/// torch's own power may be one unit in the last place off the correctly rounded one; llama3's blend, a difference of near
/// terms, makes up to four of it.
fn assert_bits(rope: &Rope, expected: &[u32]) {
    assert_eq!(rope.inv_freq().len(), expected.len());
    for (i, (got, want)) in rope.inv_freq().iter().zip(expected).enumerate() {
        let ulps = got.to_bits().abs_diff(*want);
        assert!(
            ulps <= 4,
            "frequency {i}: {got} is {ulps} ulp off {}",
            f32::from_bits(*want)
        );
    }
}

/// The first six elements of cos at position 77 and of sin at position 131071.
fn assert_turns(rope: &Rope, cos77: &[f32], sin131071: &[f32]) {
    let half = rope.inv_freq().len();
    let (mut cos, mut sin) = (vec![0.0; 2 * half], vec![0.0; 2 * half]);
    rope.cos_sin(&[[77; 3], [131071; 3]], &mut cos, &mut sin);
    for (got, want) in cos.iter().zip(cos77) {
        assert!((got - want).abs() < 1e-5, "cos {got} {want}");
    }
    // One ulp of a frequency is 2^-24 · 131071 radians out here.
    for (got, want) in sin[half..].iter().zip(sin131071) {
        assert!((got - want).abs() < 2e-2, "sin {got} {want}");
    }
}

#[test]
fn default_as_transformers() {
    let r = rope(10_000.0, 16, RopeScaling::Default);
    assert_bits(
        &r,
        &[
            0x3f800000, 0x3ea1e89b, 0x3dcccccd, 0x3d0186e3, 0x3c23d70a, 0x3b4f3e38, 0x3a83126f,
            0x39a5cb60,
        ],
    );
    assert_turns(
        &r,
        &[
            -0.030975033,
            0.7086564,
            0.15337358,
            -0.7605486,
            0.7179107,
            0.9705012,
        ],
        &[
            -0.5752417,
            -0.9512253,
            0.36723557,
            -0.87642705,
            -0.61770767,
            -0.20583814,
        ],
    );
    assert_eq!(r.attention_factor(), 1.0);
    let r = rope(1e6, 10, RopeScaling::Default);
    assert_bits(
        &r,
        &[0x3f800000, 0x3d813856, 0x3b8273a6, 0x3983b1f5, 0x3784f351],
    );
}

#[test]
fn linear_as_transformers() {
    let r = rope(10_000.0, 16, RopeScaling::Linear { factor: 3.0 });
    assert_bits(
        &r,
        &[
            0x3eaaaaab, 0x3dd7e0cf, 0x3d088889, 0x3c2cb3d9, 0x3b5a740d, 0x3a8a297b, 0x39aec33f,
            0x38dd0f2b,
        ],
    );
}

#[test]
fn llama3_as_transformers() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 256,
    };
    let r = rope(500_000.0, 64, scaling);
    assert_bits(
        &r,
        &[
            0x3f800000, 0x3f29e1c6, 0x3ee177bc, 0x3e959ee3, 0x3e4693b0, 0x3e03c6a0, 0x3d945633,
            0x3ceb4310, 0x3c2ca88b, 0x3b546fc3, 0x3b07a9c3, 0x3ab40d6d, 0x3a6ef74f, 0x3a1e9402,
            0x39d27720, 0x398baa41, 0x39395d21, 0x38f603ea, 0x38a3418d, 0x3858ac81, 0x380fc8f8,
            0x37bed4f4, 0x377d45c3, 0x3728126b, 0x36df10c4, 0x369406cb, 0x36447610, 0x36025f34,
            0x35ad07a7, 0x3565a54d, 0x351864a7, 0x34ca41b0,
        ],
    );
    assert_turns(
        &r,
        &[
            -0.030975033,
            0.67353517,
            -0.7965137,
            -0.87255186,
            -0.71378356,
            -0.8850709,
        ],
        &[
            -0.5752417,
            0.6806176,
            0.927943,
            0.29180884,
            0.8281335,
            0.027359959,
        ],
    );
}

fn yarn(factor: f64, original: usize) -> RopeScaling {
    RopeScaling::Yarn {
        factor,
        original_max_positions: original,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    }
}

#[test]
fn yarn_as_transformers() {
    let r = rope(1e6, 32, yarn(4.0, 1024));
    assert_bits(
        &r,
        &[
            0x3f800000, 0x3ed7e89b, 0x3e1ac80c, 0x3d570279, 0x3c8e7ac6, 0x3baec98e, 0x3ab8449c,
            0x3a1b690d, 0x3983126f, 0x38dd1725, 0x383a7753, 0x379d43a4, 0x3704a2b2, 0x365fba4f,
            0x35bcb0c1, 0x351f23e4,
        ],
    );
    assert_eq!(r.attention_factor(), 1.138_629_4);
    assert_turns(
        &r,
        &[
            -0.035269085,
            0.5618967,
            0.6829613,
            -0.7074827,
            0.2613241,
            1.0439316,
        ],
        &[
            -0.6549871, -0.9566156, 0.95178217, 0.19088095, -1.0347208, 1.1275499,
        ],
    );
}

#[test]
fn yarn_without_truncation_and_with_its_own_scales() {
    let scaling = RopeScaling::Yarn {
        factor: 2.5,
        original_max_positions: 512,
        beta_fast: 24.0,
        beta_slow: 2.0,
        attention_factor: None,
        mscale: Some(0.707),
        mscale_all_dim: Some(1.0),
        truncate: false,
    };
    let r = rope(10_000.0, 32, scaling);
    assert_bits(
        &r,
        &[
            0x3f800000, 0x3f0ff59a, 0x3ea1e89b, 0x3e1fe969, 0x3d97624a, 0x3d0a3e60, 0x3c6ef24d,
            0x3be91528, 0x3b83126f, 0x3b136a16, 0x3aa5cb60, 0x3a3a7753, 0x39d1b717, 0x396bdcf0,
            0x3904a2b3, 0x38952c42,
        ],
    );
    assert_eq!(r.attention_factor(), 0.975_406_17);

    let given = match yarn(4.0, 64) {
        RopeScaling::Yarn {
            factor,
            original_max_positions,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            truncate,
            ..
        } => RopeScaling::Yarn {
            factor,
            original_max_positions,
            beta_fast,
            beta_slow,
            attention_factor: Some(1.25),
            mscale,
            mscale_all_dim,
            truncate,
        },
        _ => unreachable!(),
    };
    let r = rope(10_000.0, 8, given);
    assert_bits(&r, &[0x3f800000, 0x3d800000, 0x3b23d70a, 0x3983126f]);
    assert_eq!(r.attention_factor(), 1.25);
}

#[test]
fn absurd_yarn_stays_finite() {
    for (factor, original, head_size, theta) in [
        (1e-6, 1, 2, 1.1),
        (1e6, 1 << 30, 2, 1e12),
        (1.0, 1, 4, 10_000.0),
        (4.0, 7, 256, 2.0),
    ] {
        let r = rope(theta, head_size, yarn(factor, original));
        assert!(
            r.inv_freq().iter().all(|f| f.is_finite()),
            "{factor} {original}"
        );
        assert!(r.attention_factor().is_finite());
    }
}

/// The reference's own construction: cos for each axis, then sections picked from t, h, w in turn.
#[test]
fn mrope_takes_each_section_from_its_axis() {
    let plain = rope(1e6, 64, RopeScaling::Default);
    let spec = RopeSpec {
        theta: 1e6,
        scaling: RopeScaling::Default,
        mrope_section: Some([8, 12, 12]),
    };
    let sections = Rope::new(&spec, 64);
    let positions = [[3, 50, 9], [7, 7, 7]];
    let (mut cos, mut sin) = (vec![0.0; 64], vec![0.0; 64]);
    sections.cos_sin(&positions, &mut cos, &mut sin);
    for (row, position) in positions.iter().enumerate() {
        for (axis, range) in [0..8, 8..20, 20..32].into_iter().enumerate() {
            let (mut c, mut s) = (vec![0.0; 32], vec![0.0; 32]);
            plain.cos_sin(&[[position[axis]; 3]], &mut c, &mut s);
            let at = row * 32 + range.start..row * 32 + range.end;
            assert_eq!(cos[at.clone()], c[range.clone()], "row {row} axis {axis}");
            assert_eq!(sin[at], s[range]);
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let r = rope(10_000.0, 8, RopeScaling::Default);
    let (mut cos, mut sin) = (vec![9.0; 13], vec![9.0; 13]);
    r.cos_sin(&[[0; 3], [5; 3], [2_000_000; 3]], &mut cos, &mut sin);
    assert_eq!(
        (cos[12], sin[12]),
        (9.0, 9.0),
        "nothing written behind the rows"
    );
    assert_eq!((&cos[..4], &sin[..4]), (&[1.0; 4][..], &[0.0; 4][..]));
    let (mut c, mut s) = (vec![0.0; 4], vec![0.0; 4]);
    r.cos_sin(&[[5; 3]], &mut c, &mut s);
    assert_eq!((&cos[4..8], &sin[4..8]), (&c[..], &s[..]));
    r.cos_sin(&[], &mut c, &mut s);
}
