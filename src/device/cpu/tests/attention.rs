use proptest::prelude::*;

use super::*;
use crate::device::cpu::{AttnSegment, DenseAttention, KV_BLOCK_TOKENS, KvLayout, KvView};

/// Sequences with their whole k and v known, and a paged memory with shuffled blocks, garbage wherever nothing was written.
struct World {
    layout: KvLayout,
    data: Vec<u8>,
    heads: usize,
    /// [position][heads·size], [position][kv_heads·size]
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    tables: Vec<Vec<u32>>,
}

const LAYER: usize = 1;

impl World {
    fn new(
        rng: &mut Random,
        dtype: Dtype,
        heads: usize,
        kv_heads: usize,
        size: usize,
        lengths: &[usize],
    ) -> World {
        let needed: Vec<usize> = lengths
            .iter()
            .map(|l| l.div_ceil(KV_BLOCK_TOKENS))
            .collect();
        let blocks = needed.iter().sum::<usize>() + 2;
        let mut ids: Vec<u32> = (0..blocks as u32).collect();
        for i in (1..ids.len()).rev() {
            ids.swap(i, (rng.next() % (i as u64 + 1)) as usize);
        }
        let tables = needed.iter().map(|n| ids.drain(..*n).collect()).collect();
        let layout = KvLayout {
            dtype,
            layers: 2,
            blocks,
            kv_heads,
            head_size: size,
        };
        World {
            layout,
            // NaN in every type: a key read that was never written shows.
            data: vec![0xff; layout.bytes()],
            heads,
            q: lengths
                .iter()
                .map(|l| rng.floats(l * heads * size))
                .collect(),
            k: lengths
                .iter()
                .map(|l| rng.floats(l * kv_heads * size))
                .collect(),
            v: lengths
                .iter()
                .map(|l| rng.floats(l * kv_heads * size))
                .collect(),
            tables,
        }
    }

    /// Appends and attends the pieces (sequence, start, rows) in one pass; their outputs in order.
    fn pass(
        &mut self,
        dev: &CpuDevice,
        pieces: &[(usize, usize, usize)],
        window: Option<usize>,
    ) -> Vec<f32> {
        let (q_width, kv_width) = (
            self.heads * self.layout.head_size,
            self.layout.kv_heads * self.layout.head_size,
        );
        let (mut q, mut k, mut v) = (vec![], vec![], vec![]);
        let mut segments = vec![];
        let mut first_row = 0;
        for &(sequence, start, rows) in pieces {
            q.extend_from_slice(&self.q[sequence][start * q_width..][..rows * q_width]);
            k.extend_from_slice(&self.k[sequence][start * kv_width..][..rows * kv_width]);
            v.extend_from_slice(&self.v[sequence][start * kv_width..][..rows * kv_width]);
            segments.push(AttnSegment {
                first_row,
                rows,
                start_pos: start,
                table: &self.tables[sequence],
            });
            first_row += rows;
        }
        let layout = self.layout;
        dev.kv_append(
            &layout,
            &mut self.data,
            LAYER,
            &segments,
            &k,
            kv_width,
            &v,
            kv_width,
        );
        let mut out = ActBuf::new(Dtype::F32, first_row, q_width);
        let kv = KvView {
            layout,
            data: &self.data,
        };
        let scale = 1.0 / (layout.head_size as f32).sqrt() * 4.0;
        dev.attention(
            &q, q_width, self.heads, &kv, LAYER, &segments, scale, window, &mut out,
        );
        rows_of(&out)
    }

