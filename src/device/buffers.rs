//! What ops work on: activations, KV and the rest, each in the memory of the device that made it, and what they take of it.

use std::time::Duration;

use super::cpu::{ActBuf, AttnSegment, KvLayout, dense_scratch_bytes};
use super::cuda::{self, CudaDevice, ListShape};
use super::{Device, DeviceKind, KV_BLOCK_TOKENS, WeightView};
use crate::error::Result;
use crate::units::Dtype;

/// Something that each kind of device has in its own way.
pub(super) enum On<H, G> {
    Cpu(H),
    Cuda(G),
}

/// float32 activations on a device: `[rows, cols]`, row-major.
pub struct Rows {
    pub(super) data: On<Vec<f32>, cuda::CudaRows>,
    pub(super) cols: usize,
}

/// Inputs of matrix products, rounded once to the weights' type.
pub struct Acts {
    pub(super) data: On<ActBuf, cuda::CudaActs>,
    pub(super) cols: usize,
}

/// Where the host reads results that a device of its own made.
pub struct Mirror(pub(super) On<(), cuda::Mirror>);

/// What the attention ops of a pass share on a device; filled by [`Device::begin`].
pub struct Lists(pub(super) On<(), Box<cuda::CudaLists>>);

/// What [`Device::attention_dense`] works in.
pub struct Dense(pub(super) On<(), Box<cuda::CudaDense>>);

/// The best logits of a pass, selected where they are computed.
pub struct Best(pub(super) cuda::Best);

/// Memory that something takes, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    pub host: u64,
    /// On a device with memory of its own.
    pub device: u64,
}

impl std::ops::Add for Room {
    type Output = Room;

    fn add(self, other: Room) -> Room {
        Room {
            host: self.host + other.host,
            device: self.device + other.device,
        }
    }
}

impl std::iter::Sum for Room {
    fn sum<I: Iterator<Item = Room>>(all: I) -> Room {
        all.fold(Room::default(), std::ops::Add::add)
    }
}

/// What a product does with what its output holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    Store,
    Add,
}

/// One of several products of the same rows: [`Device::linear_each`].
pub struct Product<'p> {
    pub w: &'p WeightView<'p>,
    /// One row.
    pub bias: Option<&'p WeightView<'p>>,
    pub out: &'p mut Rows,
}

/// Geometry of a paged KV cache: `[layer][block][k|v][kv head][16 tokens][head size]`.
#[derive(Clone, Copy, Debug)]
pub struct KvShape {
    pub layers: usize,
    pub blocks: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub dtype: Dtype,
}

impl KvShape {
    pub fn bytes(&self) -> usize {
        2 * self.layers
            * self.blocks
            * self.kv_heads
            * KV_BLOCK_TOKENS
            * self.head_size
            * self.dtype.bytes()
    }

    pub(super) fn layout(&self) -> KvLayout {
        KvLayout {
            layers: self.layers,
            blocks: self.blocks,
            kv_heads: self.kv_heads,
            head_size: self.head_size,
            dtype: self.dtype,
        }
    }
}

/// The bytes of the KV cache, on the device.
pub struct Kv {
    pub(super) shape: KvShape,
    pub(super) data: On<Vec<u8>, cuda::CudaKv>,
}

/// What a layer's part of a cache in host memory cost the pass behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvMove {
    pub layer: usize,
    pub to_gpu_bytes: u64,
    pub to_host_bytes: u64,
    /// When the copies to the GPU began, by the clock that was asked by.
    pub began: Option<Duration>,
    /// How long they took.
    pub load: Duration,
    /// How long the layer waited for them.
    pub waited: Duration,
}

/// The rows of a pass as attention sees them.
#[derive(Clone, Copy)]
pub struct PassRows<'p> {
    /// One behind the other from row 0 on.
    pub spans: &'p [Span<'p>],
    /// `[rows, head size / 2]`
    pub cos: &'p [f32],
    pub sin: &'p [f32],
}

/// Rows of one sequence in a pass: `rows` rows from `first_row`, the first being token `start` of its sequence.
pub type Span<'a> = AttnSegment<'a>;

