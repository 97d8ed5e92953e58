// rope_dense: vision's rotary embedding: turns q and k, rounds q, k and v into dense 16-bit rows for attention_dense
//
//   x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin   with x1, x2 the halves of a head
//
//   q, k, v [rows][heads][head_size] float32, row stride `stride` elements (three parts of one qkv product, say)
//   cos, sin [rows][head_size/2] float32 from the host (the two axes of a patch's place are in the table)
//   q_out, k_out, v_out [rows][heads][head_size] 16 bit
//   moves 6 bytes an element; bound: device memory
//
// Launch: grid rows, block 256, shared 0. head_size even.
#include "ptx.cuh"
#include "common.cuh"

constexpr int ROPE_DENSE_THREADS = 256;

extern "C" __global__ void __launch_bounds__(ROPE_DENSE_THREADS)
    TP_KERNEL(rope_dense)(const float* q, const float* k, const float* v, const float* cos, const float* sin, u16* q_out, u16* k_out,
                          u16* v_out, i64 stride, int heads, int head_size) {
  const i64 r = blockIdx.x, out = r * heads * head_size;
  const int half = head_size / 2;
  for (int i = threadIdx.x; IN_BOUNDS(i < heads * half); i += ROPE_DENSE_THREADS) {
    const int pair = i % half, at1 = i / half * head_size + pair, at2 = at1 + half;
    const float c = cos[r * half + pair], s = sin[r * half + pair];
    const i64 in = r * stride;
    q_out[out + at1] = round_half(TP_HALF(), q[in + at1] * c - q[in + at2] * s);
    q_out[out + at2] = round_half(TP_HALF(), q[in + at2] * c + q[in + at1] * s);
    k_out[out + at1] = round_half(TP_HALF(), k[in + at1] * c - k[in + at2] * s);
    k_out[out + at2] = round_half(TP_HALF(), k[in + at2] * c + k[in + at1] * s);
    v_out[out + at1] = round_half(TP_HALF(), v[in + at1]);
    v_out[out + at2] = round_half(TP_HALF(), v[in + at2]);
  }
}
