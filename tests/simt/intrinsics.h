// The intrinsics by which CUDA threads meet: barriers, shuffles, votes, atomics. Semantics: CUDA
// C++ Programming Guide, "Synchronization Functions", "Warp Shuffle Functions", "Warp Vote
// Functions", "Atomic Functions"; the lanes that a shuffle reads: PTX ISA, "shfl.sync".
#pragma once

#include "simt.h"

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- barriers and fences ----

inline void __syncthreads(SIMT_SITE) { simt::sync_block(true, "__syncthreads", {file, line}); }
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return static_cast<int>(simt::sync_block(predicate != 0, "__syncthreads_count", {file, line}));
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return simt::sync_block(predicate != 0, "__syncthreads_or", {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
  return simt::sync_block(predicate == 0, "__syncthreads_and", {file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::sync_warp(mask, 0, 0, "__syncwarp", {file, line});
}

// Memory is sequentially consistent here, so that a fence only lets other threads come in between.
inline void __threadfence_block() { simt::interleave(); }
inline void __threadfence() { simt::interleave(); }
inline void __threadfence_system() { simt::interleave(); }
inline void __nanosleep(unsigned) { simt::interleave(); }

[[noreturn]] inline void __trap() { simt::fail("__trap"); }

// ---- shuffles and votes ----

namespace simt {

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* what, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles exist for numbers of 4 and 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = sync_warp(mask, bits, source, what, site).out;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The calling lane, and the ends of its segment of `width` lanes.
struct Segment {
  int lane, first, last;
  Segment(int width, Site site) {
    if (width < 1 || width > kWarpSize || (width & (width - 1)))
      fail("shuffle: width must be a power of two up to 32, got " + std::to_string(width), site);
    lane = machine.number_of(current_thread("shuffle")) % kWarpSize;
    first = lane & ~(width - 1);
    last = first + width - 1;
  }
};

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const simt::Segment s(width, {file, line});
  return simt::shuffle(mask, value, s.first + (source & (width - 1)), "__shfl_sync", {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const simt::Segment s(width, {file, line});
  const int source = s.lane - static_cast<int>(delta & 31u);
  return simt::shuffle(mask, value, source >= s.first ? source : s.lane, "__shfl_up_sync",
                       {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const simt::Segment s(width, {file, line});
  const int source = s.lane + static_cast<int>(delta & 31u);
  return simt::shuffle(mask, value, source <= s.last ? source : s.lane, "__shfl_down_sync",
                       {file, line});
}
// Lanes of earlier segments can be read, those of later ones cannot.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_SITE) {
  const simt::Segment s(width, {file, line});
  const int source = s.lane ^ (lane_mask & 31);
  return simt::shuffle(mask, value, source <= s.last ? source : s.lane, "__shfl_xor_sync",
                       {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::sync_warp(mask, predicate != 0, 0, "__ballot_sync", {file, line}).ballot;
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::sync_warp(mask, predicate != 0, 0, "__any_sync", {file, line}).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  const simt::Thread& t = simt::sync_warp(mask, predicate != 0, 0, "__all_sync", {file, line});
  return t.ballot == t.group;
}
// Depends on how the hardware happens to schedule a warp: kernels do not use it.
unsigned __activemask() = delete;

// ---- atomics ----

namespace simt {
template <typename T>
struct Same {
  using type = T;
};
template <typename T>
using SameType = typename Same<T>::type;  // a parameter of this type takes no part in deduction

template <typename T, typename... Ts>
constexpr bool is_one_of = (std::is_same_v<T, Ts> || ...);

using ull = unsigned long long;
}  // namespace simt

// name(p, value): *p = new_value, computed from `old` and `value`. Returns old.
#define SIMT_ATOMIC(name, new_value, ...)                                                  \
  template <typename T>                                                                    \
  T name(T* p, simt::SameType<T> value, SIMT_SITE) {                                       \
    static_assert(simt::is_one_of<T, __VA_ARGS__>, "CUDA has no " #name " for this type"); \
    simt::check_aligned(p, sizeof(T), #name, {file, line});                                \
    simt::interleave();                                                                    \
    const T old = *p;                                                                      \
    *p = new_value;                                                                        \
    return old;                                                                            \
  }

namespace simt {
// Integer atomics wrap around.
template <typename T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_same_v<T, int>)
    return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  else
    return a + b;
}
}  // namespace simt

SIMT_ATOMIC(atomicAdd, simt::wrapping_add(old, value), int, unsigned, simt::ull, float, double)
SIMT_ATOMIC(atomicSub, static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(value)),
            int, unsigned)
SIMT_ATOMIC(atomicExch, value, int, unsigned, simt::ull, float)
SIMT_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, simt::ull)
SIMT_ATOMIC(atomicMax, old < value ? value : old, int, unsigned, long long, simt::ull)
SIMT_ATOMIC(atomicAnd, (old & value), int, unsigned, simt::ull)
SIMT_ATOMIC(atomicOr, (old | value), int, unsigned, simt::ull)
SIMT_ATOMIC(atomicXor, (old ^ value), int, unsigned, simt::ull)
SIMT_ATOMIC(atomicInc, (old >= value ? 0 : old + 1), unsigned)
SIMT_ATOMIC(atomicDec, (old == 0 || old > value ? value : old - 1), unsigned)
#undef SIMT_ATOMIC

template <typename T>
T atomicCAS(T* p, simt::SameType<T> compare, simt::SameType<T> value, SIMT_SITE) {
  static_assert(simt::is_one_of<T, int, unsigned, simt::ull, unsigned short>,
                "CUDA has no atomicCAS for this type");
  simt::check_aligned(p, sizeof(T), "atomicCAS", {file, line});
  simt::interleave();
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}
