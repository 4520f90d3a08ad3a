// Runs CUDA kernels on the CPU, from their own source, where there is no GPU to run them on.
//
// A .cu file is compiled as C++ against include/cuda_runtime.h. simt::launch() then executes it:
// every CUDA thread is a fiber with its own stack, the threads of a block take turns on one CPU
// thread, and blocks run one after another. A thread runs until it waits (barrier, shuffle, vote)
// or ends; which one is next depends on a seed: FCOS_SIMT_SEED or simt_set_seed(). Seed 0 is the
// natural order; any other shuffles blocks and threads, holds back one warp of each block, and lets
// threads be overtaken at atomics.
//
// Reported as std::runtime_error with kernel, block, thread and source line where they are known:
//   * __syncthreads() that some threads of the block do not reach, or reach at another line
//   * warp operations whose mask lacks the caller, or that lanes reach at different lines
//   * deadlock, spinning without progress, stack overflow, an invalid launch configuration
//   * misaligned vector accesses through __ldg, __ldcs, __stcs, ..., and misaligned atomics
//   * writes next to memory of device_malloc() or to dynamic shared memory, by canaries
//   * with undefined.cpp and -fsanitize=undefined: array bounds, shifts, overflow, alignment
// Poisoned with 0xCB, so that a result shows it: shared memory at the start of each block, fresh
// device memory, and what a shuffle reads from a lane that takes no part. Under AddressSanitizer
// every wrong access to device or dynamic shared memory stops the program.
//
// What it cannot show: weak memory (everything here is sequentially consistent, so a missing
// __threadfence() goes unnoticed); a race between two points at which no thread waits; blocks that
// run at the same time; the warp scheduler, and any timing; the arithmetic of a GPU: the host
// rounds a * b + c twice where nvcc contracts it to an FMA, and has the C library's exp2, log2 and
// 1 / x in place of the special-function unit's (MUFU) approximations.
//
// Needs Linux, C++17 and g++ or clang. An error leaves the fibers of the launch as they stand:
// destructors in kernels do not run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"
#include "machine.h"
#include "memory.h"

