//! Products to be asked of two devices: shapes, and what comes out.

use tensorpager::device::{Into, Product, WeightView};
use tensorpager::error::Result;

use super::bed::{Bed, Random, Weight};
use super::ops::Shapes;

/// Rows, n and k.
pub type ProductShape = (usize, usize, usize);

/// Columns that give the wide tile of 17 to 32 rows more blocks than any card has multiprocessors: with fewer the narrow one is taken.
pub const WIDE: usize = 12288;

/// Every tile that a card takes for few rows, ragged in each direction, and k that no tile of 16-byte loads takes.
pub fn product_shapes(which: Shapes) -> Vec<ProductShape> {
    let mut shapes = vec![
        (1, 33, 72),
        (3, 32, 64),
        (9, 100, 200),
        (17, 65, 136),
        (18, 200, 72),
        (20, WIDE, 8),
        (40, 130, 88),
        (5, 37, 51),
        // A 7B model's longest sums: what is lost in each step of a chain adds up.
        (3, 24, 3584),
        (2, 16, 18944),
    ];
    if which == Shapes::All {
        let large = [1, 8, 16, 32, 64, 256, 1024].map(|r| (r, 3584, 3584));
        shapes.extend(large);
        shapes.extend([
            (1, 18944, 3584),
            (7, 3584, 18944),
            (64, 4608, 3584),
            (130, 512, 3584),
            (65, 1000, 4095),
        ]);
    }
    shapes
}

pub fn product(bed: &Bed, &(rows, n, k): &ProductShape, into: Into) -> Result<Vec<f32>> {
    let mut random = Random::new((rows * n + k) as u64);
    let a = bed.acts(&random.values(rows * k, 1.0), k)?;
    let w = bed.weight(&random.values(n * k, 0.5), n, k)?;
    let bias = bed.weight(&random.values(n, 1.0), 1, n)?;
    let mut out = bed.rows(&random.values(rows * n, 1.0), n)?;
    bed.device
        .linear(&a, rows, &w.view(), Some(&bias.view()), &mut out, 0, into)?;
    bed.read(&out, rows * n)
}

/// Rows, the width of each matrix that they are multiplied with, and k.
pub type EachShape = (usize, &'static [usize], usize);

/// One to four matrices (a launch takes three), in tiles for few rows and more, and k that no tile of 16-byte loads takes.
pub fn each_shapes(which: Shapes) -> Vec<EachShape> {
    let mut shapes: Vec<EachShape> = vec![
        (1, &[33, 8, 8], 72),
        (5, &[100, 37], 200),
        (12, &[24, 8, 8, 8], 64),
        (20, &[70, 9, 33], 136),
        (40, &[130, 16, 16], 88),
        (7, &[50], 96),
        (3, &[37, 5, 5], 51),
    ];
    if which == Shapes::All {
        let qkv: &[usize] = &[3584, 512, 512];
        shapes.extend([1, 16, 32, 64, 512].map(|rows| (rows, qkv, 3584)));
        let wide: &[usize] = &[18944, 18944];
        shapes.extend([1, 32].map(|rows| (rows, wide, 3584)));
    }
    shapes
}

/// The products one behind the other, every second with a bias. `together`: by the op for several.
pub fn products_of_one(bed: &Bed, s: &EachShape, together: bool) -> Result<Vec<f32>> {
    let &(rows, widths, k) = s;
    let mut random = Random::new((rows + widths.len() * k) as u64);
    let a = bed.acts(&random.values(rows * k, 1.0), k)?;
    let (mut weights, mut biases, mut outs) = (Vec::new(), Vec::new(), Vec::new());
    for n in widths {
        weights.push(bed.weight(&random.values(n * k, 0.5), *n, k)?);
        biases.push(bed.weight(&random.values(*n, 1.0), 1, *n)?);
        outs.push(bed.rows(&random.values(rows * n, 1.0), *n)?);
    }
    let views: Vec<WeightView<'_>> = weights.iter().map(Weight::view).collect();
    let biases: Vec<WeightView<'_>> = biases.iter().map(Weight::view).collect();
    let mut products: Vec<Product<'_>> = views
        .iter()
        .zip(&biases)
        .zip(&mut outs)
        .enumerate()
        .map(|(i, ((w, bias), out))| Product {
            w,
            bias: (i % 2 == 0).then_some(bias),
            out,
        })
        .collect();
    match together {
        true => bed.device.linear_each(&a, rows, &mut products)?,
        false => products.iter_mut().try_for_each(|p| {
            bed.device
                .linear(&a, rows, p.w, p.bias, p.out, 0, Into::Store)
        })?,
    }
    let mut all = Vec::new();
    for (out, n) in outs.iter().zip(widths) {
        all.extend(bed.read(out, rows * n)?);
    }
    Ok(all)
}