    /// All rows of a sequence in float64, from k and v rounded to the memory's type.
    fn reference(&self, sequence: usize, window: Option<usize>) -> Vec<f64> {
        let (size, group) = (self.layout.head_size, self.heads / self.layout.kv_heads);
        let (q_width, kv_width) = (self.heads * size, self.layout.kv_heads * size);
        let scale = 4.0 / (size as f64).sqrt();
        let round = |x: f32| f64::from(rounded(self.layout.dtype, x));
        let rows = self.q[sequence].len() / q_width;
        let mut out = vec![];
        for row in 0..rows {
            let first = window.map_or(0, |w| (row + 1).saturating_sub(w));
            for head in 0..self.heads {
                let q = &self.q[sequence][row * q_width + head * size..][..size];
                let at = |t: usize| t * kv_width + head / group * size;
                let scores: Vec<f64> = (first..=row)
                    .map(|t| {
                        let k = &self.k[sequence][at(t)..][..size];
                        let dot: f64 = q
                            .iter()
                            .zip(k)
                            .map(|(q, k)| f64::from(*q) * round(*k))
                            .sum();
                        dot * scale
                    })
                    .collect();
                let max = scores.iter().fold(f64::MIN, |a, b| a.max(*b));
                let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = p.iter().sum();
                for c in 0..size {
                    let o: f64 = (first..=row)
                        .map(|t| p[t - first] * round(self.v[sequence][at(t) + c]))
                        .sum();
                    out.push(o / sum);
                }
            }
        }
        out
    }
}

#[test]
fn attention_matches_the_reference() {
    let mut rng = Random(21);
    for dev in devices(2) {
        for (dtype, heads, kv_heads, size, length, window) in [
            (Dtype::BF16, 6, 1, 64, 70, None),
            (Dtype::F16, 4, 4, 20, 300, None),
            (Dtype::F32, 4, 2, 128, 530, None),
            (Dtype::BF16, 14, 2, 80, 300, Some(1)),
            (Dtype::BF16, 3, 3, 16, 600, Some(100)),
            (Dtype::F32, 100, 1, 8, 40, Some(17)),
            (Dtype::F32, 2, 1, 512, 40, None),
        ] {
            let mut world = World::new(&mut rng, dtype, heads, kv_heads, size, &[length]);
            let got = world.pass(&dev, &[(0, 0, length)], window);
            close(&got, &world.reference(0, window), 3e-6, 3e-6);
        }
    }
}

#[test]
fn a_half_output_is_rounded_once() {
    let mut rng = Random(22);
    for dev in devices(2) {
        let (heads, size, rows) = (2, 20, 5);
        let q = rng.floats(rows * heads * size);
        let cu_seqlens = [0, rows];
        let dense = DenseAttention {
            q: &q,
            k: &q,
            v: &q,
            q_stride: heads * size,
            k_stride: heads * size,
            v_stride: heads * size,
            heads,
            kv_heads: heads,
            head_size: size,
            scale: 0.3,
            cu_seqlens: &cu_seqlens,
        };
        let mut exact = ActBuf::new(Dtype::F32, rows, heads * size);
        dev.attention_dense(&dense, &mut exact);
        for dtype in [Dtype::F16, Dtype::BF16] {
            let mut half = ActBuf::new(dtype, rows, heads * size);
            dev.attention_dense(&dense, &mut half);
            let want: Vec<f32> = rows_of(&exact)
                .iter()
                .map(|x| seen(&dev, dtype, *x))
                .collect();
            assert_eq!(bits(&rows_of(&half)), bits(&want));
        }
    }
}

#[test]
fn a_key_beyond_a_row_does_not_touch_it() {
    // An infinite value in the future, in the same block, must not become 0·inf = NaN in the past.
    for dev in devices(1) {
        let mut world = World::new(&mut Random(23), Dtype::F32, 2, 1, 16, &[24]);
        let clean = world.pass(&dev, &[(0, 0, 24)], None);
        for x in &mut world.v[0][20 * 16..21 * 16] {
            *x = f32::INFINITY;
        }
        let got = world.pass(&dev, &[(0, 0, 24)], None);
        assert_eq!(bits(&got[..20 * 32]), bits(&clean[..20 * 32]));
        assert!(got[20 * 32..].iter().all(|x| !x.is_finite()));
        // And one that has left the window is gone.
        let got = world.pass(&dev, &[(0, 0, 24)], Some(2));
        assert!(got[22 * 32..].iter().all(|x| x.is_finite()));
    }
}