/// What attention needs to know besides its operands.
#[derive(Clone, Copy, Debug)]
pub struct AttnShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub scale: f32,
    /// Keys a query sees at most, its own included.
    pub window: Option<usize>,
}

/// Attention of rows that lie side by side as `[q | k | v]`, each `heads · head_size` wide.
#[derive(Clone, Copy, Debug)]
pub struct DenseShape {
    pub heads: usize,
    pub head_size: usize,
    pub scale: f32,
}

impl Kv {
    pub fn blocks(&self) -> usize {
        self.shape.blocks
    }

    /// Whether it lies in host memory.
    pub fn in_host(&self) -> bool {
        match &self.data {
            On::Cpu(_) => true,
            On::Cuda(data) => data.in_host(),
        }
    }

    /// What the last pass moved between host memory and the GPU, layer by layer; nothing where keys and values lie where they are used. Only
    /// after a whole pass that the device is done with.
    pub fn moves(&self, clock: Option<&cuda::Clock>, each: &mut dyn FnMut(KvMove)) -> Result<()> {
        match &self.data {
            On::Cpu(_) => Ok(()),
            On::Cuda(data) => data.moves(clock, each),
        }
    }
}

/// What a caller that mixes devices hears.
pub(super) fn foreign() -> ! {
    panic!("a buffer of one device was handed to another")
}

impl<H, G> On<H, G> {
    pub(super) fn host(&self) -> &H {
        match self {
            On::Cpu(data) => data,
            On::Cuda(_) => foreign(),
        }
    }

    pub(super) fn host_mut(&mut self) -> &mut H {
        match self {
            On::Cpu(data) => data,
            On::Cuda(_) => foreign(),
        }
    }

    pub(super) fn cuda(&self) -> &G {
        match self {
            On::Cuda(data) => data,
            On::Cpu(_) => foreign(),
        }
    }

    pub(super) fn cuda_mut(&mut self) -> &mut G {
        match self {
            On::Cuda(data) => data,
            On::Cpu(_) => foreign(),
        }
    }
}

impl Acts {
    /// The type its rows are rounded to from the next op on: that of the weight they will meet.
    pub fn round_to(&mut self, dtype: Dtype) {
        match &mut self.data {
            On::Cpu(data) => data.set_dtype(dtype),
            On::Cuda(data) => data.round_to(dtype),
        }
    }

    /// As [`Acts::round_to`], but on a CPU its rows stay float32; a GPU rounds them like any other.
    pub fn keep_exact(&mut self, dtype: Dtype) {
        match &mut self.data {
            On::Cpu(data) => data.keep_exact(dtype),
            On::Cuda(data) => data.round_to(dtype),
        }
    }

    pub fn dtype(&self) -> Dtype {
        match &self.data {
            On::Cpu(data) => data.dtype(),
            On::Cuda(data) => data.dtype(),
        }
    }
}

impl Device {
    pub fn rows(&self, rows: usize, cols: usize) -> Result<Rows> {
        Ok(Rows {
            data: match self {
                Device::Cpu(_) => On::Cpu(vec![0.0; rows * cols]),
                Device::Cuda(d) => On::Cuda(d.rows(rows * cols)?),
            },
            cols,
        })
    }

    pub fn acts(&self, rows: usize, cols: usize, dtype: Dtype) -> Result<Acts> {
        Ok(Acts {
            data: match self {
                Device::Cpu(_) => On::Cpu(ActBuf::new(dtype, rows, cols)),
                Device::Cuda(d) => On::Cuda(d.acts(rows * cols)?),
            },
            cols,
        })
    }

    /// Where up to `elements` results are read; nothing where the device's memory is the host's.
    pub fn mirror(&self, elements: usize) -> Result<Mirror> {
        Ok(Mirror(match self {
            Device::Cpu(_) => On::Cpu(()),
            Device::Cuda(d) => On::Cuda(d.mirror(elements)?),
        }))
    }

    pub fn lists(&self, shape: &ListShape) -> Result<Lists> {
        Ok(Lists(match self {
            Device::Cpu(_) => On::Cpu(()),
            Device::Cuda(d) => On::Cuda(Box::new(d.lists(shape)?)),
        }))
    }

