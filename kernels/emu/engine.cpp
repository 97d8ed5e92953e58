#include "engine.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "sanitizer.h"

namespace emu {

Thread* current;
Dim3 block_idx, grid_dim, block_dim;
unsigned char* shared_memory;
uint64_t bank_conflicts;
MmaSums mma_sums = MmaSums::Nearest;

namespace {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr unsigned MAX_THREADS = 1024;

struct Warp {
  uint32_t runnable = 0, arrived = 0, mask = 0;
  int op = 0;
  uint64_t priority = 0;
  void* slots[32];
};

std::vector<Thread> threads;
std::vector<Warp> warps;
unsigned alive, at_barrier;
size_t shared_size;
Options options;
uint64_t random_state;
const std::function<void()>* kernel;
Thread host;  // the scheduler's side: where the last fibre returns to
const void* host_stack;
size_t host_stack_bytes;

uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545F4914F6CDD1Dull >> 11;
}

std::map<std::string, std::vector<Site*>>& sites() {
  static std::map<std::string, std::vector<Site*>> all;
  return all;
}
std::string& disabled() {
  static std::string key;
  return key;
}

// ---- switching fibres ----
// swapcontext asks the kernel for the signal mask each time, which costs more than everything else here; on x86-64 a
// switch saves the six registers the calling convention asks for instead.
#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
void prepare(Thread& t, void (*entry)()) {
  void** top = (void**)(t.stack + STACK_BYTES) - 2;
  *top = (void*)entry;
  t.sp = top - 6;
  memset(t.sp, 0, 6 * sizeof(void*));
}
void raw_switch(Thread& from, Thread& to) { emu_switch(&from.sp, to.sp); }
#else
std::map<Thread*, ucontext_t> contexts;
void prepare(Thread& t, void (*entry)()) {
  ucontext_t& c = contexts[&t];
  getcontext(&c);
  c.uc_stack.ss_sp = t.stack;
  c.uc_stack.ss_size = STACK_BYTES;
  makecontext(&c, entry, 0);
}
void raw_switch(Thread& from, Thread& to) { swapcontext(&contexts[&from], &contexts[&to]); }
#endif

__attribute__((no_sanitize("address"))) void switch_to(Thread& from, Thread& to) {
  const bool to_host = &to == &host;
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, to_host ? host_stack : to.stack,
                                 to_host ? host_stack_bytes : STACK_BYTES);
  current = &to;
  raw_switch(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// Mostly the warp with the highest priority, so that one warp gets far ahead of the others; sometimes any.
Thread* next() {
  int best = -1, count = 0;
  const bool any = draw() % 4 == 0;
  for (size_t w = 0; w < warps.size(); w++) {
    if (!warps[w].runnable) continue;
    count++;
    if (best < 0 || (any ? draw() % count == 0 : warps[w].priority > warps[best].priority)) best = (int)w;
  }
  if (best < 0) return nullptr;
  uint32_t bits = warps[best].runnable;
  for (int skip = (int)(draw() % __builtin_popcount(bits)); skip > 0; skip--) bits &= bits - 1;
  return &threads[best * 32 + __builtin_ctz(bits)];
}

void release_barrier() {
  Site* site = nullptr;
  at_barrier = 0;
  for (Thread& t : threads) {
    if (t.done || !t.barrier) continue;
    if (site && t.barrier->key != site->key) fail("threads wait at different barriers: " + site->key + ", " + t.barrier->key);
    site = t.barrier;
    t.barrier = nullptr;
    warps[t.warp].runnable |= 1u << t.lane;
  }
  for (Warp& w : warps) w.priority = draw();
}

// Leaves this fibre, which is not runnable now, for the next.
void leave() {
  Thread& self = *current;
  if (at_barrier == alive && alive > 0) release_barrier();
  Thread* to = next();
  if (!to && alive > 0) fail("deadlock: some threads wait at a barrier or a warp-wide instruction that others never reach");
  if (to == &self) return;
  switch_to(self, to ? *to : host);
}

__attribute__((no_sanitize("address"))) void fibre_entry() {
  if (!host_stack) {
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
  } else {
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  }
  (*kernel)();
  Thread& self = *current;
  if (!self.copies.empty()) fail("a thread ended with cp.async copies that nothing waited for");
  self.done = true;
  warps[self.warp].runnable &= ~(1u << self.lane);
  alive--;
  leave();
  __builtin_unreachable();
}

void run_block(unsigned count) {
  threads.resize(MAX_THREADS);
  for (Thread& t : threads) {
    if (t.stack) break;
    for (Thread& each : threads)
      each.stack = (char*)mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  warps.assign((count + 31) / 32, Warp());
  for (Warp& w : warps) w.priority = draw();
  for (unsigned i = 0; i < MAX_THREADS; i++) {
    Thread& t = threads[i];
    t.done = i >= count;
    t.barrier = nullptr;
    if (t.done) continue;
    t.tid = {i, 0, 0};
    t.warp = (int)i / 32, t.lane = (int)i % 32;
    t.groups = 0;
    t.copies.clear();
    warps[t.warp].runnable |= 1u << t.lane;
    // What ran last on this stack ended in leave(), whose frames never returned and so are still marked.
    __asan_unpoison_memory_region(t.stack + STACK_BYTES - 16384, 16384);
    prepare(t, fibre_entry);
  }
  alive = count, at_barrier = 0;
  switch_to(host, *next());
}

}  // namespace

Site::Site(const char* kind, const char* file, int line) {
  const char* slash = strrchr(file, '/');
  key = std::string(slash ? slash + 1 : file) + ":" + std::to_string(line) + " " + kind;
  off = key == disabled();
  sites()[key].push_back(this);
}
void disable_site(const std::string& key) {
  disabled() = key;
  for (Site* s : sites()[key]) s->off = true;
}
std::vector<std::string> sites_met() {
  std::vector<std::string> keys;
  for (auto& entry : sites()) {
    bool met = false;
    for (Site* s : entry.second) met |= s->met, s->met = false;
    if (met) keys.push_back(entry.first);
  }
  return keys;
}

void fail(const std::string& what) {
  fprintf(stderr, "emulation: %s (block %u,%u thread %u)\n", what.c_str(), block_idx.x, block_idx.y, current ? current->tid.x : 0);
  _Exit(1);
}

void launch(Dim3 grid, unsigned count, size_t shared_bytes, const Options& o, const std::function<void()>& k) {
  if (count == 0 || count > MAX_THREADS || count % 32) fail("a block has 32 to 1024 threads, a multiple of 32");
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1) fail("a grid CUDA would refuse");
  options = o;
  random_state = o.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  kernel = &k;
  grid_dim = grid;
  block_dim = {count, 1, 1};
  shared_size = shared_bytes;
  std::vector<unsigned> order(grid.x * grid.y);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
  unsigned char* memory = shared_bytes ? (unsigned char*)aligned_alloc(128, (shared_bytes + 127) / 128 * 128) : nullptr;
  if (shared_bytes % 128) __asan_poison_memory_region(memory + shared_bytes, 128 - shared_bytes % 128);
  shared_memory = memory;
  for (unsigned i : order) {
    block_idx = {i % grid.x, i / grid.x, 0};
    if (shared_bytes) memset(shared_memory, 0xFF, shared_bytes);
    run_block(count);
  }
  if (shared_bytes % 128) __asan_unpoison_memory_region(memory + shared_bytes, 128 - shared_bytes % 128);
  free(memory);
  current = nullptr;
}

void block_barrier(Site& site) {
  if (site.off) return;
  Thread& self = *current;
  self.barrier = &site;
  warps[self.warp].runnable &= ~(1u << self.lane);
  at_barrier++;
  leave();
}

void collective(int op, uint32_t mask, void* mine, Execute execute) {
  Thread& self = *current;
  Warp& w = warps[self.warp];
  if (!(mask >> self.lane & 1)) fail("a lane calls a warp-wide instruction whose mask leaves it out");
  if (w.arrived && (w.op != op || w.mask != mask)) fail("lanes of a warp meet at different instructions");
  w.op = op, w.mask = mask;
  w.slots[self.lane] = mine;
  w.arrived |= 1u << self.lane;
  if (w.arrived != mask) {
    w.runnable &= ~(1u << self.lane);
    leave();
    return;
  }
  execute(w.slots, mask);
  w.arrived = 0;
  w.runnable |= mask;
}

bool in_shared(const void* p, size_t bytes) {
  const unsigned char* b = (const unsigned char*)p;
  return b >= shared_memory && b + bytes <= shared_memory + shared_size;
}

static void land(const Copy& c) {
  // This file is built without the sanitizer, for speed: ask it.
  if (__asan_region_is_poisoned(c.to, 16)) fail("cp.async writes outside an allocation");
  if (c.valid && __asan_region_is_poisoned(const_cast<void*>(c.from), 16)) fail("cp.async reads outside an allocation");
  if (c.valid)
    memcpy(c.to, c.from, 16);
  else
    memset(c.to, 0, 16);
}

void cp_async(void* to, const void* from, bool valid) {
  if ((uintptr_t)to % 16 || !in_shared(to, 16)) fail("cp.async to an address that is not 16 aligned bytes of shared memory");
  if (valid && (uintptr_t)from % 16) fail("cp.async from an address that is not 16-byte aligned");
  Copy c = {to, from, valid, current->groups};
  const bool now = options.landing == Landing::Early || (options.landing == Landing::Drawn && draw() % 2);
  if (now)
    land(c);
  else
    current->copies.push_back(c);
}
void cp_async_commit() { current->groups++; }
void cp_async_wait(int groups, Site& site) {
  if (site.off) {
    current->copies.clear();  // they never land
    return;
  }
  auto& copies = current->copies;
  size_t landed = 0;
  while (landed < copies.size() && copies[landed].group < current->groups - groups) land(copies[landed++]);
  copies.erase(copies.begin(), copies.begin() + (long)landed);
}

}  // namespace emu
