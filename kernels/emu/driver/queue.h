// Streams and events. Each stream is a queue; one thread of the driver runs the heads of queues, in a seeded random order among
// those whose dependencies are done: a copy or a kernel happens as early or as late as the real driver allows, never as the
// caller happens to have written it.
#pragma once
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"

namespace driver {

// What happened before a point of a stream: per stream (by index), how many of its items.
using Clock = std::vector<uint32_t>;

struct Token {
  bool done = false;
  double when = 0;  // seconds, once done
  Clock clock;
  EmuStream* stream = nullptr;
};
using TokenP = std::shared_ptr<Token>;

struct Access {
  uint64_t from, to;  // addresses; a kernel's pointer stands for the byte it points to
  bool write;
};

struct Item {
  enum Kind { Kernel, Copy, Mark } kind;
  std::string what;
  std::vector<Access> accesses;
  std::function<CUresult()> run;
  TokenP token;
  std::vector<TokenP> after;
  double ready_at = 0;
};

}  // namespace driver

struct EmuStream {
  int index;
  unsigned flags;
  int priority;
  bool destroyed = false;
  std::deque<driver::Item> items;
  driver::TokenP tail;
  driver::Clock clock;
};
struct EmuEvent {
  unsigned flags;
  driver::TokenP recorded;
};

namespace driver {

CUresult stream_create(CUstream* out, unsigned flags, int priority);
CUresult stream_destroy(CUstream stream);
bool stream_ok(CUstream stream);

// Appends to the stream's queue; checks the accesses against what nothing orders before them.
TokenP submit(CUstream stream, Item item);
CUresult stream_wait(CUstream stream, const TokenP& token);

CUresult wait(const TokenP& token);  // null: nothing to wait for
CUresult wait_stream(CUstream stream);
CUresult wait_all();
CUresult query(const TokenP& token);
CUresult query_stream(CUstream stream);

// Forgets accesses to memory that is no longer what it was.
void forget(uint64_t from, uint64_t to);
// A pending item that reads or writes the range (or only one that writes it), or "".
std::string pending_use(uint64_t from, uint64_t to, bool writes_only = false);

}  // namespace driver
