// A CPU allocator for PyTorch whose memory is poisoned and lies between red zones.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include "memory.h"

namespace {

struct GuardedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* p = bytes ? simt::device_malloc(bytes) : nullptr;
    return {p, p, &simt::device_free, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &simt::device_free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

// Tensors made before or after this call are freed by the allocator that they came from.
extern "C" __attribute__((visibility("default"))) void simt_guard_memory(int on) {
  constexpr uint8_t kHighestPriority = 255;
  static auto* const guarded = new GuardedAllocator;
  static auto* const previous = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? guarded : previous, kHighestPriority);
}
