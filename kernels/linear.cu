// linear: out[r][n] (+)= sum_k a[r][k] * w[n][k] + bias[n], for up to three (w, bias, out) of the same a in one launch
//
//   a     [rows][k]   16 bit, row stride lda elements
//   w     [n][k]      16 bit, row stride ldw               bias  [n] 16 bit or null
//   out   [rows][n]   float32, row stride ldo              n = 0 where there are fewer than three
//   moves n*k*2 bytes of weights + (k*2 + n*4) per row, n summed over the matrices; 2*n*k operations per row
//   bound: device memory below ~300 rows (weights are read once), tensor cores above
//
// One definition of a product for any number of rows. Every output is one chain of mma.sync m16n8k16 over K in steps of 16
// from 0 to K rounded up to 64 (the tail multiplies zeros), starting at zero; then the bias is added, then the old
// value of `out`. There is no split over K. The tiles below differ in how many outputs share a load, never in that chain, so
// a row's result is the same bits alone or among 4096, in every tile, and whichever matrices share the launch. (wgmma sums K in
// another order inside the instruction; a variant with it would be another definition, so there is none.)
//
// Few rows are bound by memory only where enough blocks have weights in flight: about a microsecond's worth, 3.4 MB at 3.35 TB/s.
// A block of t8 or t16 has 28 to 36 KB of them. Keys or values of a 7B layer alone (512 x 3584) are 16 blocks of 32, 0.6 MB; one launch
// for queries, keys and values is 144 blocks, 5 MB, and one for gate and up (2 x 18944) leaves one uneven end instead of two. For 17
// to 32 rows a block of t32 is 64 wide: with n = 3584 there are 56, 2.8 MB on 56 multiprocessors; t32n, 32 wide, has 112 and 4.1 MB, but
// fetches the rows once for 32 weights instead of 64, twice the weights' bytes against one and a half. So it is for launches that
// would leave multiprocessors without a block. (All by arithmetic: nothing of it was measured on a GPU.)
//
// The weights are the 16-row operand and the activation rows the 8-column one: a single row wastes 7/8 of one
// small operand instead of 15/16 of the large one.
//
// Tiles stream through a ring of shared-memory stages, K 64 deep, filled by 16-byte cp.async and read by ldmatrix. Rows are 128
// bytes; the 16-byte chunk c of row r lies at chunk c ^ (r % 8), so neither side meets a bank conflict.
//
// lda, every ldw and k must be multiples of 8 and the bases 16-byte aligned; linear_any takes anything (it stages
// through registers, about a tenth of the rate).
//
// Launch: grid (ceil(n0/BN) + ceil(n1/BN) + ceil(n2/BN)) * ceil(rows/BR) in x, block and shared bytes per tile as the table at the
// end says. The first matrix's blocks come first, then the second's.
#include "ptx.cuh"
#include "common.cuh"

constexpr int LINEAR_BK = 64;        // halves of K per stage: 128 bytes a row
constexpr int LINEAR_ADD = 1;        // flags: add to what `out` holds
constexpr int LINEAR_GROUP_ROWS = 8;  // row tiles that share a sweep over n, so that both operands stay in L2

template <int BN_, int BR_, int WN_, int WR_, int STAGES_, bool ALIGNED_>
struct LinearTile {
  static constexpr int BN = BN_, BR = BR_;          // outputs of one block: BN weight rows x BR activation rows
  static constexpr int WN = WN_, WR = WR_;          // warps along each
  static constexpr int STAGES = STAGES_;
  static constexpr bool ALIGNED = ALIGNED_;
  static constexpr int THREADS = 32 * WN * WR;
  static constexpr int MI = BN / WN / 16, NI = BR / WR / 8;  // mma tiles of one warp
  static constexpr bool PRELOAD = MI == 1;                        // few fragments: a stage's are all held at once
  static constexpr int DEPTH = PRELOAD ? LINEAR_BK / 16 : 2;      // steps whose fragments are held
  static constexpr int STAGE_BYTES = (BN + BR) * LINEAR_BK * 2;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
};

