// The order in which argmax and top-k rank logits: larger first, equal ones by the lower id, NaN below everything.
#pragma once
#include "ptx.cuh"

// A key that is larger the better the pair ranks; no two ids share one. +0 and -0 are equal.
TP_DEVICE u64 select_key(float x, u32 id) {
  u32 order = 0;
  if (x == x) {
    const u32 bits = __float_as_uint(x + 0.0f);
    order = (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  }
  return (u64)order << 32 | (u32)~id;
}
TP_DEVICE u32 select_id(u64 key) { return ~(u32)key; }
