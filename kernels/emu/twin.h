// The C++ twin of ptx.cuh: each instruction with its scalar meaning, for the emulation. Included by ptx.cuh only.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define TP_DEVICE inline
#define TP_SHARED(name) u8* name = emu::shared_memory
#define EMU_SITE(kind)                               \
  ([]() -> emu::Site& {                              \
    static emu::Site site(kind, __FILE__, __LINE__); \
    site.met = true;                                 \
    return site;                                     \
  }())
#define IN_BOUNDS(condition) (EMU_SITE("bound " #condition).off || (condition))
#define CP_ASYNC_WAIT(groups) emu::cp_async_wait(groups, EMU_SITE("wait"))
#define __syncthreads() emu::block_barrier(EMU_SITE("barrier"))
#define threadIdx (emu::current->tid)
#define blockIdx emu::block_idx
#define blockDim emu::block_dim
#define gridDim emu::grid_dim

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) ushort4 {
  u16 x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
TP_DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
TP_DEVICE uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

TP_DEVICE u32 __float_as_uint(float x) {
  u32 u;
  memcpy(&u, &x, 4);
  return u;
}
TP_DEVICE float __uint_as_float(u32 u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// ---- 16-bit values ----

TP_DEVICE u16 round_half(Bf16, float x) {
  u32 u = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (u16)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
TP_DEVICE u16 round_half(F16, float x) {
  _Float16 h = (_Float16)x;
  u16 u;
  memcpy(&u, &h, 2);
  return x != x ? (u16)0x7fff : u;
}
TP_DEVICE float widen(Bf16, u16 h) { return __uint_as_float((u32)h << 16); }
// A table: the compiler's own conversion is a library call.
struct F16Table {
  float values[65536];
  F16Table() {
    for (int i = 0; i < 65536; i++) {
      const u16 bits = (u16)i;
      _Float16 f;
      memcpy(&f, &bits, 2);
      values[i] = (float)f;
    }
  }
};
inline const F16Table f16_table;
TP_DEVICE float widen(F16, u16 h) { return f16_table.values[h]; }
template <class T>
static inline u32 round_pair(T, float lo, float hi) {
  return round_half(T(), lo) | (u32)round_half(T(), hi) << 16;
}

TP_DEVICE float exp2_approx(float x) { return exp2f(x); }

// ---- warp-wide instructions ----

namespace emu {
enum Op { SYNC, SHFL, MATCH, ANY, LDMATRIX, LDMATRIX_TRANS, MMA };

struct ShflSlot {
  u64 value, result;
  int from;
};
struct MatchSlot {
  u64 value;
  u32 result;
};
struct MatrixSlot {
  const void* row;
  u32* out;
  int count;
};
template <class T>
struct MmaSlot {
  const u32* a;
  u32 b[2];
  float* d;
};

inline void execute_shfl(void** slots, uint32_t mask) {
  for (int l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    ShflSlot* s = (ShflSlot*)slots[l];
    const bool there = s->from < 32 && (mask >> s->from & 1);
    s->result = there ? ((ShflSlot*)slots[s->from])->value : s->value;
  }
}
template <class V>
static inline V shfl(uint32_t mask, V value, int from) {
  ShflSlot s = {0, 0, from};
  memcpy(&s.value, &value, sizeof(V));
  collective(SHFL, mask, &s, execute_shfl);
  memcpy(&value, &s.result, sizeof(V));
  return value;
}
inline void execute_match(void** slots, uint32_t mask) {
  for (int l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    MatchSlot* s = (MatchSlot*)slots[l];
    s->result = 0;
    for (int o = 0; o < 32; o++)
      if ((mask >> o & 1) && ((MatchSlot*)slots[o])->value == s->value) s->result |= 1u << o;
  }
}
inline void execute_nothing(void**, uint32_t) {}

inline void execute_ldmatrix(void** slots, bool trans) {
  const int count = ((MatrixSlot*)slots[0])->count;
  for (int m = 0; m < count; m++) {
    u16 matrix[8][8];
    unsigned banks = 0;
    for (int i = 0; i < 8; i++) {
      const void* row = ((MatrixSlot*)slots[m * 8 + i])->row;
      if ((uintptr_t)row % 16 || !in_shared(row, 16)) fail("ldmatrix from an address that is not 16 aligned bytes of shared memory");
      const unsigned bank = 1u << ((uintptr_t)row / 16 % 8);
      if (banks & bank) bank_conflicts++;
      banks |= bank;
      memcpy(matrix[i], row, 16);
    }
    for (int l = 0; l < 32; l++) {
      const int r = l / 4, c = l % 4 * 2;
      const u16 lo = trans ? matrix[c][r] : matrix[r][c], hi = trans ? matrix[c + 1][r] : matrix[r][c + 1];
      ((MatrixSlot*)slots[l])->out[m] = lo | (u32)hi << 16;
    }
  }
}

// Tensor cores do not round: they align the products and the old sum to the largest of them, cut off what lies below, add, and cut the sum
// to float32's 24 bits, towards zero (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021: sm_80 takes eight products at a
// time and keeps one bit more than float32 has; later cards keep more and take sixteen, so this is the worst that the kernels meet).
inline float truncated_sum(float old, const float* a, const float* b, int b_stride) {
  double terms[9] = {old};
  double largest = 0, check = 0;
  for (int k = 0; k < 8; k++) terms[k + 1] = (double)a[k] * b[k * b_stride];  // exact
  for (const double t : terms) largest = std::max(largest, std::fabs(t)), check += t;
  if (largest == 0 || !std::isfinite(check)) return (float)check;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double sum = 0;  // of whole units, few enough to be exact
  for (const double t : terms) sum += std::trunc(t / unit);
  sum *= unit;
  const float nearest = (float)sum;
  return std::fabs((double)nearest) > std::fabs(sum) ? std::nextafterf(nearest, 0) : nearest;
}

// Every output is one chain of additions over k, in ascending order.
template <class T>
__attribute__((no_sanitize("address"), optimize("O3"))) void execute_mma(void** slots, uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; l++) {
    const MmaSlot<T>* s = (const MmaSlot<T>*)slots[l];
    const int g = l / 4, t = l % 4;
    for (int h = 0; h < 2; h++) {
      a[g][2 * t + h] = widen(T(), (u16)(s->a[0] >> 16 * h));
      a[g + 8][2 * t + h] = widen(T(), (u16)(s->a[1] >> 16 * h));
      a[g][2 * t + 8 + h] = widen(T(), (u16)(s->a[2] >> 16 * h));
      a[g + 8][2 * t + 8 + h] = widen(T(), (u16)(s->a[3] >> 16 * h));
      b[2 * t + h][g] = widen(T(), (u16)(s->b[0] >> 16 * h));
      b[2 * t + 8 + h][g] = widen(T(), (u16)(s->b[1] >> 16 * h));
    }
    for (int e = 0; e < 4; e++) d[g + e / 2 * 8][2 * t + e % 2] = s->d[e];
  }
  if (mma_sums == MmaSums::Truncated) {
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 8; j++)
        for (int k = 0; k < 16; k += 8) d[i][j] = truncated_sum(d[i][j], &a[i][k], &b[k][j], 8);
  } else {
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  }
  for (int l = 0; l < 32; l++)
    for (int e = 0; e < 4; e++) ((const MmaSlot<T>*)slots[l])->d[e] = d[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
}
}  // namespace emu

template <class V>
static inline V __shfl_xor_sync(u32 mask, V v, int lanes) {
  return emu::shfl(mask, v, emu::current->lane ^ lanes);
}
template <class V>
static inline V __shfl_down_sync(u32 mask, V v, int lanes) {
  return emu::shfl(mask, v, emu::current->lane + lanes);
}
template <class V>
static inline V __shfl_sync(u32 mask, V v, int lane) {
  return emu::shfl(mask, v, lane & 31);
}
TP_DEVICE u32 __match_any_sync(u32 mask, u32 v) {
  emu::MatchSlot s = {v, 0};
  emu::collective(emu::MATCH, mask, &s, emu::execute_match);
  return s.result;
}
namespace emu {
inline void warp_barrier(Site& site) {
  if (!site.off) collective(SYNC, ~0u, nullptr, execute_nothing);
}
}  // namespace emu
#define __syncwarp() emu::warp_barrier(EMU_SITE("warp barrier"))
template <class V>
static inline V atomicAdd(V* p, V v) {
  V old = *p;
  *p = old + v;
  return old;
}
TP_DEVICE int __popc(u32 x) { return __builtin_popcount(x); }
TP_DEVICE int __ffs(u32 x) { return __builtin_ffs((int)x); }

// ---- asynchronous copies and matrix fragments ----

TP_DEVICE void cp_async_16(void* shared, const void* global, bool valid) { emu::cp_async(shared, global, valid); }
TP_DEVICE void cp_async_commit() { emu::cp_async_commit(); }

TP_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  emu::MatrixSlot s = {row, r, 4};
  emu::collective(emu::LDMATRIX, ~0u, &s, [](void** slots, uint32_t) { emu::execute_ldmatrix(slots, false); });
}
TP_DEVICE void ldmatrix_x2(u32 (&r)[2], const void* row) {
  emu::MatrixSlot s = {row, r, 2};
  emu::collective(emu::LDMATRIX, ~0u, &s, [](void** slots, uint32_t) { emu::execute_ldmatrix(slots, false); });
}
TP_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  emu::MatrixSlot s = {row, r, 4};
  emu::collective(emu::LDMATRIX_TRANS, ~0u, &s, [](void** slots, uint32_t) { emu::execute_ldmatrix(slots, true); });
}

template <class T>
static inline void mma_16816(T, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emu::MmaSlot<T> s = {a, {b0, b1}, d};
  emu::collective(emu::MMA, ~0u, &s, emu::execute_mma<T>);
}
