// selftest PTX_FOLDER: what the emulated driver promises, and that it notices what it must. Every case runs in a child of its own
// with its own settings, under several seeds.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"

extern "C" {
CUresult cuInit(unsigned);
CUresult cuDevicePrimaryCtxRetain(CUcontext*, CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuCtxSynchronize();
CUresult cuMemGetInfo_v2(size_t*, size_t*);
CUresult cuMemAlloc_v2(CUdeviceptr*, size_t);
CUresult cuMemFree_v2(CUdeviceptr);
CUresult cuMemHostAlloc(void**, size_t, unsigned);
CUresult cuMemHostRegister_v2(void*, size_t, unsigned);
CUresult cuMemHostUnregister(void*);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, CUstream);
CUresult cuMemcpyDtoHAsync_v2(void*, CUdeviceptr, size_t, CUstream);
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, size_t, CUstream);
CUresult cuMemcpyDtoH_v2(void*, CUdeviceptr, size_t);
CUresult cuMemsetD8Async(CUdeviceptr, unsigned char, size_t, CUstream);
CUresult cuStreamCreate(CUstream*, unsigned);
CUresult cuStreamSynchronize(CUstream);
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
CUresult cuLaunchHostFunc(CUstream, void (*)(void*), void*);
CUresult cuEventCreate(CUevent*, unsigned);
CUresult cuEventRecord(CUevent, CUstream);
CUresult cuEventQuery(CUevent);
CUresult cuEventSynchronize(CUevent);
CUresult cuEventElapsedTime(float*, CUevent, CUevent);
CUresult cuModuleLoadData(CUmodule*, const void*);
CUresult cuModuleGetFunction(CUfunction*, CUmodule, const char*);
CUresult cuFuncSetAttribute(CUfunction, int, int);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**);
}

