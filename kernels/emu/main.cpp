// emulate [--seed N] [--only TEST] [--truncate]     every kernel against the reference, both 16-bit types
//                                      --truncate: mma.sync adds as sm_80's tensor cores do
// emulate --controls                   switches off each barrier, wait and bound in turn: the tests must fail every time
// emulate --launch-table               block and shared bytes of each kernel, as launch.json has them
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fcntl.h>
#include <map>
#include <string>

#include "harness.h"

namespace {

struct Test {
  const char* name;
  void (*run)(const Context&);
};
const Test TESTS[] = {{"linear", test_linear},   {"attention_paged", test_attention_paged}, {"attention_dense", test_attention_dense},
                      {"norms", test_norms},     {"rope", test_rope},                       {"elementwise", test_elementwise},
                      {"select", test_select}};

constexpr rlim_t CPU_SECONDS = 120;

double seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

int run_tests(uint64_t seed, const std::string& only) {
  for (const Test& t : TESTS) {
    if (!only.empty() && only != t.name) continue;
    for (const Kernels* k : {&kernels_bf16(), &kernels_f16()}) {
      const double start = seconds();
      t.run({*k, false, seed});
      printf("ok   %-16s %-4s %6.1f s\n", t.name, k->half, seconds() - start);
      fflush(stdout);
    }
  }
  if (emu::bank_conflicts) {
    fprintf(stderr, "FAIL ldmatrix met %llu bank conflicts\n", (unsigned long long)emu::bank_conflicts);
    return 1;
  }
  return 0;
}

// Runs `test` in a child with one site off; true when the child noticed.
bool notices(const Test& test, const std::string& site) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    const int null = open("/dev/null", O_WRONLY);
    dup2(null, 2);
    const rlimit limit = {CPU_SECONDS, CPU_SECONDS};  // a loop whose bound is off may never end
    setrlimit(RLIMIT_CPU, &limit);
    emu::disable_site(site);
    for (uint64_t seed = 1; seed <= 4; seed++)
      for (const Kernels* k : {&kernels_bf16(), &kernels_f16()}) test.run({*k, true, seed});
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int run_controls() {
  std::map<std::string, std::vector<const Test*>> met;
  for (const Test& t : TESTS) {
    emu::sites_met();
    t.run({kernels_bf16(), true, 1});
    for (const std::string& site : emu::sites_met()) met[site].push_back(&t);
  }
  for (const Test& t : TESTS) {
    if (!notices(t, "")) continue;
    printf("%s fails with nothing switched off\n", t.name);
    return 1;
  }
  int unnoticed = 0;
  for (auto& [site, tests] : met) {
    bool noticed = false;
    for (const Test* t : tests) noticed = noticed || notices(*t, site);
    printf("%s %s\n", noticed ? "fails " : "PASSES", site.c_str());
    unnoticed += !noticed;
  }
  printf("%zu controls, %d unnoticed\n", met.size(), unnoticed);
  return unnoticed ? 1 : 0;
}

void launch_table() {
  const Kernels& k = kernels_bf16();
  for (const LinearKernel& l : k.linear) printf("%s %d %d\n", l.name, l.threads, l.shared_bytes);
  for (const PagedKernels& p : k.paged) {
    printf("attention_prefill_h%d %d %d\n", p.head_size, p.prefill_threads, p.prefill_shared);
    printf("attention_decode_h%d %d %d\n", p.head_size, p.decode_threads, p.decode_shared);
  }
  for (const DenseKernel& d : k.dense) printf("attention_dense_h%d %d %d\n", d.head_size, d.threads, d.shared_bytes);
  printf("rmsnorm 256 %d\nargmax 1024 %d\ntopk 1024 %d\n", k.rmsnorm_shared, k.argmax_shared, k.topk_shared);
  printf("rmsnorm_heads %d 0\nattention_merge %d 0\n", k.rmsnorm_heads_threads, k.merge_threads);
  for (const char* name : {"rope_append", "rope_dense", "swiglu", "gelu", "bias_add", "widen", "round"})
    printf("%s %d 0\n", name, k.row_threads);
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t seed = 1;
  std::string only;
  for (int i = 1; i < argc; i++) {
    const std::string arg = argv[i];
    if (arg == "--controls") return run_controls();
    if (arg == "--launch-table") return launch_table(), 0;
    if (arg == "--seed" && i + 1 < argc) {
      seed = strtoull(argv[++i], nullptr, 10);
    } else if (arg == "--only" && i + 1 < argc) {
      only = argv[++i];
    } else if (arg == "--truncate") {
      emu::mma_sums = emu::MmaSums::Truncated;
    } else {
      fprintf(stderr, "usage: emulate [--seed N] [--only TEST] [--truncate] | --controls | --launch-table\n");
      return 2;
    }
  }
  return run_tests(seed, only);
}
