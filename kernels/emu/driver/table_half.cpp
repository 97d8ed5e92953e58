// Every kernel of one 16-bit type under its symbol. Built twice, as kernels.cpp, which it contains.
#include "../kernels.cpp"

#include <tuple>
#include <utility>

#include "table.h"

namespace {

template <class... A, size_t... I>
std::function<void()> with_values(void (*f)(A...), void** params, std::index_sequence<I...>) {
  return [f, values = std::tuple<A...>(*(A*)params[I]...)] { std::apply(f, values); };
}

template <class... A>
driver::KernelEntry entry(const char* kernel, const char* half, const char* line, void (*f)(A...)) {
  driver::KernelEntry e = driver::parse_entry(kernel, half, line, {sizeof(A)...});
  e.bind = [f](void** params) { return with_values(f, params, std::index_sequence_for<A...>()); };
  return e;
}

}  // namespace

namespace driver {
#ifdef TP_F16
#define HALF "f16"
void add_f16(std::map<std::string, KernelEntry>& table) {
#else
#define HALF "bf16"
void add_bf16(std::map<std::string, KernelEntry>& table) {
#endif
#define KERNEL(name, line)                                           \
  {                                                                  \
    KernelEntry e = entry(#name, HALF, line, TP_KERNEL(name));       \
    table[e.symbol] = e;                                             \
  }
#include "launch_table.inc"  // made by build.sh of launch.json: KERNEL(name, "its line")
}
}  // namespace driver
