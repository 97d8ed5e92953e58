use super::*;

fn erf_reference(x: f64) -> f64 {
    // Σ (-1)^n x^(2n+1) / (n! (2n+1)), enough terms for |x| < 5.
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn rmsnorm_matches_the_reference() {
    let mut rng = Random(11);
    for dev in devices(2) {
        for dtype in DTYPES {
            for (rows, cols) in [(1, 1), (3, 7), (5, 500), (70, 1536)] {
                let w = Weights::new(&mut rng, dtype, 1, cols, 1, 0);
                let x = rng.floats(rows * cols);
                let want: Vec<f64> = (0..rows)
                    .flat_map(|r| {
                        let row = &x[r * cols..][..cols];
                        let mean =
                            row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / cols as f64;
                        let scale = 1.0 / (mean + 1e-6).sqrt();
                        let values = &w.values;
                        row.iter()
                            .enumerate()
                            .map(move |(c, x)| f64::from(*x) * scale * f64::from(values[c]))
                            .collect::<Vec<_>>()
                    })
                    .collect();
                let mut out = vec![0.0; rows * cols];
                dev.rmsnorm_f32(&x, rows, cols, &w.view(), 1e-6, &mut out);
                close(&out, &want, 1e-7, 1e-6);
                let mut half = ActBuf::new(dtype, rows, cols);
                dev.rmsnorm(&x, rows, cols, &w.view(), 1e-6, &mut half);
                let once: Vec<f32> = out.iter().map(|x| seen(&dev, dtype, *x)).collect();
                assert_eq!(bits(&rows_of(&half)), bits(&once), "rounded once at most");
            }
        }
    }
}

#[test]
fn rmsnorm_of_heads_leaves_the_rest_alone() {
    let mut rng = Random(12);
    for dev in devices(2) {
        let (rows, heads, size, stride) = (9, 3, 20, 71);
        let w = Weights::new(&mut rng, Dtype::BF16, 1, size, 1, 0);
        let x = rng.floats(rows * stride);
        let mut got = x.clone();
        dev.rmsnorm_heads(&mut got, rows, stride, heads, size, &w.view(), 1e-5);
        for r in 0..rows {
            for h in 0..heads {
                let at = r * stride + h * size;
                let mut want = vec![0.0; size];
                dev.rmsnorm_f32(&x[at..at + size], 1, size, &w.view(), 1e-5, &mut want);
                assert_eq!(bits(&got[at..at + size]), bits(&want));
            }
            let rest = r * stride + heads * size..(r + 1) * stride;
            assert_eq!(got[rest.clone()], x[rest]);
        }
    }
}

#[test]
fn rope_rotates_halves() {
    let mut rng = Random(13);
    for dev in devices(2) {
        for (rows, heads, size) in [(1, 1, 2), (5, 3, 20), (40, 12, 128), (3, 16, 80)] {
            let (stride, half) = (heads * size + 5, size / 2);
            let x = rng.floats(rows * stride);
            let angles = rng.floats(rows * half);
            let cos: Vec<f32> = angles.iter().map(|a| (a * 3.0).cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| (a * 3.0).sin()).collect();
            let mut got = x.clone();
            dev.rope(&mut got, rows, stride, heads, size, &cos, &sin);
            let mut want: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            for r in 0..rows {
                for h in 0..heads {
                    for i in 0..half {
                        let at = r * stride + h * size + i;
                        let (a, b) = (f64::from(x[at]), f64::from(x[at + half]));
                        let c = f64::from(cos[r * half + i]);
                        let s = f64::from(sin[r * half + i]);
                        want[at] = a * c - b * s;
                        want[at + half] = b * c + a * s;
                    }
                }
            }
            close(&got, &want, 2e-7, 1e-7);
        }
    }
}

#[test]
fn swiglu_and_gelu_match_the_reference() {
    let mut rng = Random(14);
    for dev in devices(2) {
        for dtype in DTYPES {
            for (rows, cols) in [(1, 3), (4, 37), (40, 1000)] {
                let gate: Vec<f32> = rng.floats(rows * cols).iter().map(|x| x * 6.0).collect();
                let up = rng.floats(rows * cols);
                let mut out = ActBuf::new(dtype, rows, cols);
                dev.swiglu(&gate, &up, rows, cols, &mut out);
                let want: Vec<f64> = gate
                    .iter()
                    .zip(&up)
                    .map(|(g, u)| {
                        let g = f64::from(*g);
                        g / (1.0 + (-g).exp()) * f64::from(*u)
                    })
                    .collect();
                let ulp = half_ulp(dtype) * 1.01;
                let tiny = if dtype == Dtype::F16 { 6e-8 } else { 1e-9 };
                close(&rows_of(&out), &want, tiny, ulp + 1e-6);

                let fused: Vec<f32> = (0..rows)
                    .flat_map(|r| {
                        let row = r * cols..(r + 1) * cols;
                        [&gate[row.clone()], &up[row]].concat()
                    })
                    .collect();
                let mut same = ActBuf::new(dtype, rows, cols);
                dev.swiglu_fused(&fused, rows, cols, &mut same);
                assert_eq!(bits(&rows_of(&same)), bits(&rows_of(&out)));

                dev.gelu(&gate, rows, cols, &mut out);
                let want: Vec<f64> = gate
                    .iter()
                    .map(|x| {
                        let x = f64::from(*x);
                        0.5 * x * (1.0 + erf_reference(x / std::f64::consts::SQRT_2))
                    })
                    .collect();
                close(&rows_of(&out), &want, 5e-7, ulp + 1e-6);
            }
        }
    }
}

#[test]
fn extreme_inputs_stay_what_they_are() {
    for dev in devices(1) {
        let gate = [
            -1e30,
            -200.0,
            0.0,
            200.0,
            1e30,
            f32::NAN,
            f32::INFINITY,
            -0.0,
            88.0,
        ];
        let n = gate.len();
        let mut out = ActBuf::new(Dtype::F32, 1, n);
        dev.swiglu(&gate, &vec![1.0; n], 1, n, &mut out);
        let row = out.row(0);
        assert!(row[0].abs() < 1e-6 && row[1].abs() < 1e-30, "{row:?}");
        assert_eq!(row[2], 0.0);
        assert_eq!(row[3], 200.0);
        assert_eq!(row[4], 1e30);
        assert!(row[5].is_nan());
        assert_eq!(row[6], f32::INFINITY);
        dev.gelu(&gate, 1, n, &mut out);
        let row = out.row(0);
        assert!(row[0].abs() < 1e-6 && row[1].abs() < 1e-30, "{row:?}");
        assert_eq!(row[3], 200.0);
        assert_eq!(row[4], 1e30);
        assert!(row[5].is_nan());
    }
}

#[test]
fn rounding_is_to_nearest_even_for_every_kind_of_number() {
    let mut rng = Random(15);
    let mut x: Vec<f32> = vec![
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
        f32::MAX,
        f32::MIN_POSITIVE,
        65504.0,
        65519.9,
        65520.0,
        1e-8,
        6e-8,
        1e-40,
        -1e-40,
        f32::from_bits(0x3f80_8000),
        f32::from_bits(0x3f81_8000),
        f32::from_bits(0x3f80_8001),
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xff80_ffff),
        f32::from_bits(0x7fff_ffff),
    ];
    x.extend((0..4000).map(|_| f32::from_bits(rng.next() as u32)));
    for dev in devices(2) {
        for dtype in DTYPES {
            let got = act(&dev, dtype, &x, 1, x.len()).row(0);
            for (g, x) in got.iter().zip(&x) {
                let want = seen(&dev, dtype, *x);
                assert!(
                    g.to_bits() == want.to_bits() || (g.is_nan() && want.is_nan()),
                    "{} {dtype} of {x:e} ({:#x}): {g:e}, not {want:e}",
                    dev.isa(),
                    x.to_bits()
                );
            }
        }
    }
}

