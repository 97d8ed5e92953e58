// The kernels by symbol: what launch.json says of each, and the same source compiled as C++.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace driver {

struct Argument {
  std::string name, type;
  bool pointer() const { return type.back() == '*'; }
  bool reads_only() const { return type.compare(0, 6, "const ") == 0; }
};
struct KernelEntry {
  std::string symbol, module;
  std::vector<Argument> args;
  unsigned block, shared;
  std::string grid_x, grid_y;
  // The call with the values `params` points to now.
  std::function<std::function<void()>(void** params)> bind;
};

// From launch.json's line of a kernel; `widths`: bytes of the C++ function's arguments, which must agree.
KernelEntry parse_entry(const std::string& kernel, const std::string& half, const std::string& line, const std::vector<size_t>& widths);
const std::map<std::string, KernelEntry>& kernel_table();

// The value of "(ceil(n0/64)+ceil(n1/64))*ceil(rows/32)" with the launch's integer arguments; -1 where it names something else.
long long evaluate_grid(const std::string& formula, const KernelEntry& kernel, void** params);

void add_bf16(std::map<std::string, KernelEntry>& table);
void add_f16(std::map<std::string, KernelEntry>& table);

}  // namespace driver
