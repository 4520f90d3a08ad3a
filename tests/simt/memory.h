// Memory of the simulated device: poisoned where it is not yet written, with red zones around it.
#pragma once

#include <link.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "fibers.h"  // SIMT_ASAN

#pragma GCC visibility push(hidden)
namespace simt {

constexpr size_t kGuardBytes = 512;  // on each side of an allocation; also its alignment
constexpr unsigned char kPoison = 0xCB;

// The byte that belongs at an address in a red zone. It differs from place to place, so that a copy
// from one red zone to another shows.
inline unsigned char canary(const char* p) {
  return static_cast<unsigned char>(reinterpret_cast<uintptr_t>(p) * 0x9E3779B97F4A7C15u >> 56);
}

inline void fill_red_zone(char* zone) {
  for (char* p = zone; p < zone + kGuardBytes; ++p) *p = static_cast<char>(canary(p));
}

// The first byte of a red zone that was written, or null.
inline const char* first_damage(const char* zone) {
  for (const char* p = zone; p < zone + kGuardBytes; ++p)
    if (static_cast<unsigned char>(*p) != canary(p)) return p;
  return nullptr;
}

struct Allocations {
  std::mutex mutex;
  std::map<char*, size_t> bytes;
};
// Never destroyed: tensors may be freed when the process ends.
inline Allocations& allocations() {
  static auto* all = new Allocations;
  return *all;
}

inline void* device_malloc(size_t bytes) {
  void* raw = nullptr;
  if (posix_memalign(&raw, kGuardBytes, bytes + 2 * kGuardBytes) != 0) throw std::bad_alloc();
  char* p = static_cast<char*>(raw) + kGuardBytes;
  std::memset(p, kPoison, bytes);
  fill_red_zone(p - kGuardBytes);
  fill_red_zone(p + bytes);
#ifdef SIMT_ASAN
  __asan_poison_memory_region(raw, kGuardBytes);
  __asan_poison_memory_region(p + bytes, kGuardBytes);
#endif
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  allocations().bytes[p] = bytes;
  return p;
}

inline void device_free(void* pointer) {
  char* p = static_cast<char*>(pointer);
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  const auto found = allocations().bytes.find(p);
  if (found == allocations().bytes.end()) return;
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(p - kGuardBytes, found->second + 2 * kGuardBytes);
#endif
  allocations().bytes.erase(found);
  std::free(p - kGuardBytes);
}

// What was written outside an allocation, or "". With AddressSanitizer there is nothing to look
// for: it has stopped the program at the access itself.
inline std::string damaged_red_zone(const char* dynamic_shared) {
#ifndef SIMT_ASAN
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  for (const auto& [p, bytes] : allocations().bytes) {
    const char* damaged = first_damage(p - kGuardBytes);
    if (!damaged) damaged = first_damage(p + bytes);
    if (!damaged) continue;
    fill_red_zone(p - kGuardBytes);  // later launches are not to blame
    fill_red_zone(p + bytes);
    return "out-of-bounds write: byte " + std::to_string(damaged - p) + " of " +
           (p == dynamic_shared ? "dynamic shared memory" : "an allocation") + " of " +
           std::to_string(bytes) + " bytes";
  }
#endif
  (void)dynamic_shared;
  return "";
}

// Static __shared__ variables are thread_local: they make up the zero-initialised part of this
// library's thread-local storage, which holds nothing else.
inline std::pair<char*, size_t> find_static_shared() {
  static thread_local char probe;
  probe = 0;  // the first use by a CPU thread allocates the storage
  std::pair<char*, size_t> found{&probe, 0};
  const auto visit = [](dl_phdr_info* info, size_t, void* data) {
    auto& result = *static_cast<std::pair<char*, size_t>*>(data);
    char* storage = static_cast<char*>(info->dlpi_tls_data);
    for (int i = 0; storage && i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      if (segment.p_type != PT_TLS || result.first < storage ||
          result.first >= storage + segment.p_memsz)
        continue;
      result = {storage + segment.p_filesz, segment.p_memsz - segment.p_filesz};
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}

}  // namespace simt
#pragma GCC visibility pop
