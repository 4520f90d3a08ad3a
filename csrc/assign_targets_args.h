// Arguments and results of assign_targets, the same for CPU and CUDA.
#pragma once

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "assign_targets.h"
#include "checks.h"

namespace fcos_ext {

enum class Boundary : int64_t { kInclusive, kStrict, kHalfOpen };

// Numbers that describe where the locations of a level are: steps and first of rows and columns,
// the unit of normalised distances, and the reach of the center sampling, infinite without.
constexpr size_t kGridNumbers = 6;

// The geometry of a level travels to the GPU as a kernel argument, which has a fixed size.
constexpr int64_t kMaxLevels = 32;

// labels [N, L], ltrb [N, L, 4], centerness [N, L], matched [N, L], num_pos [N].
using Targets = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Images N, and locations L of an image.
inline Targets new_targets(const Tensor& boxes, int64_t N, int64_t L) {
  using torch::stable::new_empty;
  return {new_empty(boxes, {N, L}, ScalarType::Long),
          new_empty(boxes, {N, L, 4}, ScalarType::Float),
          new_empty(boxes, {N, L}, ScalarType::Float), new_empty(boxes, {N, L}, ScalarType::Long),
          new_empty(boxes, {N}, ScalarType::Long)};
}

// Where the results go.
struct TargetPointers {
  int64_t* labels;
  float* ltrb;
  float* centerness;
  int64_t* matched;
  int64_t* num_pos;

  explicit TargetPointers(Targets& t)
      : labels(std::get<0>(t).mutable_data_ptr<int64_t>()),
        ltrb(std::get<1>(t).mutable_data_ptr<float>()),
        centerness(std::get<2>(t).mutable_data_ptr<float>()),
        matched(std::get<3>(t).mutable_data_ptr<int64_t>()),
        num_pos(std::get<4>(t).mutable_data_ptr<int64_t>()) {}
};

inline void check_assign_targets(const Tensor& boxes, const Tensor& labels, const Tensor& extents) {
  constexpr const char* kOp = "assign_targets";
  check_floating(kOp, "boxes", boxes);
  check_integer(kOp, "labels", labels);
  check_integer(kOp, "offsets or counts", extents);
  STD_TORCH_CHECK((boxes.dim() == 2 || boxes.dim() == 3) && boxes.size(-1) == 4, kOp,
                  ": boxes must have shape [K, 4] or [N, M, 4]");
  bool rows_agree = labels.dim() == boxes.dim() - 1;
  for (int64_t d = 0; rows_agree && d < labels.dim(); ++d)
    rows_agree = labels.size(d) == boxes.size(d);
  STD_TORCH_CHECK(rows_agree, kOp, ": labels must have the shape of boxes without the last 4");
  STD_TORCH_CHECK(boxes.dim() == 3 || (extents.dim() == 1 && extents.size(0) >= 1), kOp,
                  ": offsets must have shape [N + 1], got ", extents.dim(),
                  " dimensions or no element");
  STD_TORCH_CHECK(boxes.dim() == 2 || (extents.dim() == 1 && extents.size(0) == boxes.size(0)), kOp,
                  ": counts must have shape [N] with N = ", boxes.size(0), " images");
  STD_TORCH_CHECK(labels.numel() < std::numeric_limits<int32_t>::max(), kOp,
                  ": at most 2^31 - 2 boxes, got ", labels.numel());
  check_same_device(kOp, "boxes", boxes, "labels", labels);
  check_same_device(kOp, "boxes", boxes, "offsets or counts", extents);
}

// The ground truth as the kernels read it: contiguous, and the boxes in float32.
struct GroundTruth {
  Tensor boxes, labels, extents;

  GroundTruth(const Tensor& boxes_, const Tensor& labels_, const Tensor& extents_)
      : boxes(contiguous(boxes_.scalar_type() == ScalarType::Float
                             ? boxes_
                             : torch::stable::to(boxes_, ScalarType::Float))),
        labels(contiguous(labels_)),
        extents(contiguous(extents_)) {}

  bool is_padded() const { return boxes.dim() == 3; }
  int64_t num_images() const { return is_padded() ? boxes.size(0) : extents.size(0) - 1; }
  Boxes rows() const {
    return {boxes.const_data_ptr<float>(), integers_of(labels), integers_of(extents),
            labels.numel(), is_padded() ? boxes.size(1) : -1};
  }

