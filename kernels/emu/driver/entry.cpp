// The driver's exported functions, first part: versions, devices, the context, modules, launches.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>

#include "../engine.h"
#include "abi.h"
#include "memory.h"
#include "queue.h"
#include "state.h"
#include "table.h"

using namespace driver;

#define ENTER(name)                                           \
  if (const CUresult error = enter(name, false)) return error; \
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED
#define ENTER_CONTEXT(name) \
  if (const CUresult error = enter(name, true)) return error

struct EmuContext {
  int device = 0, retained = 0;
};
struct EmuModule {
  std::set<std::string> symbols;
};
struct EmuFunction {
  const KernelEntry* kernel;
  EmuModule* module;
  size_t shared_allowed = SHARED_WITHOUT_ASKING;
};

namespace {

std::atomic<bool> initialized{false};
EmuContext primary;
std::mutex objects_lock;
std::set<EmuModule*> modules;
std::set<EmuFunction*> functions;

struct Name {
  CUresult code;
  const char *name, *text;
};
const Name NAMES[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {220, "CUDA_ERROR_NVLINK_UNCORRECTABLE", "uncorrectable NVLink error detected during the execution"},
    {221, "CUDA_ERROR_JIT_COMPILER_NOT_FOUND", "PTX JIT compiler library not found"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {223, "CUDA_ERROR_JIT_COMPILATION_DISABLED", "PTX JIT compilation was disabled"},
    {226, "CUDA_ERROR_CONTAINED", "Invalid access triggered a contained error"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};
const Name* find_name(CUresult code) {
  for (const Name& n : NAMES)
    if (n.code == code) return &n;
  return nullptr;
}

int attribute(int which) {
  const Settings& s = settings();
  switch (which) {
    case 1: case 2: case 3: return 1024;       // threads per block, block dimensions
    case 4: return 64;
    case 5: return 0x7fffffff;                 // grid dimensions
    case 6: case 7: return 65535;
    case 8: return (int)SHARED_WITHOUT_ASKING; // shared memory per block
    case 9: return 65536;                      // constant memory
    case 10: return 32;                        // warp size
    case 12: case 82: return 65536;            // registers
    case 13: return 1410000;                   // clock, kHz
    case 16: return s.multiprocessors;
    case 19: case 31: case 41: case 78: case 99: return 1; // maps host memory, concurrent kernels, unified addressing, priorities, registers
    case 36: return 1215000;                   // memory clock, kHz
    case 37: return 5120;                      // bus width, bits
    case 38: return 40 << 20;                  // L2
    case 39: return 2048;                      // threads per multiprocessor
    case 40: return 2;                         // copy engines
    case 75: return s.capability / 10;
    case 76: return s.capability % 10;
    case 81: return (int)s.optin_shared + 1024;
    case 97: return (int)s.optin_shared;
    case 106: return 32;
    case 111: return 1024;
    case 115: return 1;                        // memory pools
    default: return 0;
  }
}

}  // namespace

EXPORT CUresult cuInit(unsigned flags) {
  if (const CUresult error = enter("cuInit", false)) return error;
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (settings().devices == 0) return CUDA_ERROR_NO_DEVICE;
  initialized = true;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDriverGetVersion(int* version) {
  if (const CUresult error = enter("cuDriverGetVersion", false)) return error;
  *version = settings().version;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult code, const char** text) {
  const Name* n = find_name(code);
  *text = n ? n->name : nullptr;
  return n ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuGetErrorString(CUresult code, const char** text) {
  const Name* n = find_name(code);
  *text = n ? n->text : nullptr;
  return n ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// ---- devices ----

EXPORT CUresult cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount");
  *count = settings().devices;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER("cuDeviceGet");
  if (ordinal < 0 || ordinal >= settings().devices) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  ENTER("cuDeviceGetName");
  snprintf(name, (size_t)length, "Emulated GPU (CPU, for tests)");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice) {
  ENTER("cuDeviceGetUuid");
  memset(uuid, 0, sizeof *uuid);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid(uuid, device); }
EXPORT CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice) {
  ENTER("cuDeviceGetPCIBusId");
  snprintf(id, (size_t)length, "0000:00:00.0");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
  ENTER("cuDeviceTotalMem");
  *bytes = settings().memory;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, int which, CUdevice) {
  ENTER("cuDeviceGetAttribute");
  *value = attribute(which);
  return CUDA_SUCCESS;
}

// ---- the context ----

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  ENTER("cuDevicePrimaryCtxRetain");
  if (primary.retained++ == 0) charge(settings().context_bytes);
  *context = &primary;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
  ENTER("cuDevicePrimaryCtxRelease");
  if (primary.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (--primary.retained == 0) uncharge(settings().context_bytes);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice, unsigned) {
  ENTER("cuDevicePrimaryCtxSetFlags");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  ENTER("cuDevicePrimaryCtxGetState");
  *flags = 0, *active = primary.retained > 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  ENTER("cuCtxSetCurrent");
  set_current_context(context);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  ENTER("cuCtxGetCurrent");
  *context = current_context();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) { return cuCtxSetCurrent(context); }
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  ENTER("cuCtxPopCurrent");
  if (context) *context = current_context();
  set_current_context(nullptr);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  ENTER_CONTEXT("cuCtxGetDevice");
  *device = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetFlags(unsigned) {
  ENTER_CONTEXT("cuCtxSetFlags");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ENTER_CONTEXT("cuCtxGetStreamPriorityRange");
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSynchronize() {
  ENTER_CONTEXT("cuCtxSynchronize");
  return wait_all();
}

// ---- modules ----

namespace {

// The kernels of a PTX text, after the checks a driver makes.
CUresult read_ptx(const char* text, std::set<std::string>& symbols) {
  int major = 0, minor = 0, target = 0;
  const char* version = strstr(text, ".version ");
  const char* arch = strstr(text, ".target sm_");
  if (!version || !arch || sscanf(version, ".version %d.%d", &major, &minor) != 2 || sscanf(arch, ".target sm_%d", &target) != 1)
    return CUDA_ERROR_INVALID_PTX;
  // CUDA 11.x reads PTX 7.x, 12.x reads 8.x, 13.x reads 9.x.
  const int newest = (settings().version / 1000 - 4) * 10 + settings().version % 1000 / 10;
  if (major * 10 + minor > newest) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  if (target > settings().capability) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  for (const char* at = text; (at = strstr(at, ".entry ")); at++) {
    const char* from = at + 7;
    symbols.insert(std::string(from, strcspn(from, "( \n")));
  }
  return CUDA_SUCCESS;
}

// The kernels of a fat binary whose code is not compressed: each has a section of its own.
CUresult read_fatbin(const unsigned char* image, std::set<std::string>& symbols) {
  uint16_t header = 0;
  uint64_t bytes = 0;
  memcpy(&header, image + 6, 2), memcpy(&bytes, image + 8, 8);
  for (const auto& [symbol, kernel] : kernel_table()) {
    const std::string section = ".text." + symbol;
    if (memmem(image, header + bytes, section.c_str(), section.size() + 1)) symbols.insert(symbol);
  }
  return symbols.empty() ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
}

CUresult load(CUmodule* out, const void* image) {
  if (!image) return CUDA_ERROR_INVALID_VALUE;
  std::set<std::string> symbols;
  const uint32_t fatbin = 0xBA55ED50;
  const bool is_fatbin = memcmp(image, &fatbin, 4) == 0;
  if (const CUresult error = is_fatbin ? read_fatbin((const unsigned char*)image, symbols) : read_ptx((const char*)image, symbols))
    return error;
  std::lock_guard<std::mutex> guard(objects_lock);
  EmuModule* m = new EmuModule{symbols};
  modules.insert(m);
  *out = m;
  return CUDA_SUCCESS;
}

}  // namespace

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  ENTER_CONTEXT("cuModuleLoadData");
  return load(module, image);
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, int*, void**) {
  ENTER_CONTEXT("cuModuleLoadData");
  return load(module, image);
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
  ENTER_CONTEXT("cuModuleUnload");
  wait_all();
  std::lock_guard<std::mutex> guard(objects_lock);
  if (!modules.erase(module)) return CUDA_ERROR_INVALID_HANDLE;
  for (auto f = functions.begin(); f != functions.end();) f = (*f)->module == module ? functions.erase(f) : std::next(f);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
  ENTER_CONTEXT("cuModuleGetFunction");
  std::lock_guard<std::mutex> guard(objects_lock);
  if (!modules.count(module)) return CUDA_ERROR_INVALID_HANDLE;
  const auto kernel = kernel_table().find(name);
  if (!module->symbols.count(name) || kernel == kernel_table().end()) return CUDA_ERROR_NOT_FOUND;
  EmuFunction* f = new EmuFunction{&kernel->second, module};
  functions.insert(f);
  *out = f;
  return CUDA_SUCCESS;
}

namespace {
bool function_ok(CUfunction f) {
  std::lock_guard<std::mutex> guard(objects_lock);
  return functions.count(f) != 0;
}
}  // namespace

EXPORT CUresult cuFuncSetAttribute(CUfunction f, int which, int value) {
  ENTER_CONTEXT("cuFuncSetAttribute");
  if (!function_ok(f)) return CUDA_ERROR_INVALID_HANDLE;
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || (size_t)value > settings().optin_shared) return CUDA_ERROR_INVALID_VALUE;
  f->shared_allowed = std::max((size_t)value, SHARED_WITHOUT_ASKING);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction f, int) {
  ENTER_CONTEXT("cuFuncSetCacheConfig");
  return function_ok(f) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
EXPORT CUresult cuFuncGetAttribute(int* value, int which, CUfunction f) {
  ENTER_CONTEXT("cuFuncGetAttribute");
  if (!function_ok(f)) return CUDA_ERROR_INVALID_HANDLE;
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK         ? (int)f->kernel->block
           : which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? (int)f->shared_allowed
                                                                      : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction f, int threads, size_t shared) {
  ENTER_CONTEXT("cuOccupancyMaxActiveBlocksPerMultiprocessor");
  if (!function_ok(f) || threads <= 0) return CUDA_ERROR_INVALID_VALUE;
  const size_t by_shared = (settings().optin_shared + 1024) / (shared + 1024);
  *blocks = (int)std::min({(size_t)32, (size_t)(2048 / threads), by_shared});
  return CUDA_SUCCESS;
}

// ---- launches ----

namespace {

struct Shape {
  unsigned grid[3], block[3], shared;
};

// What the hardware would make of a wrong launch is silence or garbage; here it ends the test.
void check_contract(const KernelEntry& k, const Shape& s, void** params) {
  const std::string who = "launch of " + k.symbol + ": ";
  if (s.block[0] != k.block || s.block[1] != 1 || s.block[2] != 1)
    broken(who + "block of " + std::to_string(s.block[0]) + " threads, not " + std::to_string(k.block));
  if (s.shared < k.shared) broken(who + std::to_string(s.shared) + " bytes of shared memory, not " + std::to_string(k.shared));
  const std::string* formulas[] = {&k.grid_x, &k.grid_y};
  for (int i = 0; i < 2; i++) {
    const long long want = evaluate_grid(*formulas[i], k, params);
    if (want >= 0 && want != s.grid[i]) broken(who + "grid of " + std::to_string(s.grid[i]) + ", " + *formulas[i] + " is " + std::to_string(want));
  }
}

std::vector<Access> pointers(const KernelEntry& k, void** params) {
  std::vector<Access> found;
  for (size_t i = 0; i < k.args.size(); i++) {
    if (!k.args[i].pointer()) continue;
    const uint64_t p = *(uint64_t*)params[i];
    if (p == 0) continue;
    const std::string who = k.symbol + "'s argument " + k.args[i].name;
    if (!on_device(p, 1) && !on_host(p)) broken(who + " is no address of an allocation");
    if (p % 16) broken(who + " is not 16-byte aligned");
    found.push_back({p, p + 1, !k.args[i].reads_only()});
  }
  return found;
}

CUresult launch(CUfunction f, const Shape& s, CUstream stream, void** params, void** extra) {
  if (!function_ok(f) || !stream_ok(stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (extra || !params) return CUDA_ERROR_INVALID_VALUE;
  const unsigned long long threads = (unsigned long long)s.block[0] * s.block[1] * s.block[2];
  if (!s.grid[0] || !s.grid[1] || !s.grid[2] || !threads || threads > 1024) return CUDA_ERROR_INVALID_VALUE;
  if (s.grid[0] > 0x7fffffff || s.grid[1] > 65535 || s.grid[2] > 65535) return CUDA_ERROR_INVALID_VALUE;
  if (s.shared > f->shared_allowed) return CUDA_ERROR_INVALID_VALUE;
  const KernelEntry& k = *f->kernel;
  check_contract(k, s, params);
  Item item = {Item::Kernel, k.symbol, pointers(k, params), nullptr, nullptr, {}};
  static std::atomic<uint64_t> launches{0};
  const uint64_t seed = settings().seed * 1000003 + launches++;
  const auto call = k.bind(params);
  const emu::Dim3 grid = {s.grid[0], s.grid[1], s.grid[2]};
  item.run = [=]() -> CUresult {
    const emu::Landing landings[] = {emu::Landing::Late, emu::Landing::Early, emu::Landing::Drawn};
    emu::launch(grid, s.block[0], s.shared, {seed, landings[seed % 3]}, call);
    return CUDA_SUCCESS;
  };
  if (tracing()) trace("  " + k.symbol + " on stream " + std::to_string((uintptr_t)stream > 2 ? stream->index : 0));
  submit(stream, std::move(item));
  return CUDA_SUCCESS;
}

}  // namespace

EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                               CUstream stream, void** params, void** extra) {
  ENTER_CONTEXT("cuLaunchKernel");
  return launch(f, {{gx, gy, gz}, {bx, by, bz}, shared}, stream, params, extra);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** params, void** extra) {
  ENTER_CONTEXT("cuLaunchKernel");
  return launch(f, {{c->gridDimX, c->gridDimY, c->gridDimZ}, {c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes}, c->hStream,
                params, extra);
}
