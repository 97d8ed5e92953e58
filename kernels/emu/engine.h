// Runs CUDA kernels compiled as C++: the blocks of a grid one after another in random order, the threads of a block as fibres.
// A fibre runs until it meets a barrier, a warp-wide instruction or its end; which one runs next is drawn from a seed, so that an
// order the kernel relies on but does not enforce is broken sooner or later. AddressSanitizer knows of the fibres.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// A barrier, a wait or a bounds check in a kernel's source. The mutation run switches one off and expects a test to fail.
struct Site {
  std::string key;
  bool off, met = true;  // switched off; executed since sites_met was last asked
  Site(const char* kind, const char* file, int line);
};
void disable_site(const std::string& key);
std::vector<std::string> sites_met();  // since the last call

// When a cp.async copy becomes visible: at its wait (the latest moment allowed), at once (the earliest), or either, drawn.
enum class Landing { Late, Early, Drawn };

struct Options {
  uint64_t seed = 1;
  Landing landing = Landing::Late;
};

void launch(Dim3 grid, unsigned threads, size_t shared_bytes, const Options& options, const std::function<void()>& kernel);
[[noreturn]] void fail(const std::string& what);

// ---- what the twin of ptx.cuh is made of ----

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int group;
};

struct Thread {
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  Dim3 tid;
  int warp = 0, lane = 0;
  bool done = false;
  Site* barrier = nullptr;
  int groups = 0;             // cp.async groups committed so far
  std::vector<Copy> copies;   // in flight, oldest first
};

extern Thread* current;
extern Dim3 block_idx, grid_dim, block_dim;
extern unsigned char* shared_memory;
// How mma.sync adds: each sum rounded to nearest, or truncated as the tensor cores of sm_80 do it (twin.h).
enum class MmaSums { Nearest, Truncated };
extern MmaSums mma_sums;
extern uint64_t bank_conflicts;  // of ldmatrix, counted over all launches

void block_barrier(Site& site);
void cp_async(void* to, const void* from, bool valid);
void cp_async_commit();
void cp_async_wait(int groups, Site& site);
bool in_shared(const void* p, size_t bytes);

// Meets the other lanes of `mask`; the last to arrive runs `execute(slots)` with every lane's `mine`.
using Execute = void (*)(void** slots, uint32_t mask);
void collective(int op, uint32_t mask, void* mine, Execute execute);

}  // namespace emu
