#include "../nms.h"

#include <algorithm>
#include <vector>

#include "../nms_args.h"
#include "radix_sort.h"
#include "simd.h"

namespace fcos_ext {
namespace {

// Boxes whose IoU with another is computed at once.
constexpr int kLanes = 32;
// Pairs that are worth a thread: a tenth of a millisecond. To wake one may take as long.
constexpr int64_t kPairsPerThread = 1 << 19;
// A block of candidates is tested, on all threads, against what was kept before its first: at
// least so many of them, and as many as this share of what is kept, so that blocks are few.
constexpr int64_t kBlock = 256, kBlockShare = 4;
// Groups are given to threads only if they are so many, of so many boxes.
constexpr int64_t kParallelGroups = 16, kParallelBoxes = 1 << 14;

// Kept boxes, coordinate by coordinate. The lanes still free are boxes without extent, which
// suppress nothing.
struct alignas(64) Lanes {
  float x0[kLanes], y0[kLanes], x1[kLanes], y1[kLanes], area[kLanes];
};

struct Kept {
  std::vector<Lanes> lanes;
  int64_t count = 0;

  FCOS_INLINE void add(const Box& b, float area) {
    const int64_t lane = count++ % kLanes;
    if (lane == 0) lanes.push_back(Lanes{});
    Lanes& to = lanes.back();
    to.x0[lane] = b.x0;
    to.y0[lane] = b.y0;
    to.x1[lane] = b.x1;
    to.y1[lane] = b.y1;
    to.area[lane] = area;
  }

  // Whether one of lanes[first .. last) suppresses b.
  FCOS_INLINE bool suppress(size_t first, size_t last, const Box& b, float area,
                            float threshold) const {
    for (size_t i = first; i < last; ++i) {
      const Lanes& by = lanes[i];
      int hits = 0;
#pragma omp simd reduction(| : hits)
      for (int k = 0; k < kLanes; ++k) {
        const Box kept = {by.x0[k], by.y0[k], by.x1[k], by.y1[k]};
        hits |= iou_of(kept, by.area[k], b, area) > threshold;
      }
      if (hits) return true;
    }
    return false;
  }
};

// Bits that rise as x falls. +0 and -0 are the same number; x is not NaN.
uint32_t falling_key(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
uint64_t falling_key(double x) {
  x += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits >> 63 ? bits : ~bits & 0x7fffffffffffffffu;
}

// Indices of boxes by falling score, of equal ones the lower first; those with a NaN are left out.
template <typename scalar_t>
std::vector<uint32_t> order_of(const scalar_t* scores, int64_t n) {
  using acc = acc_t<scalar_t>;
  using Key = decltype(falling_key(acc{}));
  std::vector<Keyed<Key>> items;
  items.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    const acc score = static_cast<acc>(scores[i]);
    if (score == score) items.push_back({falling_key(score), static_cast<uint32_t>(i)});
  }
  radix_sort(items);
  std::vector<uint32_t> order(items.size());
  for (size_t rank = 0; rank < items.size(); ++rank) order[rank] = items[rank].value;
  return order;
}

// Ranks, group by group, rising within each; group g has ranks[starts[g] .. starts[g + 1]).
struct Groups {
  std::vector<uint32_t> ranks;
  std::vector<size_t> starts;
};

Groups groups_of(const std::vector<uint32_t>& order, const int64_t* groups) {
  const size_t n = order.size();
  Groups result{std::vector<uint32_t>(n), {0}};
  if (!groups) {
    for (size_t rank = 0; rank < n; ++rank) result.ranks[rank] = static_cast<uint32_t>(rank);
    result.starts.push_back(n);
    return result;
  }
  // Counted from the lowest, few bytes of the keys differ, and only those are sorted by.
  int64_t lowest = std::numeric_limits<int64_t>::max();
  for (const uint32_t index : order) lowest = std::min(lowest, groups[index]);
  std::vector<Keyed<uint64_t>> items(n);
  for (size_t rank = 0; rank < n; ++rank)
    items[rank] = {static_cast<uint64_t>(groups[order[rank]]) - static_cast<uint64_t>(lowest),
                   static_cast<uint32_t>(rank)};
  radix_sort(items);
  for (size_t i = 0; i < n; ++i) {
    if (i > 0 && items[i].key != items[i - 1].key) result.starts.push_back(i);
    result.ranks[i] = items[i].value;
  }
  result.starts.push_back(n);
  return result;
}

struct Problem {
  const Box* boxes;
  const uint32_t* order;
  float threshold;
  int64_t limit;
  uint8_t* stays;  // by rank, 0 at first

