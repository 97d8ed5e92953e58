// swiglu: out = round16( silu(gate) * up ),  silu(x) = x / (1 + exp(-x))
//
//   gate, up [rows][cols] float32, row strides in elements (two halves of one buffer, or two buffers)
//   out [rows][cols] 16 bit
//   moves 10 bytes an element; bound: device memory
//
// Launch: grid (rows, ceil(cols/1024)), block 256, shared 0.
#include "ptx.cuh"
#include "common.cuh"

constexpr int SWIGLU_THREADS = 256;

extern "C" __global__ void __launch_bounds__(SWIGLU_THREADS)
    TP_KERNEL(swiglu)(const float* gate, const float* up, u16* out, i64 gate_stride, i64 up_stride, int cols) {
  const float *g = gate + blockIdx.x * gate_stride, *u = up + blockIdx.x * up_stride;
  u16* o = out + (i64)blockIdx.x * cols;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int c = blockIdx.y * (SWIGLU_THREADS * 4) + i * SWIGLU_THREADS + threadIdx.x;
    if (IN_BOUNDS(c < cols)) o[c] = round_half(TP_HALF(), g[c] / (1.0f + expf(-g[c])) * u[c]);
  }
}
