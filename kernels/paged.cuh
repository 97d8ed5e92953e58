// What prefill and decode over the paged KV agree on: segments, and which rows and keys a tile of one has.
#pragma once
#include "attention.cuh"

// One sequence's tokens in a pass: 4 int32 of `segments`.
struct Segment {
  int first_row;  // of the flat pass
  int rows;       // tokens
  int start;      // absolute position of its first token
  int table;      // index in `tables` of its first block
};

struct PagedArgs {
  const u16 *q, *kv;
  const int *segments, *tables;
  int heads, kv_heads, window;
  float scale;
};

// The rows of tile `tile` of a segment, for one kv head. Row i of the segment is token i/group, head i%group of the kv head's group.
struct PagedTile {
  Segment segment;
  int group, first, kv_head;

  TP_DEVICE int token(int row) const { return (first + row) / group; }
  TP_DEVICE bool has(int row) const { return IN_BOUNDS(token(row) < segment.rows); }
  // Index of the row's head_size numbers in a [rows][heads][head_size] array.
  TP_DEVICE i64 at(int row, const PagedArgs& p, int head_size) const {
    return ((i64)(segment.first_row + token(row)) * p.heads + kv_head * group + (first + row) % group) * head_size;
  }
  TP_DEVICE int hi(int row) const { return has(row) ? segment.start + token(row) + 1 : 0; }
  TP_DEVICE int lo(int row, int window) const {
    return has(row) && window > 0 ? max_int(0, segment.start + token(row) + 1 - window) : 0;
  }
  TP_DEVICE int keys() const { return segment.start + segment.rows; }
};

TP_DEVICE PagedTile paged_tile(const PagedArgs& p, int segment, int tile, int tile_rows, int kv_head) {
  const int* s = p.segments + segment * 4;
  return {{s[0], s[1], s[2], s[3]}, p.heads / p.kv_heads, tile * tile_rows, kv_head};
}

TP_DEVICE PagedKeys paged_keys(const PagedArgs& p, const PagedTile& t, int head_size) {
  const i64 head = (i64)ATTENTION_KV_TOKENS * head_size, part = p.kv_heads * head;
  return {p.kv + t.kv_head * head, p.tables + t.segment.table, 2 * part, part, head_size};
}

// Sets up the tile's queries, then attends to keys [lo, hi) of what its rows see.
template <class T, class Tile>
TP_DEVICE void paged_attend(const PagedArgs& p, const PagedTile& t, int lo, int hi, Partial<Tile::VD>& all) {
  TP_SHARED(shared);
  load_queries<Tile>(shared, [&](int row) -> const u16* { return t.has(row) ? p.q + t.at(row, p, Tile::HD) : nullptr; });
  Sight sight;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = (threadIdx.x >> 5) / Tile::PARTS * 16 + ((threadIdx.x & 31) >> 2) + h * 8;
    sight.lo[h] = t.lo(row, p.window), sight.hi[h] = t.hi(row);
  }
  attend<T, Tile>(shared, paged_keys(p, t, Tile::HD), lo, hi, t.keys(), sight, p.scale * LOG2_E, all);
}
