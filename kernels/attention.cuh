// The arithmetic of attention, shared by prefill, decode and vision, so that a row's result is the same bits whichever
// kernel computes it and whatever rows are beside it.
//
//   o[r] = sum_j softmax_j(scale * q[r].k[j]) v[j]   over the keys j that row r sees: lo[r] <= j < hi[r]
//
// Definition. Keys are taken in chunks of 256 at absolute positions (chunk c is [256c, 256c+256)), and a chunk in steps of 64. Within
// a chunk, from m = -inf, l = 0, o = 0, for each step in order:
//   s = (q.k by mma.sync, head size in steps of 16) * scale * log2(e), -inf where not seen;  m' = max(m, s)
//   p = round16(2^(s - m'));  l = l * 2^(m - m') + p;  o = o * 2^(m - m') + p.v (by mma.sync, keys in steps of 16)
// l is kept by 4 lanes and added at the end of the chunk. Chunks then merge in order, from M = -inf, L = 0, O = 0:
//   M' = max(M, m);  L = L * 2^(M - M') + l * 2^(m - M');  O likewise;   at the end round16(O / L).
// A step or chunk in which a row sees nothing leaves its m, l, o exactly as they are, so it may be skipped or not. Rounding p before it
// is added to l makes the weights that multiply v add to one.
//
// The library has 16 rows a warp: queries of one kv head, (token, head in group) with the head fastest. The warps of a block
// share the keys and values of a step, which lie in shared memory with rows padded by 16 bytes (no bank conflicts).
#pragma once
#include "ptx.cuh"

constexpr int KEY_CHUNK = 256, KEY_STEP = 64;
constexpr int ATTENTION_KV_TOKENS = 16;  // tokens of one KV block
constexpr float LOG2_E = 1.4426950408889634f;

// Values wider than 128 are shared by two warps, each with all scores and half of the values: registers.
template <int HD_, int ROWS_>
struct AttentionTile {
  static constexpr int HD = HD_, ROWS = ROWS_;
  static constexpr int VD = HD > 128 ? HD / 2 : HD;
  static constexpr int PARTS = HD / VD;
  static constexpr int THREADS = ROWS / 16 * PARTS * 32;
  static constexpr int ROW_BYTES = HD * 2 + 16;
  static constexpr int SHARED_BYTES = (ROWS + 2 * KEY_STEP) * ROW_BYTES;
};

// m, l of rows g and g+8 (g = lane/4); o as mma leaves it. `l` is this lane's share until lanes_add.
template <int VD>
struct Partial {
  float m[2], l[2], o[VD / 8][4];
};

template <int VD>
TP_DEVICE void partial_clear(Partial<VD>& p) {
  p.m[0] = p.m[1] = -TP_INFINITY;
  p.l[0] = p.l[1] = 0.0f;
#pragma unroll
  for (int d = 0; d < VD / 8; d++) p.o[d][0] = p.o[d][1] = p.o[d][2] = p.o[d][3] = 0.0f;
}

// What a row does with a new maximum: the factors of what it holds and of what comes.
struct Rescale {
  float m, old_by, new_by;
};
TP_DEVICE Rescale rescale(float m_old, float m_new) {
  Rescale r;
  r.m = fmaxf(m_old, m_new);
  const float base = r.m == -TP_INFINITY ? 0.0f : r.m;
  r.old_by = exp2_approx(m_old - base);
  r.new_by = exp2_approx(m_new - base);
  return r;
}
TP_DEVICE float merge(float old_sum, float new_sum, const Rescale& r) { return fmaf(new_sum, r.new_by, old_sum * r.old_by); }

// The four lanes of a row add their shares of l, in one order.
template <int VD>
TP_DEVICE void lanes_add(Partial<VD>& p) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    p.l[h] += __shfl_xor_sync(0xffffffffu, p.l[h], 1);
    p.l[h] += __shfl_xor_sync(0xffffffffu, p.l[h], 2);
  }
}

template <int VD>
TP_DEVICE void partial_merge(Partial<VD>& all, const Partial<VD>& chunk) {
  Rescale r[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    r[h] = rescale(all.m[h], chunk.m[h]);
    all.m[h] = r[h].m;
    all.l[h] = merge(all.l[h], chunk.l[h], r[h]);
  }
#pragma unroll
  for (int d = 0; d < VD / 8; d++)
#pragma unroll
    for (int e = 0; e < 4; e++) all.o[d][e] = merge(all.o[d][e], chunk.o[d][e], r[e >> 1]);
}

