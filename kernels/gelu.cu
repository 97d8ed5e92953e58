// gelu: out = round16( x/2 * (1 + erf(x/sqrt(2))) ), the exact form
//
//   x [count] float32, out [count] 16 bit
//   moves 6 bytes an element; bound: device memory
//
// Launch: grid ceil(count/1024), block 256, shared 0.
#include "ptx.cuh"
#include "common.cuh"

constexpr int GELU_THREADS = 256;

extern "C" __global__ void __launch_bounds__(GELU_THREADS) TP_KERNEL(gelu)(const float* x, u16* out, i64 count) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const i64 at = (i64)blockIdx.x * (GELU_THREADS * 4) + i * GELU_THREADS + threadIdx.x;
    if (IN_BOUNDS(at < count)) out[at] = round_half(TP_HALF(), 0.5f * x[at] * (1.0f + erff(x[at] * 0.70710678118654752f)));
  }
}
