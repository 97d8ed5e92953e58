// widen: out = float32(x): gathered embedding rows into the residual stream
//
//   x [count] 16 bit, out [count] float32
//   moves 6 bytes an element; bound: device memory
//
// Launch: grid ceil(count/1024), block 256, shared 0.
#include "ptx.cuh"
#include "common.cuh"

constexpr int WIDEN_THREADS = 256;

extern "C" __global__ void __launch_bounds__(WIDEN_THREADS) TP_KERNEL(widen)(const u16* x, float* out, i64 count) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const i64 at = (i64)blockIdx.x * (WIDEN_THREADS * 4) + i * WIDEN_THREADS + threadIdx.x;
    if (IN_BOUNDS(at < count)) out[at] = widen(TP_HALF(), x[at]);
  }
}
