// The kernels' own source files, compiled as C++. Built twice: for bf16, and for f16 with -DTP_F16.
#include "kernels.h"

#include "../paged.cuh"
#include "../reduce.cuh"
#include "../select.cuh"

namespace {  // what a file defines for one type is not the other type's
#include "../argmax.cu"
#include "../attention_decode.cu"
#include "../attention_dense.cu"
#include "../attention_merge.cu"
#include "../attention_prefill.cu"
#include "../bias_add.cu"
#include "../gelu.cu"
#include "../linear.cu"
#include "../rmsnorm.cu"
#include "../rmsnorm_heads.cu"
#include "../rope_append.cu"
#include "../rope_dense.cu"
#include "../round.cu"
#include "../swiglu.cu"
#include "../topk.cu"
#include "../widen.cu"

template <class Tile>
LinearKernel linear_kernel(const char* name, decltype(LinearKernel::run) run) {
  return {name, run, Tile::BN, Tile::BR, Tile::THREADS, Tile::SHARED_BYTES, Tile::ALIGNED};
}
template <int HD, int ROWS>
PagedKernels paged_kernels(decltype(PagedKernels::prefill) prefill, decltype(PagedKernels::decode) decode) {
  using P = AttentionTile<HD, ROWS>;
  using D = AttentionTile<HD, 16>;
  return {HD, prefill, ROWS, P::THREADS, P::SHARED_BYTES, decode, D::THREADS, D::SHARED_BYTES};
}
template <int HD>
DenseKernel dense_kernel(decltype(DenseKernel::run) run) {
  return {HD, run, AttentionTile<HD, 64>::THREADS, AttentionTile<HD, 64>::SHARED_BYTES};
}

Kernels table() {
  Kernels k = {};
  k.to_half = [](float x) { return round_half(TP_HALF(), x); };
  k.to_float = [](u16 h) { return widen(TP_HALF(), h); };
  k.linear = {linear_kernel<LinearT8>("linear_t8", TP_KERNEL(linear_t8)),
              linear_kernel<LinearT16>("linear_t16", TP_KERNEL(linear_t16)),
              linear_kernel<LinearT32>("linear_t32", TP_KERNEL(linear_t32)),
              linear_kernel<LinearT32N>("linear_t32n", TP_KERNEL(linear_t32n)),
              linear_kernel<LinearT64>("linear_t64", TP_KERNEL(linear_t64)),
              linear_kernel<LinearT128>("linear_t128", TP_KERNEL(linear_t128)),
              linear_kernel<LinearT256>("linear_t256", TP_KERNEL(linear_t256)),
              linear_kernel<LinearAny>("linear_any", TP_KERNEL(linear_any))};
  k.paged = {paged_kernels<64, 64>(TP_KERNEL(attention_prefill_h64), TP_KERNEL(attention_decode_h64)),
             paged_kernels<80, 64>(TP_KERNEL(attention_prefill_h80), TP_KERNEL(attention_decode_h80)),
             paged_kernels<96, 64>(TP_KERNEL(attention_prefill_h96), TP_KERNEL(attention_decode_h96)),
             paged_kernels<128, 64>(TP_KERNEL(attention_prefill_h128), TP_KERNEL(attention_decode_h128)),
             paged_kernels<256, 32>(TP_KERNEL(attention_prefill_h256), TP_KERNEL(attention_decode_h256))};
  k.dense = {dense_kernel<64>(TP_KERNEL(attention_dense_h64)), dense_kernel<80>(TP_KERNEL(attention_dense_h80))};
  k.merge = TP_KERNEL(attention_merge);
  k.rmsnorm = TP_KERNEL(rmsnorm);
  k.rmsnorm_heads = TP_KERNEL(rmsnorm_heads);
  k.rope_append = TP_KERNEL(rope_append);
  k.rope_dense = TP_KERNEL(rope_dense);
  k.swiglu = TP_KERNEL(swiglu);
  k.gelu = TP_KERNEL(gelu);
  k.bias_add = TP_KERNEL(bias_add);
  k.widen = TP_KERNEL(widen);
  k.round = TP_KERNEL(round);
  k.argmax = TP_KERNEL(argmax);
  k.topk = TP_KERNEL(topk);
  k.rmsnorm_shared = RMSNORM_SHARED_BYTES, k.argmax_shared = ARGMAX_SHARED_BYTES, k.topk_shared = TOPK_SHARED_BYTES;
  k.rmsnorm_heads_threads = RMSNORM_HEADS_THREADS, k.merge_threads = ATTENTION_MERGE_THREADS, k.row_threads = ROPE_THREADS;
  static_assert(RMSNORM_THREADS == 256 && ARGMAX_THREADS == 1024 && TOPK_THREADS == 1024, "the launch table says so");
  static_assert(ROPE_DENSE_THREADS == ROPE_THREADS && SWIGLU_THREADS == ROPE_THREADS && GELU_THREADS == ROPE_THREADS &&
                    BIAS_ADD_THREADS == ROPE_THREADS && WIDEN_THREADS == ROPE_THREADS && ROUND_THREADS == ROPE_THREADS,
                "the launch table has one block size for them");
  return k;
}
}  // namespace

#ifdef TP_F16
const Kernels& kernels_f16() {
  static Kernels k = table();
  k.half = "f16";
  return k;
}
#else
const Kernels& kernels_bf16() {
  static Kernels k = table();
  k.half = "bf16";
  return k;
}
#endif
