// The simulated machine: its threads, the state of the block that runs, and how an error ends a
// launch.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fibers.h"
#include "include/vector_types.h"
#include "symbols.h"

// Hidden: each library that contains kernels has a machine of its own.
#pragma GCC visibility push(hidden)
namespace simt {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of a block, on the largest GPUs
constexpr int64_t kMaxIdleYields = 1 << 18;

// A source line. Device functions take one by default arguments, which name their caller.
struct Site {
  const char* file = nullptr;
  int line = 0;
};

enum class Wait : unsigned char { kNothing, kBlock, kWarp };

// One CUDA thread.
struct Thread {
  Fiber fiber;
  uint3 index{};
  bool done = false;
  // While it waits: for whom, in which function, where, and for a warp operation with which lanes.
  Wait wait = Wait::kNothing;
  const char* what = "";
  Site site{};
  unsigned mask = 0;
  // What it brings to the others, the lane it wants to read, and what it gets in the end.
  uint64_t in = 0;
  int source = 0;
  uint64_t out = 0;
  unsigned ballot = 0, group = 0;

  bool same_place(const Thread& t) const {
    return site.line == t.site.line && std::strcmp(site.file, t.site.file) == 0 &&
           std::strcmp(what, t.what) == 0;
  }
};

// Bit l stands for lane l.
struct Warp {
  unsigned alive = 0, waiting = 0;
};

struct Machine {
  std::vector<Thread> threads{static_cast<size_t>(kMaxThreads)};
  std::thread::id owner;  // fibers are only resumed on the CPU thread that started them

  void (*body)(void*) = nullptr;  // calls the kernel
  void* body_data = nullptr;
  const void* kernel = nullptr;
  dim3 grid, block;
  char* dynamic_shared = nullptr;

  uint3 block_index{}, thread_index{};
  int block_threads = 0, alive = 0, at_barrier = 0;
  Warp warps[kMaxThreads / kWarpSize];
  Thread* current = nullptr;
  std::vector<int> ready;  // threads that can run: ready[head], ready[head + 1], ...
  size_t head = 0;
  int held_warp = 0;  // with a seed: runs, as a rule, only when nothing else can
  int64_t idle_yields = 0, atomics = 0;

  std::string error;       // of the current launch
  std::string host_error;  // undefined behaviour outside kernels; the next launch reports it
  uint64_t seed = 0;
  std::mt19937_64 random;
  int64_t launches = 0;

  Machine() {
    const char* text = std::getenv("FCOS_SIMT_SEED");
    set_seed(text ? std::strtoull(text, nullptr, 10) : 0);
  }
  void set_seed(uint64_t s) {
    seed = s;
    random.seed(s);
  }
  int number_of(const Thread& t) const { return static_cast<int>(&t - threads.data()); }
};

inline Machine machine;
inline std::mutex launch_mutex;  // one launch at a time

// ---- errors ----

inline std::string to_string(const uint3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

inline std::string to_string(const Site& s) {
  return s.file ? std::string(s.file) + ":" + std::to_string(s.line) : "unknown line";
}

[[noreturn]] inline void throw_error(const std::string& message) {
  const Machine& m = machine;
  std::string text = "simt: " + message;
  if (m.body) text += "; kernel " + symbol_name(m.kernel);
  if (m.body && m.alive) text += "; block " + to_string(m.block_index);
  if (m.current) text += "; thread " + to_string(m.current->index);
  throw std::runtime_error(text);
}

// Ends the launch. A kernel is left without unwinding, because errors also come from functions
// that must not throw.
[[noreturn]] inline void fail(const std::string& message, Site site = {}) {
  Machine& m = machine;
  const std::string text = site.file ? message + "; " + to_string(site) : message;
  if (!m.current) throw_error(text);
  m.error = text;
  for (;;) leave_fiber(m.current->fiber);  // is not resumed
}

// Who waits where: the second half of messages about barriers and deadlocks.
inline std::string describe_threads() {
  const Machine& m = machine;
  std::map<std::string, std::pair<int, int>> places;  // -> first thread, number of threads
  for (int i = 0; i < m.block_threads; ++i) {
    const Thread& t = m.threads[i];
    std::string place = t.done ? "have exited" : "can run";
    if (t.wait != Wait::kNothing)
      place = std::string("wait in ") + t.what + " at " + to_string(t.site);
    char mask[32];
    std::snprintf(mask, sizeof(mask), " with mask %#x", t.mask);
    if (t.wait == Wait::kWarp) place += mask;
    ++places.try_emplace(place, i, 0).first->second.second;
  }
  std::string text;
  for (const auto& [place, who] : places)
    text += (text.empty() ? "" : ", ") + std::to_string(who.second) + " of " +
            std::to_string(m.block_threads) + " threads (first: " + std::to_string(who.first) +
            ") " + place;
  return text;
}

inline void check_aligned(const volatile void* p, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  fail("misaligned access: " + std::string(what) + " of " + std::to_string(bytes) +
           " bytes at an address that ends in " +
           std::to_string(reinterpret_cast<uintptr_t>(p) % 16) + " modulo 16",
       site);
}

}  // namespace simt
#pragma GCC visibility pop
