//! The kernels as launches see them: their images, and their arguments as `kernels/launch.json` lists them.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use super::context::{Context, Doing, failure};
use super::ffi;
use super::memory::Address;
use super::stream::Stream;
use crate::error::{Code, Error, Result};
use crate::units::Dtype;

/// Bytes on a border of 64: what the driver wants of an image.
#[repr(C, align(64))]
struct Aligned<B: ?Sized> {
    bytes: B,
}

struct Image {
    /// `linear_bf16`
    module: &'static str,
    /// With a NUL at its end.
    ptx: &'static Aligned<[u8]>,
    /// Machine code, where nvcc was there at build time.
    fatbin: Option<&'static Aligned<[u8]>>,
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

const LAUNCHES: &str = include_str!("../../../kernels/launch.json");
/// Dynamic shared memory above which a function must be told.
const SHARED_WITHOUT_ASKING: u32 = 48 * 1024;

/// Size and kind of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    Pointer,
    I64,
    I32,
    F32,
}

/// A type that an argument may have.
pub trait Scalar {
    const WIDTH: Width;
}
impl Scalar for Address {
    const WIDTH: Width = Width::Pointer;
}
impl Scalar for i64 {
    const WIDTH: Width = Width::I64;
}
impl Scalar for i32 {
    const WIDTH: Width = Width::I32;
}
impl Scalar for f32 {
    const WIDTH: Width = Width::F32;
}

/// A kernel's arguments, in order.
pub trait Arguments {
    const LIST: &'static [(&'static str, Width)];
    /// Where each of them lies, for the driver to read.
    fn pointers(&mut self, to: &mut [*mut c_void; MOST_ARGUMENTS]);
}

/// No kernel has more.
pub const MOST_ARGUMENTS: usize = 24;

macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        pub struct $name { $(pub $field: $type,)* }
        impl Arguments for $name {
            const LIST: &'static [(&'static str, Width)] =
                &[$((stringify!($field), <$type as Scalar>::WIDTH),)*];
            fn pointers(&mut self, to: &mut [*mut c_void; MOST_ARGUMENTS]) {
                for (to, from) in to.iter_mut().zip([$((&raw mut self.$field).cast::<c_void>(),)*]) {
                    *to = from;
                }
            }
        }
    )*};
}

arguments! {
    Argmax { x: Address, ids: Address, values: Address, stride: i64, cols: i32, }
    Topk { x: Address, ids: Address, values: Address, stride: i64, cols: i32, k: i32, }
    /// One of the tiles of `linear`: up to three matrices, `n` 0 where there are fewer.
    Linear {
        a: Address, w0: Address, bias0: Address, out0: Address, w1: Address, bias1: Address, out1: Address,
        w2: Address, bias2: Address, out2: Address, lda: i64, ldw0: i64, ldw1: i64, ldw2: i64, ldo0: i64, ldo1: i64, ldo2: i64,
        rows: i32, n0: i32, n1: i32, n2: i32, k: i32, flags: i32,
    }
    Rmsnorm { x: Address, delta: Address, w: Address, out: Address, cols: i32, eps: f32, }
    RmsnormHeads { x: Address, w: Address, row_stride: i64, heads: i32, head_size: i32, eps: f32, }
    RopeAppend {
        q: Address, k: Address, v: Address, cos: Address, sin: Address, slots: Address, q_out: Address, kv: Address,
        q_stride: i64, k_stride: i64, v_stride: i64, heads: i32, kv_heads: i32, head_size: i32,
    }
    RopeDense {
        q: Address, k: Address, v: Address, cos: Address, sin: Address, q_out: Address, k_out: Address, v_out: Address,
        stride: i64, heads: i32, head_size: i32,
    }
    AttentionPrefill {
        q: Address, kv: Address, segments: Address, tables: Address, tiles: Address, out: Address,
        heads: i32, kv_heads: i32, window: i32, scale: f32,
    }
    AttentionDecode {
        q: Address, kv: Address, segments: Address, tables: Address, items: Address, sums: Address, maxima: Address,
        heads: i32, kv_heads: i32, window: i32, scale: f32,
    }
    AttentionMerge {
        sums: Address, maxima: Address, segments: Address, merges: Address, out: Address, heads: i32, kv_heads: i32, head_size: i32,
    }
    AttentionDense {
        q: Address, k: Address, v: Address, windows: Address, tiles: Address, out: Address, heads: i32, scale: f32,
    }
    Swiglu { gate: Address, up: Address, out: Address, gate_stride: i64, up_stride: i64, cols: i32, }
    BiasAdd { x: Address, bias: Address, stride: i64, cols: i32, }
    Gelu { x: Address, out: Address, count: i64, }
    Round { x: Address, out: Address, count: i64, }
    Widen { x: Address, out: Address, count: i64, }
}