struct LinearMatrix {
  const u16 *w, *bias;
  float* out;
  i64 ldw, ldo;
  int n;
};

// What one block works on, and which of its matrix's blocks it is.
struct LinearArgs {
  const u16* a;
  LinearMatrix m;
  i64 lda;
  int rows, k, flags, block;
};

TP_DEVICE u8* linear_chunk(u8* tile, int row, int chunk) { return tile + row * 128 + ((chunk ^ (row & 7)) << 4); }

// Copies `tile_rows` x 64 of `src` from (row0, k0) into a stage; what lies outside is zero.
template <class Tile, int TILE_ROWS>
TP_DEVICE void linear_load(u8* tile, const u16* src, i64 ld, int row0, int rows, int k0, int k) {
  const int chunk = threadIdx.x & 7, col = k0 + chunk * 8;
#pragma unroll
  for (int row = threadIdx.x >> 3; row < TILE_ROWS; row += Tile::THREADS / 8) {
    u8* to = linear_chunk(tile, row, chunk);
    const u16* from = src + (row0 + row) * ld + col;
    if (Tile::ALIGNED) {
      cp_async_16(to, from, IN_BOUNDS(row0 + row < rows) && IN_BOUNDS(col < k));
    } else {
      u16* half = (u16*)to;
      for (int i = 0; i < 8; i++) half[i] = IN_BOUNDS(row0 + row < rows) && IN_BOUNDS(col + i < k) ? from[i] : (u16)0;
    }
  }
}

template <class Tile>
TP_DEVICE void linear_stage(u8* stage, const LinearArgs& p, int n0, int r0, int k0) {
  linear_load<Tile, Tile::BN>(stage, p.m.w, p.m.ldw, n0, p.m.n, k0, p.k);
  linear_load<Tile, Tile::BR>(stage + Tile::BN * 128, p.a, p.lda, r0, p.rows, k0, p.k);
}

template <class Tile>
struct LinearFragments {
  u32 w[Tile::DEPTH][Tile::MI][4], a[Tile::DEPTH][Tile::NI][2];
};

// The fragments of one step of 16 in K.
template <class Tile>
TP_DEVICE void linear_fragments(u8* stage, int step, u32 (&w)[Tile::MI][4], u32 (&a)[Tile::NI][2]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int wn = (warp % Tile::WN) * Tile::MI * 16, wr = (warp / Tile::WN) * Tile::NI * 8;
#pragma unroll
  for (int i = 0; i < Tile::MI; i++) ldmatrix_x4(w[i], linear_chunk(stage, wn + i * 16 + (lane & 15), step * 2 + (lane >> 4)));
  u8* rows = stage + Tile::BN * 128;
  if (Tile::NI == 1) {
    ldmatrix_x2(a[0], linear_chunk(rows, wr + (lane & 7), step * 2 + ((lane >> 3) & 1)));
  } else {
#pragma unroll
    for (int j = 0; j + 1 < Tile::NI; j += 2) {
      u32 both[4];
      ldmatrix_x4(both, linear_chunk(rows, wr + j * 8 + (lane & 7) + (lane >> 4) * 8, step * 2 + ((lane >> 3) & 1)));
      a[j][0] = both[0], a[j][1] = both[1], a[j + 1][0] = both[2], a[j + 1][1] = both[3];
    }
  }
}

// All of a stage's fragments where they are few, else the first step's. Where they are few the next copies are issued behind this, so
// that a warp with one chain of mma finds its operands in registers and never waits between stages; a large tile has other warps
// to hide behind and no registers to spare.
template <class Tile>
TP_DEVICE void linear_first_fragments(u8* stage, LinearFragments<Tile>& f) {
#pragma unroll
  for (int step = 0; step < (Tile::PRELOAD ? Tile::DEPTH : 1); step++)
    linear_fragments<Tile>(stage, step, f.w[step], f.a[step]);
}

