#include "table.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace driver {
namespace {

// The text of `"key": ` up to the end of its string, number or bracket.
std::string field(const std::string& line, const std::string& key) {
  const size_t found = line.find("\"" + key + "\": ");
  if (found == std::string::npos) broken("launch.json: no " + key + " in " + line);
  size_t from = found + key.size() + 4, to = from;
  if (line[from] == '"') return line.substr(from + 1, line.find('"', from + 1) - from - 1);
  if (line[from] == '[') {
    int depth = 0;
    do {
      depth += line[to] == '[' ? 1 : line[to] == ']' ? -1 : 0;
      to++;
    } while (depth > 0);
    return line.substr(from, to - from);
  }
  while (isdigit(line[to])) to++;
  return line.substr(from, to - from);
}
std::vector<std::string> strings(const std::string& text) {
  std::vector<std::string> found;
  for (size_t from = text.find('"'); from != std::string::npos;) {
    const size_t to = text.find('"', from + 1);
    found.push_back(text.substr(from + 1, to - from - 1));
    from = text.find('"', to + 1);
  }
  return found;
}
size_t width(const std::string& type) { return type == "int" || type == "float" ? 4 : 8; }

// Formulas of ceil(a/b), names and numbers joined by '*' and '+'; sums stand in brackets.
struct Formula {
  const char* at;
  const KernelEntry& kernel;
  void** params;
  bool known = true;

  long long product() {
    long long value = factor();
    while (*at == '*') at++, value *= factor();
    return value;
  }
  long long sum() {
    long long value = product();
    while (*at == '+') at++, value += product();
    return value;
  }
  long long factor() {
    if (*at == '(') {
      at++;
      const long long value = sum();
      at++;  // ')'
      return value;
    }
    if (!strncmp(at, "ceil(", 5)) {
      at += 5;
      const long long a = product();
      at++;  // '/'
      const long long b = product();
      at++;  // ')'
      return b ? (a + b - 1) / b : 0;
    }
    if (isdigit(*at)) return strtoll(at, const_cast<char**>(&at), 10);
    std::string name;
    while (isalnum(*at) || *at == '_') name += *at++;
    for (size_t i = 0; i < kernel.args.size(); i++)
      if (kernel.args[i].name == name && !kernel.args[i].pointer()) return kernel.args[i].type == "int" ? *(int*)params[i] : *(long long*)params[i];
    known = false;
    return 1;
  }
};

}  // namespace

KernelEntry parse_entry(const std::string& kernel, const std::string& half, const std::string& line, const std::vector<size_t>& widths) {
  KernelEntry e;
  e.symbol = kernel + "_" + half;
  e.module = field(line, "module") + "_" + half;
  const std::vector<std::string> args = strings(field(line, "args")), grid = strings(field(line, "grid"));
  for (size_t i = 0; i + 1 < args.size(); i += 2) e.args.push_back({args[i], args[i + 1]});
  e.block = (unsigned)atoi(field(line, "block").c_str());
  e.shared = (unsigned)atoi(field(line, "shared").c_str());
  e.grid_x = grid.at(0), e.grid_y = grid.at(1);
  bool agree = widths.size() == e.args.size();
  for (size_t i = 0; agree && i < widths.size(); i++) agree = widths[i] == width(e.args[i].type);
  if (!agree) broken("launch.json and the source disagree about the arguments of " + kernel);
  return e;
}

const std::map<std::string, KernelEntry>& kernel_table() {
  static const std::map<std::string, KernelEntry>* table = [] {
    auto* all = new std::map<std::string, KernelEntry>;
    add_bf16(*all);
    add_f16(*all);
    return all;
  }();
  return *table;
}

long long evaluate_grid(const std::string& formula, const KernelEntry& kernel, void** params) {
  Formula f = {formula.c_str(), kernel, params};
  const long long value = f.product();
  if (*f.at) broken("launch.json: cannot read the grid " + formula);
  return f.known ? value : -1;
}

}  // namespace driver
