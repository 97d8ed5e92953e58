#include "state.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

#include "../engine.h"

namespace driver {
namespace {

std::string variable(const char* name, const char* otherwise = "") {
  const char* value = getenv(name);
  return value ? value : otherwise;
}
uint64_t number(const char* name, uint64_t otherwise) {
  const std::string value = variable(name);
  return value.empty() ? otherwise : strtoull(value.c_str(), nullptr, 10);
}

Settings read_settings() {
  Settings s;
  s.seed = number("EMUCUDA_SEED", 1);
  const std::string order = variable("EMUCUDA_ORDER", "drawn");
  if (order != "drawn" && order != "lazy" && order != "eager") broken("EMUCUDA_ORDER is drawn, lazy or eager, not " + order);
  s.order = order == "lazy" ? Order::Lazy : order == "eager" ? Order::Eager : Order::Drawn;
  s.devices = (int)number("EMUCUDA_DEVICES", 1);
  s.capability = (int)number("EMUCUDA_CAPABILITY", 80);
  s.multiprocessors = (int)number("EMUCUDA_MULTIPROCESSORS", 4);
  s.version = (int)number("EMUCUDA_VERSION", 12020);
  s.memory = number("EMUCUDA_MEMORY", 1ull << 30);
  s.context_bytes = number("EMUCUDA_CONTEXT", 0);
  s.others_bytes = number("EMUCUDA_OTHERS", 0);
  s.optin_shared = number("EMUCUDA_SHARED_OPTIN", 166912);
  s.pinned_limit = number("EMUCUDA_PINNED_LIMIT", SIZE_MAX);
  s.copy_us = (unsigned)number("EMUCUDA_COPY_US", 0);
  s.kernel_us = (unsigned)number("EMUCUDA_KERNEL_US", 0);
  const std::string mma = variable("EMUCUDA_MMA", "nearest");
  if (mma != "nearest" && mma != "truncate") broken("EMUCUDA_MMA is nearest or truncate, not " + mma);
  emu::mma_sums = mma == "truncate" ? emu::MmaSums::Truncated : emu::MmaSums::Nearest;
  s.check_races = variable("EMUCUDA_RACES", "check") != "off";
  s.check_frames = variable("EMUCUDA_FRAMES", "check") != "off";
  return s;
}

struct Fault {
  std::string name;
  uint64_t from, to;  // calls, counted from 1
  CUresult error;
};

struct Calls {
  std::mutex lock;
  std::map<std::string, uint64_t> counts;
  std::vector<Fault> faults;
  std::vector<std::string> ignored;
  FILE* trace = nullptr;

  Calls() {
    // NAME:N:ERROR (the Nth call), NAME:N+:ERROR (from the Nth on), NAME:*:ERROR (all); a name's _v2 may be left out
    std::istringstream list(variable("EMUCUDA_FAIL"));
    for (std::string entry; std::getline(list, entry, ',');) {
      std::istringstream parts(entry);
      std::string name, which, error;
      if (!std::getline(parts, name, ':') || !std::getline(parts, which, ':') || !std::getline(parts, error, ':'))
        broken("EMUCUDA_FAIL takes NAME:N:ERROR, not " + entry);
      if (name.size() > 3 && name.substr(name.size() - 3) == "_v2") name.resize(name.size() - 3);
      Fault f = {name, 1, UINT64_MAX, atoi(error.c_str())};
      if (which != "*") {
        f.from = strtoull(which.c_str(), nullptr, 10);
        if (which.back() != '+') f.to = f.from;
      }
      faults.push_back(f);
    }
    std::istringstream names(variable("EMUCUDA_IGNORE"));
    for (std::string name; std::getline(names, name, ',');) ignored.push_back(name);
    const std::string path = variable("EMUCUDA_TRACE");
    if (!path.empty() && !(trace = fopen(path.c_str(), "a"))) broken("EMUCUDA_TRACE: cannot open " + path);
  }
  CUresult count(const char* name) {
    std::lock_guard<std::mutex> guard(lock);
    const uint64_t n = ++counts[name];
    for (const Fault& f : faults)
      if (f.name == name && n >= f.from && n <= f.to) return f.error;
    return CUDA_SUCCESS;
  }
};
Calls& calls() {
  static Calls* all = new Calls;  // never destroyed: a thread may call while the process ends
  return *all;
}

std::atomic<CUresult> lost{CUDA_SUCCESS};
thread_local CUcontext bound = nullptr;

}  // namespace

const Settings& settings() {
  static const Settings s = read_settings();
  return s;
}

bool is_sticky(CUresult error) {
  return (error >= 700 && error <= 719 && error != CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED &&
          error != CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED && error != CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES) ||
         error == CUDA_ERROR_ECC_UNCORRECTABLE || error == CUDA_ERROR_NVLINK_UNCORRECTABLE ||
         error == CUDA_ERROR_CONTAINED || error == CUDA_ERROR_UNKNOWN;
}
void die(CUresult error) {
  CUresult none = CUDA_SUCCESS;
  lost.compare_exchange_strong(none, error);
}
CUresult sticky() { return lost.load(); }

CUresult enter(const char* name, bool context) {
  const CUresult injected = calls().count(name);
  if (tracing()) trace(name + (injected ? " -> " + std::to_string(injected) : std::string()));
  if (injected) {
    if (is_sticky(injected)) die(injected);
    return injected;
  }
  if (!context) return CUDA_SUCCESS;
  if (sticky()) return sticky();
  return bound ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult executed(const char* kind) { return calls().count(kind); }
bool ignored(const char* name) {
  for (const std::string& n : calls().ignored)
    if (n == name) return true;
  return false;
}
bool tracing() { return calls().trace != nullptr; }
void trace(const std::string& line) {
  std::lock_guard<std::mutex> guard(calls().lock);
  fprintf(calls().trace, "%s\n", line.c_str());
  fflush(calls().trace);
}

void broken(const std::string& what) {
  fprintf(stderr, "emulated CUDA driver: %s\n", what.c_str());
  fflush(nullptr);
  abort();
}

CUcontext current_context() { return bound; }
void set_current_context(CUcontext context) { bound = context; }

}  // namespace driver
