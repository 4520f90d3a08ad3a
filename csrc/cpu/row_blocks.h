// The rows that count, gathered from all over a tile into short columns that vector code computes
// on, and results scattered back. Few rows do in training, one in a hundred, so the rest must cost
// nothing but a look at its label.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "../integers.h"
#include "../iou_loss.h"
#include "../rows.h"
#include "simd.h"

namespace fcos_ext {

// Rows of one work item. A fixed size, whatever the number of threads, makes sums the same to the
// bit on any of them.
constexpr int64_t kRowTile = 4096;
// Rows that are computed at a time; their columns stay in L1.
constexpr int kRowBlock = 256;
// Labels that are looked at together.
constexpr int kLabelStep = 64;

inline int64_t num_row_tiles(int64_t rows) { return (rows + kRowTile - 1) / kRowTile; }

// Calls f(begin, end, tile) for every tile of rows, on all threads, each compiled for this CPU. No
// thread is woken for less than `grain` tiles.
template <typename F>
void for_each_row_tile(int64_t rows, const F& f, int64_t grain = 1) {
  torch::stable::parallel_for(0, num_row_tiles(rows), grain, [&](int64_t first, int64_t last) {
    with_cpu_isa([&] {
      for (int64_t tile = first; tile < last; ++tile)
        f(tile * kRowTile, std::min(rows, (tile + 1) * kRowTile), tile);
    });
  });
}

// Labels from here on take no part. This one lets all take part.
constexpr int64_t kAnyClass = std::numeric_limits<int64_t>::max();

// Calls body(rows, n) with the numbers of the rows of [begin, end) whose label lies in
// [0, num_classes), at most kRowBlock at a time. Without labels those are all. Returns how many
// labels lie below -1 or from num_classes on.
template <typename label_t, typename Body>
FCOS_INLINE int64_t for_each_row_block(const label_t* labels, int64_t num_classes, int64_t begin,
                                       int64_t end, const Body& body) {
  int64_t rows[kRowBlock + kLabelStep];
  int count = 0;
  int64_t ignored = 0;
  for (int64_t i = begin; i < end; i += kLabelStep) {
    const int n = static_cast<int>(std::min<int64_t>(kLabelStep, end - i));
    if (labels) {
      label_t all = -1, unlike_background = 0;
      for (int k = 0; k < n; ++k) {
        all &= labels[i + k];
        unlike_background |= ~labels[i + k];
      }
      if (unlike_background == 0) continue;
      for (int k = 0; k < n; ++k)  // one comparison for -1 <= label < num_classes
        ignored += uint64_t(int64_t(labels[i + k])) + 1 > uint64_t(num_classes);
      if (all < 0) continue;
      for (int k = 0; k < n; ++k) {
        rows[count] = i + k;
        count += uint64_t(int64_t(labels[i + k])) < uint64_t(num_classes);
      }
    } else {
      for (int k = 0; k < n; ++k) rows[count++] = i + k;
    }
    if (count < kRowBlock) continue;
    body(rows, kRowBlock);
    count -= kRowBlock;
    for (int k = 0; k < count; ++k) rows[k] = rows[kRowBlock + k];
  }
  if (count > 0) body(rows, count);
  return ignored;
}

template <typename Body>
FCOS_INLINE int64_t for_each_row_block(const Integers& labels, int64_t num_classes, int64_t begin,
                                       int64_t end, const Body& body) {
  if (labels.is_int64)
    return for_each_row_block(static_cast<const int64_t*>(labels.data), num_classes, begin, end,
                              body);
  return for_each_row_block(static_cast<const int32_t*>(labels.data), num_classes, begin, end,
                            body);
}

template <typename acc>
struct alignas(64) Column {
  acc values[kRowBlock];
  FCOS_INLINE acc& operator[](int i) { return values[i]; }
  FCOS_INLINE acc operator[](int i) const { return values[i]; }
};

template <typename acc>
struct LtrbColumns {
  Column<acc> l, t, r, b;
  FCOS_INLINE Ltrb<acc> operator[](int i) const { return {l[i], t[i], r[i], b[i]}; }
  FCOS_INLINE void set(int i, const Ltrb<acc>& row) {
    l[i] = row.l;
    t[i] = row.t;
    r[i] = row.r;
    b[i] = row.b;
  }
};

// Calls f with a zero of the C++ type behind a dtype that has been checked.
template <typename F>
FCOS_INLINE void with_dtype(ScalarType dtype, const F& f) {
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

template <typename acc, typename From>
FCOS_INLINE void gather(const From& from, const int64_t* rows, int n, LtrbColumns<acc>& to) {
  with_dtype(from.dtype, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(from.data);
    for (int i = 0; i < n; ++i) {
      const auto* p = data + from.offset(rows[i]);
      to.l[i] = static_cast<acc>(p[0]);
      to.t[i] = static_cast<acc>(p[from.stride]);
      to.r[i] = static_cast<acc>(p[2 * from.stride]);
      to.b[i] = static_cast<acc>(p[3 * from.stride]);
    }
  });
}

template <typename acc, typename From>
FCOS_INLINE void gather(const From& from, const int64_t* rows, int n, Column<acc>& to) {
  with_dtype(from.dtype, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(from.data);
    for (int i = 0; i < n; ++i) to[i] = static_cast<acc>(data[from.offset(rows[i])]);
  });
}

template <typename acc, typename To>
FCOS_INLINE void scatter(const LtrbColumns<acc>& from, const int64_t* rows, int n, const To& to) {
  with_dtype(to.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    auto* data = static_cast<scalar_t*>(to.data);
    for (int i = 0; i < n; ++i) {
      auto* p = data + to.offset(rows[i]);
      p[0] = static_cast<scalar_t>(from.l[i]);
      p[to.stride] = static_cast<scalar_t>(from.t[i]);
      p[2 * to.stride] = static_cast<scalar_t>(from.r[i]);
      p[3 * to.stride] = static_cast<scalar_t>(from.b[i]);
    }
  });
}

template <typename acc, typename To>
FCOS_INLINE void scatter(const Column<acc>& from, const int64_t* rows, int n, const To& to) {
  with_dtype(to.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    auto* data = static_cast<scalar_t*>(to.data);
    for (int i = 0; i < n; ++i) data[to.offset(rows[i])] = static_cast<scalar_t>(from[i]);
  });
}

// Sets a dense tensor to 0, whatever its strides. Rows that do not count are then done.
inline void clear_all(const Tensor& t) {
  constexpr int64_t kPiece = 1 << 18;
  auto* bytes = static_cast<char*>(t.mutable_data_ptr());
  const int64_t size = t.numel() * static_cast<int64_t>(t.element_size());
  torch::stable::parallel_for(0, (size + kPiece - 1) / kPiece, 1, [&](int64_t first, int64_t last) {
    std::memset(bytes + first * kPiece, 0,
                static_cast<size_t>(std::min(size, last * kPiece) - first * kPiece));
  });
}

}  // namespace fcos_ext
