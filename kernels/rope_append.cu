// rope_append: turns q and k by their positions, rounds them, and stores k and v in the paged KV
//
//   x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin   with x1, x2 the halves of a head ("rotate halves")
//
//   q   [rows][heads][head_size] float32, row stride q_stride elements; k, v likewise with kv_heads and their strides
//   cos, sin [rows][head_size/2] float32, computed by the host: any scaling of the frequencies and the three axes
//       of M-RoPE (each pair's own axis picks the position) are in the table, the kernel is the same
//   slots [rows] int32: block * 16 + (position % 16) of the row's place in the KV, from the sequence's block table; < 0: not stored
//   q_out [rows][heads][head_size] 16 bit
//   kv  this layer's part of the KV: [block][k|v][kv head][16 tokens][head_size] 16 bit
//   moves 6 bytes an element of q, k and v; bound: device memory, latency at few rows
//
// One block a row. head_size even.
// Launch: grid rows, block 256, shared 0.
#include "ptx.cuh"
#include "common.cuh"

constexpr int ROPE_THREADS = 256;
constexpr int KV_BLOCK_TOKENS = 16;

struct RopeRow {
  const float *cos, *sin;
  int half;
};

// One pair of one head: from x (a row of heads) to `out`, the same head's 16-bit place.
template <class T>
TP_DEVICE void rope_pair(const RopeRow& row, const float* x, u16* out, int pair) {
  const float c = row.cos[pair], s = row.sin[pair];
  const float x1 = x[pair], x2 = x[pair + row.half];
  out[pair] = round_half(T(), x1 * c - x2 * s);
  out[pair + row.half] = round_half(T(), x2 * c + x1 * s);
}

template <class T>
TP_DEVICE void rope_append_row(const float* q, const float* k, const float* v, const RopeRow& row, int slot, u16* q_out, u16* kv,
                               int heads, int kv_heads) {
  const int size = row.half * 2;
  for (int i = threadIdx.x; IN_BOUNDS(i < heads * row.half); i += ROPE_THREADS) {
    const int head = i / row.half;
    rope_pair<T>(row, q + head * size, q_out + head * size, i % row.half);
  }
  if (!IN_BOUNDS(slot >= 0)) return;
  const i64 part = (i64)kv_heads * KV_BLOCK_TOKENS * size;
  u16* k_out = kv + (i64)(slot / KV_BLOCK_TOKENS) * 2 * part + (i64)(slot % KV_BLOCK_TOKENS) * size;
  for (int i = threadIdx.x; IN_BOUNDS(i < kv_heads * row.half); i += ROPE_THREADS) {
    const int head = i / row.half, pair = i % row.half;
    u16* to = k_out + (i64)head * KV_BLOCK_TOKENS * size;
    rope_pair<T>(row, k + head * size, to, pair);
    to[part + pair] = round_half(T(), v[head * size + pair]);
    to[part + pair + row.half] = round_half(T(), v[head * size + pair + row.half]);
  }
}

extern "C" __global__ void __launch_bounds__(ROPE_THREADS)
    TP_KERNEL(rope_append)(const float* q, const float* k, const float* v, const float* cos, const float* sin, const int* slots,
                           u16* q_out, u16* kv, i64 q_stride, i64 k_stride, i64 v_stride, int heads, int kv_heads,
                           int head_size) {
  const i64 r = blockIdx.x;
  const int half = head_size / 2;
  const RopeRow row = {cos + r * half, sin + r * half, half};
  rope_append_row<TP_HALF>(q + r * q_stride, k + r * k_stride, v + r * v_stride, row, slots[r],
                           q_out + r * heads * head_size, kv, heads, kv_heads);
}
