#include <algorithm>
#include <numeric>

#include "harness.h"
#include "ref.h"

namespace {

struct Sequence {
  int start, rows;
};
struct Case {
  int heads, kv_heads, window;
  std::vector<Sequence> sequences;
};

// A KV pool in which only the sequences' own tokens are written; the rest stays NaN.
struct Paged {
  const Case& c;
  const Kernels& k;
  int size, rows = 0, blocks = 0;
  std::vector<int> table_at, blocks_of;
  std::vector<int> order;
  Buffer<u16> kv, q;

  Paged(const Case& which, const Kernels& kernels, int head_size, Random random)
      : c(which), k(kernels), size(head_size), order(shuffled(random)), kv(blocks * block_elements()), q((size_t)rows * c.heads * size) {
    random.fill(q, k, 3.0f / std::sqrt((float)size) * 2.0f);
    for (size_t s = 0; s < c.sequences.size(); s++)
      for (int j = 0; j < c.sequences[s].start + c.sequences[s].rows; j++)
        for (int part = 0; part < 2; part++)
          for (int h = 0; h < c.kv_heads; h++)
            for (int d = 0; d < size; d++) kv[at(s, j, part, h, d)] = k.to_half(random.uniform() * 2);
  }
  std::vector<int> shuffled(Random& random) {
    for (const Sequence& s : c.sequences) {
      table_at.push_back(blocks);
      blocks += (s.start + s.rows + 15) / 16;
      rows += s.rows;
    }
    std::vector<int> ids((size_t)blocks);
    std::iota(ids.begin(), ids.end(), 0);
    for (size_t i = ids.size(); i > 1; i--) std::swap(ids[i - 1], ids[(size_t)random.below((int)i)]);
    return ids;
  }
  size_t block_elements() const { return (size_t)2 * c.kv_heads * 16 * size; }
  size_t at(size_t s, int j, int part, int head, int d) const {
    const size_t block = (size_t)order[(size_t)(table_at[s] + j / 16)];
    return block * block_elements() + ((size_t)(part * c.kv_heads + head) * 16 + j % 16) * size + d;
  }
};

// One part of a pass: some tokens of one sequence.
struct Part {
  size_t sequence;
  int first_row, offset, rows;  // row in the pass of the sequence's first token, tokens before this part, tokens
};

struct Launch {
  const Paged& p;
  const PagedKernels& kernels;
  emu::Options options;
  Buffer<int> segments, tables;
  std::vector<Part> parts;

  Launch(const Paged& paged, const PagedKernels& pk, const std::vector<Part>& which, const emu::Options& o)
      : p(paged), kernels(pk), options(o), segments(which.size() * 4), tables((size_t)paged.blocks), parts(which) {
    for (size_t i = 0; i < parts.size(); i++) {
      segments[4 * i] = parts[i].first_row + parts[i].offset, segments[4 * i + 1] = parts[i].rows;
      segments[4 * i + 2] = p.c.sequences[parts[i].sequence].start + parts[i].offset, segments[4 * i + 3] = p.table_at[parts[i].sequence];
    }
    for (int i = 0; i < p.blocks; i++) tables[(size_t)i] = p.order[(size_t)i];
  }
  float scale() const { return 1.0f / std::sqrt((float)p.size); }
  int tiles_of(const Part& part, int tile_rows) const { return (int)ceil_div(part.rows * (p.c.heads / p.c.kv_heads), tile_rows); }

  void prefill(Buffer<u16>& out) {
    std::vector<int> list;
    for (size_t i = 0; i < parts.size(); i++)
      for (int t = tiles_of(parts[i], kernels.rows) - 1; t >= 0; t--) list.push_back((int)i), list.push_back(t);
    Buffer<int> tiles(list.size());
    std::copy(list.begin(), list.end(), tiles.p);
    emu::launch({(unsigned)list.size() / 2, (unsigned)p.c.kv_heads}, (unsigned)kernels.prefill_threads, (size_t)kernels.prefill_shared,
                options, [&] {
                  kernels.prefill(p.q.p, p.kv.p, segments.p, tables.p, tiles.p, out.p, p.c.heads, p.c.kv_heads, p.c.window, scale());
                });
  }

