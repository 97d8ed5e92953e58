// round: out = round16(x), to nearest, ties to even: the input of a matrix product
//
//   x [count] float32, out [count] 16 bit
//   moves 6 bytes an element; bound: device memory
//
// Launch: grid ceil(count/1024), block 256, shared 0.
#include "ptx.cuh"
#include "common.cuh"

constexpr int ROUND_THREADS = 256;

extern "C" __global__ void __launch_bounds__(ROUND_THREADS) TP_KERNEL(round)(const float* x, u16* out, i64 count) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const i64 at = (i64)blockIdx.x * (ROUND_THREADS * 4) + i * ROUND_THREADS + threadIdx.x;
    if (IN_BOUNDS(at < count)) out[at] = round_half(TP_HALF(), x[at]);
  }
}
