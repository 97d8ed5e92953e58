//! The CUDA driver's calls: the only file that names them. One thin function a call; who owns what they hand out is said in the files
//! beside this one.
//!
//! `libcuda` is found at run time. cudarc panics where it is missing, so [`library_is_there`] comes before everything else.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use cudarc::driver::sys;

/// One driver call.
macro_rules! call {
    ($call:expr) => {{
        // SAFETY: the library is there ([`library_is_there`]); pointers are to locals of the caller, or what the caller's own contract
        // says of them; handles came from the driver and their owners are alive.
        match unsafe { $call } {
            SUCCESS => Ok(()),
            code => Err(Failure(code)),
        }
    }};
}

/// Functions of the driver, each looked up when first called. They return numbers and not cudarc's enum: newer drivers have codes that it
/// lacks, and an enum with such a value is undefined behaviour.
macro_rules! driver {
    ($(fn $name:ident($($argument:ident: $type:ty),*);)*) => {$(
        #[allow(non_snake_case, clippy::too_many_arguments)]
        unsafe fn $name($($argument: $type),*) -> u32 {
            type Function = unsafe extern "C" fn($($type),*) -> u32;
            static FOUND: OnceLock<Option<Function>> = OnceLock::new();
            let found = FOUND.get_or_init(|| {
                // SAFETY: the signature is cuda.h's, and the library stays loaded for good.
                let symbol = unsafe { sys::culib().get::<Function>(stringify!($name).as_bytes()) };
                symbol.ok().map(|f| *f)
            });
            match found {
                // SAFETY: the caller's promise.
                Some(function) => unsafe { function($($argument),*) },
                None => NEWER_DRIVER,
            }
        }
    )*};
}

driver! {
    fn cuInit(flags: c_uint);
    fn cuDriverGetVersion(version: *mut c_int);
    fn cuGetErrorName(code: u32, name: *mut *const c_char);
    fn cuDeviceGetCount(count: *mut c_int);
    fn cuDeviceGet(gpu: *mut sys::CUdevice, ordinal: c_int);
    fn cuDeviceGetName(name: *mut c_char, bytes: c_int, gpu: sys::CUdevice);
    fn cuDeviceGetAttribute(value: *mut c_int, which: sys::CUdevice_attribute, gpu: sys::CUdevice);
    fn cuDevicePrimaryCtxRetain(context: *mut sys::CUcontext, gpu: sys::CUdevice);
    fn cuDevicePrimaryCtxRelease_v2(gpu: sys::CUdevice);
    fn cuCtxSetCurrent(context: sys::CUcontext);
    fn cuCtxSynchronize();
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    fn cuMemAlloc_v2(address: *mut sys::CUdeviceptr, bytes: usize);
    fn cuMemFree_v2(address: sys::CUdeviceptr);
    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint);
    fn cuMemFreeHost(address: *mut c_void);
    fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint);
    fn cuMemHostUnregister(address: *mut c_void);
    fn cuMemcpyHtoDAsync_v2(to: sys::CUdeviceptr, from: *const c_void, bytes: usize, stream: sys::CUstream);
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream);
    fn cuMemcpyDtoDAsync_v2(to: sys::CUdeviceptr, from: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream);
    fn cuStreamCreateWithPriority(stream: *mut sys::CUstream, flags: c_uint, priority: c_int);
    fn cuStreamDestroy_v2(stream: sys::CUstream);
    fn cuStreamSynchronize(stream: sys::CUstream);
    fn cuStreamWaitEvent(stream: sys::CUstream, event: sys::CUevent, flags: c_uint);
    fn cuEventCreate(event: *mut sys::CUevent, flags: c_uint);
    fn cuEventDestroy_v2(event: sys::CUevent);
    fn cuEventRecord(event: sys::CUevent, stream: sys::CUstream);
    fn cuEventQuery(event: sys::CUevent);
    fn cuEventSynchronize(event: sys::CUevent);
    fn cuEventElapsedTime(ms: *mut f32, from: sys::CUevent, to: sys::CUevent);
    fn cuModuleLoadData(module: *mut sys::CUmodule, image: *const c_void);
    fn cuModuleUnload(module: sys::CUmodule);
    fn cuModuleGetFunction(function: *mut sys::CUfunction, module: sys::CUmodule, name: *const c_char);
    fn cuFuncSetAttribute(function: sys::CUfunction, which: sys::CUfunction_attribute, value: c_int);
    fn cuLaunchKernel(
        function: sys::CUfunction, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint,
        shared_bytes: c_uint, stream: sys::CUstream, arguments: *mut *mut c_void, extra: *mut *mut c_void
    );
}

/// A driver call's answer when it is not success: a number, as cuda.h has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure(u32);

pub type Done<T> = std::result::Result<T, Failure>;

const SUCCESS: u32 = 0;
/// CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER
pub const NEWER_DRIVER: u32 = 36;
/// CUDA_ERROR_NOT_READY
const NOT_READY: u32 = 600;