  void decode(Buffer<u16>& out) {
    const int group = p.c.heads / p.c.kv_heads;
    std::vector<int> items, merges;
    for (size_t i = 0; i < parts.size(); i++)
      for (int t = 0; t < tiles_of(parts[i], 16); t++) {
        const int start = p.c.sequences[parts[i].sequence].start + parts[i].offset;
        const int first = start + t * 16 / group, last = start + std::min((t * 16 + 15) / group, parts[i].rows - 1);
        const int lo = p.c.window ? std::max(0, first + 1 - p.c.window) : 0, item = (int)items.size() / 3;
        for (int chunk = lo / 256; chunk <= last / 256; chunk++) items.insert(items.end(), {(int)i, t, chunk});
        merges.insert(merges.end(), {(int)i, t, item, (int)items.size() / 3 - item});
      }
    Buffer<int> item_list(items.size()), merge_list(merges.size());
    std::copy(items.begin(), items.end(), item_list.p), std::copy(merges.begin(), merges.end(), merge_list.p);
    const size_t rows = items.size() / 3 * (size_t)p.c.kv_heads * 16;
    Buffer<float> sums(rows * (size_t)p.size), maxima(rows * 2);
    emu::launch({(unsigned)items.size() / 3, (unsigned)p.c.kv_heads}, (unsigned)kernels.decode_threads, (size_t)kernels.decode_shared,
                options, [&] {
                  kernels.decode(p.q.p, p.kv.p, segments.p, tables.p, item_list.p, sums.p, maxima.p, p.c.heads, p.c.kv_heads,
                                 p.c.window, scale());
                });
    emu::launch({(unsigned)merges.size() / 4, (unsigned)p.c.kv_heads}, 256, 0, options, [&] {
      p.k.merge(sums.p, maxima.p, segments.p, merge_list.p, out.p, p.c.heads, p.c.kv_heads, p.size);
    });
  }
};

void compare(const Paged& p, const Buffer<u16>& out, double epsilon) {
  std::vector<double> want((size_t)p.size), magnitude((size_t)p.size);
  int row = 0;
  for (size_t s = 0; s < p.c.sequences.size(); s++) {
    for (int t = 0; t < p.c.sequences[s].rows; t++, row++) {
      const int position = p.c.sequences[s].start + t, lo = p.c.window ? std::max(0, position + 1 - p.c.window) : 0;
      for (int h = 0; h < p.c.heads; h++) {
        const size_t base = ((size_t)row * p.c.heads + h) * p.size;
        const int kv_head = h / (p.c.heads / p.c.kv_heads);
        auto half = [&](int part) { return [&, part](int j, int d) { return p.k.to_float(p.kv[p.at(s, j, part, kv_head, d)]); }; };
        ref::attend(
            lo, position + 1, p.size, 1.0 / std::sqrt((double)p.size), [&](int d) { return p.k.to_float(p.q[base + d]); }, half(0),
            half(1), want.data(), magnitude.data());
        for (int d = 0; d < p.size; d++)
          near("attention", "output", base + d, p.k.to_float(out[base + d]), want[d], epsilon * (magnitude[d] + 1e-3));
      }
    }
  }
}

// Whole segments, one token at a time, and cut in two; by either kernel: one answer, and the right one.
void paged_case(const Context& c, const PagedKernels& pk, const Case& which, int turn) {
  const Paged p(which, c.k, pk.head_size, Random(c.seed + (uint64_t)turn));
  std::vector<Part> whole, single, halves;
  int row = 0;
  for (size_t s = 0; s < which.sequences.size(); s++) {
    const int rows = which.sequences[s].rows, cut = rows / 3;
    whole.push_back({s, row, 0, rows});
    for (int t = 0; t < rows; t++) single.push_back({s, row, t, 1});
    if (cut) halves.push_back({s, row, 0, cut});
    halves.push_back({s, row, cut, rows - cut});
    row += rows;
  }
  Buffer<u16> want(p.q.count), got(p.q.count);
  Launch(p, pk, whole, c.options(LANDINGS[turn % 3])).prefill(want);
  compare(p, want, c.k.half[0] == 'b' ? 0x1p-7 : 0x1p-10);
  Launch(p, pk, single, c.options(LANDINGS[(turn + 1) % 3])).decode(got);
  same_bits("attention", "decode of one token", got.p, want.p, got.count);
  got.poison();
  Launch(p, pk, whole, c.options(LANDINGS[(turn + 2) % 3])).decode(got);
  same_bits("attention", "decode of all tokens", got.p, want.p, got.count);
  got.poison();
  Launch(p, pk, halves, c.options(LANDINGS[turn % 3])).prefill(got);
  same_bits("attention", "prefill in two", got.p, want.p, got.count);
}

struct Window {
  int rows;
};

void dense_case(const Context& c, const DenseKernel& k, int heads, const std::vector<int>& lengths, int turn) {
  Random random(c.seed + (uint64_t)turn);
  Buffer<int> windows(lengths.size() + 1);
  std::vector<int> list;
  windows[0] = 0;
  for (size_t w = 0; w < lengths.size(); w++) {
    windows[w + 1] = windows[w] + lengths[w];
    for (int t = 0; t < (int)ceil_div(lengths[w], 64); t++) list.push_back((int)w), list.push_back(t);
  }
  Buffer<int> tiles(list.size());
  std::copy(list.begin(), list.end(), tiles.p);
  const int size = k.head_size, stride = heads * size;
  const size_t count = (size_t)windows[lengths.size()] * stride;
  Buffer<u16> q(count), key(count), value(count), out(count);
  random.fill(q, c.k, 6.0f / std::sqrt((float)size)), random.fill(key, c.k, 2.0f), random.fill(value, c.k, 2.0f);
  emu::launch({(unsigned)list.size() / 2, (unsigned)heads}, (unsigned)k.threads, (size_t)k.shared_bytes, c.options(LANDINGS[turn % 3]),
              [&] { k.run(q.p, key.p, value.p, windows.p, tiles.p, out.p, heads, 1.0f / std::sqrt((float)size)); });
  std::vector<double> want((size_t)size), magnitude((size_t)size);
  const double epsilon = c.k.half[0] == 'b' ? 0x1p-7 : 0x1p-10;
  for (size_t w = 0; w < lengths.size(); w++)
    for (int r = windows[w]; r < windows[w + 1]; r++)
      for (int h = 0; h < heads; h++) {
        auto in = [&](const Buffer<u16>& b) {
          return [&, h](int j, int d) { return c.k.to_float(b[(size_t)j * stride + h * size + d]); };
        };
        ref::attend(
            windows[w], windows[w + 1], size, 1.0 / std::sqrt((double)size), [&](int d) { return in(q)(r, d); }, in(key), in(value),
            want.data(), magnitude.data());
        for (int d = 0; d < size; d++) {
          const size_t at = (size_t)r * stride + h * size + d;
          near("attention_dense", "output", at, c.k.to_float(out[at]), want[d], epsilon * (magnitude[d] + 1e-3));
        }
      }
}

}  // namespace

void test_attention_paged(const Context& c) {
  int turn = (int)(c.seed % 6);
  for (const PagedKernels& pk : c.k.paged) {
    const bool main_size = pk.head_size == 128;
    if (c.quick && pk.head_size != 64 && pk.head_size != 256) continue;
    paged_case(c, pk, {3, 1, 0, {{250, 9}, {0, 5}, {70, 1}}}, turn++);
    paged_case(c, pk, {2, 2, 21, {{0, 26}, {300, 2}}}, turn++);
    if (c.quick) continue;
    paged_case(c, pk, {7, 1, 270, {{500, 30}, {511, 2}}}, turn++);
    paged_case(c, pk, {1, 1, 1, {{255, 3}}}, turn++);
    if (main_size) paged_case(c, pk, {4, 2, 0, {{0, 70}, {1023, 2}, {15, 2}, {16, 1}}}, turn++);
  }
}

void test_attention_dense(const Context& c) {
  int turn = (int)(c.seed % 6);
  for (const DenseKernel& k : c.k.dense) {
    dense_case(c, k, 2, {5, 64, 1, 70}, turn++);
    if (!c.quick) dense_case(c, k, 1, {300, 16}, turn++);
  }
}