// ---- where keys and values lie: key(j), value(j) point to HD 16-bit numbers ----

struct PagedKeys {
  const u16* kv;     // this layer and kv head: block 0's keys
  const int* table;  // the sequence's blocks
  i64 block, part;   // elements from block to block, and from its keys to its values
  int head_size;
  TP_DEVICE const u16* key(int j) const {
    return kv + table[j / ATTENTION_KV_TOKENS] * block + j % ATTENTION_KV_TOKENS * head_size;
  }
  TP_DEVICE const u16* value(int j) const { return key(j) + part; }
};
struct DenseKeys {
  const u16 *k, *v;  // this window and head
  i64 stride;
  TP_DEVICE const u16* key(int j) const { return k + j * stride; }
  TP_DEVICE const u16* value(int j) const { return v + j * stride; }
};

// 64 rows from key `first`; those at `end` and after are zeros, never read: unwritten memory may hold NaN, and 0 * NaN is NaN.
template <class Tile, bool VALUES, class Keys>
TP_DEVICE void load_step(u8* shared, const Keys& keys, int first, int end) {
  constexpr int CHUNKS = Tile::HD / 8;
#pragma unroll 8
  for (int i = threadIdx.x; i < KEY_STEP * CHUNKS; i += Tile::THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const bool there = IN_BOUNDS(first + row < end);
    const int j = there ? first + row : first;
    cp_async_16(shared + row * Tile::ROW_BYTES + chunk * 16, (VALUES ? keys.value(j) : keys.key(j)) + chunk * 8, there);
  }
}

