#include "harness.h"
#include "ref.h"

namespace {

struct Shape {
  int rows, n, k;
  int lda, ldw, ldo;
};

struct Problem {
  Shape s;
  Buffer<u16> a, w, bias;
  Problem(const Shape& shape, const Kernels& k, Random random)
      : s(shape), a((size_t)(shape.rows - 1) * shape.lda + shape.k), w((size_t)(shape.n - 1) * shape.ldw + shape.k), bias(shape.n) {
    random.fill(a, k, 2.0f), random.fill(w, k, 1.0f), random.fill(bias, k, 3.0f);
  }
};

void run(const LinearKernel& l, const Problem& p, int first_row, int rows, const u16* bias, Buffer<float>& out, int flags,
         const emu::Options& options) {
  const unsigned blocks = ceil_div(p.s.n, l.bn) * ceil_div(rows, l.br);
  emu::launch({blocks}, (unsigned)l.threads, (size_t)l.shared_bytes, options, [&] {
    l.run(p.a.p + (i64)first_row * p.s.lda, p.w.p, bias, out.p, p.s.lda, p.s.ldw, p.s.ldo, rows, p.s.n, p.s.k, flags);
  });
}

void compare(const Context& c, const LinearKernel& l, const Problem& p, const Buffer<float>& out, bool bias, const float* before) {
  for (int r = 0; r < p.s.rows; r++) {
    for (int n = 0; n < p.s.n; n++) {
      const ref::Dot d = ref::dot(
          p.s.k, [&](int i) { return c.k.to_float(p.a[(size_t)r * p.s.lda + i]); },
          [&](int i) { return c.k.to_float(p.w[(size_t)n * p.s.ldw + i]); });
      const size_t at = (size_t)r * p.s.ldo + n;
      const double want = d.value + (bias ? c.k.to_float(p.bias[n]) : 0) + (before ? before[at] : 0);
      near(l.name, "product", at, out[at], want, 4e-6 * d.magnitude + 2e-6 * (std::fabs(want) + 3));
    }
  }
}

// Every tile, store and add, with and without bias, under every landing; the gaps of a strided output stay untouched.
void against_reference(const Context& c, const LinearKernel& l, const Shape& s, int turn) {
  const Problem p(s, c.k, Random(c.seed + (uint64_t)turn));
  const bool bias = turn % 2, add = turn / 2 % 2;
  Buffer<float> out((size_t)(s.rows - 1) * s.ldo + s.n);
  std::vector<float> before(out.count);
  Random random(c.seed + 7);
  if (add) random.fill(out, 1.0f);
  memcpy(before.data(), out.p, out.count * sizeof(float));
  run(l, p, 0, s.rows, bias ? p.bias.p : nullptr, out, add ? 1 : 0, c.options(LANDINGS[turn % 3]));
  compare(c, l, p, out, bias, add ? before.data() : nullptr);
  for (int r = 0; r + 1 < s.rows; r++)
    for (int n = s.n; n < s.ldo; n++) same_bits(l.name, "a gap", &out[(size_t)r * s.ldo + n], &before[(size_t)r * s.ldo + n], 1);
}

// Rows of one large product and of every other tile, alone and together: the same bits.
void same_for_any_rows(const Context& c, const Shape& s) {
  const Problem p(s, c.k, Random(c.seed + 1000));
  Buffer<float> all((size_t)s.rows * s.ldo);
  run(c.k.linear[4], p, 0, s.rows, nullptr, all, 0, c.options(emu::Landing::Drawn));
  for (const LinearKernel& l : c.k.linear) {
    for (int rows : {1, 3, l.br, l.br + 1}) {
      const int first = rows > s.rows ? 0 : Random(c.seed + (uint64_t)rows).below(s.rows - rows + 1);
      rows = rows > s.rows ? s.rows : rows;
      Buffer<float> some((size_t)rows * s.ldo);
      run(l, p, first, rows, nullptr, some, 0, c.options(LANDINGS[rows % 3]));
      for (int r = 0; r < rows; r++) same_bits(l.name, "a row alone", &some[(size_t)r * s.ldo], &all[(size_t)(first + r) * s.ldo], (size_t)s.n);
    }
  }
}

}  // namespace

void test_linear(const Context& c) {
  int turn = (int)(c.seed % 12);
  for (const LinearKernel& l : c.k.linear) {
    const int br = l.br, bn = l.bn;
    std::vector<Shape> shapes = {{br + 1, bn + 8, 64 * 5 + 24, 352, 344, bn + 11}};
    if (!c.quick) {
      shapes.push_back({1, 1, 8, 8, 8, 1});
      shapes.push_back({br - 1, bn, 64, 64, 72, bn});
      shapes.push_back({2, bn - 1, 64 * 12, 64 * 12, 64 * 12, bn - 1});
      shapes.push_back({br * 9 + 3 > 300 ? 300 : br * 9 + 3, 2 * bn + 1, 72, 72, 72, 2 * bn + 4});
    }
    if (!l.aligned) shapes.push_back({br + 1, bn + 3, 77, 79, 77, bn + 3}), shapes.push_back({3, 5, 1, 1, 3, 5});
    for (const Shape& s : shapes) against_reference(c, l, s, turn++);
  }
  if (c.quick) return;
  same_for_any_rows(c, {300, 40, 64 * 3 + 8, 200, 200, 40});
  same_for_any_rows(c, {4096, 9, 80, 80, 80, 9});
}
