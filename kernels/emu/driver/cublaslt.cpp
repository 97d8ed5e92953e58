// The functions of cublasLt that tensorpager calls, on the emulated driver: each product is a launch of linear_any, in the stream's order.
// What a product is described by is checked against what the real library is promised: types, a transposed weight, matching sizes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
struct EmuModule;
struct EmuFunction;
int cuMemAlloc_v2(unsigned long long* out, size_t bytes);
int cuModuleLoadData(EmuModule** module, const void* image);
int cuModuleGetFunction(EmuFunction** function, EmuModule* module, const char* name);
int cuLaunchKernel(EmuFunction* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                   void** params, void** extra);
}

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type { F32 = 0, F16 = 2, BF16 = 14 };
constexpr int COMPUTE_32F = 68, DESC_TRANSA = 3, PREF_MAX_WORKSPACE = 1;

struct Desc {
  int compute, scale, transa = 0;
};
struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Preference {
  uint64_t workspace = 0;
};
// The library's own: cublasLtMatmulHeuristicResult_t.
struct Heuristic {
  uint64_t algo[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
constexpr uint64_t ALGO = 0x7e57a190;

// What EMUCUBLASLT_FAIL says of this function.
Status told(const char* function) {
  const char* fail = getenv("EMUCUBLASLT_FAIL");
  const size_t length = strlen(function);
  if (!fail || strncmp(fail, function, length) || fail[length] != ':') return SUCCESS;
  return (Status)atoi(fail + length + 1);
}

// Column-major: w is [k, n], taken transposed; a is [k, rows]; out is [n, rows].
bool matches(const Desc& d, const Layout& w, const Layout& a, const Layout& c, const Layout& out) {
  const bool halves = (w.type == F16 || w.type == BF16) && a.type == w.type && out.type == F32;
  const bool same = c.type == out.type && c.rows == out.rows && c.cols == out.cols && c.ld == out.ld;
  const bool sizes = w.rows == a.rows && w.cols == out.rows && a.cols == out.cols;
  const bool strides = w.ld >= (int64_t)w.rows && a.ld >= (int64_t)a.rows && out.ld >= (int64_t)out.rows;
  return d.transa == 1 && d.compute == COMPUTE_32F && d.scale == F32 && halves && same && sizes && strides;
}

// linear_any of the type, loaded once.
EmuFunction* kernel(int type) {
  static EmuFunction* known[2] = {};
  EmuFunction*& f = known[type == F16];
  if (f) return f;
  const std::string name = type == F16 ? "linear_any_f16" : "linear_any_bf16";
  const std::string ptx = ".version 8.2\n.target sm_80\n.visible .entry " + name + "(\n)\n";
  EmuModule* module = nullptr;
  if (cuModuleLoadData(&module, ptx.c_str()) || cuModuleGetFunction(&f, module, name.c_str())) return nullptr;
  return f;
}

}  // namespace

EXPORT Status cublasLtCreate(void** handle) {
  static int one;
  *handle = &one;
  // The handle's own memory, never given back.
  static unsigned long long taken = 0;
  const char* bytes = getenv("EMUCUBLASLT_HANDLE");
  if (bytes && !taken && cuMemAlloc_v2(&taken, strtoull(bytes, nullptr, 10))) return ALLOC_FAILED;
  return told("cublasLtCreate");
}
EXPORT Status cublasLtDestroy(void* handle) { return handle ? SUCCESS : NOT_INITIALIZED; }

EXPORT Status cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) {
  *desc = new Desc{compute, scale};
  return SUCCESS;
}
EXPORT Status cublasLtMatmulDescDestroy(Desc* desc) {
  delete desc;
  return SUCCESS;
}
EXPORT Status cublasLtMatmulDescSetAttribute(Desc* desc, int which, const void* value, size_t bytes) {
  if (which != DESC_TRANSA || bytes != sizeof desc->transa) return INVALID_VALUE;
  memcpy(&desc->transa, value, bytes);
  return SUCCESS;
}

EXPORT Status cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  *layout = new Layout{type, rows, cols, ld};
  return SUCCESS;
}
EXPORT Status cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return SUCCESS;
}

EXPORT Status cublasLtMatmulPreferenceCreate(Preference** preference) {
  *preference = new Preference;
  return SUCCESS;
}
EXPORT Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  return SUCCESS;
}
EXPORT Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int which, const void* value, size_t bytes) {
  if (which != PREF_MAX_WORKSPACE || bytes != sizeof preference->workspace) return INVALID_VALUE;
  memcpy(&preference->workspace, value, bytes);
  return SUCCESS;
}

EXPORT Status cublasLtMatmulAlgoGetHeuristic(void* handle, const Desc* d, const Layout* w, const Layout* a, const Layout* c, const Layout* out,
                                             const Preference* preference, int wanted, Heuristic* found, int* count) {
  *count = 0;
  if (const Status status = told("cublasLtMatmulAlgoGetHeuristic")) return status;
  if (!handle || wanted < 1 || !matches(*d, *w, *a, *c, *out)) return INVALID_VALUE;
  *found = {{ALGO, preference->workspace}, preference->workspace, SUCCESS, 1.0f, {}};
  *count = 1;
  return SUCCESS;
}

EXPORT Status cublasLtMatmul(void* handle, const Desc* d, const float* alpha, const void* w, const Layout* wl, const void* a, const Layout* al,
                             const float* beta, const void* c, const Layout* cl, void* out, const Layout* ol, const uint64_t* algo,
                             void* workspace, size_t workspace_bytes, void* stream) {
  if (const Status status = told("cublasLtMatmul")) return status;
  if (!handle || !matches(*d, *wl, *al, *cl, *ol) || c != out) return INVALID_VALUE;
  if (*alpha != 1.0f || (*beta != 0.0f && *beta != 1.0f)) return NOT_SUPPORTED;
  if (algo[0] != ALGO || workspace_bytes < algo[1] || !workspace) return INVALID_VALUE;
  EmuFunction* f = kernel(wl->type);
  if (!f) return EXECUTION_FAILED;
  const void* none = nullptr;
  int64_t lda = al->ld, ldw = wl->ld, ldo = ol->ld, no = 0;
  int rows = (int)al->cols, n = (int)wl->cols, k = (int)wl->rows, flags = *beta == 1.0f, empty = 0;
  void* params[] = {&a,   &w,   &none, &out, &none, &none, &none, &none, &none,  &none,  &lda, &ldw,
                    &no,  &no,  &ldo,  &no,  &no,   &rows, &n,    &empty, &empty, &k,    &flags};  // of three matrices the first
  const unsigned grid = (unsigned)((n + 63) / 64 * ((rows + 31) / 32));
  return cuLaunchKernel(f, grid, 1, 1, 128, 1, 1, 24576, stream, params, nullptr) ? EXECUTION_FAILED : SUCCESS;
}