namespace {

std::string ptx_folder;

[[noreturn]] void wrong(int line, const char* what, long long got) {
  fprintf(stderr, "selftest.cpp:%d: %s: %lld\n", line, what, got);
  _Exit(1);
}
#define WANT(code, call)                                                 \
  do {                                                                   \
    const CUresult result_ = (call);                                       \
    if (result_ != (code)) wrong(__LINE__, #call " is not " #code, result_); \
  } while (0)
#define OK(call) WANT(CUDA_SUCCESS, call)
#define HOLDS(condition) \
  if (!(condition)) wrong(__LINE__, "does not hold: " #condition, 0)

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (text.str().empty()) wrong(__LINE__, path.c_str(), 0);
  return text.str();
}

CUcontext context;

void open_device() {
  OK(cuInit(0));
  OK(cuDevicePrimaryCtxRetain(&context, 0));
  OK(cuCtxSetCurrent(context));
}
CUfunction function(const char* module, const char* symbol) {
  CUmodule m;
  CUfunction f;
  OK(cuModuleLoadData(&m, read_file(ptx_folder + "/" + module + "_bf16.ptx").c_str()));
  OK(cuModuleGetFunction(&f, m, symbol));
  return f;
}
CUstream stream() {
  CUstream s;
  OK(cuStreamCreate(&s, CU_STREAM_NON_BLOCKING));
  return s;
}
CUevent event() {
  CUevent e;
  OK(cuEventCreate(&e, 0));
  return e;
}
CUdeviceptr device(size_t bytes) {
  CUdeviceptr p;
  OK(cuMemAlloc_v2(&p, bytes));
  return p;
}
template <class V>
V* host(size_t count) {
  void* p;
  OK(cuMemHostAlloc(&p, count * sizeof(V), 0));
  return (V*)p;
}
CUresult widen(CUfunction f, CUdeviceptr x, CUdeviceptr out, long long count, CUstream s, unsigned grid = 0) {
  void* params[] = {&x, &out, &count};
  return cuLaunchKernel(f, grid ? grid : (unsigned)((count + 1023) / 1024), 1, 1, 256, 1, 1, 0, s, params, nullptr);
}
uint16_t bf16(int small) {  // exact below 256
  float x = (float)small;
  uint32_t u;
  memcpy(&u, &x, 4);
  return (uint16_t)(u >> 16);
}

// Units of weights pass through two pinned frames and two slots; a kernel widens each into its row of `out`: the engine's pipeline
// in small. False when a row is wrong.
constexpr int UNITS = 24, COUNT = 3000;
bool pipeline(bool reuse_frames_at_once) {
  open_device();
  const CUfunction f = function("widen", "widen_bf16");
  const CUstream copies = stream(), compute = stream();
  uint16_t* frames = host<uint16_t>(2 * 4096);
  const CUdeviceptr slots[2] = {device(COUNT * 2), device(COUNT * 2)}, out = device((size_t)UNITS * 4096 * 4);
  CUevent copied[2] = {event(), event()}, used[2] = {event(), event()};
  for (int u = 0; u < UNITS; u++) {
    const int side = u % 2;
    uint16_t* frame = frames + side * 4096;
    if (u >= 2 && !reuse_frames_at_once) OK(cuEventSynchronize(copied[side]));
    for (int i = 0; i < COUNT; i++) frame[i] = bf16(1 + (u * 7 + i) % 200);
    if (u >= 2) OK(cuStreamWaitEvent(copies, used[side], 0));
    OK(cuMemcpyHtoDAsync_v2(slots[side], frame, COUNT * 2, copies));
    OK(cuEventRecord(copied[side], copies));
    OK(cuStreamWaitEvent(compute, copied[side], 0));
    OK(widen(f, slots[side], out + (size_t)u * 4096 * 4, COUNT, compute));
    OK(cuEventRecord(used[side], compute));
  }
  float* result = host<float>((size_t)UNITS * 4096);
  OK(cuMemcpyDtoHAsync_v2(result, out, (size_t)UNITS * 4096 * 4, compute));
  OK(cuStreamSynchronize(compute));
  for (int u = 0; u < UNITS; u++)
    for (int i = 0; i < COUNT; i++)
      if (result[(size_t)u * 4096 + i] != (float)(1 + (u * 7 + i) % 200)) return false;
  return true;
}

void right_when_ordered() { HOLDS(pipeline(false)); }
void wrong_without_waits() { HOLDS(pipeline(false)); }   // run with the waits ignored: must fail
void frame_reused() { HOLDS(pipeline(true)); }           // must fail

// The device writes pinned memory and reads it again on another stream, as a cache in host memory does; all of it given at once.
bool through_host_memory() {
  open_device();
  const CUstream in = stream(), out = stream();
  uint16_t* cache = host<uint16_t>(4096);
  const CUdeviceptr slots[2] = {device(COUNT * 2), device(COUNT * 2)};
  const CUevent loaded = event(), stored = event();
  for (int i = 0; i < COUNT; i++) cache[i] = (uint16_t)i;
  for (int round = 0; round < 6; round++) {
    if (round) OK(cuStreamWaitEvent(in, stored, 0));
    OK(cuMemcpyHtoDAsync_v2(slots[round % 2], cache, COUNT * 2, in));
    OK(cuMemsetD8Async(slots[round % 2], (unsigned char)round, 2, in));
    OK(cuEventRecord(loaded, in));
    OK(cuStreamWaitEvent(out, loaded, 0));
    OK(cuMemcpyDtoHAsync_v2(cache, slots[round % 2], COUNT * 2, out));
    OK(cuEventRecord(stored, out));
  }
  OK(cuStreamSynchronize(out));
  if (cache[0] != 0x0505) return false;
  for (int i = 1; i < COUNT; i++)
    if (cache[i] != (uint16_t)i) return false;
  return true;
}
void host_cache() { HOLDS(through_host_memory()); }

// A wait is for the record made before it, whatever the event is used for later.
void waits_capture() {
  open_device();
  const CUstream a = stream(), b = stream();
  const CUevent e = event();
  const CUdeviceptr x = device(4096), y = device(4096);
  OK(cuMemsetD8Async(x, 1, 4096, a));
  OK(cuEventRecord(e, a));
  OK(cuStreamWaitEvent(b, e, 0));
  OK(cuMemsetD8Async(y, 7, 4096, a));
  OK(cuEventRecord(e, a));
  OK(cuMemcpyDtoDAsync_v2(device(4096), x, 4096, b));  // no race with the second memset
  unsigned char byte = 0;
  OK(cuEventSynchronize(e));
  OK(cuMemcpyDtoH_v2(&byte, y, 1));
  HOLDS(byte == 7);
  float ms = -1;
  const CUevent later = event();
  OK(cuEventRecord(later, a));
  CUresult state;
  while ((state = cuEventQuery(later)) == CUDA_ERROR_NOT_READY) usleep(100);
  OK(state);
  OK(cuEventElapsedTime(&ms, e, later));
  HOLDS(ms >= 0);
  OK(cuCtxSynchronize());
}

// Nothing runs before it is waited for in the lazy order, and a poll is answered in the end.
void lazy_is_late() {
  open_device();
  const CUstream s = stream();
  const CUdeviceptr x = device(1 << 20);
  const CUevent e = event();
  OK(cuMemsetD8Async(x, 0, 1 << 20, s));
  OK(cuEventRecord(e, s));
  WANT(CUDA_ERROR_NOT_READY, cuEventQuery(e));
  int polls = 0;
  while (cuEventQuery(e) == CUDA_ERROR_NOT_READY && polls++ < 20000) usleep(50);
  OK(cuEventQuery(e));
  static std::atomic<int> called{0};
  OK(cuLaunchHostFunc(s, [](void*) { called = 1; }, nullptr));
  for (int i = 0; i < 1000 && !called; i++) usleep(1000);
  HOLDS(called);
}

void pageable_is_taken_at_once() {
  open_device();
  const CUstream s = stream();
  std::vector<unsigned char> bytes(100000, 5), back(100000, 0);
  const CUdeviceptr x = device(100000);
  OK(cuMemcpyHtoDAsync_v2(x, bytes.data(), bytes.size(), s));
  memset(bytes.data(), 9, bytes.size());
  OK(cuMemcpyDtoHAsync_v2(back.data(), x, back.size(), s));  // to pageable memory: done when it returns
  HOLDS(back[0] == 5 && back[99999] == 5);
}

void shared_memory_rule() {
  open_device();
  const CUfunction f = function("linear", "linear_t8_bf16");
  const CUstream s = stream();
  CUdeviceptr a = device(64 * 2), w = device(32 * 64 * 2), none = 0, out = device(32 * 4);
  OK(cuMemsetD8Async(a, 0, 128, s));
  OK(cuMemsetD8Async(w, 0, 4096, s));
  long long ld = 64, ldo = 32, no = 0;
  int rows = 1, n = 32, k = 64, zero = 0;
  void* params[] = {&a,  &w,  &none, &out, &none, &none, &none, &none, &none, &none, &ld, &ld,
                    &no, &no, &ldo,  &no,  &no,   &rows, &n,    &zero, &zero, &k,    &zero};
  WANT(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(f, 1, 1, 1, 64, 1, 1, 51200, s, params, nullptr));
  WANT(CUDA_ERROR_INVALID_VALUE, cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 1 << 20));
  OK(cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 51200));
  WANT(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(f, 0, 1, 1, 64, 1, 1, 51200, s, params, nullptr));
  OK(cuLaunchKernel(f, 1, 1, 1, 64, 1, 1, 51200, s, params, nullptr));
  float got[32];
  OK(cuMemcpyDtoHAsync_v2(got, out, sizeof got, s));
  for (float x : got) HOLDS(x == 0.0f);
}

