#include <algorithm>

#include "harness.h"
#include "ref.h"

namespace {

// Half a unit in the last place of a 16-bit value of this size, and float32's own error before the rounding.
double half_ulp(const Kernels& k, double x) { return std::fabs(x) * (k.half[0] == 'b' ? 0x1.01p-8 : 0x1.01p-11) + 1e-6; }

void norm_case(const Context& c, int rows, int cols, bool delta, int turn) {
  Random random(c.seed + (uint64_t)turn);
  const size_t count = (size_t)rows * cols;
  Buffer<float> x(count), before(count), d(count);
  Buffer<u16> w((size_t)cols), out(count);
  random.fill(x, 3.0f), random.fill(d, 1.0f), random.fill(w, c.k, 1.5f);
  std::copy(x.p, x.p + count, before.p);
  emu::launch({(unsigned)rows}, 256, (size_t)c.k.rmsnorm_shared, c.options(LANDINGS[0]),
              [&] { c.k.rmsnorm(x.p, delta ? d.p : nullptr, w.p, out.p, cols, 1e-5f); });
  for (int r = 0; r < rows; r++) {
    double sum = 0;
    for (int i = 0; i < cols; i++) {
      const size_t at = (size_t)r * cols + i;
      const float h = delta ? before[at] + d[at] : before[at];
      same_bits("rmsnorm", "residual", &x[at], &h, 1);
      sum += (double)h * h;
    }
    for (int i = 0; i < cols; i++) {
      const size_t at = (size_t)r * cols + i;
      const double want = x[at] / std::sqrt(sum / cols + 1e-5) * c.k.to_float(w[(size_t)i]);
      near("rmsnorm", "output", at, c.k.to_float(out[at]), want, half_ulp(c.k, want));
    }
  }
}

void norm_heads_case(const Context& c, int rows, int heads, int size, int stride) {
  Random random(c.seed + (uint64_t)size);
  Buffer<float> x((size_t)(rows - 1) * stride + heads * size), before(x.count);
  Buffer<u16> w((size_t)size);
  random.fill(x, 2.0f), random.fill(w, c.k, 1.5f);
  std::copy(x.p, x.p + x.count, before.p);
  emu::launch({(unsigned)rows, ceil_div(heads, 4)}, 128, 0, c.options(LANDINGS[0]),
              [&] { c.k.rmsnorm_heads(x.p, w.p, stride, heads, size, 1e-6f); });
  std::vector<bool> is_head(x.count, false);
  for (int r = 0; r < rows; r++)
    for (int h = 0; h < heads; h++) {
      const size_t at = (size_t)r * stride + h * size;
      double sum = 0;
      for (int d = 0; d < size; d++) sum += (double)before[at + d] * before[at + d];
      for (int d = 0; d < size; d++) {
        const double want = before[at + d] / std::sqrt(sum / size + 1e-6) * c.k.to_float(w[(size_t)d]);
        near("rmsnorm_heads", "output", at + d, x[at + d], want, std::fabs(want) * 1e-6 + 1e-9);
        is_head[at + d] = true;
      }
    }
  for (size_t i = 0; i < x.count; i++)
    if (!is_head[i]) same_bits("rmsnorm_heads", "a gap", &x[i], &before[i], 1);
}

struct Turned {
  double first, second;
};
Turned turn_pair(double x1, double x2, double c, double s) { return {x1 * c - x2 * s, x2 * c + x1 * s}; }

void rope_append_case(const Context& c, int rows, int heads, int kv_heads, int size) {
  Random random(c.seed + (uint64_t)size);
  const int half = size / 2, qs = heads * size + 4, ks = kv_heads * size, vs = kv_heads * size + 3, blocks = rows / 16 + 2;
  Buffer<float> q((size_t)(rows - 1) * qs + heads * size), k((size_t)rows * ks), v((size_t)(rows - 1) * vs + kv_heads * size);
  Buffer<float> cos((size_t)rows * half), sin((size_t)rows * half);
  Buffer<int> slots((size_t)rows);
  Buffer<u16> q_out((size_t)rows * heads * size), kv((size_t)blocks * 2 * kv_heads * 16 * size);
  random.fill(q, 2), random.fill(k, 2), random.fill(v, 2), random.fill(cos, 1), random.fill(sin, 1);
  std::vector<int> free_slots((size_t)blocks * 16);
  for (size_t i = 0; i < free_slots.size(); i++) free_slots[i] = (int)i;
  for (size_t i = free_slots.size(); i > 1; i--) std::swap(free_slots[i - 1], free_slots[(size_t)random.below((int)i)]);
  for (int r = 0; r < rows; r++) slots[(size_t)r] = r == rows / 2 ? -1 : free_slots[(size_t)r];
  emu::launch({(unsigned)rows}, 256, 0, c.options(LANDINGS[0]), [&] {
    c.k.rope_append(q.p, k.p, v.p, cos.p, sin.p, slots.p, q_out.p, kv.p, qs, ks, vs, heads, kv_heads, size);
  });
  std::vector<bool> written(kv.count, false);
  auto check = [&](u16 got, double want, size_t at) { near("rope_append", "output", at, c.k.to_float(got), want, half_ulp(c.k, want)); };
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < half; p++) {
      const double co = cos[(size_t)r * half + p], si = sin[(size_t)r * half + p];
      for (int h = 0; h < heads; h++) {
        const size_t from = (size_t)r * qs + h * size + p, to = ((size_t)r * heads + h) * size + p;
        const Turned t = turn_pair(q[from], q[from + half], co, si);
        check(q_out[to], t.first, to), check(q_out[to + half], t.second, to + half);
      }
      if (slots[(size_t)r] < 0) continue;
      for (int h = 0; h < kv_heads; h++) {
        const size_t from = (size_t)r * ks + h * size + p, part = (size_t)kv_heads * 16 * size;
        const size_t block = (size_t)slots[(size_t)r] / 16 * 2 * part, to = block + ((size_t)h * 16 + slots[(size_t)r] % 16) * size + p;
        const Turned t = turn_pair(k[from], k[from + half], co, si);
        check(kv[to], t.first, to), check(kv[to + half], t.second, to + half);
        for (int side : {0, half}) {
          check(kv[to + part + side], v[(size_t)r * vs + h * size + p + side], to);
          written[to + side] = written[to + part + side] = true;
        }
      }
    }
  for (size_t i = 0; i < kv.count; i++)
    if (!written[i] && kv[i] != 0xFFFF) wrong("rope_append", "a place of another token", i, kv[i], 0xFFFF);
}