#pragma GCC visibility push(hidden)
namespace simt {

// ---- waiting ----

inline Thread& current_thread(const char* what) {
  if (!machine.current) fail(std::string(what) + " outside a kernel");
  return *machine.current;
}

inline void suspend(Thread& t) {
  if (!t.fiber.stack_intact())
    fail("stack overflow: a thread used more than " + std::to_string(kStackBytes) + " bytes");
  leave_fiber(t.fiber);
}

inline void release(Thread& t) {
  Machine& m = machine;
  t.wait = Wait::kNothing;
  m.idle_yields = 0;
  m.ready.push_back(m.number_of(t));
}

// Lets the block pass its barrier if all have arrived that still run.
inline void pass_barrier() {
  Machine& m = machine;
  if (m.at_barrier == 0 || m.at_barrier < m.alive) return;
  const auto end = m.threads.begin() + m.block_threads;
  const auto first = std::find_if(m.threads.begin(), end, [](const Thread& t) { return !t.done; });
  const bool together = m.alive == m.block_threads && std::all_of(first, end, [&](const Thread& t) {
                          return t.same_place(*first);
                        });
  if (!together) fail("divergent barrier: " + describe_threads());
  const auto count = std::count_if(first, end, [](const Thread& t) { return t.in != 0; });
  for (auto t = first; t != end; ++t) {
    t->out = static_cast<uint64_t>(count);
    release(*t);
  }
  m.at_barrier = 0;
}

// Lets the lanes in t's mask pass their operation if all have arrived that still run.
inline void pass_warp(const Thread& t) {
  Machine& m = machine;
  const int number = m.number_of(t);
  Thread* lanes = &m.threads[number - number % kWarpSize];
  Warp& warp = m.warps[number / kWarpSize];
  const unsigned mask = t.mask, group = mask & warp.alive;
  if (group & ~warp.waiting) return;
  unsigned ballot = 0;
  for (int l = 0; l < kWarpSize; ++l) {
    if (!(group >> l & 1u)) continue;
    if (lanes[l].mask != mask) return;
    if (!lanes[l].same_place(t)) fail("divergent warp operation: " + describe_threads());
    ballot |= static_cast<unsigned>(lanes[l].in != 0) << l;
  }
  warp.waiting &= ~group;
  for (int l = 0; l < kWarpSize; ++l) {
    if (!(group >> l & 1u)) continue;
    Thread& lane = lanes[l];
    if (group >> lane.source & 1u)
      lane.out = lanes[lane.source].in;
    else
      std::memset(&lane.out, kPoison, sizeof(lane.out));
    lane.ballot = ballot;
    lane.group = group;
    release(lane);
  }
}

// Every block barrier: the number of threads that brought a true predicate.
inline unsigned sync_block(bool predicate, const char* what, Site site) {
  Machine& m = machine;
  Thread& t = current_thread(what);
  t.wait = Wait::kBlock;
  t.what = what;
  t.site = site;
  t.in = predicate;
  ++m.at_barrier;
  pass_barrier();
  suspend(t);
  return static_cast<unsigned>(t.out);
}

// Every warp operation: a lane brings `value`, and gets the value of lane `source` (out), the lanes
// that brought a value other than 0 (ballot) and those that took part (group).
inline const Thread& sync_warp(unsigned mask, uint64_t value, int source, const char* what,
                               Site site) {
  Machine& m = machine;
  Thread& t = current_thread(what);
  const int number = m.number_of(t), lane = number % kWarpSize;
  if (!(mask >> lane & 1u))
    fail(std::string(what) + ": the mask lacks the calling lane " + std::to_string(lane), site);
  t.wait = Wait::kWarp;
  t.what = what;
  t.site = site;
  t.mask = mask;
  t.in = value;
  t.source = source;
  m.warps[number / kWarpSize].waiting |= 1u << lane;
  pass_warp(t);
  suspend(t);
  return t;
}

// A point at which other threads may come in between. Those that spin on an atomic must, or the
// thread that they wait for would never run.
inline void interleave() {
  Machine& m = machine;
  if (!m.current || (m.seed ? m.random() % 4 != 0 : ++m.atomics % 64 != 0)) return;
  if (++m.idle_yields > kMaxIdleYields)
    fail("no progress: threads spin on a value that nobody changes: " + describe_threads());
  m.ready.push_back(m.number_of(*m.current));
  suspend(*m.current);
}

// ---- launch ----

inline void end_thread(Thread& t) {
  Machine& m = machine;
  const int number = m.number_of(t);
  Warp& warp = m.warps[number / kWarpSize];
  t.done = true;
  m.idle_yields = 0;
  --m.alive;
  warp.alive &= ~(1u << number % kWarpSize);
  pass_barrier();
  for (int l = 0; l < kWarpSize; ++l)  // warp operations do not wait for lanes that have exited
    if (warp.waiting >> l & 1u) pass_warp(m.threads[number - number % kWarpSize + l]);
}

// What every fiber does: run one thread of one block after another.
inline void run_threads() {
  begin_fiber();
  for (;;) {
    try {
      machine.body(machine.body_data);
    } catch (const std::exception& e) {
      fail(std::string("the kernel threw: ") + e.what());
    } catch (...) {
      fail("the kernel threw");
    }
    end_thread(*machine.current);
    suspend(*machine.current);
  }
}

inline Thread& next_thread() {
  Machine& m = machine;
  if (m.head == m.ready.size()) fail("deadlock: " + describe_threads());
  // Threads at random, and one warp far behind the others, as far as they do not wait for it.
  for (int draws = m.seed ? 8 : 0; draws > 0; --draws) {
    std::swap(m.ready[m.head], m.ready[m.head + m.random() % (m.ready.size() - m.head)]);
    if (m.ready[m.head] / kWarpSize != m.held_warp || m.idle_yields > 64) break;
  }
  Thread& next = m.threads[m.ready[m.head++]];
  if (m.head == m.ready.size() || m.head == size_t(4 * kMaxThreads)) {
    m.ready.erase(m.ready.begin(), m.ready.begin() + static_cast<std::ptrdiff_t>(m.head));
    m.head = 0;
  }
  return next;
}

inline void run_block(std::pair<char*, size_t> static_shared, size_t shared_bytes) {
  Machine& m = machine;
  std::memset(static_shared.first, kPoison, static_shared.second);
  if (shared_bytes) std::memset(m.dynamic_shared, kPoison, shared_bytes);
  m.alive = m.block_threads;
  m.at_barrier = 0;
  m.idle_yields = 0;
  m.head = 0;
  m.ready.clear();
  for (Warp& warp : m.warps) warp = {};
  // Half of the time the first, as it is thread 0 that collects what others have left.
  const int warps = (m.block_threads + kWarpSize - 1) / kWarpSize;
  if (m.seed) m.held_warp = m.random() % 2 ? 0 : static_cast<int>(m.random() % warps);
  for (int i = 0; i < m.block_threads; ++i) {
    Thread& t = m.threads[i];
    const unsigned u = static_cast<unsigned>(i);
    t.index = {u % m.block.x, u / m.block.x % m.block.y, u / m.block.x / m.block.y};
    t.done = false;
    t.wait = Wait::kNothing;
    m.warps[i / kWarpSize].alive |= 1u << i % kWarpSize;
    m.ready.push_back(i);
  }
  while (m.alive > 0) {
    m.current = &next_thread();
    m.thread_index = m.current->index;
    resume_fiber(m.current->fiber, run_threads);
    if (!m.error.empty()) throw_error(m.error);
    m.current = nullptr;
  }
}

inline void check_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto within = [](dim3 d, unsigned x, unsigned y, unsigned z) {
    return d.x && d.y && d.z && d.x <= x && d.y <= y && d.z <= z;
  };
  if (!within(block, 1024, 1024, 64) || uint64_t(block.x) * block.y * block.z > kMaxThreads)
    fail("invalid launch configuration: block " + to_string(block));
  if (!within(grid, 0x7fffffff, 65535, 65535))
    fail("invalid launch configuration: grid " + to_string(grid));
  if (shared_bytes > kMaxSharedBytes)
    fail("invalid launch configuration: " + std::to_string(shared_bytes) +
         " bytes of dynamic shared memory");
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes) {
  Machine& m = machine;
  check_configuration(grid, block, shared_bytes);
  if (m.owner != std::this_thread::get_id()) {
    static char* const stacks = allocate_stacks(kMaxThreads);
    for (int i = 0; i < kMaxThreads; ++i) reset_fiber(m.threads[i].fiber, stacks + i * kStackBytes);
    m.owner = std::this_thread::get_id();
  }
  m.grid = grid;
  m.block = block;
  m.block_threads = static_cast<int>(block.x * block.y * block.z);
  if (shared_bytes) m.dynamic_shared = static_cast<char*>(device_malloc(shared_bytes));
  const auto static_shared = find_static_shared();
  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  if (m.seed) std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const uint64_t b : blocks) {
    m.block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(static_shared, shared_bytes);
  }
  const std::string damage = damaged_red_zone(m.dynamic_shared);
  if (!damage.empty()) fail(damage);
}

