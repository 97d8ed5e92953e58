// What the tests share: exact buffers full of NaN, seeded values, launches under every landing of cp.async, comparisons.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "engine.h"
#include "kernels.h"

// Device memory: exactly `count` elements, 256-byte aligned, all bits set: NaN in every float type, -1 as an index.
template <class V>
struct Buffer {
  V* p = nullptr;
  size_t count;
  explicit Buffer(size_t n) : count(n) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, n * sizeof(V) + (n == 0))) abort();
    p = (V*)memory;
    poison();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(p); }
  void poison() { memset((void*)p, 0xFF, count * sizeof(V)); }
  V& operator[](size_t i) { return p[i]; }
  const V& operator[](size_t i) const { return p[i]; }
};

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 99) {}
  uint64_t next() {
    state += 0x9E3779B97F4A7C15ull;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
  }
  int below(int n) { return (int)(next() % (uint64_t)n); }
  float uniform() { return (float)(next() >> 40) / 8388608.0f - 1.0f; }  // [-1, 1)
  void fill(Buffer<float>& b, float scale) {
    for (size_t i = 0; i < b.count; i++) b[i] = uniform() * scale;
  }
  void fill(Buffer<u16>& b, const Kernels& k, float scale) {
    for (size_t i = 0; i < b.count; i++) b[i] = k.to_half(uniform() * scale);
  }
};

struct Context {
  const Kernels& k;
  bool quick;     // fewer shapes: the mutation run
  uint64_t seed;  // of values and of the order of threads
  emu::Options options(emu::Landing landing) const { return {seed, landing}; }
};

inline const emu::Landing LANDINGS[] = {emu::Landing::Late, emu::Landing::Early, emu::Landing::Drawn};

// The first thing wrong ends the run: what comes after it would only repeat it.
[[noreturn]] inline void wrong(const char* test, const char* what, size_t at, double got, double want) {
  fprintf(stderr, "FAIL %s: %s at %zu: got %.9g, want %.9g\n", test, what, at, got, want);
  _Exit(1);
}
inline void near(const char* test, const char* what, size_t at, double got, double want, double tolerance) {
  if (!(std::fabs(got - want) <= tolerance)) wrong(test, what, at, got, want);
}
template <class V>
void same_bits(const char* test, const char* what, const V* got, const V* want, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (memcmp(&got[i], &want[i], sizeof(V))) wrong(test, what, i, (double)got[i], (double)want[i]);
}

inline unsigned ceil_div(i64 a, i64 b) { return (unsigned)((a + b - 1) / b); }

void test_linear(const Context&);
void test_attention_paged(const Context&);
void test_attention_dense(const Context&);
void test_norms(const Context&);
void test_rope(const Context&);
void test_elementwise(const Context&);
void test_select(const Context&);
