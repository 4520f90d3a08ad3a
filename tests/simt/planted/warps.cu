// Warp operations and atomics with every kind of argument: the test knows what CUDA gives.
#include <cuda_runtime.h>

constexpr int kShuffles = 11;

// out[thread][k] for a warp or less.
__global__ void shuffles(int* out) {
  const unsigned all = 0xffffffffu;
  const int v = 100 + static_cast<int>(threadIdx.x);
  int* mine = out + kShuffles * threadIdx.x;
  mine[0] = __shfl_sync(all, v, 5);
  mine[1] = __shfl_sync(all, v, 35);
  mine[2] = __shfl_sync(all, v, 3, 8);
  mine[3] = __shfl_up_sync(all, v, 1);
  mine[4] = __shfl_up_sync(all, v, 3, 8);
  mine[5] = __shfl_down_sync(all, v, 1);
  mine[6] = __shfl_down_sync(all, v, 2, 16);
  mine[7] = __shfl_xor_sync(all, v, 1);
  mine[8] = __shfl_xor_sync(all, v, 16, 8);
  mine[9] = static_cast<int>(__shfl_sync(all, 0.25 * v, 4) * 4);
  mine[10] = static_cast<int>(__shfl_xor_sync(all, (1LL << 40) * v, 31) >> 40);
}

// Two halves of a warp in different branches, each with its own mask.
__global__ void half_warps(int* out) {
  const int v = static_cast<int>(threadIdx.x);
  if (v < 16) {
    for (int i = 0; i < 3; ++i) out[v] = __shfl_sync(0x0000ffffu, v + i, 3);
  } else {
    out[v] = __shfl_sync(0xffff0000u, v, 20);
  }
}

constexpr int kVotes = 6;

__global__ void votes(unsigned* out) {
  const int t = static_cast<int>(threadIdx.x);
  unsigned* mine = out + kVotes * threadIdx.x;
  mine[0] = __ballot_sync(0xffffffffu, t & 1 ? 5 : 0);
  mine[1] = static_cast<unsigned>(__any_sync(0xffffffffu, t == 33));
  mine[2] = static_cast<unsigned>(__all_sync(0xffffffffu, t != 33));
  mine[3] = static_cast<unsigned>(__all_sync(0xffffffffu, 1));
  mine[4] = mine[5] = 0;
  if (t % 32 >= 6) return;
  mine[4] = __ballot_sync(0xffffffffu, 1);  // the mask may name lanes that have exited
  if (t % 2 == 0) mine[5] = __ballot_sync(0x15u, t % 32 != 2);
}

// One counter each, then what the operation returned to the only thread of the last two.
__global__ void atomics(int* i, unsigned* u, unsigned long long* q, float* f, double* d) {
  const int t = static_cast<int>(threadIdx.x);
  atomicAdd(&i[0], t);
  atomicSub(&i[1], t);
  atomicMin(&i[2], 5 - t);
  atomicMax(&i[3], t - 5);
  atomicInc(&u[0], 6u);
  atomicDec(&u[1], 6u);
  atomicAnd(&u[2], ~(1u << t % 32));
  atomicOr(&u[3], 1u << t % 32);
  atomicXor(&u[4], 1u << t % 32);
  atomicMin(&u[5], 4000000000u - static_cast<unsigned>(t));
  atomicAdd(&q[0], 1ull << 40);
  atomicMax(&q[1], static_cast<unsigned long long>(t) << 33);
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  for (int old = i[4], seen = -1; old != seen;) {  // i[4] += 2, by comparing and swapping
    seen = old;
    old = atomicCAS(&i[4], seen, seen + 2);
  }
  if (t != 0) return;
  i[5] = atomicExch(&i[6], 9);
  i[7] = atomicAdd(&i[6], 1);
}

constexpr int kBits = 16;

__global__ void bits(int* out) {
  int k = 0;
  out[k++] = static_cast<int>(__umulhi(0xffffffffu, 0xffffffffu));
  out[k++] = __mulhi(-5, 3);
  out[k++] = static_cast<int>(__umul64hi(~0ull, 1ull << 33));
  out[k++] = __popc(0xf0f0u);
  out[k++] = __popcll(~0ull);
  out[k++] = __ffs(0);
  out[k++] = __ffs(8);
  out[k++] = __clz(0);
  out[k++] = __clz(1);
  out[k++] = __clzll(1);
  out[k++] = static_cast<int>(__brev(1u) >> 28);
  out[k++] = static_cast<int>(__float_as_uint(1.0f));
  out[k++] = static_cast<int>(__uint_as_float(0x40400000u));
  out[k++] = static_cast<int>(__fmaf_rn(3.0f, 4.0f, 5.0f));
  out[k++] = static_cast<int>(8.0f * __frcp_rn(2.0f));
  out[k++] = static_cast<int>(max(min(7u, 9u), 3u));
}