  FCOS_INLINE const Box& box(uint32_t rank) const { return boxes[order[rank]]; }
};

// Decides the next ranks of a group, n of them; `kept` holds what is kept of those before.
void decide_block(const Problem& p, const uint32_t* ranks, int64_t n, Kept& kept) {
  std::vector<uint8_t> suppressed;
  size_t tested = 0;  // lanes that are full and have been compared with the whole block
  if (n * kept.count >= 2 * kPairsPerThread) {
    suppressed.resize(n);
    tested = static_cast<size_t>(kept.count / kLanes);
    const int64_t grain = kPairsPerThread / kept.count + 1;
    torch::stable::parallel_for(0, n, grain, [&](int64_t first, int64_t last) {
      with_cpu_isa([&] {
        for (int64_t i = first; i < last; ++i) {
          const Box& b = p.box(ranks[i]);
          suppressed[i] = kept.suppress(0, tested, b, area_of(b), p.threshold);
        }
      });
    });
  }
  with_cpu_isa([&] {
    for (int64_t i = 0; i < n && kept.count < p.limit; ++i) {
      if (tested > 0 && suppressed[i]) continue;
      const Box& b = p.box(ranks[i]);
      const float area = area_of(b);
      if (kept.suppress(tested, kept.lanes.size(), b, area, p.threshold)) continue;
      kept.add(b, area);
      p.stays[ranks[i]] = 1;
    }
  });
}

// Marks which boxes stay of groups [first, last). Of a group no more than the limit can be among
// the best of all.
void decide_groups(const Problem& p, const Groups& groups, int64_t first, int64_t last) {
  Kept kept;
  for (int64_t g = first; g < last; ++g) {
    kept.lanes.clear();
    kept.count = 0;
    const int64_t end = static_cast<int64_t>(groups.starts[g + 1]);
    for (int64_t i = static_cast<int64_t>(groups.starts[g]); i < end && kept.count < p.limit;) {
      const int64_t n = std::min(std::max(kBlock, kept.count / kBlockShare), end - i);
      decide_block(p, &groups.ranks[i], n, kept);
      i += n;
    }
  }
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups,
               double iou_threshold, int64_t max_detections) {
  check_nms(boxes, scores, groups);
  const Tensor b = float_boxes(boxes);
  const Tensor s = torch::stable::contiguous(scores);
  std::vector<uint32_t> order;
  dispatch_floating(s.scalar_type(), "nms", [&](auto zero) {
    using scalar_t = decltype(zero);
    order = order_of(s.const_data_ptr<scalar_t>(), s.numel());
  });
  const int64_t n = static_cast<int64_t>(order.size());
  std::vector<uint8_t> stays(n);
  const Problem problem = {static_cast<const Box*>(b.const_data_ptr()), order.data(),
                           static_cast<float>(iou_threshold), keep_limit(n, max_detections),
                           stays.data()};
  std::optional<Tensor> g;
  if (groups) g = torch::stable::contiguous(*groups);
  const Groups by_group = groups_of(order, g ? g->const_data_ptr<int64_t>() : nullptr);
  const int64_t num_groups = static_cast<int64_t>(by_group.starts.size()) - 1;
  const bool parallel = num_groups >= kParallelGroups && n >= kParallelBoxes;
  torch::stable::parallel_for(
      0, num_groups, parallel ? 1 : num_groups,
      [&](int64_t first, int64_t last) { decide_groups(problem, by_group, first, last); });

  const int64_t kept = std::count(stays.begin(), stays.end(), 1);
  const int64_t count = std::min(kept, problem.limit);
  Tensor out = torch::stable::new_empty(b, {count}, ScalarType::Long);
  int64_t* indices = out.mutable_data_ptr<int64_t>();
  for (int64_t rank = 0, written = 0; written < count; ++rank)
    if (stays[rank]) indices[written++] = order[rank];
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) { m.impl("nms", TORCH_BOX(&nms_cpu)); }

}  // namespace fcos_ext
