// Everything the kernels need from the machine: the 16-bit types, asynchronous copies, ldmatrix, mma and the few scalar
// instructions CUDA C++ has no name for. This is the only file with inline PTX, so that it has one twin: emu/twin.h gives
// each function the same meaning in C++ and the kernels run on a CPU under a sanitizer.
//
// Nothing of the toolkit is included: the file compiles with nvcc and with NVRTC's library alone.
// Every kernel file is compiled once per 16-bit type: bf16, or f16 with -DTP_F16; its symbols end in the type.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Bf16 {};  // tags; a value is stored as u16
struct F16 {};

#define TP_CONCAT_(a, b) a##_##b
#define TP_CONCAT(a, b) TP_CONCAT_(a, b)

#define TP_INFINITY __uint_as_float(0x7f800000u)

#ifdef TP_EMULATE
#include "emu/twin.h"
#else

#define TP_DEVICE __device__ __forceinline__
#define TP_SHARED(name) extern __shared__ __align__(128) u8 name[]
// A condition that keeps an access inside its array. The emulation can switch any one of them off, to see that a test fails.
#define IN_BOUNDS(condition) (condition)
#define CP_ASYNC_WAIT(groups) cp_async_wait<groups>()

// ---- 16-bit values ----

TP_DEVICE u16 round_half(Bf16, float x) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
TP_DEVICE u16 round_half(F16, float x) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
// Two values in one register, `lo` in the low half.
TP_DEVICE u32 round_pair(Bf16, float lo, float hi) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
TP_DEVICE u32 round_pair(F16, float lo, float hi) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
TP_DEVICE float widen(Bf16, u16 h) { return __uint_as_float((u32)h << 16); }
TP_DEVICE float widen(F16, u16 h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}

// 2^x within two units in the last place; 2^0 is exactly 1 and 2^-inf exactly 0.
TP_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- asynchronous copies, global to shared ----

TP_DEVICE u32 shared_address(const void* p) {
  u32 a;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
  return a;
}
// 16 bytes, both addresses 16-byte aligned; when `valid` is false nothing is read and zeros are written.
TP_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
TP_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `groups` of this thread's newest groups are still in flight. Others see the data after a barrier.
template <int groups>
TP_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ---- matrix fragments ----
// Lane l holds, of each 8x8 matrix of 16-bit values, row l/4, columns 2(l%4) and 2(l%4)+1 (transposed: column l/4).
// Lane l gives the address of row l%8 of matrix l/8 (x2: lanes 0..15 count).

TP_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
TP_DEVICE void ldmatrix_x2(u32 (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
TP_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16x8] += a[16x16] b[16x8], float32 accumulation. g = lane/4, t = lane%4:
//   a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..)   b: (k 2t.., column g) (k 2t+8.., column g)
//   d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
TP_DEVICE void mma_16816(Bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TP_DEVICE void mma_16816(F16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // TP_EMULATE

TP_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
TP_DEVICE int max_int(int a, int b) { return a > b ? a : b; }