#[test]
fn widening_is_exact_and_takes_any_alignment() {
    let mut rng = Random(16);
    for dev in devices(1) {
        for dtype in DTYPES {
            for cols in [1, 7, 8, 31, 500] {
                let w = Weights::new(&mut rng, dtype, 2, cols, 1, 3);
                let mut out = vec![0.0; cols];
                for r in 0..2 {
                    dev.widen(dtype, w.view().row(r), &mut out);
                    assert_eq!(out, w.values[r * cols..][..cols]);
                }
            }
        }
    }
}

#[test]
fn bias_is_added_to_every_row() {
    let mut rng = Random(17);
    for dev in devices(2) {
        let (rows, cols) = (700, 37);
        let bias = Weights::new(&mut rng, Dtype::F16, 1, cols, 1, 0);
        let x = rng.floats(rows * cols);
        let mut got = x.clone();
        dev.add_bias(&mut got, rows, &bias.view());
        for (i, g) in got.iter().enumerate() {
            assert_eq!(*g, x[i] + bias.values[i % cols]);
        }
    }
}

#[test]
fn a_buffer_takes_smaller_shapes_and_other_dtypes_and_refuses_larger() {
    let dev = CpuDevice::new(1).unwrap();
    let mut buf = ActBuf::new(Dtype::BF16, 4, 64);
    for (dtype, rows, cols) in [
        (Dtype::F32, 4, 64),
        (Dtype::F16, 3, 33),
        (Dtype::BF16, 2, 5),
    ] {
        buf.set_dtype(dtype);
        let x = Random(18).floats(rows * cols);
        dev.round(&x, rows, cols, &mut buf);
        let want: Vec<f32> = x.iter().map(|x| seen(&dev, dtype, *x)).collect();
        assert_eq!(rows_of(&buf), want);
    }
    let too_many = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        dev.round(&[0.0; 5 * 64], 5, 64, &mut buf)
    }));
    assert!(too_many.is_err());
}

#[test]
fn unknown_instruction_sets_are_named_in_the_error() {
    let Err(error) = CpuDevice::with_isa(1, "sse9") else {
        panic!("there is no sse9")
    };
    assert_eq!(error.code(), crate::error::Code::Device);
    assert!(error.what().contains("sse9") && error.cause().contains("portable"));
}