void rope_dense_case(const Context& c, int rows, int heads, int size) {
  Random random(c.seed + (uint64_t)size);
  const int half = size / 2, n = heads * size, stride = 3 * n;
  Buffer<float> qkv((size_t)rows * stride), cos((size_t)rows * half), sin((size_t)rows * half);
  Buffer<u16> out[3] = {Buffer<u16>((size_t)rows * n), Buffer<u16>((size_t)rows * n), Buffer<u16>((size_t)rows * n)};
  random.fill(qkv, 2), random.fill(cos, 1), random.fill(sin, 1);
  emu::launch({(unsigned)rows}, 256, 0, c.options(LANDINGS[0]), [&] {
    c.k.rope_dense(qkv.p, qkv.p + n, qkv.p + 2 * n, cos.p, sin.p, out[0].p, out[1].p, out[2].p, stride, heads, size);
  });
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < heads * half; i++)
      for (int which = 0; which < 3; which++) {
        const int p = i % half, at = i / half * size + p;
        const float* x = &qkv[(size_t)r * stride + which * n + at];
        const Turned t = which == 2 ? Turned{x[0], x[half]} : turn_pair(x[0], x[half], cos[(size_t)r * half + p], sin[(size_t)r * half + p]);
        const u16* y = &out[which][(size_t)r * n + at];
        near("rope_dense", "first", (size_t)at, c.k.to_float(y[0]), t.first, half_ulp(c.k, t.first));
        near("rope_dense", "second", (size_t)at, c.k.to_float(y[half]), t.second, half_ulp(c.k, t.second));
      }
}

void swiglu_case(const Context& c, int rows, int cols) {
  Random random(c.seed + (uint64_t)cols);
  Buffer<float> both((size_t)rows * 2 * cols);
  Buffer<u16> out((size_t)rows * cols);
  random.fill(both, 6);
  emu::launch({(unsigned)rows, ceil_div(cols, 1024)}, 256, 0, c.options(LANDINGS[0]),
              [&] { c.k.swiglu(both.p, both.p + cols, out.p, 2 * cols, 2 * cols, cols); });
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < cols; i++) {
      const double want = ref::silu(both[(size_t)r * 2 * cols + i]) * both[(size_t)r * 2 * cols + cols + i];
      near("swiglu", "output", (size_t)r * cols + i, c.k.to_float(out[(size_t)r * cols + i]), want, half_ulp(c.k, want));
    }
}

void bias_case(const Context& c, int rows, int cols, int stride) {
  Random random(c.seed + (uint64_t)cols);
  Buffer<float> x((size_t)(rows - 1) * stride + cols), before(x.count);
  Buffer<u16> bias((size_t)cols);
  random.fill(x, 3), random.fill(bias, c.k, 2);
  std::copy(x.p, x.p + x.count, before.p);
  emu::launch({(unsigned)rows, ceil_div(cols, 1024)}, 256, 0, c.options(LANDINGS[0]), [&] { c.k.bias_add(x.p, bias.p, stride, cols); });
  for (size_t i = 0; i < x.count; i++) {
    const float want = i % (size_t)stride < (size_t)cols ? before[i] + c.k.to_float(bias[i % (size_t)stride]) : before[i];
    same_bits("bias_add", "output", &x[i], &want, 1);
  }
}

