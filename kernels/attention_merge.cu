// attention_merge: adds the chunks that attention_decode left, in ascending order, and rounds
//
//   sums, maxima: as attention_decode writes them        segments: as given to it
//   merges [grid.x][4] int32 {segment, tile, first item, number of items}
//   out    [rows][heads][head_size] 16 bit
//   moves 4 * head_size bytes a row and chunk; bound: latency
//
// Launch: grid (merges, kv_heads), block 256, shared 0.
#include "paged.cuh"
#include "common.cuh"

constexpr int ATTENTION_MERGE_THREADS = 256;

// One output number: chunks in order.
TP_DEVICE float attention_merge_one(const float* sums, const float* maxima, i64 row, i64 item_rows, int items, int head_size, int d) {
  float m = -TP_INFINITY, l = 0.0f, o = 0.0f;
  for (int i = 0; i < items; i++, row += item_rows) {
    const Rescale r = rescale(m, maxima[row * 2]);
    m = r.m;
    l = merge(l, maxima[row * 2 + 1], r);
    o = merge(o, sums[row * head_size + d], r);
  }
  return o * (1.0f / l);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_MERGE_THREADS)
    TP_KERNEL(attention_merge)(const float* sums, const float* maxima, const int* segments, const int* merges, u16* out,
                                      int heads, int kv_heads, int head_size) {
  const int* m = merges + blockIdx.x * 4;
  PagedArgs p = {nullptr, nullptr, segments, nullptr, heads, kv_heads, 0, 0.0f};
  const PagedTile t = paged_tile(p, m[0], m[1], 16, blockIdx.y);
  const i64 first = ((i64)m[2] * kv_heads + blockIdx.y) * 16, item_rows = (i64)kv_heads * 16;
  for (int i = threadIdx.x; IN_BOUNDS(i < 16 * head_size); i += ATTENTION_MERGE_THREADS) {
    const int row = i / head_size, d = i % head_size;
    if (!t.has(row)) continue;
    const float o = attention_merge_one(sums, maxima, first + row, item_rows, m[3], head_size, d);
    out[t.at(row, p, head_size) + d] = round_half(TP_HALF(), o);
  }
}