#[test]
fn windows_of_dense_attention_do_not_see_one_another() {
    let mut rng = Random(24);
    for dev in devices(3) {
        for (heads, kv_heads, size, cu_seqlens) in [
            (16, 16, 80, vec![0usize, 64, 64, 70, 333]),
            (4, 2, 20, vec![0, 1, 2, 600]),
            (2, 2, 8, vec![0]),
        ] {
            let rows = *cu_seqlens.last().unwrap();
            let stride = (heads + 2 * kv_heads) * size;
            let qkv = rng.floats((rows * stride).max(stride));
            let a = DenseAttention {
                q: &qkv,
                k: &qkv[heads * size..],
                v: &qkv[(heads + kv_heads) * size..],
                q_stride: stride,
                k_stride: stride,
                v_stride: stride,
                heads,
                kv_heads,
                head_size: size,
                scale: 0.5,
                cu_seqlens: &cu_seqlens,
            };
            let mut out = ActBuf::new(Dtype::F32, rows, heads * size);
            dev.attention_dense(&a, &mut out);
            let mut want = vec![];
            for row in 0..rows {
                let window = cu_seqlens
                    .windows(2)
                    .find(|w| (w[0]..w[1]).contains(&row))
                    .unwrap();
                for head in 0..heads {
                    let q = &a.q[row * stride + head * size..][..size];
                    let at = |t: usize| t * stride + head / (heads / kv_heads) * size;
                    let scores: Vec<f64> = (window[0]..window[1])
                        .map(|t| {
                            let k = &a.k[at(t)..][..size];
                            q.iter()
                                .zip(k)
                                .map(|(q, k)| f64::from(*q) * f64::from(*k))
                                .sum::<f64>()
                                * 0.5
                        })
                        .collect();
                    let max = scores.iter().fold(f64::MIN, |a, b| a.max(*b));
                    let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum: f64 = p.iter().sum();
                    for c in 0..size {
                        let o: f64 = p
                            .iter()
                            .enumerate()
                            .map(|(t, p)| p * f64::from(a.v[at(window[0] + t) + c]))
                            .sum();
                        want.push(o / sum);
                    }
                }
            }
            close(&rows_of(&out), &want, 3e-6, 3e-6);
        }
    }
}

#[test]
#[should_panic(expected = "block table too short")]
fn a_short_block_table_is_refused() {
    let dev = CpuDevice::with_isa(1, "portable").unwrap();
    let mut world = World::new(&mut Random(25), Dtype::F32, 1, 1, 8, &[33]);
    world.tables[0].pop();
    world.pass(&dev, &[(0, 0, 33)], None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Chunked prefill, decode, other sequences beside it, thread counts, block placement: the same bits.
    #[test]
    fn a_rows_attention_depends_on_its_own_keys_alone(
        (heads, kv_heads) in prop_oneof![Just((6, 1)), Just((12, 2)), Just((4, 4)), Just((14, 2))],
        size in prop_oneof![Just(16usize), Just(64), Just(80), Just(20)],
        dtype in prop_oneof![Just(Dtype::F16), Just(Dtype::BF16), Just(Dtype::F32)],
        length in 1usize..560,
        other in 1usize..60,
        cut in 1usize..40,
        threads in 1usize..5,
        window in prop_oneof![Just(None), (1usize..400).prop_map(Some)],
        seed in any::<u64>(),
    ) {
        let width = heads * size;
        for name in CpuDevice::isas() {
            let many = CpuDevice::with_isa(threads, name).unwrap();
            let one = CpuDevice::with_isa(1, name).unwrap();
            let mut world = World::new(&mut Random(seed), dtype, heads, kv_heads, size, &[length, other]);
            let whole = world.pass(&one, &[(0, 0, length)], window);

            // Another sequence before it, itself in two chunks, the last row alone.
            let mut world = World::new(&mut Random(seed), dtype, heads, kv_heads, size, &[length, other]);
            world.tables.reverse();
            for table in &mut world.tables {
                table.reverse();
            }
            let tables = world.tables.concat();
            let needed = length.div_ceil(KV_BLOCK_TOKENS);
            world.tables = vec![tables[..needed].to_vec(), tables[needed..].to_vec()];
            let cut = cut.min(length);
            let mut pieces = vec![];
            let first = world.pass(&many, &[(1, 0, other), (0, 0, cut)], window);
            pieces.extend_from_slice(&first[other * width..]);
            if length - cut > 1 {
                pieces.extend(world.pass(&many, &[(0, cut, length - 1 - cut)], window));
            }
            if length > cut {
                pieces.extend(world.pass(&many, &[(0, length - 1, 1)], window));
            }
            prop_assert_eq!(bits(&pieces), bits(&whole), "{}", name);
        }
    }
}
