// attention_prefill: causal attention of ragged segments over the paged KV, grouped heads, optional sliding window
//
//   Maths and the order of every sum: attention.cuh. A token at position p sees keys max(0, p+1-window) .. p.
//   q    [rows][heads][head_size] 16 bit (rope_append's q_out)
//   kv   this layer's part of the KV, [block][k|v][kv head][16 tokens][head_size] 16 bit, the segments' own tokens already appended
//   segments [n][4] int32 {first_row, tokens, start position, index into tables}
//   tables   int32 block ids, one run per segment
//   tiles    [grid.x][2] int32 {segment, tile}: tile i has rows i*R.. of the segment's tokens*heads/kv_heads rows; R is 64 (32 for 256).
//            Late tiles have the most keys: put them first
//   out  [rows][heads][head_size] 16 bit
//   window 0: none. scale: usually 1/sqrt(head_size)
//   moves 4 * head_size bytes (q, out) per row and head, and of KV at least 4 * head_size bytes per key and kv head, once more for each
//         tile that sees the key; out of the L2 cache where the tiles of a segment run together
//   4 * keys seen * head_size operations per row and head; bound: tensor cores
//
// Launch: grid (tiles, kv_heads), block 128, shared AttentionTile<head size, R>::SHARED_BYTES.
#include "paged.cuh"
#include "common.cuh"

template <class T, class Tile>
TP_DEVICE void prefill_block(const PagedArgs& p, const int* tiles, u16* out) {
  const PagedTile t = paged_tile(p, tiles[blockIdx.x * 2], tiles[blockIdx.x * 2 + 1], Tile::ROWS, blockIdx.y);
  const int last_token = min_int(t.token(Tile::ROWS - 1), t.segment.rows - 1);
  Partial<Tile::VD> all;
  paged_attend<T, Tile>(p, t, t.lo(0, p.window), t.segment.start + last_token + 1, all);
  store_rows<T, Tile>(all, [&](int row) -> u16* { return t.has(row) ? out + t.at(row, p, Tile::HD) : nullptr; });
}

#define TP_PREFILL(name, HD, ROWS)                                                                                             \
  extern "C" __global__ void __launch_bounds__(AttentionTile<HD, ROWS>::THREADS, 2)                                               \
      TP_KERNEL(name)(const u16* q, const u16* kv, const int* segments, const int* tables, const int* tiles, u16* out,         \
                      int heads, int kv_heads, int window, float scale) {                                                      \
    PagedArgs p = {q, kv, segments, tables, heads, kv_heads, window, scale};                                                   \
    prefill_block<TP_HALF, AttentionTile<HD, ROWS>>(p, tiles, out);                                                            \
  }

#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 64
TP_PREFILL(attention_prefill_h64, 64, 64)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 80
TP_PREFILL(attention_prefill_h80, 80, 64)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 96
TP_PREFILL(attention_prefill_h96, 96, 64)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 128
TP_PREFILL(attention_prefill_h128, 128, 64)
#endif
#if TP_HEAD_SIZE == 0 || TP_HEAD_SIZE == 256
TP_PREFILL(attention_prefill_h256, 256, 32)
#endif