impl Failure {
    pub fn number(self) -> u32 {
        self.0
    }

    /// `CUDA_ERROR_OUT_OF_MEMORY` and the like, as the driver calls it.
    pub fn name(self) -> String {
        let mut name = null();
        match call!(cuGetErrorName(self.0, &mut name)) {
            Ok(()) if !name.is_null() => {
                // SAFETY: the driver's answer: a text of its own, NUL-terminated, there for good.
                let text = unsafe { CStr::from_ptr(name) };
                text.to_string_lossy().into_owned()
            }
            _ => "a CUDA error without a name".to_string(),
        }
    }
}

/// What the driver hands out. Its calls may be made from any thread that has the context bound.
macro_rules! handle {
    ($($name:ident($raw:ty),)*) => {$(
        #[derive(Clone, Copy, PartialEq, Eq)]
        pub struct $name($raw);
        // SAFETY: an opaque name of something inside the driver, whose calls are thread-safe.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}
    )*};
}

handle! {
    Context(sys::CUcontext),
    Stream(sys::CUstream),
    Event(sys::CUevent),
    Module(sys::CUmodule),
    Function(sys::CUfunction),
}

#[derive(Clone, Copy)]
pub struct Gpu(sys::CUdevice);

/// What is asked of a GPU's properties.
#[derive(Clone, Copy, Debug)]
pub enum Attribute {
    Multiprocessors,
    SharedBytesPerBlock,
    ComputeMajor,
    ComputeMinor,
}

/// The driver's library can be loaded. Nothing else here may be called where it cannot.
pub fn library_is_there() -> bool {
    // SAFETY: loads and unloads the driver's library; its initialisers are the vendor's.
    unsafe { sys::is_culib_present() }
}

pub fn init() -> Done<()> {
    call!(cuInit(0))
}

/// 12020 for CUDA 12.2: the newest that the driver knows.
pub fn driver_version() -> Done<u32> {
    let mut version = 0;
    call!(cuDriverGetVersion(&mut version))?;
    Ok(version as u32)
}

pub fn gpu_count() -> Done<usize> {
    let mut count = 0;
    call!(cuDeviceGetCount(&mut count))?;
    Ok(count as usize)
}

pub fn gpu(ordinal: usize) -> Done<Gpu> {
    let mut gpu = 0;
    call!(cuDeviceGet(&mut gpu, ordinal as c_int))?;
    Ok(Gpu(gpu))
}

pub fn gpu_name(gpu: Gpu) -> Done<String> {
    let mut name = [0u8; 256];
    call!(cuDeviceGetName(
        name.as_mut_ptr().cast(),
        name.len() as c_int - 1,
        gpu.0
    ))?;
    let text = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

pub fn attribute(gpu: Gpu, attribute: Attribute) -> Done<u32> {
    use sys::CUdevice_attribute as A;
    let which = match attribute {
        Attribute::Multiprocessors => A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        Attribute::SharedBytesPerBlock => A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        Attribute::ComputeMajor => A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        Attribute::ComputeMinor => A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    };
    let mut value = 0;
    call!(cuDeviceGetAttribute(&mut value, which, gpu.0))?;
    Ok(value as u32)
}

/// The primary context: shared with whatever else in this process uses the GPU (cublasLt does).
pub fn context_retain(gpu: Gpu) -> Done<Context> {
    let mut context = null_mut();
    call!(cuDevicePrimaryCtxRetain(&mut context, gpu.0))?;
    Ok(Context(context))
}

pub fn context_release(gpu: Gpu) -> Done<()> {
    call!(cuDevicePrimaryCtxRelease_v2(gpu.0))
}

pub fn context_bind(context: Context) -> Done<()> {
    call!(cuCtxSetCurrent(context.0))
}

/// The host waits for everything given to the bound context.
pub fn context_synchronize() -> Done<()> {
    call!(cuCtxSynchronize())
}

/// Free and total bytes of the bound context's GPU.
pub fn memory_info() -> Done<(u64, u64)> {
    let (mut free, mut total) = (0, 0);
    call!(cuMemGetInfo_v2(&mut free, &mut total))?;
    Ok((free as u64, total as u64))
}

/// Device memory, 256-byte aligned, with anything in it.
pub fn device_alloc(bytes: u64) -> Done<u64> {
    let mut address = 0;
    call!(cuMemAlloc_v2(&mut address, bytes as usize))?;
    Ok(address)
}

pub fn device_free(address: u64) -> Done<()> {
    call!(cuMemFree_v2(address))
}

/// Pinned host memory, cached for the CPU, with anything in it.
pub fn host_alloc(bytes: u64) -> Done<*mut u8> {
    let mut address = null_mut();
    call!(cuMemHostAlloc(&mut address, bytes as usize, 0))?;
    Ok(address.cast())
}

pub fn host_free(address: *mut u8) -> Done<()> {
    call!(cuMemFreeHost(address.cast()))
}

/// Pins memory that is there already.
pub fn host_register(address: *const u8, bytes: usize) -> Done<()> {
    call!(cuMemHostRegister_v2(address.cast_mut().cast(), bytes, 0))
}

pub fn host_unregister(address: *const u8) -> Done<()> {
    call!(cuMemHostUnregister(address.cast_mut().cast()))
}

/// # Safety
/// `from..from + bytes` stays readable and unchanged until the stream has passed this point, and `to..to + bytes` is device memory of an
/// owner that lives as long, used by nobody else meanwhile.
pub unsafe fn copy_to_device(to: u64, from: *const u8, bytes: usize, stream: Stream) -> Done<()> {
    call!(cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream.0))
}

