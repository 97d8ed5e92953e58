#include "queue.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <set>
#include <thread>

#include "state.h"

namespace driver {
namespace {

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

struct Record {
  uint32_t at;  // the item's number in its stream
  Access access;
  std::string what;
};

struct Queues {
  std::mutex lock;
  std::condition_variable work, done;
  std::vector<EmuStream*> streams;  // index 0: the default stream
  std::set<CUstream> live;
  std::vector<TokenP> wanted;  // what callers wait for now
  std::vector<std::vector<Record>> records;  // by stream
  Clock seen;  // what the host knows to be done: it comes before everything submitted from then on
  uint64_t random;
  bool started = false, stopping = false, running = false;
  bool wakes = false;  // something was submitted or is waited for since the worker last looked
};
// Never destroyed: the worker and late callers may use it while the process ends.
Queues& q() {
  static Queues* all = [] {
    Queues* queues = new Queues;
    queues->random = settings().seed * 0x9E3779B97F4A7C15ull + 0x7777;
    return queues;
  }();
  return *all;
}

uint64_t draw() {
  uint64_t& r = q().random;
  r ^= r << 13, r ^= r >> 7, r ^= r << 17;
  return r * 0x2545F4914F6CDD1Dull >> 11;
}

void merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}
uint32_t at(const Clock& clock, int stream) { return (size_t)stream < clock.size() ? clock[(size_t)stream] : 0; }

bool overlap(const Access& a, const Access& b) { return a.from < b.to && b.from < a.to; }

// What the host has seen done is ordered before everything to come.
void drop_known(std::vector<Record>& list, int stream) {
  const uint32_t known = at(q().seen, stream);
  list.erase(std::remove_if(list.begin(), list.end(), [&](const Record& r) { return r.at <= known; }), list.end());
}

void check_races(int stream, const Clock& clock, const Item& item) {
  for (size_t s = 0; s < q().records.size(); s++) {
    if ((int)s == stream) continue;
    drop_known(q().records[s], (int)s);
    for (const Record& r : q().records[s]) {
      if (r.at <= at(clock, (int)s)) continue;
      for (const Access& a : item.accesses)
        if ((a.write || r.access.write) && overlap(a, r.access))
          broken("race: " + item.what + " (stream " + std::to_string(stream) + ") " + (a.write ? "writes" : "reads") + " what " + r.what +
                 " (stream " + std::to_string(s) + ") " + (r.access.write ? "writes" : "reads") + ", and no event orders them");
    }
  }
}

EmuStream* default_stream() {
  if (q().streams.empty()) {
    EmuStream* s = new EmuStream{0, 0, 0, false, {}, nullptr, {}};
    q().streams.push_back(s);
    q().records.emplace_back();
  }
  return q().streams[0];
}
EmuStream* resolve(CUstream stream) { return (uintptr_t)stream <= 2 ? default_stream() : stream; }

bool runnable(EmuStream* s) {
  if (s->items.empty()) return false;
  for (const TokenP& t : s->items.front().after)
    if (!t->done) return false;
  return true;
}

// The streams whose head must run, sooner or later, for `token` to be done.
void needed_for(const TokenP& token, std::set<EmuStream*>& streams) {
  if (token->done || !token->stream || !streams.insert(token->stream).second) return;
  for (const Item& item : token->stream->items) {
    for (const TokenP& t : item.after) needed_for(t, streams);
    if (item.token == token) break;
  }
}

// The next head to run, or null; `later`: when something may become possible.
EmuStream* choose(double* later) {
  Queues& all = q();
  all.wanted.erase(std::remove_if(all.wanted.begin(), all.wanted.end(), [](const TokenP& t) { return t->done; }), all.wanted.end());
  const bool asked = !all.wanted.empty();
  const Order order = settings().order;
  std::set<EmuStream*> needed;
  const bool only_needed = asked && order != Order::Eager && (order == Order::Lazy || draw() % 2);
  if (only_needed)
    for (const TokenP& t : all.wanted) needed_for(t, needed);
  EmuStream* best = nullptr;
  uint64_t count = 0;
  const double time = now();
  for (EmuStream* s : all.streams) {
    if (!runnable(s) || (only_needed && !needed.count(s))) continue;
    Item& head = s->items.front();
    if (head.ready_at == 0) {
      const unsigned us = head.kind == Item::Copy ? settings().copy_us : head.kind == Item::Kernel ? settings().kernel_us : 0;
      head.ready_at = time + us * 1e-6;
    }
    if (head.ready_at > time) {
      *later = std::min(*later, head.ready_at);
      continue;
    }
    if (draw() % ++count == 0) best = s;
  }
  return best;
}

void finish(EmuStream* s, CUresult result) {
  Item item = std::move(s->items.front());
  s->items.pop_front();
  item.token->done = true;
  item.token->when = now();
  if (result == CUDA_SUCCESS) return;
  die(result);
  for (EmuStream* each : q().streams) {
    for (Item& i : each->items) i.token->done = true;
    each->items.clear();
  }
}

void run_head(EmuStream* s, std::unique_lock<std::mutex>& guard) {
  Item& item = s->items.front();
  q().running = true;
  guard.unlock();
  CUresult result = CUDA_SUCCESS;
  if (item.kind != Item::Mark) result = executed(item.kind == Item::Kernel ? "kernel" : "copy");
  if (result == CUDA_SUCCESS && item.run) result = item.run();
  guard.lock();
  q().running = false;
  finish(s, result);
  q().done.notify_all();
}

void worker() {
  using namespace std::chrono;
  Queues& all = q();
  std::unique_lock<std::mutex> guard(all.lock);
  while (!all.stopping) {
    const bool asked = !all.wanted.empty();
    if (!asked && settings().order != Order::Eager) {
      // Nobody waits: idle for a drawn time. Lazy: so long that only what nobody ever waits for (a host function) runs now.
      const microseconds pause(settings().order == Order::Lazy ? 5000 : draw() % 4 ? 0 : draw() % 2000);
      if (pause.count() && all.work.wait_for(guard, pause, [&] { return all.stopping || !all.wanted.empty(); })) continue;
    }
    double later = now() + 0.05;
    all.wakes = false;
    if (EmuStream* s = choose(&later)) {
      run_head(s, guard);
      continue;
    }
    const bool waits = std::any_of(all.streams.begin(), all.streams.end(), [](EmuStream* s) { return !s->items.empty(); });
    const auto woken = [&] { return all.stopping || all.wakes; };
    if (waits)
      all.work.wait_for(guard, duration<double>(std::max(0.0, later - now())), woken);
    else
      all.work.wait(guard, woken);
  }
  all.done.notify_all();
}

void stop() {
  std::unique_lock<std::mutex> guard(q().lock);
  q().stopping = true;
  q().work.notify_all();
  q().done.wait(guard, [] { return !q().running; });
}

void start() {
  if (q().started) return;
  q().started = true;
  std::thread(worker).detach();
  atexit(stop);  // before the engine's statics go
}

void wake() {
  q().wakes = true;
  q().work.notify_all();
}

CUresult wait_locked(const std::vector<TokenP>& tokens, std::unique_lock<std::mutex>& guard) {
  Queues& all = q();
  const auto finished = [&] { return std::all_of(tokens.begin(), tokens.end(), [](const TokenP& t) { return !t || t->done; }); };
  if (!finished()) {
    for (const TokenP& t : tokens)
      if (t) all.wanted.push_back(t);
    wake();
    all.done.wait(guard, finished);
  }
  for (const TokenP& t : tokens)
    if (t) merge(all.seen, t->clock);
  return sticky();
}

}  // namespace