 private:
  // Does not ask PyTorch where nothing is to do, which alone takes longer than a small image.
  static Tensor contiguous(const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }
};

// Rounded to float32; beyond its range, to infinity.
inline float to_float(double x) {
  if (std::fabs(x) <= double(std::numeric_limits<float>::max())) return static_cast<float>(x);
  return x > 0 ? INFINITY : x < 0 ? -INFINITY : NAN;
}

inline Ties ties_of(int64_t ties, bool pixels) {
  STD_TORCH_CHECK(ties == 0 || ties == 1, "assign_targets: ties must be 0 or 1, got ", ties);
  const float end = pixels ? 1.0f : 0.0f;
  return ties == 0 ? Ties{0.0f, INFINITY, end} : Ties{1e8f, 0.0f, end};
}

// Where rows or columns are.
inline Axis axis_of(double step, double first, size_t level) {
  const Axis axis{to_float(step), to_float(first)};
  STD_TORCH_CHECK(axis.step >= std::numeric_limits<float>::min() && axis.step < INFINITY &&
                      std::fabs(axis.first) < INFINITY,
                  "assign_targets: grids must have finite steps above 0 and a finite first, got ",
                  step, " and ", first, " at level ", level);
  return axis;
}

// The levels from the flat lists of the operator: (height, width), grid and (low, high) of each.
inline std::vector<Level> levels_of(const std::vector<int64_t>& feature_sizes,
                                    const std::vector<double>& grids,
                                    const std::vector<double>& size_ranges, int64_t boundary) {
  constexpr const char* kOp = "assign_targets";
  constexpr int64_t kMaxLocations = int64_t(1) << 30;  // of a level: indices stay far from overflow
  const size_t n = grids.size() / kGridNumbers;
  STD_TORCH_CHECK(n >= 1 && n <= kMaxLevels && grids.size() == kGridNumbers * n &&
                      feature_sizes.size() == 2 * n && size_ranges.size() == 2 * n,
                  kOp, ": feature_sizes and size_ranges must have two entries and grids ",
                  kGridNumbers, " for each of 1 to ", kMaxLevels, " levels, got ",
                  feature_sizes.size(), ", ", size_ranges.size(), " and ", grids.size());
  STD_TORCH_CHECK(boundary >= 0 && boundary <= 2, kOp, ": boundary must be 0, 1 or 2, got ",
                  boundary);
  const auto rule = static_cast<Boundary>(boundary);
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < n; ++i) {
    const int64_t height = feature_sizes[2 * i], width = feature_sizes[2 * i + 1];
    STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= kMaxLocations / width, kOp,
                    ": feature_sizes must be (height, width) of at least 1 and of at most 2^30 ",
                    "locations, got (", height, ", ", width, ") at level ", i);
    const double* grid = grids.data() + kGridNumbers * i;
    const Axis y = axis_of(grid[0], grid[2], i), x = axis_of(grid[1], grid[3], i);
    const float unit = to_float(grid[4]), reach = to_float(grid[5]);
    STD_TORCH_CHECK(unit > 0 && unit < INFINITY && reach >= 0, kOp,
                    ": grids must have a finite unit above 0 and a reach >= 0, got ", grid[4],
                    " and ", grid[5], " at level ", i);
    float low = to_float(size_ranges[2 * i]), high = to_float(size_ranges[2 * i + 1]);
    STD_TORCH_CHECK(low <= high, kOp, ": size_ranges must be (low, high) with low <= high, got (",
                    low, ", ", high, ") at level ", i);
    if (rule == Boundary::kStrict) low = std::nextafter(low, INFINITY);
    if (rule != Boundary::kInclusive) high = std::nextafter(high, -INFINITY);
    levels.push_back({start, static_cast<int32_t>(height), static_cast<int32_t>(width), y, x, unit,
                      low, high, reach});
    start += height * width;
  }
  return levels;
}

inline int64_t num_locations(const std::vector<Level>& levels) {
  const Level& last = levels.back();
  return last.start + int64_t(last.height) * last.width;
}

}  // namespace fcos_ext