template <class T, class Tile>
TP_DEVICE void linear_multiply(u8* stage, LinearFragments<Tile>& f, float (&acc)[Tile::MI][Tile::NI][4]) {
  constexpr int STEPS = LINEAR_BK / 16;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int now = step % Tile::DEPTH, next = (step + 1) % Tile::DEPTH;
    if (Tile::DEPTH < STEPS && step + 1 < STEPS) linear_fragments<Tile>(stage, step + 1, f.w[next], f.a[next]);
#pragma unroll
    for (int i = 0; i < Tile::MI; i++)
#pragma unroll
      for (int j = 0; j < Tile::NI; j++) mma_16816(T(), acc[i][j], f.w[now][i], f.a[now][j][0], f.a[now][j][1]);
  }
}

template <class T, class Tile>
TP_DEVICE void linear_store(const LinearArgs& p, int n0, int r0, float (&acc)[Tile::MI][Tile::NI][4]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int n_base = n0 + (warp % Tile::WN) * Tile::MI * 16 + (lane >> 2);
  const int r_base = r0 + (warp / Tile::WN) * Tile::NI * 8 + (lane & 3) * 2;
#pragma unroll
  for (int i = 0; i < Tile::MI; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int n = n_base + i * 16 + half * 8;
      if (!IN_BOUNDS(n < p.m.n)) continue;
      const float bias = p.m.bias ? widen(T(), p.m.bias[n]) : 0.0f;
#pragma unroll
      for (int j = 0; j < Tile::NI; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int r = r_base + j * 8 + e;
          if (!IN_BOUNDS(r < p.rows)) continue;
          float* out = p.m.out + r * p.m.ldo + n;
          float x = acc[i][j][half * 2 + e];
          if (p.m.bias) x += bias;
          *out = (p.flags & LINEAR_ADD) ? *out + x : x;
        }
      }
    }
  }
}

// Gives the block its matrix: as many blocks as the first has tiles work on it, those behind them on the second, then on the third.
template <class Tile>
TP_DEVICE void linear_choose(LinearArgs& p, const LinearMatrix& second, const LinearMatrix& third) {
  const int tiles_r = (p.rows + Tile::BR - 1) / Tile::BR;
  const int of_first = (p.m.n + Tile::BN - 1) / Tile::BN * tiles_r, of_second = (second.n + Tile::BN - 1) / Tile::BN * tiles_r;
  if (IN_BOUNDS(p.block < of_first)) return;
  p.block -= of_first;
  p.m = second;
  if (IN_BOUNDS(p.block < of_second)) return;
  p.block -= of_second;
  p.m = third;
}

// Which tile this block computes: groups of 8 row tiles sweep n together.
template <class Tile>
TP_DEVICE void linear_place(const LinearArgs& p, int& n0, int& r0) {
  const int tiles_n = (p.m.n + Tile::BN - 1) / Tile::BN, tiles_r = (p.rows + Tile::BR - 1) / Tile::BR;
  const int group = p.block / (LINEAR_GROUP_ROWS * tiles_n), first = group * LINEAR_GROUP_ROWS;
  const int in_group = min_int(tiles_r - first, LINEAR_GROUP_ROWS), i = p.block - first * tiles_n;
  r0 = (first + i % in_group) * Tile::BR;
  n0 = i / in_group * Tile::BN;
}