CUresult stream_create(CUstream* out, unsigned flags, int priority) {
  std::lock_guard<std::mutex> guard(q().lock);
  default_stream();
  EmuStream* s = new EmuStream{(int)q().streams.size(), flags, priority, false, {}, nullptr, {}};
  q().streams.push_back(s);
  q().records.emplace_back();
  q().live.insert(s);
  *out = s;
  return CUDA_SUCCESS;
}
// What is queued still runs; the object stays, so that tokens may point to it.
CUresult stream_destroy(CUstream stream) {
  std::lock_guard<std::mutex> guard(q().lock);
  return q().live.erase(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
bool stream_ok(CUstream stream) {
  std::lock_guard<std::mutex> guard(q().lock);
  return (uintptr_t)stream <= 2 || q().live.count(stream);
}

TokenP submit(CUstream stream, Item item) {
  std::lock_guard<std::mutex> guard(q().lock);
  start();
  EmuStream* s = resolve(stream);
  // The default stream and the streams made without NON_BLOCKING wait for each other.
  for (EmuStream* other : q().streams) {
    const bool ordered = other != s && other->tail && (s->index == 0 ? !(other->flags & CU_STREAM_NON_BLOCKING)
                                                                      : other->index == 0 && !(s->flags & CU_STREAM_NON_BLOCKING));
    if (ordered) item.after.push_back(other->tail);
  }
  merge(s->clock, q().seen);
  for (const TokenP& t : item.after) merge(s->clock, t->clock);
  if (s->clock.size() <= (size_t)s->index) s->clock.resize((size_t)s->index + 1);
  if (settings().check_races) check_races(s->index, s->clock, item);
  const uint32_t number = ++s->clock[(size_t)s->index];
  if (settings().check_races) {
    auto& own = q().records[(size_t)s->index];
    if (own.size() > 8192) drop_known(own, s->index);
    for (const Access& a : item.accesses) own.push_back({number, a, item.what});
  }
  item.token = std::make_shared<Token>();
  item.token->clock = s->clock;
  item.token->stream = s;
  s->tail = item.token;
  TokenP token = item.token;
  s->items.push_back(std::move(item));
  wake();
  return token;
}

CUresult stream_wait(CUstream stream, const TokenP& token) {
  Item item = {Item::Mark, "wait for an event", {}, nullptr, nullptr, {}};
  if (token) item.after.push_back(token);
  submit(stream, std::move(item));
  return CUDA_SUCCESS;
}

CUresult wait(const TokenP& token) {
  std::unique_lock<std::mutex> guard(q().lock);
  return wait_locked({token}, guard);
}
CUresult wait_stream(CUstream stream) {
  std::unique_lock<std::mutex> guard(q().lock);
  return wait_locked({resolve(stream)->tail}, guard);
}
CUresult wait_all() {
  std::unique_lock<std::mutex> guard(q().lock);
  std::vector<TokenP> tails;
  for (EmuStream* s : q().streams) tails.push_back(s->tail);
  return wait_locked(tails, guard);
}

CUresult query(const TokenP& token) {
  std::unique_lock<std::mutex> guard(q().lock);
  if (sticky()) return sticky();
  if (!token) return CUDA_SUCCESS;
  if (!token->done) {
    if (draw() % 4 == 0) {  // who polls waits, too
      q().wanted.push_back(token);
      wake();
    }
    return CUDA_ERROR_NOT_READY;
  }
  merge(q().seen, token->clock);
  return CUDA_SUCCESS;
}
CUresult query_stream(CUstream stream) {
  TokenP tail;
  {
    std::lock_guard<std::mutex> guard(q().lock);
    tail = resolve(stream)->tail;
  }
  return query(tail);
}

void forget(uint64_t from, uint64_t to) {
  std::lock_guard<std::mutex> guard(q().lock);
  for (auto& list : q().records)
    list.erase(std::remove_if(list.begin(), list.end(), [&](const Record& r) { return overlap(r.access, {from, to, true}); }), list.end());
}

std::string pending_use(uint64_t from, uint64_t to, bool writes_only) {
  std::lock_guard<std::mutex> guard(q().lock);
  for (EmuStream* s : q().streams)
    for (const Item& item : s->items)
      for (const Access& a : item.accesses)
        if (overlap(a, {from, to, true}) && (a.write || !writes_only)) return item.what;
  return "";
}

}  // namespace driver
