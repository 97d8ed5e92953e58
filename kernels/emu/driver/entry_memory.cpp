// The driver's exported functions, second part: memory and copies.
#include <cstring>
#include <memory>

#include "abi.h"
#include "memory.h"
#include "queue.h"
#include "state.h"

using namespace driver;

#define ENTER_CONTEXT(name) \
  if (const CUresult error = enter(name, true)) return error

namespace {

// Of all bytes; order matters, speed too.
uint64_t digest(const void* p, size_t bytes) {
  const unsigned char* b = (const unsigned char*)p;
  uint64_t h[4] = {1, 2, 3, 4};
  size_t i = 0;
  for (; i + 32 <= bytes; i += 32)
    for (int l = 0; l < 4; l++) {
      uint64_t w;
      memcpy(&w, b + i + 8 * l, 8);
      h[l] = (h[l] ^ w) * 0x9E3779B97F4A7C15ull;
      h[l] ^= h[l] >> 29;
    }
  for (; i < bytes; i++) h[0] = (h[0] ^ b[i]) * 0x100000001B3ull;
  return h[0] ^ h[1] * 3 ^ h[2] * 5 ^ h[3] * 7;
}

std::string what(const char* name, size_t bytes) { return std::string(name) + " of " + std::to_string(bytes) + " bytes"; }
Access range(const void* p, size_t bytes, bool write) { return {(uint64_t)p, (uint64_t)p + bytes, write}; }
Access range(CUdeviceptr p, size_t bytes, bool write) { return {p, p + bytes, write}; }

CUresult to_device(CUdeviceptr to, const void* from, size_t bytes, CUstream stream, bool waits) {
  if (!stream_ok(stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (bytes == 0) return CUDA_SUCCESS;
  if (!from || !on_device(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
  const Pinned where = pinned(from, bytes);
  if (where == Pinned::Partly) return CUDA_ERROR_INVALID_VALUE;
  Item item = {Item::Copy, what("copy to the device", bytes), {range(to, bytes, true)}, nullptr, nullptr, {}};
  if (where == Pinned::No) {
    // The driver takes the bytes before it returns; when they arrive is another matter.
    auto staged = std::make_shared<std::string>((const char*)from, bytes);
    item.run = [=] { return memcpy((void*)to, staged->data(), bytes), CUDA_SUCCESS; };
    submit(stream, std::move(item));
    return CUDA_SUCCESS;
  }
  item.accesses.push_back(range(from, bytes, false));
  // What the device is still to write there changes it rightly, where the streams are ordered: that is another check.
  const bool check = settings().check_frames && pending_use((uint64_t)from, (uint64_t)from + bytes, true).empty();
  const uint64_t before = check ? digest(from, bytes) : 0;
  const std::string name = item.what;
  item.run = [=] {
    if (check && digest(from, bytes) != before) broken("the host changed pinned memory before this was done: " + name);
    memcpy((void*)to, from, bytes);
    return CUDA_SUCCESS;
  };
  const TokenP token = submit(stream, std::move(item));
  return waits ? wait(token) : CUDA_SUCCESS;
}

CUresult to_host(void* to, CUdeviceptr from, size_t bytes, CUstream stream, bool waits) {
  if (!stream_ok(stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (bytes == 0) return CUDA_SUCCESS;
  if (!to || !on_device(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
  const Pinned where = pinned(to, bytes);
  if (where == Pinned::Partly) return CUDA_ERROR_INVALID_VALUE;
  Item item = {Item::Copy, what("copy to the host", bytes), {range(from, bytes, false), range(to, bytes, true)}, nullptr, nullptr, {}};
  item.run = [=] { return memcpy(to, (const void*)from, bytes), CUDA_SUCCESS; };
  // Nobody may read it yet, but copies that come before this one.
  if (where == Pinned::Yes && !waits && settings().check_frames && pending_use((uint64_t)to, (uint64_t)to + bytes).empty())
    memset(to, 0xFF, bytes);
  const TokenP token = submit(stream, std::move(item));
  return waits || where == Pinned::No ? wait(token) : CUDA_SUCCESS;
}

CUresult on_the_device(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  if (!stream_ok(stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (bytes == 0) return CUDA_SUCCESS;
  if (!on_device(to, bytes) || !on_device(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
  Item item = {Item::Copy, what("copy on the device", bytes), {range(to, bytes, true), range(from, bytes, false)}, nullptr, nullptr, {}};
  item.run = [=] { return memcpy((void*)to, (const void*)from, bytes), CUDA_SUCCESS; };
  submit(stream, std::move(item));
  return CUDA_SUCCESS;
}

template <class V>
CUresult fill(CUdeviceptr to, V value, size_t count, CUstream stream) {
  if (!stream_ok(stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (count == 0) return CUDA_SUCCESS;
  if (to % sizeof(V) || !on_device(to, count * sizeof(V))) return CUDA_ERROR_INVALID_VALUE;
  Item item = {Item::Copy, what("memset", count * sizeof(V)), {range(to, count * sizeof(V), true)}, nullptr, nullptr, {}};
  item.run = [=] {
    for (size_t i = 0; i < count; i++) ((V*)to)[i] = value;
    return CUDA_SUCCESS;
  };
  submit(stream, std::move(item));
  return CUDA_SUCCESS;
}

}  // namespace

// ---- allocations ----

EXPORT CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  ENTER_CONTEXT("cuMemGetInfo");
  memory_info(free, total);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
  ENTER_CONTEXT("cuMemAlloc");
  return device_alloc(out, bytes);
}
EXPORT CUresult cuMemFree_v2(CUdeviceptr p) {
  ENTER_CONTEXT("cuMemFree");
  if (p == 0) return CUDA_SUCCESS;
  // The driver happens to wait here, and promises nothing.
  const std::string use = pending_use(p, p + device_size(p));
  if (!use.empty()) broken("device memory is freed while this is pending: " + use);
  return device_free(p);
}
EXPORT CUresult cuMemAllocAsync(CUdeviceptr* out, size_t bytes, CUstream stream) {
  ENTER_CONTEXT("cuMemAllocAsync");
  return stream_ok(stream) ? device_alloc(out, bytes) : CUDA_ERROR_INVALID_HANDLE;
}
EXPORT CUresult cuMemFreeAsync(CUdeviceptr p, CUstream stream) {
  ENTER_CONTEXT("cuMemFreeAsync");
  if (!stream_ok(stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (p == 0) return CUDA_SUCCESS;
  if (!on_device(p, 1)) return CUDA_ERROR_INVALID_VALUE;
  submit(stream, {Item::Mark, "free", {range(p, 1, true)}, [=] { return device_free(p); }, nullptr, {}});
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostRegister_v2(void* p, size_t bytes, unsigned) {
  ENTER_CONTEXT("cuMemHostRegister");
  return host_register(p, bytes);
}
EXPORT CUresult cuMemHostUnregister(void* p) {
  ENTER_CONTEXT("cuMemHostUnregister");
  return host_unregister(p);
}
EXPORT CUresult cuMemHostAlloc(void** out, size_t bytes, unsigned) {
  ENTER_CONTEXT("cuMemHostAlloc");
  return host_alloc(out, bytes);
}
EXPORT CUresult cuMemAllocHost_v2(void** out, size_t bytes) {
  ENTER_CONTEXT("cuMemAllocHost");
  return host_alloc(out, bytes);
}
EXPORT CUresult cuMemFreeHost(void* p) {
  ENTER_CONTEXT("cuMemFreeHost");
  return host_free(p);
}
EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* p, unsigned) {
  ENTER_CONTEXT("cuMemHostGetDevicePointer");
  if (!on_host((uint64_t)p)) return CUDA_ERROR_INVALID_VALUE;
  *out = (CUdeviceptr)p;
  return CUDA_SUCCESS;
}

// ---- copies ----

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  ENTER_CONTEXT("cuMemcpyHtoDAsync");
  return to_device(to, from, bytes, stream, false);
}
EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  ENTER_CONTEXT("cuMemcpyHtoD");
  return to_device(to, from, bytes, nullptr, true);
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  ENTER_CONTEXT("cuMemcpyDtoHAsync");
  return to_host(to, from, bytes, stream, false);
}
EXPORT CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  ENTER_CONTEXT("cuMemcpyDtoH");
  return to_host(to, from, bytes, nullptr, true);
}
EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  ENTER_CONTEXT("cuMemcpyDtoDAsync");
  return on_the_device(to, from, bytes, stream);
}
EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  ENTER_CONTEXT("cuMemcpyDtoD");
  return on_the_device(to, from, bytes, nullptr);
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  ENTER_CONTEXT("cuMemsetD8Async");
  return fill(to, value, count, stream);
}
EXPORT CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
  ENTER_CONTEXT("cuMemsetD8");
  return fill(to, value, count, nullptr);
}
EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  ENTER_CONTEXT("cuMemsetD32Async");
  return fill(to, value, count, stream);
}
EXPORT CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
  ENTER_CONTEXT("cuMemsetD32");
  return fill(to, value, count, nullptr);
}
