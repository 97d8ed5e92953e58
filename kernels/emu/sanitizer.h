// What the engine tells AddressSanitizer, or nobody: with EMU_PLAIN the program or library is built without it.
#pragma once
#ifdef EMU_PLAIN
#include <cstddef>
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_poison_memory_region(const void*, size_t) {}
inline void __asan_unpoison_memory_region(const void*, size_t) {}
inline void* __asan_region_is_poisoned(const void*, size_t) { return nullptr; }
#else
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