void flat_case(const Context& c, int count) {
  Random random(c.seed + (uint64_t)count);
  Buffer<float> x((size_t)count), y((size_t)count), wide((size_t)count);
  Buffer<u16> gelu((size_t)count), rounded((size_t)count);
  random.fill(x, 5), random.fill(y, 5);
  x[0] = 1.0e30f, y[0] = -0.0f;
  const unsigned blocks = ceil_div(count, 1024);
  const emu::Options o = c.options(LANDINGS[0]);
  emu::launch({blocks}, 256, 0, o, [&] { c.k.round(x.p, rounded.p, count); });
  emu::launch({blocks}, 256, 0, o, [&] { c.k.widen(rounded.p, wide.p, count); });
  emu::launch({blocks}, 256, 0, o, [&] { c.k.gelu(y.p, gelu.p, count); });
  for (size_t i = 0; i < (size_t)count; i++) {
    const float w = c.k.to_float(c.k.to_half(x[i]));
    same_bits("round", "output, widened", &wide[i], &w, 1);
    if (i > 0) near("round", "output", i, wide[i], x[i], half_ulp(c.k, x[i]));
    near("gelu", "output", i, c.k.to_float(gelu[i]), ref::gelu(y[i]), half_ulp(c.k, ref::gelu(y[i])));
  }
}

struct Ranked {
  float value;
  u32 id;
};
std::vector<Ranked> ranked(const float* row, int cols) {
  std::vector<Ranked> all((size_t)cols);
  for (int i = 0; i < cols; i++) all[(size_t)i] = {row[i], (u32)i};
  std::stable_sort(all.begin(), all.end(), [](const Ranked& a, const Ranked& b) {
    if (std::isnan(a.value) || std::isnan(b.value)) return !std::isnan(a.value) && std::isnan(b.value);
    return a.value > b.value;
  });
  return all;
}

enum class Values { Spread, Few, Same, Special };

void select_case(const Context& c, int rows, int cols, int k, Values kind) {
  Random random(c.seed + (uint64_t)cols + (uint64_t)k);
  const int stride = cols + 5;
  Buffer<float> x((size_t)(rows - 1) * stride + cols), best((size_t)rows), values((size_t)rows * k);
  Buffer<u32> best_id((size_t)rows), ids((size_t)rows * k);
  random.fill(x, 10);
  const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -1.0f, 1.0f};
  for (size_t i = 0; i < x.count; i++) {
    if (kind == Values::Few) x[i] = (float)random.below(5) - 2;
    if (kind == Values::Same) x[i] = -3.5f;
    if (kind == Values::Special) x[i] = special[random.below(7)];
  }
  emu::launch({(unsigned)rows}, 1024, (size_t)c.k.argmax_shared, c.options(LANDINGS[0]),
              [&] { c.k.argmax(x.p, best_id.p, best.p, stride, cols); });
  emu::launch({(unsigned)rows}, 1024, (size_t)c.k.topk_shared, c.options(LANDINGS[0]),
              [&] { c.k.topk(x.p, ids.p, values.p, stride, cols, k); });
  for (int r = 0; r < rows; r++) {
    const std::vector<Ranked> want = ranked(&x[(size_t)r * stride], cols);
    if (best_id[(size_t)r] != want[0].id) wrong("argmax", "id", (size_t)r, best_id[(size_t)r], want[0].id);
    same_bits("argmax", "value", &best[(size_t)r], &want[0].value, 1);
    for (int i = 0; i < k; i++) {
      const Ranked w = i < cols ? want[(size_t)i] : Ranked{-INFINITY, 0xffffffffu};
      const size_t at = (size_t)r * k + i;
      if (ids[at] != w.id) wrong("topk", "id", at, ids[at], w.id);
      same_bits("topk", "value", &values[at], &w.value, 1);
    }
  }
}

}  // namespace

void test_norms(const Context& c) {
  int turn = 0;
  for (int cols : {64, 3584, 77, 1025, 4, 1})
    for (bool delta : {false, true}) norm_case(c, 3, cols, delta, turn++);
  norm_heads_case(c, 3, 5, 128, 5 * 128 + 7);
  norm_heads_case(c, 2, 1, 80, 80);
  norm_heads_case(c, 1, 8, 6, 48);
}

void test_rope(const Context& c) {
  rope_append_case(c, 19, 7, 1, 128);
  rope_append_case(c, 3, 4, 2, 64);
  rope_append_case(c, 1, 2, 2, 80);
  rope_dense_case(c, 5, 3, 80);
  rope_dense_case(c, 1, 16, 64);
}

void test_elementwise(const Context& c) {
  for (int cols : {1, 77, 1024, 1500}) swiglu_case(c, 2, cols), bias_case(c, 3, cols, cols + 2), flat_case(c, cols * 3 + 1);
}

void test_select(const Context& c) {
  for (Values kind : {Values::Spread, Values::Few, Values::Same, Values::Special}) {
    select_case(c, 2, 3001, 64, kind);
    select_case(c, 1, 40, 64, kind);
    select_case(c, 1, 1500, 1, kind);
  }
  if (!c.quick) select_case(c, 1, 20000, 20, Values::Spread);
}
