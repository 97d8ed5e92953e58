//! The vision tower's kernels at Qwen2.5-VL-7B's shapes: 1280 wide, 16 heads of 80, a picture of 64 x 64 patches, windows of 64 patches in
//! most blocks and none in the others; the merger's GELU at 5120.

use tensorpager::device::{DenseShape, PassRows};
use tensorpager::units::Dtype;

use super::kernels::{floor_row, time};
use super::{Outcome, Suite, ops};

const HEAD: usize = 80;

struct Sizes {
    heads: usize,
    patches: usize,
    window: usize,
}

const REAL: Sizes = Sizes {
    heads: 16,
    patches: 4096,
    window: 64,
};
const SMOKE: Sizes = Sizes {
    heads: 2,
    patches: 48,
    window: 16,
};

pub fn section(suite: &mut Suite) -> Outcome<()> {
    let s = if suite.smoke { SMOKE } else { REAL };
    // The decoder's head size is 128 beside it; its kernels are not used here.
    let bed = ops::open(Dtype::BF16, 128, Some(HEAD))?;
    let d = &bed.device;
    let (rows, cols) = (s.patches, s.heads * HEAD);
    let shape = DenseShape {
        heads: s.heads,
        head_size: HEAD,
        scale: 0.112,
    };
    let angles = vec![0.5; rows * HEAD / 2];
    let pass = PassRows {
        spans: &[],
        cos: &angles,
        sin: &angles,
    };
    // Angles are sent once, not each time.
    let sent = PassRows {
        spans: &[],
        cos: &[],
        sin: &[],
    };
    let mut qkv = d.rows(rows, 3 * cols)?;
    let mut dense = d.dense(rows, &shape)?;
    let mut out = d.acts(rows, cols, bed.half)?;
    d.rope_dense(&mut qkv, rows, &shape, &pass, &mut dense)?;
    let t = time(&bed, |_| {
        Ok(d.rope_dense(&mut qkv, rows, &shape, &sent, &mut dense)?)
    })?;
    let what = format!("rope_dense, {rows} rows");
    floor_row(suite, &what, t, rows * cols * 18, 0.0)?;
    for window in [s.window, rows] {
        let ends: Vec<usize> = (0..=rows).step_by(window).collect();
        let t = time(&bed, |_| {
            Ok(d.attention_dense(&qkv, &shape, &ends, &mut dense, &mut out)?)
        })?;
        let what = format!("attention_dense, {rows} rows, windows of {window}");
        let flops = 4.0 * (rows * window * cols) as f64;
        floor_row(suite, &what, t, rows * cols * 8, flops)?;
    }
    let (rows, cols) = (rows / 4, cols * 4);
    let x = d.rows(rows, cols)?;
    let mut out = d.acts(rows, cols, bed.half)?;
    let t = time(&bed, |_| Ok(d.gelu(&x, rows, cols, &mut out)?))?;
    let what = format!("gelu, {rows} rows of {cols}");
    floor_row(suite, &what, t, rows * cols * 6, 0.0)
}
