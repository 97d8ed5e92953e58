// Sums in one fixed order: butterflies inside a warp, then the warps from first to last.
#pragma once
#include "ptx.cuh"

TP_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// The sum over the block, in every thread. `partial`: one float per warp of shared memory, used once per kernel.
TP_DEVICE float block_sum(float x, float* partial) {
  x = warp_sum(x);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < (int)(blockDim.x >> 5); w++) sum += partial[w];
  return sum;
}