template <class T, class Tile>
TP_DEVICE void linear_block(const LinearArgs& p) {
  TP_SHARED(shared);
  int n0, r0;
  linear_place<Tile>(p, n0, r0);
  const int tiles_k = (p.k + LINEAR_BK - 1) / LINEAR_BK;
  for (int s = 0; s < Tile::STAGES - 1; s++) {
    if (s < tiles_k) linear_stage<Tile>(shared + s * Tile::STAGE_BYTES, p, n0, r0, s * LINEAR_BK);
    cp_async_commit();
  }
  float acc[Tile::MI][Tile::NI][4];
#pragma unroll
  for (int i = 0; i < Tile::MI; i++)
#pragma unroll
    for (int j = 0; j < Tile::NI; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;

  int use = 0, fill = Tile::STAGES - 1;
  for (int t = 0; t < tiles_k; t++) {
    CP_ASYNC_WAIT(Tile::STAGES - 2);  // the oldest stage has landed for this thread ...
    __syncthreads();                  // ... for all, and all have left the stage that is filled next
    u8* stage = shared + use * Tile::STAGE_BYTES;
    LinearFragments<Tile> fragments;
    if (Tile::PRELOAD) linear_first_fragments<Tile>(stage, fragments);
    const int ahead = t + Tile::STAGES - 1;
    if (ahead < tiles_k) linear_stage<Tile>(shared + fill * Tile::STAGE_BYTES, p, n0, r0, ahead * LINEAR_BK);
    cp_async_commit();
    if (!Tile::PRELOAD) linear_first_fragments<Tile>(stage, fragments);
    linear_multiply<T, Tile>(stage, fragments, acc);
    use = use + 1 == Tile::STAGES ? 0 : use + 1;
    fill = fill + 1 == Tile::STAGES ? 0 : fill + 1;
  }
  linear_store<T, Tile>(p, n0, r0, acc);
}

//                        BN   BR  warps  stages             use up to so many rows
using LinearT8 = LinearTile<32, 8, 2, 1, 10, true>;       //    8
using LinearT16 = LinearTile<32, 16, 2, 1, 8, true>;      //   16
using LinearT32 = LinearTile<64, 32, 4, 1, 7, true>;      //   32
using LinearT32N = LinearTile<32, 32, 2, 2, 10, true>;    //   32, where t32 has fewer blocks than there are multiprocessors
using LinearT64 = LinearTile<64, 64, 2, 2, 6, true>;      //   64
using LinearT128 = LinearTile<128, 128, 2, 4, 3, true>;   //   any
using LinearT256 = LinearTile<256, 128, 4, 2, 3, true>;   //   many, 144 KiB of shared memory
using LinearAny = LinearTile<64, 32, 4, 1, 2, false>;     //   any alignment

#define TP_LINEAR(name, Tile, blocks)                                                                                         \
  extern "C" __global__ void __launch_bounds__(Tile::THREADS, blocks)                                                         \
      TP_KERNEL(name)(const u16* a, const u16* w0, const u16* bias0, float* out0, const u16* w1, const u16* bias1, float* out1, \
                      const u16* w2, const u16* bias2, float* out2, i64 lda, i64 ldw0, i64 ldw1, i64 ldw2, i64 ldo0, i64 ldo1,  \
                      i64 ldo2, int rows, int n0, int n1, int n2, int k, int flags) {                                           \
    LinearArgs p = {a, {w0, bias0, out0, ldw0, ldo0, n0}, lda, rows, k, flags, (int)blockIdx.x};                                \
    linear_choose<Tile>(p, {w1, bias1, out1, ldw1, ldo1, n1}, {w2, bias2, out2, ldw2, ldo2, n2});                               \
    linear_block<TP_HALF, Tile>(p);                                                                                           \
  }

TP_LINEAR(linear_t8, LinearT8, 4)
TP_LINEAR(linear_t16, LinearT16, 4)
TP_LINEAR(linear_t32, LinearT32, 2)
TP_LINEAR(linear_t32n, LinearT32N, 2)
TP_LINEAR(linear_t64, LinearT64, 2)
TP_LINEAR(linear_t128, LinearT128, 2)
TP_LINEAR(linear_t256, LinearT256, 1)
TP_LINEAR(linear_any, LinearAny, 2)
