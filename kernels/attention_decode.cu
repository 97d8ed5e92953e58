// attention_decode: the same attention as prefill's, bit for bit, spread over chunks of 256 keys: for few rows and many keys
//
//   Arguments as attention_prefill's, except:
//   items [grid.x][3] int32 {segment, tile, chunk}: tile i has rows 16i.. of the segment's tokens*heads/kv_heads rows; one item for
//         each chunk that some row of the tile sees, chunks of a tile in ascending order and next to each other
//   sums  [items][kv_heads][16][head_size] float32, maxima [items][kv_heads][16][2] float32 {m, l}: for attention_merge, which
//         must follow
//   moves 4 * head_size bytes a key and kv head; bound: device memory
//
// Launch: grid (items, kv_heads), block 32 (64 for head size 256), shared AttentionTile<head size, 16>::SHARED_BYTES.
#include "paged.cuh"
#include "common.cuh"

template <class T, class Tile>
TP_DEVICE void decode_block(const PagedArgs& p, const int* items, float* sums, float* maxima) {
  const int* item = items + blockIdx.x * 3;
  const PagedTile t = paged_tile(p, item[0], item[1], 16, blockIdx.y);
  const int last_token = min_int(t.token(15), t.segment.rows - 1), chunk = item[2] * KEY_CHUNK;
  const int lo = max_int(t.lo(0, p.window), chunk), hi = min_int(t.segment.start + last_token + 1, chunk + KEY_CHUNK);
  // One chunk merged into nothing is that chunk: its old factor multiplies zeros, its new one is 2^0.
  Partial<Tile::VD> all;
  paged_attend<T, Tile>(p, t, lo, hi, all);
  const int lane = threadIdx.x & 31, part = threadIdx.x >> 5;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const i64 row = ((i64)blockIdx.x * p.kv_heads + blockIdx.y) * 16 + (lane >> 2) + h * 8;
    float* to = sums + row * Tile::HD + part * Tile::VD + (lane & 3) * 2;
#pragma unroll
    for (int d = 0; d < Tile::VD / 8; d++) to[d * 8] = all.o[d][2 * h], to[d * 8 + 1] = all.o[d][2 * h + 1];
    if (part == 0 && (lane & 3) == 0) maxima[row * 2] = all.m[h], maxima[row * 2 + 1] = all.l[h];
  }
}

#define TP_DECODE(name, HD)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(AttentionTile<HD, 16>::THREADS)                                                  \
      TP_KERNEL(name)(const u16* q, const u16* kv, const int* segments, const int* tables, const int* items, float* sums,       \
                      float* maxima, int heads, int kv_heads, int window, float scale) {                                        \
    PagedArgs p = {q, kv, segments, tables, heads, kv_heads, window, scale};                                                    \
    decode_block<TP_HALF, AttentionTile<HD, 16>>(p, items, sums, maxima);                                                       \
  }

#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 64
TP_DECODE(attention_decode_h64, 64)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 80
TP_DECODE(attention_decode_h80, 80)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 96
TP_DECODE(attention_decode_h96, 96)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 128
TP_DECODE(attention_decode_h128, 128)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 256
TP_DECODE(attention_decode_h256, 256)
#endif
