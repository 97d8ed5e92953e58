#include <memory>

#include "harness.h"
#include "ref.h"

namespace {

constexpr int MOST = 3;  // matrices of a launch

struct Matrix {
  int n, ldw, ldo;
};

struct Shape {
  int rows, k, lda;
  std::vector<Matrix> matrices;
};

struct Weights : Matrix {
  Buffer<u16> w, bias;
  Weights(const Matrix& m, int k) : Matrix(m), w(m.n ? (size_t)(m.n - 1) * m.ldw + k : 0), bias(m.n) {}
};

struct Problem {
  Shape s;
  Buffer<u16> a;
  std::vector<std::unique_ptr<Weights>> weights;
  Problem(const Shape& shape, const Kernels& k, Random random) : s(shape), a((size_t)(shape.rows - 1) * shape.lda + shape.k) {
    random.fill(a, k, 2.0f);
    for (const Matrix& m : s.matrices) {
      weights.push_back(std::make_unique<Weights>(m, s.k));
      random.fill(weights.back()->w, k, 1.0f), random.fill(weights.back()->bias, k, 3.0f);
    }
  }
};

// A float32 output of `rows` rows for each matrix.
struct Outputs {
  std::vector<std::unique_ptr<Buffer<float>>> of;
  Outputs(const Problem& p, int rows) {
    for (const Matrix& m : p.s.matrices) of.push_back(std::make_unique<Buffer<float>>(m.n ? (size_t)(rows - 1) * m.ldo + m.n : 0));
  }
  Buffer<float>& operator[](size_t i) { return *of[i]; }
};

// `from` to `to` of the matrices in one launch; `biased` has a bit for each.
void run(const LinearKernel& l, const Problem& p, size_t from, size_t to, int first_row, int rows, int biased, Outputs& out, int flags,
         const emu::Options& options) {
  const u16 *w[MOST] = {}, *bias[MOST] = {};
  float* o[MOST] = {};
  i64 ldw[MOST] = {}, ldo[MOST] = {};
  int n[MOST] = {};
  unsigned tiles = 0;
  for (size_t i = from; i < to; i++) {
    const Weights& m = *p.weights[i];
    const size_t at = i - from;
    w[at] = m.w.p, bias[at] = biased >> i & 1 ? m.bias.p : nullptr, o[at] = out[i].p;
    ldw[at] = m.ldw, ldo[at] = m.ldo, n[at] = m.n;
    tiles += ceil_div(m.n, l.bn);
  }
  emu::launch({tiles * ceil_div(rows, l.br)}, (unsigned)l.threads, (size_t)l.shared_bytes, options, [&] {
    l.run(p.a.p + (i64)first_row * p.s.lda, w[0], bias[0], o[0], w[1], bias[1], o[1], w[2], bias[2], o[2], p.s.lda, ldw[0], ldw[1], ldw[2],
          ldo[0], ldo[1], ldo[2], rows, n[0], n[1], n[2], p.s.k, flags);
  });
}

void compare(const Context& c, const LinearKernel& l, const Problem& p, const Weights& m, const Buffer<float>& out, bool bias,
             const float* before) {
  for (int r = 0; r < p.s.rows; r++) {
    for (int n = 0; n < m.n; n++) {
      const ref::Dot d = ref::dot(
          p.s.k, [&](int i) { return c.k.to_float(p.a[(size_t)r * p.s.lda + i]); },
          [&](int i) { return c.k.to_float(m.w[(size_t)n * m.ldw + i]); });
      const size_t at = (size_t)r * m.ldo + n;
      const double want = d.value + (bias ? c.k.to_float(m.bias[n]) : 0) + (before ? before[at] : 0);
      near(l.name, "product", at, out[at], want, 4e-6 * d.magnitude + 2e-6 * (std::fabs(want) + 3));
    }
  }
}

// Every tile, store and add, each matrix with and without bias, under every landing; the gaps of a strided output stay untouched.
void against_reference(const Context& c, const LinearKernel& l, const Shape& s, int turn) {
  const Problem p(s, c.k, Random(c.seed + (uint64_t)turn));
  const bool add = turn / 2 % 2;
  const int biased = turn % 2 ? 5 : 2;
  Outputs out(p, s.rows);
  std::vector<std::vector<float>> before;
  Random random(c.seed + 7);
  for (auto& o : out.of) {
    if (add) random.fill(*o, 1.0f);
    before.emplace_back(o->p, o->p + o->count);
  }
  run(l, p, 0, s.matrices.size(), 0, s.rows, biased, out, add ? 1 : 0, c.options(LANDINGS[turn % 3]));
  for (size_t i = 0; i < s.matrices.size(); i++) {
    const Weights& m = *p.weights[i];
    compare(c, l, p, m, out[i], biased >> i & 1, add ? before[i].data() : nullptr);
    for (int r = 0; r + 1 < s.rows; r++)
      for (int n = m.n; n < m.ldo; n++) same_bits(l.name, "a gap", &out[i][(size_t)r * m.ldo + n], &before[i][(size_t)r * m.ldo + n], 1);
  }
}

// Rows of one large product and of every other tile, alone and together: the same bits.
void same_for_any_rows(const Context& c, const Shape& s) {
  const Problem p(s, c.k, Random(c.seed + 1000));
  const Matrix& m = s.matrices[0];
  Outputs all(p, s.rows);
  run(c.k.linear.back(), p, 0, 1, 0, s.rows, 0, all, 0, c.options(emu::Landing::Drawn));
  for (const LinearKernel& l : c.k.linear) {
    for (int rows : {1, 3, l.br, l.br + 1}) {
      const int first = rows > s.rows ? 0 : Random(c.seed + (uint64_t)rows).below(s.rows - rows + 1);
      rows = rows > s.rows ? s.rows : rows;
      Outputs some(p, rows);
      run(l, p, 0, 1, first, rows, 0, some, 0, c.options(LANDINGS[rows % 3]));
      for (int r = 0; r < rows; r++)
        same_bits(l.name, "a row alone", &some[0][(size_t)r * m.ldo], &all[0][(size_t)(first + r) * m.ldo], (size_t)m.n);
    }
  }
}

// Two or three matrices in one launch and each in its own: the same bits.
void same_in_one_launch(const Context& c, const Shape& s) {
  const Problem p(s, c.k, Random(c.seed + 2000));
  Outputs each(p, s.rows);
  const size_t count = s.matrices.size();
  for (size_t i = 0; i < count; i++) run(c.k.linear[0], p, i, i + 1, 0, s.rows, 5, each, 0, c.options(emu::Landing::Late));
  for (const LinearKernel& l : c.k.linear) {
    for (size_t to : {count - 1, count}) {
      Outputs together(p, s.rows);
      run(l, p, 0, to, 0, s.rows, 5, together, 0, c.options(LANDINGS[to % 3]));
      for (size_t i = 0; i < to; i++) {
        const Matrix& m = s.matrices[i];
        for (int r = 0; r < s.rows; r++)
          same_bits(l.name, "a matrix alone", &together[i][(size_t)r * m.ldo], &each[i][(size_t)r * m.ldo], (size_t)m.n);
      }
    }
  }
}

}  // namespace