/// # Safety
/// As [`copy_to_device`], the other way round: `to..to + bytes` is not touched until the stream has passed this point.
pub unsafe fn copy_to_host(to: *mut u8, from: u64, bytes: usize, stream: Stream) -> Done<()> {
    call!(cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream.0))
}

/// # Safety
/// Both ranges are device memory of owners that live until the stream has passed this point; they do not overlap.
pub unsafe fn copy_on_device(to: u64, from: u64, bytes: usize, stream: Stream) -> Done<()> {
    call!(cuMemcpyDtoDAsync_v2(to, from, bytes, stream.0))
}

/// A stream that does not wait for the legacy default stream. The lower the number, the more urgent.
pub fn stream_create(priority: i32) -> Done<Stream> {
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    let mut stream = null_mut();
    call!(cuStreamCreateWithPriority(&mut stream, flags, priority))?;
    Ok(Stream(stream))
}

pub fn stream_destroy(stream: Stream) -> Done<()> {
    call!(cuStreamDestroy_v2(stream.0))
}

/// The host waits until everything given to the stream is done.
pub fn stream_synchronize(stream: Stream) -> Done<()> {
    call!(cuStreamSynchronize(stream.0))
}

/// What is given to the stream from now on waits for the event's last record so far.
pub fn stream_wait(stream: Stream, event: Event) -> Done<()> {
    call!(cuStreamWaitEvent(stream.0, event.0, 0))
}

pub fn event_create(timing: bool) -> Done<Event> {
    let flags = match timing {
        true => sys::CUevent_flags::CU_EVENT_DEFAULT,
        false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
    };
    let mut event = null_mut();
    call!(cuEventCreate(&mut event, flags as u32))?;
    Ok(Event(event))
}

pub fn event_destroy(event: Event) -> Done<()> {
    call!(cuEventDestroy_v2(event.0))
}

pub fn event_record(event: Event, stream: Stream) -> Done<()> {
    call!(cuEventRecord(event.0, stream.0))
}

/// Whether the stream has passed the event's last record.
pub fn event_is_done(event: Event) -> Done<bool> {
    match call!(cuEventQuery(event.0)) {
        Ok(()) => Ok(true),
        Err(Failure(NOT_READY)) => Ok(false),
        Err(failure) => Err(failure),
    }
}

pub fn event_synchronize(event: Event) -> Done<()> {
    call!(cuEventSynchronize(event.0))
}

/// Milliseconds between two records that are done.
pub fn event_elapsed_ms(from: Event, to: Event) -> Done<f32> {
    let mut ms = 0.0;
    call!(cuEventElapsedTime(&mut ms, from.0, to.0))?;
    Ok(ms)
}

/// PTX (NUL-terminated) or a fatbin; 64-byte aligned.
pub fn module_load(image: &'static [u8]) -> Done<Module> {
    let mut module = null_mut();
    call!(cuModuleLoadData(&mut module, image.as_ptr().cast()))?;
    Ok(Module(module))
}

pub fn module_unload(module: Module) -> Done<()> {
    call!(cuModuleUnload(module.0))
}

pub fn module_function(module: Module, symbol: &CStr) -> Done<Function> {
    let mut function = null_mut();
    call!(cuModuleGetFunction(
        &mut function,
        module.0,
        symbol.as_ptr()
    ))?;
    Ok(Function(function))
}

/// Lets launches of the function have so many bytes of dynamic shared memory: needed above 48 KiB.
pub fn function_allow_shared(function: Function, bytes: u32) -> Done<()> {
    let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    call!(cuFuncSetAttribute(function.0, which, bytes as c_int))
}

/// # Safety
/// `arguments` point to values of the types that the kernel takes, in order. The device memory they name belongs to owners that live until
/// the stream has passed the launch, has the sizes that the kernel's header asks for, and is used by nobody else meanwhile.
pub unsafe fn launch(
    function: Function,
    grid: (u32, u32),
    block: u32,
    shared_bytes: u32,
    stream: Stream,
    arguments: &mut [*mut c_void],
) -> Done<()> {
    call!(cuLaunchKernel(
        function.0,
        grid.0,
        grid.1,
        1,
        block,
        1,
        1,
        shared_bytes,
        stream.0,
        arguments.as_mut_ptr(),
        null_mut()
    ))
}

/// The stream as other libraries take it.
pub fn raw_stream(stream: Stream) -> *mut c_void {
    stream.0.cast()
}
