// Loads and stores of rows of strided tensors (Rows, LevelRows), of a dtype that is known at run
// time: it is the same for all threads, and few rows are read, so that a branch costs less than a
// kernel for each.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../integers.h"
#include "../iou_loss.h"
#include "../rows.h"

namespace fcos_ext {

constexpr int kRowThreads = 256;
// Blocks of an SM that there must be registers for. Asked for no number, the compiler spills some
// to have more blocks.
constexpr int kMinBlocks = 2;
constexpr int kRowsPerThread = 4;  // independent loads of labels in flight
// Rows of one work item of a block. A fixed size, whatever the GPU, makes the sum the same to the
// bit on any of them.
constexpr int kRowTile = kRowThreads * kRowsPerThread;

FCOS_INLINE int64_t num_row_tiles(int64_t rows) { return (rows + kRowTile - 1) / kRowTile; }

// Which of a thread's rows of a tile count, as bits.
__device__ __forceinline__ unsigned rows_that_count(const Integers& labels, int64_t rows,
                                                    int64_t first) {
  unsigned counting = 0;
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k) {
    const int64_t row = first + k * kRowThreads;
    if (row < rows && (labels.data == nullptr || labels[row] >= 0)) counting |= 1u << k;
  }
  return counting;
}

// Calls f with a zero of the C++ type behind a dtype that has been checked.
template <typename F>
__device__ __forceinline__ void with_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      return f(float{});
  }
}

// Four values that travel together: 8 bytes, or one or two times 16.
template <typename T>
struct Quad {
  using Word = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  static constexpr int kWords = 4 * sizeof(T) / sizeof(Word);
  T values[4];
};

template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* p) {
  using Word = typename Quad<T>::Word;
  Word words[Quad<T>::kWords];
#pragma unroll
  for (int k = 0; k < Quad<T>::kWords; ++k) words[k] = __ldg(reinterpret_cast<const Word*>(p) + k);
  Quad<T> quad;
  memcpy(&quad, words, sizeof(quad));
  return quad;
}

template <typename T>
__device__ __forceinline__ void store_quad(T* p, const Quad<T>& quad) {
  using Word = typename Quad<T>::Word;
  Word words[Quad<T>::kWords];
  memcpy(words, &quad, sizeof(quad));
#pragma unroll
  for (int k = 0; k < Quad<T>::kWords; ++k) __stcs(reinterpret_cast<Word*>(p) + k, words[k]);
}

template <typename acc, typename From, typename Where>
__device__ __forceinline__ Ltrb<acc> load_ltrb(const From& from, Where row) {
  Ltrb<acc> result;
  with_dtype(from.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* p = static_cast<const scalar_t*>(from.data) + from.offset(row);
    Quad<scalar_t> quad;
    if (from.is_vector) {
      quad = load_quad(p);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) quad.values[k] = p[k * from.stride];
    }
    result = {static_cast<acc>(quad.values[0]), static_cast<acc>(quad.values[1]),
              static_cast<acc>(quad.values[2]), static_cast<acc>(quad.values[3])};
  });
  return result;
}

template <typename acc, typename To, typename Where>
__device__ __forceinline__ void store_ltrb(const To& to, Where row, const Ltrb<acc>& values) {
  with_dtype(to.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    auto* p = static_cast<scalar_t*>(to.data) + to.offset(row);
    const Quad<scalar_t> quad{{static_cast<scalar_t>(values.l), static_cast<scalar_t>(values.t),
                               static_cast<scalar_t>(values.r), static_cast<scalar_t>(values.b)}};
    if (to.is_vector) return store_quad(p, quad);
#pragma unroll
    for (int k = 0; k < 4; ++k) p[k * to.stride] = quad.values[k];
  });
}

template <typename acc, typename From, typename Where>
__device__ __forceinline__ acc load_value(const From& from, Where row) {
  acc result;
  with_dtype(from.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    result = static_cast<acc>(static_cast<const scalar_t*>(from.data)[from.offset(row)]);
  });
  return result;
}

template <typename acc, typename To, typename Where>
__device__ __forceinline__ void store_value(const To& to, Where row, acc value) {
  with_dtype(to.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    static_cast<scalar_t*>(to.data)[to.offset(row)] = static_cast<scalar_t>(value);
  });
}

}  // namespace fcos_ext