void memory_rules() {
  open_device();
  size_t free = 0, total = 0;
  OK(cuMemGetInfo_v2(&free, &total));
  HOLDS(total == 4 << 20 && free == (4 << 20) - 4096);  // the context's 4096
  CUdeviceptr p, q;
  OK(cuMemAlloc_v2(&p, (1 << 20) + 1));
  OK(cuMemGetInfo_v2(&free, &total));
  HOLDS(free == (2 << 20) - 4096);  // a whole page is taken
  WANT(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&q, (1 << 20) + 1));
  OK(cuMemFree_v2(p));
  OK(cuMemAlloc_v2(&q, 1000000));
  unsigned char fresh[16];
  OK(cuMemcpyDtoH_v2(fresh, q + 999984, 16));
  for (unsigned char byte : fresh) HOLDS(byte == 0xFF);
  WANT(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoH_v2(fresh, q + 999985, 16));
  static unsigned char pages[3 * 4096] __attribute__((aligned(4096)));
  OK(cuMemHostRegister_v2(pages, 4096, 0));
  WANT(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, cuMemHostRegister_v2(pages, 4096, 0));
  OK(cuMemHostRegister_v2(pages + 4096, 4096, 0));
  WANT(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoDAsync_v2(q, pages + 4000, 200, nullptr));  // over the border of two registrations
  WANT(CUDA_ERROR_OUT_OF_MEMORY, cuMemHostRegister_v2(pages + 8192, 4096, 0));          // the limit on pinned memory
  OK(cuMemHostUnregister(pages));
  WANT(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, cuMemHostUnregister(pages));
  std::thread([&] { WANT(CUDA_ERROR_INVALID_CONTEXT, cuMemAlloc_v2(&p, 16)); }).join();
}

