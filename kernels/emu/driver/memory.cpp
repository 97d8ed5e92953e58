#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "../sanitizer.h"
#include "queue.h"
#include "state.h"

namespace driver {
namespace {

constexpr size_t PAGE = 4096;
constexpr unsigned char CANARY = 0xC5;
// As drivers have been seen to: blocks of a mebibyte and more have pages of 2 MiB to themselves, smaller ones are cut out of such pages.
constexpr size_t DEVICE_PAGE = 2 << 20, LARGE = 1 << 20;

struct Block {
  size_t bytes, mapped;
  void* base;
};
struct Memory {
  std::mutex lock;
  std::map<uint64_t, Block> device, host;  // by first address; host: allocated (base set) or registered
  size_t pages = settings().others_bytes, small = 0, pinned = 0;
  size_t used(size_t more_pages = 0, size_t more_small = 0) const {
    return pages + more_pages + (small + more_small + DEVICE_PAGE - 1) / DEVICE_PAGE * DEVICE_PAGE;
  }
};
Memory& memory() {
  static Memory* all = new Memory;
  return *all;
}

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

const std::pair<const uint64_t, Block>* find(const std::map<uint64_t, Block>& blocks, uint64_t at) {
  auto next = blocks.upper_bound(at);
  if (next == blocks.begin()) return nullptr;
  --next;
  return at < next->first + next->second.bytes ? &*next : nullptr;
}

// The first address is 512-byte aligned as the driver's; the end lies as close before a guard page as that allows.
Block map_block(size_t bytes, uint64_t* first) {
  const size_t body = round_up(bytes, PAGE), mapped = body + 2 * PAGE;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return {0, 0, nullptr};
  mprotect(base, PAGE, PROT_NONE);
  mprotect((char*)base + PAGE + body, PAGE, PROT_NONE);
  *first = (uint64_t)base + PAGE + (body - round_up(bytes, 512));
  return {bytes, mapped, base};
}

void check_canary(uint64_t first, const Block& b) {
  const unsigned char* slack = (const unsigned char*)first + b.bytes;
  for (size_t i = 0; i < round_up(b.bytes, 512) - b.bytes; i++)
    if (slack[i] != CANARY) broken("something wrote " + std::to_string(i) + " bytes past an allocation of " + std::to_string(b.bytes) + " bytes");
}

}  // namespace

CUresult device_alloc(CUdeviceptr* out, size_t bytes) {
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> guard(memory().lock);
  const bool large = round_up(bytes, 512) >= LARGE;
  if (memory().used(large ? round_up(bytes, DEVICE_PAGE) : 0, large ? 0 : round_up(bytes, 512)) > settings().memory) return CUDA_ERROR_OUT_OF_MEMORY;
  uint64_t first = 0;
  const Block b = map_block(bytes, &first);
  if (!b.base) return CUDA_ERROR_OUT_OF_MEMORY;
  memset((void*)first, 0xFF, bytes);
  memset((char*)first + bytes, CANARY, round_up(bytes, 512) - bytes);
  // Under AddressSanitizer reading there is noticed too.
  __asan_poison_memory_region((void*)(first + bytes), round_up(bytes, 512) - bytes);
  (large ? memory().pages : memory().small) += large ? round_up(bytes, DEVICE_PAGE) : round_up(bytes, 512);
  memory().device[first] = b;
  *out = first;
  return CUDA_SUCCESS;
}
CUresult device_free(CUdeviceptr p) {
  Block b;
  {
    std::lock_guard<std::mutex> guard(memory().lock);
    auto found = memory().device.find(p);
    if (found == memory().device.end()) return CUDA_ERROR_INVALID_VALUE;
    b = found->second;
    check_canary(p, b);
    memory().device.erase(found);
    const bool large = round_up(b.bytes, 512) >= LARGE;
    (large ? memory().pages : memory().small) -= large ? round_up(b.bytes, DEVICE_PAGE) : round_up(b.bytes, 512);
  }
  forget(p, p + b.bytes);
  // The addresses are never given out again: what still uses them is told apart from what comes next, and faults.
  madvise(b.base, b.mapped, MADV_DONTNEED);
  mprotect(b.base, b.mapped, PROT_NONE);
  return CUDA_SUCCESS;
}
size_t device_size(CUdeviceptr p) {
  std::lock_guard<std::mutex> guard(memory().lock);
  auto found = memory().device.find(p);
  return found == memory().device.end() ? 0 : found->second.bytes;
}
void charge(size_t bytes) {
  std::lock_guard<std::mutex> guard(memory().lock);
  memory().pages += bytes;
}
void uncharge(size_t bytes) {
  std::lock_guard<std::mutex> guard(memory().lock);
  memory().pages -= bytes;
}
void memory_info(size_t* free, size_t* total) {
  std::lock_guard<std::mutex> guard(memory().lock);
  *total = settings().memory;
  *free = settings().memory - std::min(settings().memory, memory().used());
}
bool on_device(uint64_t from, uint64_t bytes) {
  std::lock_guard<std::mutex> guard(memory().lock);
  const auto* block = find(memory().device, from);
  return block && from + bytes <= block->first + block->second.bytes;
}

CUresult host_register(void* p, size_t bytes) {
  if (!p || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> guard(memory().lock);
  const uint64_t first = (uint64_t)p;
  auto next = memory().host.lower_bound(first);
  if (find(memory().host, first) || (next != memory().host.end() && next->first < first + bytes)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  if (memory().pinned + bytes > settings().pinned_limit) return CUDA_ERROR_OUT_OF_MEMORY;
  memory().pinned += bytes;
  memory().host[first] = {bytes, 0, nullptr};
  return CUDA_SUCCESS;
}
CUresult host_unregister(void* p) {
  const uint64_t first = (uint64_t)p;
  size_t bytes = 0;
  {
    std::lock_guard<std::mutex> guard(memory().lock);
    auto found = memory().host.find(first);
    if (found == memory().host.end() || found->second.base) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    bytes = found->second.bytes;
  }
  const std::string use = pending_use(first, first + bytes);
  if (!use.empty() && !sticky()) broken("host memory is unregistered while this is pending: " + use);
  forget(first, first + bytes);
  std::lock_guard<std::mutex> guard(memory().lock);
  memory().host.erase(first);
  memory().pinned -= bytes;
  return CUDA_SUCCESS;
}
CUresult host_alloc(void** out, size_t bytes) {
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> guard(memory().lock);
  if (memory().pinned + bytes > settings().pinned_limit) return CUDA_ERROR_OUT_OF_MEMORY;
  void* p = mmap(nullptr, round_up(bytes, PAGE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  memory().pinned += bytes;
  memory().host[(uint64_t)p] = {bytes, round_up(bytes, PAGE), p};
  *out = p;
  return CUDA_SUCCESS;
}
CUresult host_free(void* p) {
  Block b;
  {
    std::lock_guard<std::mutex> guard(memory().lock);
    auto found = memory().host.find((uint64_t)p);
    if (found == memory().host.end() || !found->second.base) return CUDA_ERROR_INVALID_VALUE;
    b = found->second;
  }
  const std::string use = pending_use((uint64_t)p, (uint64_t)p + b.bytes);
  if (!use.empty() && !sticky()) broken("host memory is freed while this is pending: " + use);
  forget((uint64_t)p, (uint64_t)p + b.bytes);
  std::lock_guard<std::mutex> guard(memory().lock);
  memory().host.erase((uint64_t)p);
  memory().pinned -= b.bytes;
  munmap(p, b.mapped);
  return CUDA_SUCCESS;
}

Pinned pinned(const void* p, size_t bytes) {
  std::lock_guard<std::mutex> guard(memory().lock);
  const uint64_t from = (uint64_t)p, to = from + bytes;
  const auto* block = find(memory().host, from);
  if (block) return to <= block->first + block->second.bytes ? Pinned::Yes : Pinned::Partly;
  auto next = memory().host.upper_bound(from);
  return next != memory().host.end() && next->first < to ? Pinned::Partly : Pinned::No;
}
bool on_host(uint64_t from) {
  std::lock_guard<std::mutex> guard(memory().lock);
  return find(memory().host, from) != nullptr;
}

}  // namespace driver