/// A kernel of `launch.json`.
#[derive(serde::Deserialize)]
struct Launch {
    module: String,
    args: Vec<(String, String)>,
    block: u32,
    shared: u32,
}

#[derive(serde::Deserialize)]
struct Launches {
    kernels: BTreeMap<String, Launch>,
}

impl Launches {
    fn read() -> Result<Launches> {
        serde_json::from_str(LAUNCHES)
            .map_err(|e| Error::internal(format!("kernels/launch.json cannot be read: {e}")))
    }

    fn get(&self, kernel: &str) -> Result<&Launch> {
        self.kernels
            .get(kernel)
            .ok_or_else(|| Error::internal(format!("there is no kernel {kernel}")))
    }
}

impl Launch {
    /// The arguments are those that this program passes.
    fn takes(&self, kernel: &str, list: &[(&str, Width)]) -> Result<()> {
        let width = |c: &str| match c {
            "int" => Some(Width::I32),
            "i64" => Some(Width::I64),
            "float" => Some(Width::F32),
            _ => c.ends_with('*').then_some(Width::Pointer),
        };
        let same = self.args.len() == list.len()
            && self
                .args
                .iter()
                .zip(list)
                .all(|((name, c), (own, w))| name == own && width(c) == Some(*w));
        match same && list.len() <= MOST_ARGUMENTS {
            true => Ok(()),
            false => Err(Error::internal(format!(
                "the arguments of {kernel} are not those of kernels/launch.json"
            ))),
        }
    }
}

/// A function on the GPU that takes `A`.
pub struct Kernel<A> {
    name: String,
    function: ffi::Function,
    block: u32,
    shared: u32,
    _arguments: std::marker::PhantomData<fn(A)>,
}

impl<A: Arguments> Kernel<A> {
    /// Gives the launch to the stream. `grid`: blocks in x and y; with none in either there is nothing to do.
    ///
    /// The op that calls this has checked that its buffers have the shapes the kernel's header asks for.
    pub fn launch(&self, stream: &Stream, grid: (usize, usize), mut arguments: A) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let mut pointers = [std::ptr::null_mut(); MOST_ARGUMENTS];
        arguments.pointers(&mut pointers);
        // SAFETY: `load` compared the arguments with those of the kernel; they live until the call returns, which copies them. Addresses
        // come from `DeviceBuffer::at`, which checks bounds, and a buffer waits for the GPU before it goes. Work on one stream is in
        // order, and the only other stream writes slots alone, ordered by fences.
        unsafe {
            ffi::launch(
                self.function,
                (grid.0 as u32, grid.1 as u32),
                self.block,
                self.shared,
                stream.handle(),
                &mut pointers[..A::LIST.len()],
            )
        }
        .map_err(|f| failure(f, &format!("launching {}", self.name)))
    }
}

/// The modules of one 16-bit type, loaded as their functions are asked for.
pub struct Modules {
    context: Arc<Context>,
    half: &'static str,
    launches: Launches,
    loaded: BTreeMap<&'static str, ffi::Module>,
    pub machine_code: bool,
}

impl Modules {
    /// `half`: the type of the weights.
    pub fn new(context: &Arc<Context>, half: Dtype) -> Result<Modules> {
        Ok(Modules {
            context: context.clone(),
            half: half.short(),
            launches: Launches::read()?,
            loaded: BTreeMap::new(),
            machine_code: true,
        })
    }

    /// The kernel `name` of this type.
    pub fn load<A: Arguments>(&mut self, name: &str) -> Result<Kernel<A>> {
        let launch = self.launches.get(name)?;
        launch.takes(name, A::LIST)?;
        let (block, shared) = (launch.block, launch.shared);
        let file = format!("{}_{}", launch.module, self.half);
        let symbol = format!("{name}_{}", self.half);
        let doing = format!("loading the kernel {symbol}");
        let module = self.module(&file)?;
        let c_symbol =
            CString::new(symbol.clone()).map_err(|_| Error::internal("a kernel's name"))?;
        let function = ffi::module_function(module, &c_symbol).doing(&doing)?;
        if shared > SHARED_WITHOUT_ASKING {
            ffi::function_allow_shared(function, shared).doing(&doing)?;
        }
        Ok(Kernel {
            name: symbol,
            function,
            block,
            shared,
            _arguments: std::marker::PhantomData,
        })
    }

