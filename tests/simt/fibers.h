// Fibers: functions with stacks of their own, between which one CPU thread switches by hand.
//
// A switch by _setjmp/_longjmp takes 30 ns; one by swapcontext takes 385 ns, because it makes
// system calls. So ucontext only puts a fiber onto its stack, and a fiber that has ended its work
// is given new work instead of being started again. AddressSanitizer is told of every switch.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "simt: compile with -U_FORTIFY_SOURCE, whose longjmp refuses to change stacks"
#endif
#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define SIMT_ASAN
#endif
#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#pragma GCC visibility push(hidden)
namespace simt {

constexpr size_t kStackBytes = 128 * 1024;
constexpr uint64_t kStackMark = 0x51a7c4edbadc0ffe;  // at the far end of every stack

struct Fiber {
  jmp_buf context;
  char* stack = nullptr;
  bool started = false;
  void* fake_stack = nullptr;  // AddressSanitizer's

  // False once the fiber has used more stack than it has.
  bool stack_intact() const { return std::memcmp(stack, &kStackMark, sizeof(kStackMark)) == 0; }
};

// The stack that fibers are resumed from.
struct FiberOwner {
  jmp_buf context;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};
inline FiberOwner fiber_owner;

#ifdef SIMT_ASAN
inline void announce_switch(void** save, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(save, stack, bytes);
}
inline void announce_arrival(void* saved, const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(saved, from, bytes);
}
#else
inline void announce_switch(void**, const void*, size_t) {}
inline void announce_arrival(void*, const void**, size_t*) {}
#endif

// Memory for n stacks, touched only where it is used. Below the first one lies a spare stack, so
// that an overflow can still be reported.
inline char* allocate_stacks(int n) {
  void* p = mmap(nullptr, (n + 1) * kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p) + kStackBytes;
}

// Forgets whatever the fiber was doing; it starts afresh when it is next resumed.
inline void reset_fiber(Fiber& f, char* stack) {
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  f.started = false;
  f.stack = stack;
  std::memcpy(stack, &kStackMark, sizeof(kStackMark));
}

// Runs f until it leaves. A fresh one calls entry(), which must call begin_fiber() and not return.
__attribute__((noinline)) inline void resume_fiber(Fiber& f, void (*entry)()) {
  announce_switch(&fiber_owner.fake_stack, f.stack, kStackBytes);
  if (_setjmp(fiber_owner.context) == 0) {
    if (f.started) _longjmp(f.context, 1);
    f.started = true;
    static ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = f.stack;
    start.uc_stack.ss_size = kStackBytes;
    start.uc_link = nullptr;
    makecontext(&start, entry, 0);
    setcontext(&start);
  }
  announce_arrival(fiber_owner.fake_stack, nullptr, nullptr);
}

inline void begin_fiber() {
  announce_arrival(nullptr, &fiber_owner.stack, &fiber_owner.stack_bytes);
}

// Back to resume_fiber(). Returns when the fiber is resumed again.
__attribute__((noinline)) inline void leave_fiber(Fiber& f) {
  announce_switch(&f.fake_stack, fiber_owner.stack, fiber_owner.stack_bytes);
  if (_setjmp(f.context) == 0) _longjmp(fiber_owner.context, 1);
  announce_arrival(f.fake_stack, &fiber_owner.stack, &fiber_owner.stack_bytes);
}

}  // namespace simt
#pragma GCC visibility pop