void module_rules() {
  open_device();
  CUmodule m;
  CUfunction f;
  std::string text = read_file(ptx_folder + "/widen_bf16.ptx");
  OK(cuModuleLoadData(&m, text.c_str()));
  WANT(CUDA_ERROR_NOT_FOUND, cuModuleGetFunction(&f, m, "swiglu_bf16"));
  std::string newer = text, other = text;
  newer.replace(newer.find(".version 8.2"), 12, ".version 8.9");
  other.replace(other.find(".target sm_80"), 13, ".target sm_90");
  WANT(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, cuModuleLoadData(&m, newer.c_str()));
  WANT(CUDA_ERROR_NO_BINARY_FOR_GPU, cuModuleLoadData(&m, other.c_str()));
  WANT(CUDA_ERROR_INVALID_PTX, cuModuleLoadData(&m, "no PTX"));
}

// EMUCUDA_FAIL=cuMemAlloc_v2:2:2,kernel:2:719
void faults() {
  open_device();
  CUdeviceptr p, q;
  OK(cuMemAlloc_v2(&p, 4096));
  WANT(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&q, 4096));
  OK(cuMemAlloc_v2(&q, 8192));
  const CUfunction f = function("widen", "widen_bf16");
  const CUstream s = stream();
  OK(cuMemsetD8Async(p, 0, 4096, s));
  OK(widen(f, p, q, 2048, s));
  OK(cuStreamSynchronize(s));
  CUresult later = widen(f, p, q, 2048, s);
  for (int i = 0; later == CUDA_SUCCESS && i < 3; i++) later = cuStreamSynchronize(s);
  HOLDS(later == CUDA_ERROR_LAUNCH_FAILED);
  WANT(CUDA_ERROR_LAUNCH_FAILED, cuMemAlloc_v2(&p, 16));
  WANT(CUDA_ERROR_LAUNCH_FAILED, cuCtxSynchronize());
}

// ---- what must end the process ----