// s = scores of this warp's 16 rows with the step's 64 keys.
template <class T, class Tile>
TP_DEVICE void step_scores(u8* queries, u8* keys, float (&s)[KEY_STEP / 8][4]) {
  const int lane = threadIdx.x & 31, warp_row = (threadIdx.x >> 5) / Tile::PARTS * 16;
#pragma unroll
  for (int n = 0; n < KEY_STEP / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
  for (int d = 0; d < Tile::HD / 16; d++) {
    u32 q[4];
    ldmatrix_x4(q, queries + (warp_row + (lane & 15)) * Tile::ROW_BYTES + d * 32 + (lane >> 4) * 16);
#pragma unroll
    for (int n = 0; n < KEY_STEP / 16; n++) {
      u32 k[4];
      ldmatrix_x4(k, keys + (n * 16 + (lane & 7) + (lane >> 4) * 8) * Tile::ROW_BYTES + d * 32 + ((lane >> 3) & 1) * 16);
      mma_16816(T(), s[2 * n], q, k[0], k[1]);
      mma_16816(T(), s[2 * n + 1], q, k[2], k[3]);
    }
  }
}

// The keys that rows g and g+8 of this lane see.
struct Sight {
  int lo[2], hi[2];
};

// Masks and exponentiates the scores of the step from key `first`; `weights` are p as the a operand of mma.
template <class T, int VD>
TP_DEVICE void step_softmax(float (&s)[KEY_STEP / 8][4], const Sight& sight, int first, float scale_log2, Partial<VD>& p,
                            u32 (&weights)[KEY_STEP / 16][4]) {
  float top[2] = {-TP_INFINITY, -TP_INFINITY};
#pragma unroll
  for (int n = 0; n < KEY_STEP / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int h = e >> 1, j = first + n * 8 + (threadIdx.x & 3) * 2 + (e & 1);
      s[n][e] = IN_BOUNDS(j >= sight.lo[h]) && IN_BOUNDS(j < sight.hi[h]) ? s[n][e] * scale_log2 : -TP_INFINITY;
      top[h] = fmaxf(top[h], s[n][e]);
    }
  float base[2], by[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
    const Rescale r = rescale(p.m[h], top[h]);
    p.m[h] = r.m, by[h] = r.old_by, base[h] = r.m == -TP_INFINITY ? 0.0f : r.m;
    p.l[h] *= by[h];
  }
#pragma unroll
  for (int n = 0; n < KEY_STEP / 8; n++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 pair = round_pair(T(), exp2_approx(s[n][2 * h] - base[h]), exp2_approx(s[n][2 * h + 1] - base[h]));
      p.l[h] += widen(T(), (u16)pair) + widen(T(), (u16)(pair >> 16));
      weights[n / 2][(n & 1) * 2 + h] = pair;
    }
#pragma unroll
  for (int d = 0; d < VD / 8; d++)
#pragma unroll
    for (int e = 0; e < 4; e++) p.o[d][e] *= by[e >> 1];
}

template <class T, class Tile>
TP_DEVICE void step_values(u8* values, const u32 (&weights)[KEY_STEP / 16][4], Partial<Tile::VD>& p) {
  const int lane = threadIdx.x & 31, part = (threadIdx.x >> 5) % Tile::PARTS;
  u8* from = values + (lane & 15) * Tile::ROW_BYTES + part * Tile::VD * 2 + (lane >> 4) * 16;
#pragma unroll
  for (int n = 0; n < KEY_STEP / 16; n++)
#pragma unroll
    for (int d = 0; d < Tile::VD / 16; d++) {
      u32 v[4];
      ldmatrix_x4_trans(v, from + n * 16 * Tile::ROW_BYTES + d * 32);
      mma_16816(T(), p.o[2 * d], weights[n], v[0], v[1]);
      mma_16816(T(), p.o[2 * d + 1], weights[n], v[2], v[3]);
    }
}

// The block's queries into shared memory: `query(row)` gives row 0 <= row < ROWS of the tile, or null.
template <class Tile, class Query>
TP_DEVICE void load_queries(u8* shared, const Query& query) {
  constexpr int CHUNKS = Tile::HD / 8;
  for (int i = threadIdx.x; i < Tile::ROWS * CHUNKS; i += Tile::THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const u16* from = query(row);
    cp_async_16(shared + row * Tile::ROW_BYTES + chunk * 16, from ? from + chunk * 8 : from, from != nullptr);
  }
}

// Keys lo <= j < hi, all that some row of the block sees, chunk by chunk into `all`. `end`: keys that exist.
// The queries' copies are in flight when this is called. A step's values load behind its scores, the next step's keys behind its values.
template <class T, class Tile, class Keys>
TP_DEVICE void attend(u8* shared, const Keys& keys, int lo, int hi, int end, const Sight& sight, float scale_log2,
                      Partial<Tile::VD>& all) {
  u8 *key_tile = shared + Tile::ROWS * Tile::ROW_BYTES, *value_tile = key_tile + KEY_STEP * Tile::ROW_BYTES;
  Partial<Tile::VD> chunk;
  partial_clear(all);
  partial_clear(chunk);
  int first = lo / KEY_STEP * KEY_STEP;
  load_step<Tile, false>(key_tile, keys, first, end);
  cp_async_commit();
  for (; first < hi; first += KEY_STEP) {
    CP_ASYNC_WAIT(0);  // keys are here
    __syncthreads();   // for all; and all have left the last step's values
    load_step<Tile, true>(value_tile, keys, first, end);
    cp_async_commit();
    float s[KEY_STEP / 8][4];
    u32 weights[KEY_STEP / 16][4];
    step_scores<T, Tile>(shared, key_tile, s);
    step_softmax<T>(s, sight, first, scale_log2, chunk, weights);
    CP_ASYNC_WAIT(0);  // values are here
    __syncthreads();   // for all; and all have left this step's keys
    if (first + KEY_STEP < hi) load_step<Tile, false>(key_tile, keys, first + KEY_STEP, end);
    cp_async_commit();
    step_values<T, Tile>(value_tile, weights, chunk);
    if ((first + KEY_STEP) % KEY_CHUNK == 0 || first + KEY_STEP >= hi) {
      lanes_add(chunk);
      partial_merge(all, chunk);
      partial_clear(chunk);
    }
  }
}

// O / L of this lane's rows; `out(row)` gives the row's HD outputs, or null.
template <class T, class Tile, class Out>
TP_DEVICE void store_rows(const Partial<Tile::VD>& p, const Out& out) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u16* to = out(warp / Tile::PARTS * 16 + (lane >> 2) + h * 8);
    if (!to) continue;
    const float by = 1.0f / p.l[h];
    to += warp % Tile::PARTS * Tile::VD + (lane & 3) * 2;
#pragma unroll
    for (int d = 0; d < Tile::VD / 8; d++)
      *(u32*)(to + d * 8) = round_pair(T(), p.o[d][2 * h] * by, p.o[d][2 * h + 1] * by);
  }
}
