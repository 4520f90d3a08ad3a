// Sorting by unsigned keys, in time proportional to their number.
#pragma once

#include <cstdint>
#include <vector>

namespace fcos_ext {

template <typename Key>
struct Keyed {
  Key key;
  uint32_t value;
};

// Stable, by rising key: the lowest byte first, and each byte that tells keys apart in one pass.
template <typename Key>
void radix_sort(std::vector<Keyed<Key>>& items) {
  constexpr int kBytes = sizeof(Key);
  const size_t n = items.size();
  if (n < 2) return;
  uint32_t counts[kBytes][256] = {};
  for (const Keyed<Key>& item : items)
    for (int byte = 0; byte < kBytes; ++byte) ++counts[byte][item.key >> 8 * byte & 255];
  std::vector<Keyed<Key>> sorted(n);
  for (int byte = 0; byte < kBytes; ++byte) {
    uint32_t* next = counts[byte];
    if (next[items[0].key >> 8 * byte & 255] == n) continue;
    uint32_t before = 0;
    for (int digit = 0; digit < 256; ++digit) {
      const uint32_t count = next[digit];
      next[digit] = before;
      before += count;
    }
    for (const Keyed<Key>& item : items) sorted[next[item.key >> 8 * byte & 255]++] = item;
    items.swap(sorted);
  }
}

}  // namespace fcos_ext
