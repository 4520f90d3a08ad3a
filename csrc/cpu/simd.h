// Run-time choice of the CPU instruction set.
//
// A binary for every x86-64 machine may only use SSE2, which makes the loops many times slower
// than the machine is. So each hot loop is compiled three times and the widest version that this
// CPU has is run. Elsewhere (ARM) the compiler's own baseline is wide already.
#pragma once

#include <cstdlib>
#include <cstring>

namespace fcos_ext {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline";
}

// The instruction set in use: the best that this CPU has, or less if FCOS_CPU_ISA says so
// (baseline, avx2, avx512), which tests and benchmarks do.
inline Isa cpu_isa() {
  static const Isa isa = [] {
    Isa best = Isa::kBaseline;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::kAvx2;
    if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      best = Isa::kAvx512;
#endif
    if (const char* wanted = std::getenv("FCOS_CPU_ISA"))
      for (Isa lower : {Isa::kBaseline, Isa::kAvx2})
        if (lower < best && std::strcmp(wanted, isa_name(lower)) == 0) return lower;
    return best;
  }();
  return isa;
}

#if defined(__x86_64__)
// `flatten` inlines the whole call tree of f, which is then compiled for the target named here.
template <typename F>
__attribute__((target("avx2,fma"), flatten, noinline)) void run_avx2(const F& f) {
  f();
}
template <typename F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"), flatten,
               noinline)) void
run_avx512(const F& f) {
  f();
}
#endif

// Runs f() compiled for the instruction set in use.
template <typename F>
void with_cpu_isa(const F& f) {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::kAvx512) return run_avx512(f);
  if (cpu_isa() == Isa::kAvx2) return run_avx2(f);
#endif
  f();
}

}  // namespace fcos_ext
