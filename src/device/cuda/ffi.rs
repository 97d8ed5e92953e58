//! The CUDA driver's calls: the only file that names them. One thin function a call; who owns what they hand out is said in the files
//! beside this one.
//!
//! `libcuda` is found at run time. cudarc panics where it is missing, so [`library_is_there`] comes before everything else.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys;

/// A driver call's answer when it is not success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure(sys::CUresult);

pub type Done<T> = std::result::Result<T, Failure>;

impl Failure {
    /// As cuda.h numbers it.
    pub fn number(self) -> u32 {
        self.0 as u32
    }

    /// `CUDA_ERROR_OUT_OF_MEMORY` and the like.
    pub fn name(self) -> String {
        format!("{:?}", self.0)
    }
}

/// One driver call.
macro_rules! call {
    ($call:expr) => {{
        // SAFETY: the library is there ([`library_is_there`]); pointers are to locals of the caller, or what the caller's own contract
        // says of them; handles came from the driver and their owners are alive.
        match unsafe { $call } {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(Failure(code)),
        }
    }};
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
    call!(sys::cuInit(0))
}

/// 12020 for CUDA 12.2: the newest that the driver knows.
pub fn driver_version() -> Done<u32> {
    let mut version = 0;
    call!(sys::cuDriverGetVersion(&mut version))?;
    Ok(version as u32)
}

pub fn gpu_count() -> Done<usize> {
    let mut count = 0;
    call!(sys::cuDeviceGetCount(&mut count))?;
    Ok(count as usize)
}

pub fn gpu(ordinal: usize) -> Done<Gpu> {
    let mut gpu = 0;
    call!(sys::cuDeviceGet(&mut gpu, ordinal as c_int))?;
    Ok(Gpu(gpu))
}

pub fn gpu_name(gpu: Gpu) -> Done<String> {
    let mut name = [0u8; 256];
    call!(sys::cuDeviceGetName(
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
    call!(sys::cuDeviceGetAttribute(&mut value, which, gpu.0))?;
    Ok(value as u32)
}

/// The primary context: shared with whatever else in this process uses the GPU (cublasLt does).
pub fn context_retain(gpu: Gpu) -> Done<Context> {
    let mut context = null_mut();
    call!(sys::cuDevicePrimaryCtxRetain(&mut context, gpu.0))?;
    Ok(Context(context))
}

pub fn context_release(gpu: Gpu) -> Done<()> {
    call!(sys::cuDevicePrimaryCtxRelease_v2(gpu.0))
}

pub fn context_bind(context: Context) -> Done<()> {
    call!(sys::cuCtxSetCurrent(context.0))
}

/// The host waits for everything given to the bound context.
pub fn context_synchronize() -> Done<()> {
    call!(sys::cuCtxSynchronize())
}

/// Free and total bytes of the bound context's GPU.
pub fn memory_info() -> Done<(u64, u64)> {
    let (mut free, mut total) = (0, 0);
    call!(sys::cuMemGetInfo_v2(&mut free, &mut total))?;
    Ok((free as u64, total as u64))
}

/// Device memory, 256-byte aligned, with anything in it.
pub fn device_alloc(bytes: u64) -> Done<u64> {
    let mut address = 0;
    call!(sys::cuMemAlloc_v2(&mut address, bytes as usize))?;
    Ok(address)
}

pub fn device_free(address: u64) -> Done<()> {
    call!(sys::cuMemFree_v2(address))
}

/// Pinned host memory, cached for the CPU, with anything in it.
pub fn host_alloc(bytes: u64) -> Done<*mut u8> {
    let mut address = null_mut();
    call!(sys::cuMemHostAlloc(&mut address, bytes as usize, 0))?;
    Ok(address.cast())
}

pub fn host_free(address: *mut u8) -> Done<()> {
    call!(sys::cuMemFreeHost(address.cast()))
}

/// Pins memory that is there already.
pub fn host_register(address: *const u8, bytes: usize) -> Done<()> {
    call!(sys::cuMemHostRegister_v2(
        address.cast_mut().cast(),
        bytes,
        0
    ))
}

pub fn host_unregister(address: *const u8) -> Done<()> {
    call!(sys::cuMemHostUnregister(address.cast_mut().cast()))
}

/// # Safety
/// `from..from + bytes` stays readable and unchanged until the stream has passed this point, and `to..to + bytes` is device memory of an
/// owner that lives as long, used by nobody else meanwhile.
pub unsafe fn copy_to_device(to: u64, from: *const u8, bytes: usize, stream: Stream) -> Done<()> {
    call!(sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream.0))
}

/// # Safety
/// As [`copy_to_device`], the other way round: `to..to + bytes` is not touched until the stream has passed this point.
pub unsafe fn copy_to_host(to: *mut u8, from: u64, bytes: usize, stream: Stream) -> Done<()> {
    call!(sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream.0))
}