void broken_block() {
  open_device();
  const CUfunction f = function("widen", "widen_bf16");
  CUdeviceptr x = device(64), out = device(128);
  long long count = 32;
  void* params[] = {&x, &out, &count};
  cuLaunchKernel(f, 1, 1, 1, 128, 1, 1, 0, stream(), params, nullptr);
}
void broken_grid() {
  open_device();
  widen(function("widen", "widen_bf16"), device(8192), device(16384), 4096, stream(), 3);
}
void broken_pointer() {
  open_device();
  const CUdeviceptr x = device(64);
  OK(cuMemFree_v2(x));
  widen(function("widen", "widen_bf16"), x, device(128), 32, stream());
}
void broken_alignment() {
  open_device();
  widen(function("widen", "widen_bf16"), device(64) + 2, device(128), 16, stream());
}
void broken_bounds() {  // 9 floats where 8 fit
  open_device();
  const CUdeviceptr out = device(32);
  const CUstream s = stream();
  widen(function("widen", "widen_bf16"), device(64), out, 9, s);
  OK(cuStreamSynchronize(s));
  cuMemFree_v2(out);
}
#ifdef __SANITIZE_ADDRESS__
void broken_read() {  // 16 halves where 15 are: the 16th lies before the next multiple of 512
  open_device();
  const CUstream s = stream();
  widen(function("widen", "widen_bf16"), device(30), device(64), 16, s);
  OK(cuStreamSynchronize(s));
}
#endif
void broken_free() {
  open_device();
  const CUdeviceptr x = device(4096);
  const CUstream s = stream();
  for (int i = 0; i < 100; i++) OK(cuMemsetD8Async(x, 1, 4096, s));
  cuMemFree_v2(x);
}
void broken_unregister() {
  open_device();
  static unsigned char page[4096] __attribute__((aligned(4096)));
  OK(cuMemHostRegister_v2(page, 4096, 0));
  const CUdeviceptr x = device(4096);
  const CUstream s = stream();
  for (int i = 0; i < 100; i++) OK(cuMemcpyHtoDAsync_v2(x, page, 4096, s));
  cuMemHostUnregister(page);
}

// Who notices first that something is written past an allocation.
#ifdef __SANITIZE_ADDRESS__
#define PAST_THE_END "AddressSanitizer"
#else
#define PAST_THE_END "past an allocation"
#endif

struct Case {
  const char* name;
  void (*run)();
  const char* environment;  // NAME=VALUE, separated by blanks
  enum { Passes, Fails, FailsAtOnce } want;  // Fails: under some seed
  const char* says;  // part of what it prints when it fails, or null
};
const Case CASES[] = {
    {"ordered", right_when_ordered, "", Case::Passes, nullptr},
    {"ordered, lazy", right_when_ordered, "EMUCUDA_ORDER=lazy", Case::Passes, nullptr},
    {"ordered, eager", right_when_ordered, "EMUCUDA_ORDER=eager", Case::Passes, nullptr},
    {"ordered, slow copies", right_when_ordered, "EMUCUDA_COPY_US=500", Case::Passes, nullptr},
    {"ordered, slow kernels", right_when_ordered, "EMUCUDA_KERNEL_US=500", Case::Passes, nullptr},
    {"waits ignored: race", wrong_without_waits, "EMUCUDA_IGNORE=cuStreamWaitEvent", Case::FailsAtOnce, "race"},
    {"waits ignored: results", wrong_without_waits, "EMUCUDA_IGNORE=cuStreamWaitEvent EMUCUDA_RACES=off", Case::Fails, "pipeline"},
    {"waits ignored, lazy", wrong_without_waits, "EMUCUDA_IGNORE=cuStreamWaitEvent EMUCUDA_RACES=off EMUCUDA_ORDER=lazy", Case::FailsAtOnce,
     "pipeline"},
    {"frame reused: noticed", frame_reused, "", Case::Fails, "changed pinned memory"},
    {"frame reused: results", frame_reused, "EMUCUDA_FRAMES=off", Case::Fails, "pipeline"},
    {"frame reused, lazy", frame_reused, "EMUCUDA_ORDER=lazy", Case::FailsAtOnce, "changed pinned memory"},
    {"host wait ignored", right_when_ordered, "EMUCUDA_IGNORE=cuEventSynchronize EMUCUDA_ORDER=lazy", Case::FailsAtOnce, "changed pinned memory"},
    {"final wait ignored", right_when_ordered, "EMUCUDA_IGNORE=cuStreamSynchronize EMUCUDA_ORDER=lazy", Case::FailsAtOnce, "pipeline"},
    {"host cache", host_cache, "", Case::Passes, nullptr},
    {"host cache, lazy", host_cache, "EMUCUDA_ORDER=lazy", Case::Passes, nullptr},
    {"host cache, waits ignored", host_cache, "EMUCUDA_IGNORE=cuStreamWaitEvent", Case::FailsAtOnce, "race"},
    {"waits capture", waits_capture, "", Case::Passes, nullptr},
    {"lazy is late", lazy_is_late, "EMUCUDA_ORDER=lazy", Case::Passes, nullptr},
    {"pageable", pageable_is_taken_at_once, "EMUCUDA_ORDER=lazy", Case::Passes, nullptr},
    {"shared memory", shared_memory_rule, "", Case::Passes, nullptr},
    {"memory", memory_rules, "EMUCUDA_MEMORY=4194304 EMUCUDA_CONTEXT=4096 EMUCUDA_PINNED_LIMIT=8192", Case::Passes, nullptr},
    {"modules", module_rules, "", Case::Passes, nullptr},
    {"faults", faults, "EMUCUDA_FAIL=cuMemAlloc_v2:2:2,kernel:2:719", Case::Passes, nullptr},
    {"block", broken_block, "", Case::FailsAtOnce, "block of 128"},
    {"grid", broken_grid, "", Case::FailsAtOnce, "grid of 3"},
    {"freed pointer", broken_pointer, "", Case::FailsAtOnce, "no address"},
    {"alignment", broken_alignment, "", Case::FailsAtOnce, "aligned"},
    {"bounds", broken_bounds, "", Case::FailsAtOnce, PAST_THE_END},
#ifdef __SANITIZE_ADDRESS__
    {"reading past the end", broken_read, "", Case::FailsAtOnce, PAST_THE_END},
#endif
    {"free in use", broken_free, "EMUCUDA_ORDER=lazy", Case::FailsAtOnce, "freed while"},
    {"unregister in use", broken_unregister, "EMUCUDA_ORDER=lazy", Case::FailsAtOnce, "unregistered while"},
};

