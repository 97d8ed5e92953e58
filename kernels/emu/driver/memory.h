// Device memory: host pages of the emulator, exactly as long as asked for, between guard pages, full of NaN when allocated.
#pragma once
#include <string>

#include "abi.h"

namespace driver {

CUresult device_alloc(CUdeviceptr* out, size_t bytes);
CUresult device_free(CUdeviceptr p);
size_t device_size(CUdeviceptr p);  // of the allocation that begins there; 0: none does
void memory_info(size_t* free, size_t* total);
void charge(size_t bytes);  // to nobody: what the context itself takes
void uncharge(size_t bytes);
bool on_device(uint64_t from, uint64_t bytes);  // within one allocation

CUresult host_alloc(void** out, size_t bytes);
CUresult host_free(void* p);
CUresult host_register(void* p, size_t bytes);
CUresult host_unregister(void* p);
enum class Pinned { No, Yes, Partly };
Pinned pinned(const void* p, size_t bytes);
bool on_host(uint64_t from);  // in pinned memory, which kernels may read

}  // namespace driver
