// The ops in double precision, as the CPU device defines them. Inputs are what the kernels are given, already rounded.
#pragma once
#include <cmath>
#include <vector>

namespace ref {

// Also returns sum |a||w|, what an error in float32 sums is measured against.
struct Dot {
  double value, magnitude;
};
template <class A, class W>
Dot dot(int k, A a, W w) {
  Dot d = {0, 0};
  for (int i = 0; i < k; i++) d.value += (double)a(i) * w(i), d.magnitude += std::fabs((double)a(i) * w(i));
  return d;
}

inline double silu(double x) { return x / (1 + std::exp(-x)); }
inline double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

// One query over keys lo..hi-1. key(j, d) and value(j, d) are functions; `magnitude` receives sum p|v| per output.
template <class Q, class K, class V>
void attend(int lo, int hi, int size, double scale, Q q, K key, V value, double* out, double* magnitude) {
  std::vector<double> s(hi);
  double top = -INFINITY, total = 0;
  for (int j = lo; j < hi; j++) {
    s[j] = 0;
    for (int d = 0; d < size; d++) s[j] += (double)q(d) * key(j, d);
    s[j] *= scale;
    top = std::fmax(top, s[j]);
  }
  for (int j = lo; j < hi; j++) total += s[j] = std::exp(s[j] - top);
  for (int d = 0; d < size; d++) {
    out[d] = magnitude[d] = 0;
    for (int j = lo; j < hi; j++) out[d] += s[j] / total * value(j, d), magnitude[d] += s[j] / total * std::fabs(value(j, d));
  }
}

}  // namespace ref
