//! Every method of every instruction set this CPU has, against plain arithmetic on the lanes.

use super::*;

/// Values of every kind: numbers, ties, denormals, infinities, NaN.
fn values() -> Vec<f32> {
    let mut x = vec![
        0.0,
        -0.0,
        1.0,
        -1.5,
        2.5,
        -2.5,
        0.5,
        3.5,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-40,
        65504.0,
        f32::from_bits(0x3f80_8000),
        f32::from_bits(0x3f81_8000),
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xffff_ffff),
    ];
    let mut state = 1u64;
    x.extend((0..300).map(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        f32::from_bits((state >> 32) as u32)
    }));
    x
}

fn same(got: f32, want: f32) -> bool {
    got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan())
}

/// The lanes of `f` applied to each run of values and to the run after it.
struct Check;

impl Op for Check {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: every pointer below is to the start of an array of MAX_LANES.
        unsafe {
            check_lanes(s);
            check_memory(s);
            check_sums(s);
        }
    }
}

#[inline(always)]
unsafe fn lanes<S: Simd>(s: S, v: S::V) -> [f32; MAX_LANES] {
    let mut out = [0.0; MAX_LANES];
    // SAFETY: MAX_LANES hold any vector.
    unsafe { s.store(out.as_mut_ptr(), v) };
    out
}

#[inline(always)]
unsafe fn check_lanes<S: Simd>(s: S) {
    let x = values();
    for window in x.windows(2 * S::LANES + 1) {
        // SAFETY: the window is long enough for both loads.
        let (a, b) = unsafe {
            (
                s.load(window.as_ptr()),
                s.load(window.as_ptr().add(S::LANES)),
            )
        };
        let c = s.splat(window[2 * S::LANES]);
        // SAFETY: `lanes` only writes its own array.
        unsafe {
            let add = lanes(s, s.add(a, b));
            let sub = lanes(s, s.sub(a, b));
            let mul = lanes(s, s.mul(a, b));
            let div = lanes(s, s.div(a, b));
            let fma = lanes(s, s.fma(a, b, c));
            let max = lanes(s, s.max(a, b));
            let min = lanes(s, s.min(a, b));
            let sign = lanes(s, s.by_sign(a, b, c));
            let abs = lanes(s, s.abs(a));
            let bf16 = lanes(s, s.round_bf16(a));
            for i in 0..S::LANES {
                let (a, b, c) = (window[i], window[S::LANES + i], window[2 * S::LANES]);
                assert!(same(add[i], a + b) && same(sub[i], a - b), "{a:e} {b:e}");
                assert!(same(mul[i], a * b) && same(div[i], a / b), "{a:e} {b:e}");
                assert!(
                    same(fma[i], a.mul_add(b, c)) || same(fma[i], a * b + c),
                    "{a:e} {b:e} {c:e}"
                );
                assert!(same(max[i], if a > b { a } else { b }), "max {a:e} {b:e}");
                assert!(same(min[i], if a < b { a } else { b }), "min {a:e} {b:e}");
                assert!(same(sign[i], if a.is_sign_negative() { b } else { c }));
                assert!(same(abs[i], a.abs()));
                assert!(same(bf16[i], half::bf16::from_f32(a).to_f32()), "{a:e}");
            }
        }
    }
    for n in -126..=127 {
        // SAFETY: as above.
        let got = unsafe { lanes(s, s.exp2_whole(s.splat(n as f32))) };
        assert_eq!(got[S::LANES - 1], 2f32.powi(n));
    }
    for x in [0.5f32, 1.5, 2.5, -0.5, -1.5, 0.49, 126.51, -125.5, 1000.4] {
        // SAFETY: as above.
        let got = unsafe { lanes(s, s.nearest(s.splat(x))) };
        assert_eq!(got[0], x.round_ties_even());
    }
}

