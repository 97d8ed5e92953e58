// Every kernel of one 16-bit type, with what its launch needs to know.
#pragma once
#include <vector>

#include "../ptx.cuh"

struct LinearKernel {
  const char* name;
  void (*run)(const u16*, const u16*, const u16*, float*, const u16*, const u16*, float*, const u16*, const u16*, float*, i64, i64, i64, i64,
              i64, i64, i64, int, int, int, int, int, int);
  int bn, br, threads, shared_bytes;
  bool aligned;
};
struct PagedKernels {
  int head_size;
  void (*prefill)(const u16*, const u16*, const int*, const int*, const int*, u16*, int, int, int, float);
  int rows, prefill_threads, prefill_shared;
  void (*decode)(const u16*, const u16*, const int*, const int*, const int*, float*, float*, int, int, int, float);
  int decode_threads, decode_shared;
};
struct DenseKernel {
  int head_size;
  void (*run)(const u16*, const u16*, const u16*, const int*, const int*, u16*, int, float);
  int threads, shared_bytes;
};
struct Kernels {
  const char* half;
  u16 (*to_half)(float);
  float (*to_float)(u16);
  std::vector<LinearKernel> linear;
  std::vector<PagedKernels> paged;
  std::vector<DenseKernel> dense;
  void (*merge)(const float*, const float*, const int*, const int*, u16*, int, int, int);
  void (*rmsnorm)(float*, const float*, const u16*, u16*, int, float);
  void (*rmsnorm_heads)(float*, const u16*, i64, int, int, float);
  void (*rope_append)(const float*, const float*, const float*, const float*, const float*, const int*, u16*, u16*, i64, i64, i64, int,
                      int, int);
  void (*rope_dense)(const float*, const float*, const float*, const float*, const float*, u16*, u16*, u16*, i64, int, int);
  void (*swiglu)(const float*, const float*, u16*, i64, i64, int);
  void (*gelu)(const float*, u16*, i64);
  void (*bias_add)(float*, const u16*, i64, int);
  void (*widen)(const u16*, float*, i64);
  void (*round)(const float*, u16*, i64);
  void (*argmax)(const float*, u32*, float*, i64, int);
  void (*topk)(const float*, u32*, float*, i64, int, int);
  int rmsnorm_shared, argmax_shared, topk_shared, rmsnorm_heads_threads, merge_threads, row_threads;
};

const Kernels& kernels_bf16();
const Kernels& kernels_f16();
