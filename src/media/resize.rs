//! Bicubic resizing with antialiasing, bit for bit as Pillow does it on 8-bit images (`libImaging/Resample.c`).
//!
//! Keys' cubic with a = −0.5, stretched by the scale when shrinking; weights in 22-bit fixed point; rows and columns one after the
//! other, with bytes between.

use super::Rgb;

const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Half the width of the kernel at scale 1.
const SUPPORT: f64 = 2.0;

/// `image` at `width` × `height`. A dimension that does not change is not filtered.
///
/// # Panics
/// When a dimension is zero.
pub fn resize(image: &Rgb, width: usize, height: usize) -> Rgb {
    assert!(image.width > 0 && image.height > 0 && width > 0 && height > 0);
    let (across, down) = (width != image.width, height != image.height);
    let wide = |data: &[u8]| horizontal(data, image.width, &Taps::new(image.width, width));
    let high = |data: &[u8], width| vertical(data, width, &Taps::new(image.height, height));
    let data = match (across, down) {
        (false, false) => image.data.clone(),
        (true, false) => wide(&image.data),
        (false, true) => high(&image.data, width),
        (true, true) if vertical_first(image, width, height) => {
            wide(&high(&image.data, image.width))
        }
        (true, true) => high(&wide(&image.data), width),
    };
    Rgb {
        width,
        height,
        data,
    }
}

/// Pillow 13 begins with the columns where the height shrinks by more than twice what the width shrinks by; earlier releases always began with
/// the rows. The two orders differ by a level here and there.
fn vertical_first(image: &Rgb, width: usize, height: usize) -> bool {
    let (down, across) = (
        image.height as i64 - height as i64,
        image.width as i64 - width as i64,
    );
    down > 0 && down > 2 * across
}

/// For each output sample: its first input sample, and the weights from there on.
struct Taps {
    first: Vec<usize>,
    /// `count[i]` weights at `weights[i * stride..]`.
    count: Vec<usize>,
    weights: Vec<i32>,
    stride: usize,
}

impl Taps {
    fn new(input: usize, output: usize) -> Taps {
        let scale = input as f64 / output as f64;
        let stretch = scale.max(1.0);
        let support = SUPPORT * stretch;
        let stride = support.ceil() as usize * 2 + 1;
        let mut taps = Taps {
            first: Vec::with_capacity(output),
            count: Vec::with_capacity(output),
            weights: vec![0; output * stride],
            stride,
        };
        let mut w = vec![0.0f64; stride];
        for out in 0..output {
            let center = (out as f64 + 0.5) * scale;
            // Truncated towards zero as C does, then kept inside the image.
            let first = ((center - support + 0.5) as i64).max(0) as usize;
            let last = ((center + support + 0.5) as i64).clamp(0, input as i64) as usize;
            let count = last - first;
            let mut sum = 0.0;
            for (i, w) in w[..count].iter_mut().enumerate() {
                *w = cubic(((i + first) as f64 - center + 0.5) * (1.0 / stretch));
                sum += *w;
            }
            let fixed = &mut taps.weights[out * stride..][..count];
            for (fixed, w) in fixed.iter_mut().zip(&w) {
                let w = if sum != 0.0 { w / sum } else { *w };
                let scaled = w * f64::from(1u32 << PRECISION_BITS);
                *fixed = (scaled + if w < 0.0 { -0.5 } else { 0.5 }) as i32;
            }
            taps.first.push(first);
            taps.count.push(count);
        }
        taps
    }

    fn len(&self) -> usize {
        self.first.len()
    }

    fn at(&self, out: usize) -> (usize, &[i32]) {
        let weights = &self.weights[out * self.stride..][..self.count[out]];
        (self.first[out], weights)
    }
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn clip8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

fn horizontal(data: &[u8], width: usize, taps: &Taps) -> Vec<u8> {
    let mut out = vec![0; data.len() / width * taps.len()];
    let rows = data.chunks_exact(width * 3);
    for (row, out) in rows.zip(out.chunks_exact_mut(taps.len() * 3)) {
        for (x, out) in out.chunks_exact_mut(3).enumerate() {
            let (first, weights) = taps.at(x);
            let mut sum = [HALF; 3];
            for (pixel, w) in row[first * 3..].chunks_exact(3).zip(weights) {
                for c in 0..3 {
                    sum[c] += i32::from(pixel[c]) * w;
                }
            }
            for c in 0..3 {
                out[c] = clip8(sum[c]);
            }
        }
    }
    out
}

fn vertical(data: &[u8], width: usize, taps: &Taps) -> Vec<u8> {
    let row_bytes = width * 3;
    let mut out = vec![0; taps.len() * row_bytes];
    let mut sums = vec![0i32; row_bytes];
    for (y, out) in out.chunks_exact_mut(row_bytes).enumerate() {
        let (first, weights) = taps.at(y);
        sums.fill(HALF);
        for (row, w) in data[first * row_bytes..]
            .chunks_exact(row_bytes)
            .zip(weights)
        {
            for (sum, v) in sums.iter_mut().zip(row) {
                *sum += i32::from(*v) * w;
            }
        }
        for (out, sum) in out.iter_mut().zip(&sums) {
            *out = clip8(*sum);
        }
    }
    out
}

#[cfg(test)]
mod tests;
