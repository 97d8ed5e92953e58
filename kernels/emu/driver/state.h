// Settings (from the environment), injected faults, the sticky error, and the way out when a contract is broken.
#pragma once
#include <atomic>
#include <string>

#include "abi.h"

namespace driver {

enum class Order {
  Drawn,  // a worker runs what may run at random times; a wait draws what runs before it returns
  Lazy,   // nothing runs before somebody waits for it, and then only what that wait needs
  Eager,  // as soon as it may
};

struct Settings {
  uint64_t seed;
  Order order;
  int devices, capability, multiprocessors, version;
  size_t memory, context_bytes, others_bytes, optin_shared, pinned_limit;
  unsigned copy_us, kernel_us;  // no copy, no kernel ends sooner after it could begin
  bool check_races, check_frames;
};
const Settings& settings();

// Every exported function begins with it: counts the call, traces it, gives the sticky or the injected error.
// `context`: the call needs a context bound to the thread.
CUresult enter(const char* name, bool context);
// The same counters for what runs on the device: "kernel", "copy".
CUresult executed(const char* kind);
// EMUCUDA_IGNORE names the call: it is to do nothing and say success. For tests of the tests.
bool ignored(const char* name);
bool tracing();
void trace(const std::string& line);

bool is_sticky(CUresult error);
void die(CUresult error);  // the context is lost: every later call returns `error`
CUresult sticky();

// A use no real driver would report in time (or at all): says what and ends the process.
[[noreturn]] void broken(const std::string& what);

CUcontext current_context();
void set_current_context(CUcontext context);

}  // namespace driver