    /// For [`Device::attention_dense`] of up to so many rows.
    pub fn dense(&self, rows: usize, shape: &DenseShape) -> Result<Dense> {
        Ok(Dense(match self {
            Device::Cpu(_) => On::Cpu(()),
            Device::Cuda(d) => On::Cuda(Box::new(d.dense(rows, shape)?)),
        }))
    }

    /// Room for the best of `rows` rows of `tiles` blocks of logits. `None` where reading them all costs nothing.
    pub fn best(&self, tiles: usize, rows: usize) -> Result<Option<Best>> {
        match self {
            Device::Cpu(_) => Ok(None),
            Device::Cuda(d) => Ok(Some(Best(d.best(tiles, rows)?))),
        }
    }

    pub fn kv(&self, shape: &KvShape) -> Result<Kv> {
        Ok(Kv {
            data: match self {
                Device::Cpu(_) => On::Cpu(vec![0; shape.bytes()]),
                Device::Cuda(d) => On::Cuda(d.kv(shape)?),
            },
            shape: *shape,
        })
    }

    /// A cache in host memory, of which a device with memory of its own has two layers at a time.
    pub fn kv_in_host(&self, shape: &KvShape) -> Result<Kv> {
        match self {
            Device::Cpu(_) => self.kv(shape),
            Device::Cuda(d) => Ok(Kv {
                data: On::Cuda(d.kv_in_host(shape)?),
                shape: *shape,
            }),
        }
    }
}

impl DeviceKind {
    /// What [`Device::rows`] takes.
    pub fn rows_room(self, rows: usize, cols: usize) -> Room {
        match self {
            DeviceKind::Cpu => host((rows * cols) as u64 * 4),
            DeviceKind::Cuda => device(CudaDevice::rows_bytes(rows * cols)),
        }
    }

    /// What [`Device::acts`] takes.
    pub fn acts_room(self, rows: usize, cols: usize) -> Room {
        match self {
            DeviceKind::Cpu => host(ActBuf::bytes_for(rows, cols)),
            DeviceKind::Cuda => device(CudaDevice::acts_bytes(rows * cols)),
        }
    }

    /// What [`Device::mirror`] takes.
    pub fn mirror_room(self, elements: usize) -> Room {
        match self {
            DeviceKind::Cpu => Room::default(),
            DeviceKind::Cuda => host(elements as u64 * 4),
        }
    }

    /// What [`Device::lists`] takes.
    pub fn lists_room(self, shape: &ListShape) -> Room {
        match self {
            DeviceKind::Cpu => Room::default(),
            DeviceKind::Cuda => {
                host(shape.numbers() as u64 * 4) + device(cuda::CudaLists::bytes(shape))
            }
        }
    }

    /// What [`Device::dense`] takes.
    pub fn dense_room(self, rows: usize, shape: &DenseShape) -> Room {
        match self {
            // Taken for as long as an op runs.
            DeviceKind::Cpu => host(dense_scratch_bytes(rows, shape.head_size)),
            DeviceKind::Cuda => device(cuda::CudaDense::bytes(rows, shape)),
        }
    }

    /// What [`Device::best`] takes.
    pub fn best_room(self, tiles: usize, rows: usize) -> Room {
        match self {
            DeviceKind::Cpu => Room::default(),
            DeviceKind::Cuda => {
                host(CudaDevice::best_host_bytes(tiles, rows))
                    + device(cuda::Best::bytes(tiles, rows))
            }
        }
    }

    /// What [`Device::kv`] takes.
    pub fn kv_room(self, shape: &KvShape) -> Room {
        match self {
            DeviceKind::Cpu => host(shape.bytes() as u64),
            DeviceKind::Cuda => cuda::CudaKv::device_room(shape),
        }
    }

    /// What [`Device::kv_in_host`] takes.
    pub fn kv_in_host_room(self, shape: &KvShape) -> Room {
        match self {
            DeviceKind::Cpu => self.kv_room(shape),
            DeviceKind::Cuda => cuda::CudaKv::host_room(shape),
        }
    }
}

fn host(bytes: u64) -> Room {
    Room {
        host: bytes,
        device: 0,
    }
}

fn device(bytes: u64) -> Room {
    Room {
        host: 0,
        device: bytes,
    }
}
