// bias_add: x[r][c] += bias[c]
//
//   x [rows][cols] float32, row stride in elements      bias [cols] 16 bit
//   moves 8 bytes an element; bound: device memory. (linear adds a bias itself; this is for cublasLt's products.)
//
// Launch: grid (rows, ceil(cols/1024)), block 256, shared 0.
#include "ptx.cuh"
#include "common.cuh"

constexpr int BIAS_ADD_THREADS = 256;

extern "C" __global__ void __launch_bounds__(BIAS_ADD_THREADS) TP_KERNEL(bias_add)(float* x, const u16* bias, i64 stride, int cols) {
  float* row = x + blockIdx.x * stride;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int c = blockIdx.y * (BIAS_ADD_THREADS * 4) + i * BIAS_ADD_THREADS + threadIdx.x;
    if (IN_BOUNDS(c < cols)) row[c] += widen(TP_HALF(), bias[c]);
  }
}
