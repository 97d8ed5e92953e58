// attention_decode: the same attention as prefill's, bit for bit, spread over chunks of 256 keys: for few rows and many keys
//
//   Arguments as attention_prefill's, except:
//   items [grid.x][3] int32 {segment, tile, chunk}: tile i has rows 16i.. of the segment's tokens*heads/kv_heads rows; one item for
//         each chunk that some row of the tile sees, chunks of a tile in ascending order and next to each other
//   sums  [items][kv_heads][16][head_size] float32, maxima [items][kv_heads][16][2] float32 {m, l}: scratch between the two kernels
//   merges [grid.x][4] int32 {segment, tile, first item, number of items}
//   attention_decode moves 4 * head_size bytes a key and kv head; bound: device memory
//   attention_decode_merge adds the chunks in order and rounds: 4 * head_size bytes a row and chunk
//
// Launch: attention_decode_h*: grid (items, kv_heads), block 32 (64 for head size 256), shared AttentionTile<head size, 16>::SHARED_BYTES;
//         attention_decode_merge: grid (merges, kv_heads), block 256, shared 0.
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

TP_DECODE(attention_decode_h64, 64)
TP_DECODE(attention_decode_h80, 80)
TP_DECODE(attention_decode_h96, 96)
TP_DECODE(attention_decode_h128, 128)
TP_DECODE(attention_decode_h256, 256)

constexpr int DECODE_MERGE_THREADS = 256;

// One output number: chunks in order.
TP_DEVICE float decode_merge_one(const float* sums, const float* maxima, i64 row, i64 item_rows, int items, int head_size, int d) {
  float m = -TP_INFINITY, l = 0.0f, o = 0.0f;
  for (int i = 0; i < items; i++, row += item_rows) {
    const Rescale r = rescale(m, maxima[row * 2]);
    m = r.m;
    l = merge(l, maxima[row * 2 + 1], r);
    o = merge(o, sums[row * head_size + d], r);
  }
  return o * (1.0f / l);
}

extern "C" __global__ void __launch_bounds__(DECODE_MERGE_THREADS)
    TP_KERNEL(attention_decode_merge)(const float* sums, const float* maxima, const int* segments, const int* merges, u16* out,
                                      int heads, int kv_heads, int head_size) {
  const int* m = merges + blockIdx.x * 4;
  PagedArgs p = {nullptr, nullptr, segments, nullptr, heads, kv_heads, 0, 0.0f};
  const PagedTile t = paged_tile(p, m[0], m[1], 16, blockIdx.y);
  const i64 first = ((i64)m[2] * kv_heads + blockIdx.y) * 16, item_rows = (i64)kv_heads * 16;
  for (int i = threadIdx.x; i < 16 * head_size; i += DECODE_MERGE_THREADS) {
    const int row = i / head_size, d = i % head_size;
    if (!t.has(row)) continue;
    const float o = decode_merge_one(sums, maxima, first + row, item_rows, m[3], head_size, d);
    out[t.at(row, p, head_size) + d] = round_half(TP_HALF(), o);
  }
}
