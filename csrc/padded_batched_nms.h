// The order in which candidates of an image are looked at, the same for CPU and CUDA: higher
// scores first, of equal ones the lower index.
#pragma once

#include <limits>
#include <type_traits>

#include "nms.h"

namespace fcos_ext {

__extension__ typedef unsigned __int128 Unsigned128;

// An unsigned number that grows with the score. Absent candidates have 0.
template <typename score_t>
using OrderKey =
    std::conditional_t<std::is_same_v<score_t, double>, unsigned long long, unsigned int>;

// The inverse, of a key that is not 0.
FCOS_INLINE float number_of_key(OrderKey<float> key) {
  const OrderKey<float> bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// The same for a score that is above 0.
FCOS_INLINE float score_of_key(OrderKey<float> key) { return number_of_key(key | 0x80000000u); }

// Key and index in one number, the higher the better; no two candidates have the same.
template <typename score_t>
using Rank = std::conditional_t<std::is_same_v<score_t, double>, Unsigned128, unsigned long long>;

// 0 of NaN and -inf. The bits of positive numbers are in order, those of negative ones in reverse;
// the two zeros are equal.
template <typename score_t>
FCOS_INLINE OrderKey<score_t> order_key(score_t score) {
  using Key = OrderKey<score_t>;
  constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);
  const score_t unsigned_zero = score == score_t(0) ? score_t(0) : score;
  Key bits;
  std::memcpy(&bits, &unsigned_zero, sizeof(bits));
  const Key key = bits & kSign ? ~bits : bits | kSign;
  return score > -std::numeric_limits<score_t>::infinity() ? key : Key(0);
}

// Of a candidate that is present; `index` has 32 bits.
template <typename score_t>
FCOS_INLINE Rank<score_t> rank_of(OrderKey<score_t> key, int64_t index) {
  return Rank<score_t>(key) << 32 | ~static_cast<unsigned int>(index);
}

template <typename R>
FCOS_INLINE int64_t index_of(R rank) {
  return int64_t(~static_cast<unsigned int>(rank));
}

}  // namespace fcos_ext