// Runs the case in a child; what it said, and whether it passed.
bool passes(const Case& c, const char* self, int seed, std::string& said) {
  int pipe_ends[2];
  if (pipe(pipe_ends)) abort();
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipe_ends[1], 2);
    close(pipe_ends[0]), close(pipe_ends[1]);
    std::istringstream settings(c.environment);
    for (std::string s; settings >> s;) setenv(s.substr(0, s.find('=')).c_str(), s.substr(s.find('=') + 1).c_str(), 1);
    setenv("EMUCUDA_SEED", std::to_string(seed).c_str(), 1);
    alarm(60);
    execl(self, self, ptx_folder.c_str(), c.name, nullptr);
    _exit(127);
  }
  close(pipe_ends[1]);
  char buffer[4096];
  for (ssize_t n; (n = read(pipe_ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, (size_t)n);
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return fprintf(stderr, "usage: selftest PTX_FOLDER\n"), 2;
  ptx_folder = argv[1];
  if (argc == 3) {
    for (const Case& c : CASES)
      if (!strcmp(c.name, argv[2])) return c.run(), 0;
    return 2;
  }
  constexpr int SEEDS = 6;
  int bad = 0;
  for (const Case& c : CASES) {
    int passed = 0;
    std::string said;
    bool says_so = true;
    for (int seed = 1; seed <= SEEDS; seed++) {
      std::string this_time;
      const bool ok = passes(c, argv[0], seed, this_time);
      passed += ok;
      if (!ok && c.says && this_time.find(c.says) == std::string::npos) says_so = false;
      said += this_time;
    }
    const bool good = says_so && (c.want == Case::Passes ? passed == SEEDS : c.want == Case::Fails ? passed < SEEDS : passed == 0);
    printf("%s %-24s %d of %d pass%s\n", good ? "ok  " : "FAIL", c.name, passed, SEEDS, c.want == Case::Passes ? "" : " (must not)");
    if (!good) printf("%s", said.c_str()), bad++;
  }
  return bad ? 1 : 0;
}