void test_linear(const Context& c) {
  int turn = (int)(c.seed % 12);
  for (const LinearKernel& l : c.k.linear) {
    const int br = l.br, bn = l.bn;
    std::vector<Shape> shapes = {{br + 1, 64 * 5 + 24, 352, {{bn + 8, 344, bn + 11}, {3, 352, 3}, {bn - 7, 344, bn}}}};
    if (!c.quick) {
      shapes.push_back({1, 8, 8, {{1, 8, 1}}});
      shapes.push_back({br - 1, 64, 64, {{bn, 72, bn}}});
      shapes.push_back({2, 64 * 12, 64 * 12, {{bn - 1, 64 * 12, bn - 1}, {2 * bn, 64 * 12, 2 * bn + 3}}});
      shapes.push_back({br * 9 + 3 > 300 ? 300 : br * 9 + 3, 72, 72, {{2 * bn + 1, 72, 2 * bn + 4}, {bn + 1, 80, bn + 1}}});
      shapes.push_back({3, 24, 24, {{5, 24, 5}, {0, 24, 0}, {7, 24, 7}}});  // one has no rows
    }
    if (!l.aligned) shapes.push_back({br + 1, 77, 79, {{bn + 3, 77, bn + 3}, {2, 78, 2}}}), shapes.push_back({3, 1, 1, {{5, 3, 5}}});
    for (const Shape& s : shapes) against_reference(c, l, s, turn++);
  }
  if (c.quick) return;
  same_for_any_rows(c, {300, 64 * 3 + 8, 200, {{40, 200, 40}}});
  same_for_any_rows(c, {4096, 80, 80, {{9, 80, 9}}});
  same_in_one_launch(c, {37, 136, 136, {{70, 136, 70}, {9, 144, 12}, {33, 136, 33}}});
}
