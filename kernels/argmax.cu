// argmax: ids[r] = the id of the largest of x[r], the lowest id among equals; NaN ranks below everything
//
//   x [rows][cols] float32, row stride in elements       ids [rows] u32, values [rows] float32 (what x holds there)
//   moves 4 bytes an element; bound: device memory, one block a row
//
// Launch: grid rows, block 1024, shared 256 bytes.
#include "select.cuh"
#include "common.cuh"

constexpr int ARGMAX_THREADS = 1024;
[[maybe_unused]] constexpr int ARGMAX_SHARED_BYTES = ARGMAX_THREADS / 32 * 8;

TP_DEVICE u64 argmax_warp(u64 best) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes >>= 1) {
    const u64 other = __shfl_xor_sync(0xffffffffu, best, lanes);
    best = other > best ? other : best;
  }
  return best;
}

extern "C" __global__ void __launch_bounds__(ARGMAX_THREADS)
    TP_KERNEL(argmax)(const float* x, u32* ids, float* values, i64 stride, int cols) {
  TP_SHARED(shared);
  u64* best_of_warp = (u64*)shared;
  const float* row = x + blockIdx.x * stride;
  u64 best = 0;
#pragma unroll 4
  for (int c = threadIdx.x; IN_BOUNDS(c < cols); c += ARGMAX_THREADS) {
    const u64 key = select_key(row[c], (u32)c);
    best = key > best ? key : best;
  }
  best = argmax_warp(best);
  if ((threadIdx.x & 31) == 0) best_of_warp[threadIdx.x >> 5] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = argmax_warp(best_of_warp[threadIdx.x]);
  if (threadIdx.x != 0) return;
  ids[blockIdx.x] = select_id(best);
  values[blockIdx.x] = row[select_id(best)];
}
