//! A device with weights where it wants them, and values that 16 bits hold exactly: the same op can be asked of two devices.
#![allow(dead_code)] // the test and the suite each use a part

use tensorpager::device::cuda::{Copier, Piece, Slot, Ticks};
use tensorpager::device::{Acts, Device, Into, Rows, WeightView};
use tensorpager::error::Result;
use tensorpager::units::Dtype;

/// Numbers in (-1, 1), the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// Values that bfloat16 and float16 hold exactly: eight significant bits.
    pub fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        let exact = |x: f32| half::bf16::from_f32(x * scale).to_f32();
        (0..count).map(|_| exact(self.next())).collect()
    }
}

/// Little-endian bytes of values in the type.
pub fn bytes_of(values: &[f32], half: Dtype) -> Vec<u8> {
    let pair = |x: &f32| match half {
        Dtype::F16 => half::f16::from_f32(*x).to_le_bytes(),
        _ => half::bf16::from_f32(*x).to_le_bytes(),
    };
    values.iter().flat_map(pair).collect()
}

/// A weight in the device's memory.
pub struct Weight {
    place: Place,
    half: Dtype,
    rows: usize,
    cols: usize,
}

enum Place {
    Host(Vec<u8>),
    Gpu(Slot),
}

impl Weight {
    pub fn view(&self) -> WeightView<'_> {
        match &self.place {
            Place::Host(bytes) => WeightView::packed(self.half, self.rows, self.cols, bytes),
            Place::Gpu(slot) => WeightView {
                dtype: self.half,
                rows: self.rows,
                cols: self.cols,
                row_stride: self.cols * self.half.bytes(),
                data: slot.bytes(),
            },
        }
    }
}

pub struct Bed {
    pub device: Device,
    pub half: Dtype,
}

impl Bed {
    pub fn weight(&self, values: &[f32], rows: usize, cols: usize) -> Result<Weight> {
        assert_eq!(values.len(), rows * cols);
        self.weight_bytes(bytes_of(values, self.half), rows, cols)
    }

    pub fn weight_bytes(&self, bytes: Vec<u8>, rows: usize, cols: usize) -> Result<Weight> {
        let place = match self.device.as_cuda() {
            None => Place::Host(bytes),
            Some(cuda) => {
                let context = cuda.context();
                let mut copier = Copier::<Vec<u8>>::new(context, 1)?;
                let mut slot = Slot::new(context, bytes.len() as u64, "a weight")?;
                let all = Piece {
                    from: 0,
                    to: 0,
                    bytes: bytes.len(),
                };
                copier.begin(&mut slot)?;
                copier.send(bytes, &[all], &slot)?;
                copier.finish(&mut slot)?;
                copier.reclaim(true)?;
                cuda.compute().acquire(&mut slot, &Ticks::new(context)?)?;
                Place::Gpu(slot)
            }
        };
        Ok(Weight {
            place,
            half: self.half,
            rows,
            cols,
        })
    }

    pub fn rows(&self, values: &[f32], cols: usize) -> Result<Rows> {
        let mut rows = self.device.rows(values.len() / cols, cols)?;
        self.device.write_rows(&mut rows, 0, values)?;
        Ok(rows)
    }

    pub fn acts(&self, values: &[f32], cols: usize) -> Result<Acts> {
        let rows = values.len() / cols;
        let mut acts = self.device.acts(rows, cols, self.half)?;
        let from = self.rows(values, cols)?;
        self.device.round(&from, rows, cols, &mut acts)?;
        Ok(acts)
    }

    pub fn read(&self, rows: &Rows, elements: usize) -> Result<Vec<f32>> {
        let mut mirror = self.device.mirror(elements)?;
        Ok(self.device.read(rows, elements, &mut mirror)?.to_vec())
    }

    /// What an op left in 16 bits: no device shows that by itself, a product with the unit matrix does, exactly.
    pub fn read_acts(&self, acts: &Acts, rows: usize, cols: usize) -> Result<Vec<f32>> {
        let mut unit = vec![0.0; cols * cols];
        (0..cols).for_each(|i| unit[i * cols + i] = 1.0);
        let unit = self.weight(&unit, cols, cols)?;
        let mut out = self.device.rows(rows, cols)?;
        self.device
            .linear(acts, rows, &unit.view(), None, &mut out, 0, Into::Store)?;
        self.read(&out, rows * cols)
    }
}

/// Squared error over the squared reference; infinite where something is not a number.
pub fn nmse(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut error, mut reference) = (0.0f64, 0.0f64);
    for (g, w) in got.iter().zip(want) {
        let (g, w) = (f64::from(*g), f64::from(*w));
        error += (g - w) * (g - w);
        reference += w * w;
    }
    match error.is_finite() && reference > 0.0 {
        true => error / reference,
        false => f64::INFINITY,
    }
}