/// # Safety
/// Both ranges are device memory of owners that live until the stream has passed this point; they do not overlap.
pub unsafe fn copy_on_device(to: u64, from: u64, bytes: usize, stream: Stream) -> Done<()> {
    call!(sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream.0))
}

/// A stream that does not wait for the legacy default stream. The lower the number, the more urgent.
pub fn stream_create(priority: i32) -> Done<Stream> {
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    let mut stream = null_mut();
    call!(sys::cuStreamCreateWithPriority(
        &mut stream,
        flags,
        priority
    ))?;
    Ok(Stream(stream))
}

pub fn stream_destroy(stream: Stream) -> Done<()> {
    call!(sys::cuStreamDestroy_v2(stream.0))
}

/// The host waits until everything given to the stream is done.
pub fn stream_synchronize(stream: Stream) -> Done<()> {
    call!(sys::cuStreamSynchronize(stream.0))
}

/// What is given to the stream from now on waits for the event's last record so far.
pub fn stream_wait(stream: Stream, event: Event) -> Done<()> {
    call!(sys::cuStreamWaitEvent(stream.0, event.0, 0))
}

pub fn event_create(timing: bool) -> Done<Event> {
    let flags = match timing {
        true => sys::CUevent_flags::CU_EVENT_DEFAULT,
        false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
    };
    let mut event = null_mut();
    call!(sys::cuEventCreate(&mut event, flags as u32))?;
    Ok(Event(event))
}

pub fn event_destroy(event: Event) -> Done<()> {
    call!(sys::cuEventDestroy_v2(event.0))
}

pub fn event_record(event: Event, stream: Stream) -> Done<()> {
    call!(sys::cuEventRecord(event.0, stream.0))
}

/// Whether the stream has passed the event's last record.
pub fn event_is_done(event: Event) -> Done<bool> {
    match call!(sys::cuEventQuery(event.0)) {
        Ok(()) => Ok(true),
        Err(Failure(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
        Err(failure) => Err(failure),
    }
}

pub fn event_synchronize(event: Event) -> Done<()> {
    call!(sys::cuEventSynchronize(event.0))
}

/// Milliseconds between two records that are done.
pub fn event_elapsed_ms(from: Event, to: Event) -> Done<f32> {
    let mut ms = 0.0;
    call!(sys::cuEventElapsedTime(&mut ms, from.0, to.0))?;
    Ok(ms)
}

/// PTX (NUL-terminated) or a fatbin; 64-byte aligned.
pub fn module_load(image: &'static [u8]) -> Done<Module> {
    let mut module = null_mut();
    call!(sys::cuModuleLoadData(&mut module, image.as_ptr().cast()))?;
    Ok(Module(module))
}

pub fn module_unload(module: Module) -> Done<()> {
    call!(sys::cuModuleUnload(module.0))
}

pub fn module_function(module: Module, symbol: &CStr) -> Done<Function> {
    let mut function = null_mut();
    call!(sys::cuModuleGetFunction(
        &mut function,
        module.0,
        symbol.as_ptr()
    ))?;
    Ok(Function(function))
}

/// Lets launches of the function have so many bytes of dynamic shared memory: needed above 48 KiB.
pub fn function_allow_shared(function: Function, bytes: u32) -> Done<()> {
    let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    call!(sys::cuFuncSetAttribute(function.0, which, bytes as c_int))
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
    call!(sys::cuLaunchKernel(
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