// Runs body() once for every thread of the grid; body calls the kernel. `kernel` is the kernel's
// address, and only serves to name it in errors.
template <typename F>
void launch(dim3 grid, dim3 block, size_t shared_bytes, F&& body, const void* kernel = nullptr) {
  using Body = std::remove_reference_t<F>;
  Machine& m = machine;
  if (m.current) fail("launch inside a kernel");
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (!m.host_error.empty()) throw_error(std::exchange(m.host_error, {}));
  ++m.launches;
  m.body = [](void* f) { (*static_cast<Body*>(f))(); };
  m.body_data = const_cast<void*>(static_cast<const void*>(&body));
  m.kernel = kernel;
  const auto finish = [&m] {
    m.body = nullptr;
    m.alive = 0;
    device_free(std::exchange(m.dynamic_shared, nullptr));
  };
  try {
    run_grid(grid, block, shared_bytes);
  } catch (...) {
    m.current = nullptr;
    m.error.clear();
    m.owner = {};  // the fibers stand in the middle of the kernel: start new ones
    finish();
    throw;
  }
  finish();
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(machine.dynamic_shared);
}

}  // namespace simt
#pragma GCC visibility pop

// For Python, through ctypes.
extern "C" {
__attribute__((used, visibility("default"))) inline void simt_set_seed(uint64_t seed) {
  simt::machine.set_seed(seed);
}
__attribute__((used, visibility("default"))) inline int64_t simt_launches() {
  return simt::machine.launches;
}
}
