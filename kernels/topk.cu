// topk: the k best of each row, best first, in argmax's order (equal values by the lower id, NaN last)
//
//   x [rows][cols] float32, row stride in elements; 1 <= k <= 64
//   ids [rows][k] u32, values [rows][k] float32; past cols: id 0xffffffff, value -inf
//   moves 4 bytes an element from device memory, then the row again from L2 per pass (2 to 9, for typical logits 5)
//   bound: latency of one block a row
//
// Radix select over the 64-bit keys, 8 bits a pass from the top: count the digits of the keys that share the
// prefix, keep the digit in which the k-th best lies, stop when everything in it is wanted. Integer counts only, so
// the order of the threads does not show. Lanes with the same digit add once (logits share their exponents).
//
// Launch: grid rows, block 1024, shared 1552 bytes.
#include "select.cuh"
#include "common.cuh"

constexpr int TOPK_THREADS = 1024;
constexpr int TOPK_MAX = 64;

struct TopkShared {
  u64 keys[TOPK_MAX];
  u32 counts[256];
  u32 digit, need, found, in_digit;
};
[[maybe_unused]] constexpr int TOPK_SHARED_BYTES = sizeof(TopkShared);

// counts[d] = keys of the row with this prefix and next digit d.
TP_DEVICE void topk_count(const float* row, int cols, u64 prefix, int shift, u32* counts) {
  const int lane = threadIdx.x & 31;
  for (int base = threadIdx.x - lane; base < cols; base += TOPK_THREADS) {
    const int c = base + lane;
    u32 digit = 256;
    if (IN_BOUNDS(c < cols)) {
      const u64 key = select_key(row[c], (u32)c);
      if (shift == 56 || key >> (shift + 8) == prefix) digit = (u32)(key >> shift) & 255;
    }
    const u32 same = __match_any_sync(0xffffffffu, digit);
    if (digit < 256 && __ffs(same) - 1 == lane) atomicAdd(&counts[digit], (u32)__popc(same));
  }
}

// One warp: the digit d for which the counts above d are fewer than `need` and with d's reach it.
TP_DEVICE void topk_digit(TopkShared* s) {
  const int lane = threadIdx.x & 31, top = 255 - lane * 8;  // this lane's digits: top, top-1, ..., top-7
  u32 own = 0;
  for (int i = 0; i < 8; i++) own += s->counts[top - i];
  u32 above = 0;
  for (int from = 0; from < 31; from++) {
    const u32 other = __shfl_sync(0xffffffffu, own, from);
    if (from < lane) above += other;
  }
  const u32 need = s->need;
  __syncwarp();  // all have read `need` before one lane writes it
  if (above >= need || above + own < need) return;
  for (int i = 0; i < 8; i++) {
    const u32 count = s->counts[top - i];
    if (above + count >= need) {
      s->digit = (u32)(top - i), s->need = need - above, s->in_digit = count;
      return;
    }
    above += count;
  }
}

// The smallest key that is wanted.
TP_DEVICE u64 topk_threshold(const float* row, int cols, TopkShared* s) {
  u64 prefix = 0;
  for (int shift = 56;; shift -= 8) {
    if (threadIdx.x < 256) s->counts[threadIdx.x] = 0;
    __syncthreads();
    topk_count(row, cols, prefix, shift, s->counts);
    __syncthreads();
    if (threadIdx.x < 32) topk_digit(s);
    __syncthreads();
    prefix = prefix << 8 | s->digit;
    if (shift == 0 || s->in_digit == s->need) return prefix << shift;
  }
}

extern "C" __global__ void __launch_bounds__(TOPK_THREADS)
    TP_KERNEL(topk)(const float* x, u32* ids, float* values, i64 stride, int cols, int k) {
  TP_SHARED(shared);
  TopkShared* s = (TopkShared*)shared;
  const float* row = x + blockIdx.x * stride;
  const int wanted = min_int(k, cols);
  if (threadIdx.x == 0) s->need = (u32)wanted, s->found = 0;
  const u64 threshold = topk_threshold(row, cols, s);
  for (int c = threadIdx.x; IN_BOUNDS(c < cols); c += TOPK_THREADS) {
    const u64 key = select_key(row[c], (u32)c);
    if (key >= threshold) s->keys[atomicAdd(&s->found, 1u)] = key;
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (!IN_BOUNDS(i < k)) return;
  const i64 out = (i64)blockIdx.x * k;
  if (!IN_BOUNDS(i < wanted)) {
    ids[out + i] = 0xffffffffu, values[out + i] = -TP_INFINITY;
    return;
  }
  int rank = 0;
  for (int other = 0; other < wanted; other++) rank += s->keys[other] > s->keys[i];
  ids[out + rank] = select_id(s->keys[i]);
  values[out + rank] = row[select_id(s->keys[i])];
}
