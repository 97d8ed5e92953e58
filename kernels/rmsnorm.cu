// rmsnorm: x += delta (where given); out = round16( x / sqrt(mean(x^2) + eps) * w )
//
//   x     [rows][cols] float32, the residual stream, updated in place      delta [rows][cols] float32 or null
//   w     [cols] 16 bit                                                    out   [rows][cols] 16 bit
//   moves 6 bytes an element (14 with delta); bound: device memory, latency at few rows
//
// The forward pass gives no delta: every residual add of these models ends a product, which adds into x itself (linear's flags 1).
// That moves 8 + 6 bytes an element where a stored product and a delta would move 4 + 14, and the bits are the same: one add a value.
//
// One block a row. A thread reads again only what it wrote itself, so the row needs no barrier but the sum's.
// Bases are 16-byte aligned; cols is any number (a multiple of 4 takes the wide path; both add in their own fixed order,
// which depends on cols alone).
//
// Launch: grid rows, block 256, shared 32 bytes.
#include "reduce.cuh"
#include "common.cuh"

constexpr int RMSNORM_THREADS = 256;
[[maybe_unused]] constexpr int RMSNORM_SHARED_BYTES = RMSNORM_THREADS / 32 * 4;

TP_DEVICE float rmsnorm_add(float* x, const float* delta, int cols) {
  float sum = 0.0f;
  if (cols % 4 == 0) {
    for (int c = threadIdx.x * 4; IN_BOUNDS(c < cols); c += RMSNORM_THREADS * 4) {
      float4 h = *(const float4*)(x + c);
      if (delta) {
        const float4 d = *(const float4*)(delta + c);
        h.x += d.x, h.y += d.y, h.z += d.z, h.w += d.w;
        *(float4*)(x + c) = h;
      }
      sum += h.x * h.x + h.y * h.y + (h.z * h.z + h.w * h.w);
    }
  } else {
    for (int c = threadIdx.x; IN_BOUNDS(c < cols); c += RMSNORM_THREADS) {
      float h = x[c];
      if (delta) x[c] = h += delta[c];
      sum += h * h;
    }
  }
  return sum;
}

template <class T>
TP_DEVICE void rmsnorm_row(float* x, const float* delta, const u16* w, u16* out, int cols, float eps) {
  TP_SHARED(shared);
  const float sum = block_sum(rmsnorm_add(x, delta, cols), (float*)shared);
  const float scale = 1.0f / sqrtf(sum / (float)cols + eps);
  if (cols % 4 == 0) {
    for (int c = threadIdx.x * 4; IN_BOUNDS(c < cols); c += RMSNORM_THREADS * 4) {
      const float4 h = *(const float4*)(x + c);
      const ushort4 g = *(const ushort4*)(w + c);
      const u32 lo = round_pair(T(), h.x * scale * widen(T(), g.x), h.y * scale * widen(T(), g.y));
      const u32 hi = round_pair(T(), h.z * scale * widen(T(), g.z), h.w * scale * widen(T(), g.w));
      *(uint2*)(out + c) = make_uint2(lo, hi);
    }
  } else {
    for (int c = threadIdx.x; IN_BOUNDS(c < cols); c += RMSNORM_THREADS) out[c] = round_half(T(), x[c] * scale * widen(T(), w[c]));
  }
}

extern "C" __global__ void __launch_bounds__(RMSNORM_THREADS)
    TP_KERNEL(rmsnorm)(float* x, const float* delta, const u16* w, u16* out, int cols, float eps) {
  const i64 row = (i64)blockIdx.x * cols;
  rmsnorm_row<TP_HALF>(x + row, delta ? delta + row : delta, w, out + row, cols, eps);
}