#[inline(always)]
unsafe fn check_memory<S: Simd>(s: S) {
    let mut bytes = [0u8; MAX_LANES * 4 + 1];
    for first in (0..=u16::MAX).step_by(MAX_LANES) {
        for i in 0..MAX_LANES {
            let half = first.wrapping_add(i as u16).to_le_bytes();
            bytes[1 + 2 * i..3 + 2 * i].copy_from_slice(&half);
        }
        // SAFETY: an odd address with MAX_LANES halves behind it.
        unsafe {
            let bf16 = s.load_bf16(bytes.as_ptr().add(1));
            let f16 = lanes(s, s.load_f16(bytes.as_ptr().add(1)));
            let wide = lanes(s, bf16);
            let mut packed = [0u16; MAX_LANES + 1];
            let odd = packed.as_mut_ptr().cast::<u8>().add(1).cast::<u16>();
            s.store_bf16(odd, bf16);
            for i in 0..S::LANES {
                let half = first.wrapping_add(i as u16);
                assert!(same(wide[i], f32::from_bits(u32::from(half) << 16)));
                assert!(same(f16[i], half::f16::from_bits(half).to_f32()));
                assert_eq!(odd.add(i).read_unaligned(), half);
            }
        }
    }
    let mut words = [0u8; MAX_LANES * 4 + 1];
    for (i, byte) in words.iter_mut().enumerate() {
        *byte = (i * 37 + 11) as u8;
    }
    // SAFETY: an odd address with 2·MAX_LANES halves behind it; the halves of a vector fit their arrays.
    unsafe {
        let even = lanes(s, s.load_bf16_even(words.as_ptr().add(1)));
        let odd = lanes(s, s.load_bf16_odd(words.as_ptr().add(1)));
        for i in 0..2 * S::LANES {
            let half = u16::from_le_bytes([words[1 + 2 * i], words[2 + 2 * i]]);
            let got = if i % 2 == 0 { even[i / 2] } else { odd[i / 2] };
            assert!(
                same(got, f32::from_bits(u32::from(half) << 16)),
                "element {i}"
            );
        }
        let whole: [f32; MAX_LANES] = std::array::from_fn(|i| i as f32);
        let (mut even, mut odd) = ([-1f32; MAX_LANES], [-1f32; MAX_LANES]);
        s.store_split(even.as_mut_ptr(), odd.as_mut_ptr(), s.load(whole.as_ptr()));
        for i in 0..MAX_LANES {
            let stored = i < S::LANES / 2;
            assert_eq!(even[i], if stored { 2.0 * i as f32 } else { -1.0 });
            assert_eq!(odd[i], if stored { 2.0 * i as f32 + 1.0 } else { -1.0 });
        }
    }
    let x = values();
    for n in 0..S::LANES {
        // SAFETY: n floats are there; the array has room for n.
        unsafe {
            let v = s.load_upto(x.as_ptr(), n);
            let some = lanes(s, v);
            let mut stored = [7f32; MAX_LANES];
            s.store_upto(stored.as_mut_ptr(), v, n);
            for i in 0..S::LANES {
                assert_eq!(some[i].to_bits(), if i < n { x[i].to_bits() } else { 0 });
                assert!(i < n || stored[i] == 7.0);
                assert!(i >= n || same(stored[i], x[i]));
            }
        }
    }
}

/// The tree that [`Simd::sum`] promises: neighbours first.
fn tree(x: &[f32]) -> f32 {
    match x {
        [one] => *one,
        _ => tree(&x[..x.len() / 2]) + tree(&x[x.len() / 2..]),
    }
}

#[inline(always)]
unsafe fn check_sums<S: Simd>(s: S) {
    let x: Vec<f32> = (0..200)
        .map(|i| ((i * i * 7919) % 1009) as f32 / 37.0 - 13.0)
        .collect();
    for at in 0..100 {
        // SAFETY: 100 + 4 × 16 floats are there.
        unsafe {
            let v: [S::V; 4] = [0, 1, 2, 3].map(|i| s.load(x.as_ptr().add(at + i * S::LANES)));
            let four = s.sum4(v);
            for i in 0..4 {
                let lanes = &x[at + i * S::LANES..][..S::LANES];
                assert_eq!(four[i].to_bits(), tree(lanes).to_bits());
                assert_eq!(s.sum(v[i]).to_bits(), tree(lanes).to_bits());
                assert_eq!(
                    s.largest(v[i]),
                    lanes.iter().copied().fold(f32::MIN, f32::max)
                );
            }
        }
    }
}

#[test]
fn every_method_does_what_it_says() {
    for name in ISA_NAMES {
        match Isa::named(name) {
            Some(isa) => {
                assert_eq!(isa.name(), name);
                isa.run(Check);
            }
            None => eprintln!("skipped: this CPU has no {name}"),
        }
    }
}

#[test]
fn exp_is_accurate() {
    struct Exp;
    impl Op for Exp {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let mut worst: f64 = 0.0;
            for i in -870_000..880_000 {
                let x = i as f32 / 10_000.0;
                // SAFETY: `lanes` only writes its own array.
                let got = unsafe { lanes(s, super::super::math::exp(s, s.splat(x)))[0] };
                let want = f64::from(x).exp();
                worst = worst.max(((f64::from(got) - want) / want).abs());
            }
            assert!(worst < 2e-7, "relative error {worst:e}");
            // SAFETY: as above.
            unsafe {
                assert_eq!(lanes(s, super::super::math::exp(s, s.zero()))[0], 1.0);
                assert!(lanes(s, super::super::math::exp(s, s.splat(f32::NAN)))[0].is_nan());
            }
        }
    }
    for name in ISA_NAMES {
        if let Some(isa) = Isa::named(name) {
            isa.run(Exp);
        }
    }
}
