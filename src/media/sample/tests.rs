use super::*;

fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn chosen(total: usize, fps: (f64, f64), sampling: Sampling) -> Vec<usize> {
    sample_frames(total, fps.0, fps.1, (4, 768), 2, sampling).unwrap()
}

/// FNV-1a over the indices (u32, little-endian; n of them, where `arange` may give one beyond the end) that torch 2.11's `arange` and `linspace` give for some 3,700 videos.
#[test]
fn both_ways_choose_what_torch_chooses() {
    let totals = (2..400).chain((400..20000).step_by(37));
    let cases: Vec<(usize, (f64, f64))> = totals
        .flat_map(|t| [(30.0, 2.0), (24.0, 4.0), (29.97, 1.5), (10.0, 10.0)].map(|f| (t, f)))
        .collect();
    for (sampling, want) in [
        (Sampling::Arange, 0xeae2_57cf_d3cc_057a),
        (Sampling::Linspace, 0x12cf_d6a0_2772_0c2e),
    ] {
        let bytes = cases
            .iter()
            .flat_map(|(total, fps)| chosen(*total, *fps, sampling))
            .flat_map(|i| (i as u32).to_le_bytes());
        assert_eq!(fnv(bytes), want, "{sampling:?}");
    }
}

#[test]
fn the_ends_differ_between_the_two() {
    assert_eq!(
        chosen(90, (30.0, 2.0), Sampling::Arange),
        [0, 15, 30, 45, 60, 75]
    );
    assert_eq!(
        chosen(90, (30.0, 2.0), Sampling::Linspace),
        [0, 18, 36, 53, 71, 89]
    );
}

#[test]
fn short_videos_and_limits() {
    assert_eq!(chosen(1, (30.0, 2.0), Sampling::Arange), [0]);
    assert_eq!(chosen(3, (30.0, 2.0), Sampling::Linspace), [0, 2]);
    assert_eq!(
        chosen(8, (2.0, 2.0), Sampling::Arange),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
    let few = sample_frames(900, 30.0, 2.0, (4, 6), 2, Sampling::Arange).unwrap();
    assert_eq!(few.len(), 6);
    // One frame at most is no temporal patch of two: the smallest whole one is taken.
    let one = sample_frames(900, 30.0, 2.0, (4, 1), 2, Sampling::Arange).unwrap();
    assert_eq!(one.len(), 2);
    for (total, a, b) in [
        (0, 30.0, 2.0),
        (9, 0.0, 2.0),
        (9, 30.0, f64::NAN),
        (9, 30.0, -1.0),
    ] {
        assert!(sample_frames(total, a, b, (4, 768), 2, Sampling::Arange).is_err());
    }
}
