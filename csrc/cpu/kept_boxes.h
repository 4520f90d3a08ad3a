// The boxes that a greedy suppression has kept so far, arranged for the one question it asks.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "../nms.h"

namespace fcos_ext {

class KeptBoxes {
 public:
  KeptBoxes() { newest_.fill(-1); }

  void clear() {
    newest_.fill(-1);
    blocks_.clear();
  }

  // Adds a box, and returns true, unless a box of its group suppresses it.
  FCOS_INLINE bool add_unless_suppressed(const Box& box, int64_t group, float iou_threshold) {
    const float area = area_of(box);
    int32_t& newest = newest_[static_cast<uint64_t>(group) % kChains];
    for (int32_t at = newest; at >= 0; at = blocks_[at].older)
      if (suppresses(blocks_[at], box, area, group, iou_threshold)) return false;
    if (newest < 0 || blocks_[newest].size == kLanes) {
      blocks_.emplace_back();
      blocks_.back().older = newest;
      newest = static_cast<int32_t>(blocks_.size() - 1);
    }
    Block& block = blocks_[newest];
    const int k = block.size++;
    block.x0[k] = box.x0, block.y0[k] = box.y0, block.x1[k] = box.x1, block.y1[k] = box.y1;
    block.area[k] = area;
    block.low[k] = low_half(group), block.high[k] = high_half(group);
    return true;
  }

 private:
  static constexpr int kLanes = 16;
  // A group is in the chain of its number modulo this: one each for the usual 80 classes, so that
  // few boxes of other groups are met.
  static constexpr int kChains = 128;

  // Lanes that are not in use hold boxes without area, which suppress nothing.
  struct alignas(64) Block {
    float x0[kLanes] = {}, y0[kLanes] = {}, x1[kLanes] = {}, y1[kLanes] = {}, area[kLanes] = {};
    // Halves of the group: as wide as the floats, they are compared in the same vectors.
    int32_t low[kLanes] = {}, high[kLanes] = {};
    int32_t size = 0, older = -1;
  };

  static int32_t low_half(int64_t group) { return static_cast<int32_t>(group); }
  static int32_t high_half(int64_t group) { return static_cast<int32_t>(group >> 32); }

  static FCOS_INLINE bool suppresses(const Block& block, const Box& box, float area, int64_t group,
                                     float iou_threshold) {
    const int32_t low = low_half(group), high = high_half(group);
    int32_t any = 0;
#pragma omp simd reduction(| : any)
    for (int k = 0; k < kLanes; ++k) {
      const Box kept{block.x0[k], block.y0[k], block.x1[k], block.y1[k]};
      const bool overlaps = iou_of(kept, block.area[k], box, area) > iou_threshold;
      any |= static_cast<int32_t>(overlaps & (block.low[k] == low) & (block.high[k] == high));
    }
    return any != 0;
  }

  std::array<int32_t, kChains> newest_;
  std::vector<Block> blocks_;
};

}  // namespace fcos_ext
