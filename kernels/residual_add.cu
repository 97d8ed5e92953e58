// residual_add: x += y
//
//   x, y [count] float32
//   moves 12 bytes an element; bound: device memory. (linear adds into the residual itself, rmsnorm on its way; this is the plain one.)
//
// Launch: grid ceil(count/1024), block 256, shared 0.
#include "ptx.cuh"
#include "common.cuh"

constexpr int RESIDUAL_ADD_THREADS = 256;

extern "C" __global__ void __launch_bounds__(RESIDUAL_ADD_THREADS) TP_KERNEL(residual_add)(float* x, const float* y, i64 count) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const i64 at = (i64)blockIdx.x * (RESIDUAL_ADD_THREADS * 4) + i * RESIDUAL_ADD_THREADS + threadIdx.x;
    if (IN_BOUNDS(at < count)) x[at] += y[at];
  }
}