    fn module(&mut self, file: &str) -> Result<ffi::Module> {
        let image = IMAGES
            .iter()
            .find(|i| i.module == file)
            .ok_or_else(|| Error::internal(format!("no image of {file} is embedded")))?;
        if let Some(module) = self.loaded.get(image.module) {
            return Ok(*module);
        }
        self.context.bind()?;
        let compiled = image.fatbin.and_then(|f| ffi::module_load(&f.bytes).ok());
        // Machine code for another architecture than this GPU's: the driver compiles the PTX.
        let module = match compiled {
            Some(module) => module,
            None => {
                self.machine_code = false;
                ffi::module_load(&image.ptx.bytes)
                    .doing(&format!("loading the kernels of {file}"))?
            }
        };
        self.loaded.insert(image.module, module);
        Ok(module)
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        for module in self.loaded.values() {
            let _ = ffi::module_unload(*module);
        }
    }
}

/// The head sizes for which there is a kernel whose name begins so.
pub fn head_sizes(prefix: &str) -> Result<Vec<usize>> {
    let mut sizes: Vec<usize> = Launches::read()?
        .kernels
        .keys()
        .filter_map(|name| name.strip_prefix(prefix)?.strip_prefix("_h")?.parse().ok())
        .collect();
    sizes.sort_unstable();
    Ok(sizes)
}

/// A head size that no kernel has.
pub fn no_head_size(what: &str, size: usize, known: &[usize]) -> Error {
    let known: Vec<String> = known.iter().map(usize::to_string).collect();
    Error::new(
        Code::Unsupported,
        format!("{what} of head size {size} cannot run on the GPU"),
        format!("there are kernels for {}", known.join(", ")),
        "run with --device cpu",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::tiles::TILES;

    #[test]
    fn arguments_are_those_of_the_launch_table() {
        fn check<A: Arguments>(launches: &Launches, names: &[String]) {
            for name in names {
                launches.get(name).unwrap().takes(name, A::LIST).unwrap();
            }
        }
        fn one(name: &str) -> [String; 1] {
            [name.to_string()]
        }
        let l = Launches::read().unwrap();
        let sized = |name: &str| -> Vec<String> {
            let sizes = head_sizes(name).unwrap();
            assert!(!sizes.is_empty());
            sizes.iter().map(|s| format!("{name}_h{s}")).collect()
        };
        let tiles: Vec<String> = TILES.iter().map(|t| t.0.to_string()).collect();
        check::<Linear>(&l, &tiles);
        check::<AttentionPrefill>(&l, &sized("attention_prefill"));
        check::<AttentionDecode>(&l, &sized("attention_decode"));
        check::<AttentionDense>(&l, &sized("attention_dense"));
        check::<AttentionMerge>(&l, &one("attention_merge"));
        check::<Argmax>(&l, &one("argmax"));
        check::<Topk>(&l, &one("topk"));
        check::<Rmsnorm>(&l, &one("rmsnorm"));
        check::<RmsnormHeads>(&l, &one("rmsnorm_heads"));
        check::<RopeAppend>(&l, &one("rope_append"));
        check::<RopeDense>(&l, &one("rope_dense"));
        check::<Swiglu>(&l, &one("swiglu"));
        check::<BiasAdd>(&l, &one("bias_add"));
        check::<Gelu>(&l, &one("gelu"));
        check::<Round>(&l, &one("round"));
        check::<Widen>(&l, &one("widen"));
        // All of them: a kernel that nobody launches has no place there.
        let attention = ["attention_prefill", "attention_decode", "attention_dense"];
        let sizes: usize = attention.iter().map(|a| sized(a).len()).sum();
        assert_eq!(l.kernels.len(), tiles.len() + sizes + 12);
    }

    #[test]
    fn a_wrong_width_is_noticed() {
        let l = Launches::read().unwrap();
        let gelu = l.get("gelu").unwrap();
        gelu.takes("gelu", Gelu::LIST).unwrap();
        let mut narrow = Gelu::LIST.to_vec();
        narrow[2].1 = Width::I32;
        assert!(gelu.takes("gelu", &narrow).is_err());
        assert!(gelu.takes("gelu", &Gelu::LIST[..2]).is_err());
    }

    #[test]
    fn images_are_where_the_driver_wants_them() {
        assert_eq!(IMAGES.len() % 2, 0);
        for image in IMAGES {
            assert_eq!(
                image.ptx.bytes.as_ptr() as usize % 64,
                0,
                "{}",
                image.module
            );
            assert_eq!(image.ptx.bytes.last(), Some(&0), "{}", image.module);
        }
        let l = Launches::read().unwrap();
        for launch in l.kernels.values() {
            for half in ["bf16", "f16"] {
                let file = format!("{}_{half}", launch.module);
                assert!(IMAGES.iter().any(|i| i.module == file), "{file}");
            }
        }
    }
}
