// attention_dense: vision's attention: within a window every row sees every row, none outside it
//
//   Maths and the order of every sum: attention.cuh, positions counted from the window's first row.
//   q, k, v [rows][heads][head_size] 16 bit (rope_dense's outputs)
//   windows int32 row numbers: window w is rows windows[w] .. windows[w+1]-1 ("cu_seqlens")
//   tiles   [grid.x][2] int32 {window, tile}: tile i has rows 64i.. of the window
//   out     [rows][heads][head_size] 16 bit
//   moves 4 * head_size bytes (q, out) a row and head, and k and v, as many again, once for each of the window's tiles of 64 rows:
//         out of the L2 cache where those run together
//   4 * window * head_size operations a row and head; bound: tensor cores
//
// Launch: grid (tiles, heads), block 128, shared AttentionTile<head size, 64>::SHARED_BYTES.
#include "attention.cuh"
#include "common.cuh"

struct DenseArgs {
  const u16 *q, *k, *v;
  const int *windows, *tiles;
  u16* out;
  int heads;
  float scale;
};

template <class T, class Tile>
TP_DEVICE void dense_block(const DenseArgs& p) {
  TP_SHARED(shared);
  const int* tile = p.tiles + blockIdx.x * 2;
  const int start = p.windows[tile[0]], keys = p.windows[tile[0] + 1] - start, first = tile[1] * Tile::ROWS;
  const i64 stride = (i64)p.heads * Tile::HD, base = start * stride + (i64)blockIdx.y * Tile::HD;
  load_queries<Tile>(shared, [&](int row) -> const u16* {
    return IN_BOUNDS(first + row < keys) ? p.q + base + (first + row) * stride : nullptr;
  });
  const Sight sight = {{0, 0}, {keys, keys}};
  Partial<Tile::VD> all;
  attend<T, Tile>(shared, DenseKeys{p.k + base, p.v + base, stride}, 0, keys, keys, sight, p.scale * LOG2_E, all);
  store_rows<T, Tile>(all, [&](int row) -> u16* {
    return IN_BOUNDS(first + row < keys) ? p.out + base + (first + row) * stride : nullptr;
  });
}

#define TP_DENSE(name, HD)                                                                                                \
  extern "C" __global__ void __launch_bounds__(AttentionTile<HD, 64>::THREADS, 2)                                            \
      TP_KERNEL(name)(const u16* q, const u16* k, const u16* v, const int* windows, const int* tiles, u16* out, int heads, \
                      float scale) {                                                                                      \
    DenseArgs p = {q, k, v, windows, tiles, out, heads, scale};                                                           \
    dense_block<TP_HALF, AttentionTile<HD, 64>>(p);                                                                       \
  }

#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 64
TP_DENSE(attention_dense_h64, 64)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 80
TP_DENSE(attention_dense_h80, 80)
#endif
