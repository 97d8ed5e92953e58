// rmsnorm_heads: the per-head norm of q and k (Qwen3), in place: x = x / sqrt(mean(x^2) + eps) * w over each head
//
//   x [rows][heads][head_size] float32, row stride in elements        w [head_size] 16 bit
//   moves 8 bytes an element; bound: device memory, latency at few rows
//
// One warp a head; the head's values stay in the lane that read them.
//
// Launch: grid (rows, ceil(heads/4)), block 128, shared 0.
#include "reduce.cuh"
#include "common.cuh"

constexpr int RMSNORM_HEADS_THREADS = 128;

extern "C" __global__ void __launch_bounds__(RMSNORM_HEADS_THREADS)
    TP_KERNEL(rmsnorm_heads)(float* x, const u16* w, i64 row_stride, int heads, int head_size, float eps) {
  const int lane = threadIdx.x & 31, head = blockIdx.y * (RMSNORM_HEADS_THREADS / 32) + (threadIdx.x >> 5);
  if (!IN_BOUNDS(head < heads)) return;
  float* v = x + blockIdx.x * row_stride + (i64)head * head_size;
  float sum = 0.0f;
  for (int d = lane; IN_BOUNDS(d < head_size); d += 32) sum += v[d] * v[d];
  const float scale = 1.0f / sqrtf(warp_sum(sum) / (float)head_size + eps);
  for (int d = lane; IN_BOUNDS(d < head_size); d += 32) v[d] = v[d] * scale * widen(TP_HALF(), w[d]);
}
