// The arguments of postprocess, the same for CPU and CUDA: rules, and the forms kernels take them
// in.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "padded_batched_nms.h"
#include "postprocess.h"

namespace fcos_ext {

constexpr int kMaxPostprocessLevels = 8;

// Numbers of any of four floating dtypes and two integer ones, of which few are read.
struct Numbers {
  const void* data;
  ScalarType dtype;

  template <typename acc>
  FCOS_INLINE acc at(int64_t i) const {
    switch (dtype) {
      case ScalarType::Double:
        return static_cast<acc>(static_cast<const double*>(data)[i]);
      case ScalarType::Half:
        return static_cast<acc>(
            static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[i]));
      case ScalarType::BFloat16:
        return static_cast<acc>(
            static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[i]));
      case ScalarType::Long:
        return static_cast<acc>(static_cast<const int64_t*>(data)[i]);
      case ScalarType::Int:
        return static_cast<acc>(static_cast<const int32_t*>(data)[i]);
      default:
        return static_cast<acc>(static_cast<const float*>(data)[i]);
    }
  }
};

// A tensor [N, channels, H, W] with any strides, in elements.
struct Maps {
  Numbers numbers;
  int64_t image, channel, row, column;

  FCOS_INLINE int64_t offset(int64_t n, int y, int x) const {
    return n * image + y * row + x * column;
  }
};

inline Maps maps_of(const Tensor& t) {
  return {
      {t.const_data_ptr(), t.scalar_type()}, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// One level, as kernels see it. An index into the logits of an image counts them in the order of
// the memory; a flat one by location, then class, and orders candidates of equal score.
struct PostprocessLevel {
  const void* logits;
  int64_t image_stride;
  bool planes;  // locations are innermost, not classes
  int height, width;
  int locations;
  int pairs;  // of a location and a class
  Maps regression, centerness;
  Grid grid;
  Numbers anchors;          // [H W, 4], in place of the grid if not null
  int64_t first_candidate;  // among those of an image
  int max_candidates;

  // Of a location, before its sigmoid, which is 1 where there is no centerness.
  template <typename acc>
  FCOS_INLINE acc centerness_at(int64_t n, int y, int x) const {
    return centerness.numbers.data ? centerness.numbers.at<acc>(centerness.offset(n, y, x))
                                   : std::numeric_limits<acc>::infinity();
  }

  // Product of the scores of a candidate, from what it was ranked by.
  FCOS_INLINE float product_of(const Scoring& scoring, Rank<float> rank, int64_t n, int y,
                               int x) const {
    const float key = score_of_key(static_cast<OrderKey<float>>(rank >> 32));
    return scoring.by_class ? product(key, sigmoid_by_series(centerness_at<double>(n, y, x))) : key;
  }

  FCOS_INLINE Box decode(const BoxCoding& coding, int64_t n, int y, int x) const {
    const Numbers& from = regression.numbers;
    const int64_t at = regression.offset(n, y, x), step = regression.channel;
    return coding.decode(anchor(y, x), from.at<float>(at), from.at<float>(at + step),
                         from.at<float>(at + 2 * step), from.at<float>(at + 3 * step));
  }

 private:
  FCOS_INLINE Anchor anchor(int y, int x) const {
    if (!anchors.data) return grid.anchor(y, x);
    const int64_t i = 4 * (int64_t(y) * width + x);
    return anchor_of({anchors.at<float>(i), anchors.at<float>(i + 1), anchors.at<float>(i + 2),
                      anchors.at<float>(i + 3)});
  }
};

struct PostprocessCall {
  std::vector<PostprocessLevel> levels;
  int64_t images, classes, candidates;  // the last of an image, at most
  ScalarType dtype;                     // of the logits
  Scoring scoring;
  BoxCoding coding;
  float iou_threshold;
  int64_t topk_candidates, max_detections;
  bool class_agnostic, clip, keep_empty;
  BoxEnds ends;
  int64_t max_apart;  // up to so many candidates of an image, boxes are compared moved_apart()
  Numbers image_sizes, original_sizes;  // [N, 2]; the latter null if the former are to be kept
  // [N, D, 4], [N, D], [N, D], [N], [N]
  Tensor boxes, scores, labels, counts, dropped;
  std::vector<Tensor> alive;  // copies that others point into

  // Height and width of an image that detections refer to, divided by those that it has here.
  FCOS_INLINE static float scale(const Numbers& original, const Numbers& image, int64_t i) {
    return original.data ? original.at<float>(i) / image.at<float>(i) : 1.0f;
  }
};

// Whether the classes and locations of each image lie without gaps, in that order (planes) or the
// other.
inline bool is_dense_image(const Tensor& t, bool planes) {
  const int planes_order[] = {3, 2, 1}, rows_order[] = {1, 3, 2};
  int64_t stride = 1;
  for (int d : planes ? planes_order : rows_order) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

inline void check_maps(const char* name, const std::vector<Tensor>& maps,
                       const std::vector<Tensor>& logits, int64_t channels) {
  constexpr const char* kOp = "postprocess";
  STD_TORCH_CHECK(maps.size() == logits.size(), kOp, ": ", name, " must have ", logits.size(),
                  " levels, got ", maps.size());
  for (size_t l = 0; l < maps.size(); ++l) {
    const Tensor &t = maps[l], &x = logits[l];
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == logits[0].size(0) && t.size(1) == channels &&
                        t.size(2) == x.size(2) && t.size(3) == x.size(3),
                    kOp, ": ", name, " must be [N, ", channels, ", H, W] with the H and W of ",
                    "logits in each level");
    check_floating(kOp, name, t);
    STD_TORCH_CHECK(t.scalar_type() == maps[0].scalar_type(), kOp, ": all levels of ", name,
                    " must have the same dtype");
    check_same_device(kOp, "logits", logits[0], name, t);
  }
}

inline Numbers check_image_sizes(const char* name, const Tensor& sizes, const Tensor& logits,
                                 std::vector<Tensor>& alive) {
  constexpr const char* kOp = "postprocess";
  STD_TORCH_CHECK(sizes.dim() == 2 && sizes.size(0) == logits.size(0) && sizes.size(1) == 2, kOp,
                  ": ", name, " must be [N, 2]");
  const ScalarType dtype = sizes.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int ||
                      dtype == ScalarType::Float || dtype == ScalarType::Double,
                  kOp, ": ", name, " must be Long, Int, Float or Double, got ",
                  torch::headeronly::toString(dtype));
  check_same_device(kOp, "logits", logits, name, sizes);
  alive.push_back(torch::stable::contiguous(sizes));
  return {alive.back().const_data_ptr(), dtype};
}

inline Numbers check_anchors(size_t level, const std::vector<Tensor>& anchors, const Tensor& logits,
                             std::vector<Tensor>& alive) {
  constexpr const char* kOp = "postprocess";
  const Tensor& t = anchors[level];
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == logits.size(2) * logits.size(3) && t.size(1) == 4,
                  kOp, ": anchors must be [H W, 4] with the H and W of logits in each level");
  check_floating(kOp, "anchors", t);
  check_same_device(kOp, "logits", logits, "anchors", t);
  alive.push_back(torch::stable::contiguous(t));
  return {alive.back().const_data_ptr(), t.scalar_type()};
}

inline PostprocessCall make_postprocess_call(
    const std::vector<Tensor>& logits, const std::vector<Tensor>& regression,
    const std::vector<Tensor>& centerness, const std::vector<Tensor>& anchors,
    const Tensor& image_sizes, const std::optional<Tensor>& original_sizes,
    const std::vector<double>& grids, const std::vector<double>& deltas, double score_threshold,
    double iou_threshold, int64_t topk_candidates, int64_t max_detections, int64_t max_apart,
    bool root, bool on_final, bool by_class, bool class_agnostic, bool clip, bool in_pixels,
    bool keep_empty, bool pixels, bool overlap_edges) {
  constexpr const char* kOp = "postprocess";
  STD_TORCH_CHECK(!logits.empty() && logits.size() <= kMaxPostprocessLevels, kOp,
                  ": logits must have 1 to ", kMaxPostprocessLevels, " levels, got ",
                  logits.size());
  STD_TORCH_CHECK(logits[0].dim() == 4 && logits[0].size(1) >= 1, kOp,
                  ": logits must be [N, C, H, W] with C >= 1");
  const int64_t N = logits[0].size(0), C = logits[0].size(1);
  check_maps("logits", logits, logits, C);
  check_maps("regression", regression, logits, 4);
  if (!centerness.empty()) check_maps("centerness", centerness, logits, 1);
  STD_TORCH_CHECK(grids.size() == 5 * logits.size(), kOp, ": grids must be 5 numbers a level, got ",
                  grids.size());
  STD_TORCH_CHECK(deltas.empty() || deltas.size() == 5, kOp,
                  ": deltas must be 4 weights and a limit, or nothing, got ", deltas.size(),
                  " numbers");
  STD_TORCH_CHECK(deltas.empty() || !anchors.empty(), kOp, ": deltas need anchors");
  STD_TORCH_CHECK(score_threshold >= 0 && score_threshold <= 1, kOp,
                  ": score_threshold must be in [0, 1], got ", score_threshold);
  STD_TORCH_CHECK(topk_candidates >= 1, kOp, ": topk_candidates must be at least 1, got ",
                  topk_candidates);
  STD_TORCH_CHECK(max_detections >= 1, kOp, ": max_detections must be at least 1, got ",
                  max_detections);

  PostprocessCall call{};
  call.images = N;
  call.classes = C;
  call.dtype = logits[0].scalar_type();
  call.scoring = {static_cast<float>(score_threshold), root, on_final, by_class};
  call.iou_threshold = static_cast<float>(iou_threshold);
  call.topk_candidates = topk_candidates;
  call.max_detections = max_detections;
  call.class_agnostic = class_agnostic;
  call.clip = clip;
  call.keep_empty = keep_empty;
  call.ends = {pixels ? 1.0f : 0.0f, !overlap_edges};
  call.max_apart = class_agnostic ? 0 : max_apart;
  call.coding.in_pixels = in_pixels;
  if (!deltas.empty())
    call.coding = {false,
                   true,
                   static_cast<float>(deltas[0]),
                   static_cast<float>(deltas[1]),
                   static_cast<float>(deltas[2]),
                   static_cast<float>(deltas[3]),
                   static_cast<float>(deltas[4])};
  call.image_sizes = check_image_sizes("image_sizes", image_sizes, logits[0], call.alive);
  if (original_sizes)
    call.original_sizes =
        check_image_sizes("original_sizes", *original_sizes, logits[0], call.alive);
  STD_TORCH_CHECK(anchors.empty() || anchors.size() == logits.size(), kOp, ": anchors must have ",
                  logits.size(), " levels, or none, got ", anchors.size());
  for (size_t l = 0; l < logits.size(); ++l) {
    const Tensor& t = logits[l];
    const int64_t height = t.size(2), width = t.size(3);
    STD_TORCH_CHECK(height >= 1 && width >= 1, kOp, ": levels must have a location");
    // Indices have 32 bits, and room to be advanced beyond the last one.
    STD_TORCH_CHECK(height < (1 << 30) && width < (1 << 30) && C < (1 << 30) &&
                        height * width < (1 << 30) && height * width * C < (1 << 30),
                    kOp, ": at most 2^30 - 1 logits in a level of an image, got [", C, ", ", height,
                    ", ", width, "]");
    const bool rows = is_dense_image(t, false), planes = !rows && is_dense_image(t, true);
    call.alive.push_back(rows || planes ? t : torch::stable::contiguous(t));
    const Tensor dense = call.alive.back();
    const double* g = grids.data() + 5 * l;
    PostprocessLevel level{};
    level.logits = dense.const_data_ptr();
    level.image_stride = dense.stride(0);
    level.planes = !rows;
    level.height = static_cast<int>(height);
    level.width = static_cast<int>(width);
    level.locations = static_cast<int>(height * width);
    level.pairs = static_cast<int>(height * width * C);
    level.regression = maps_of(regression[l]);
    if (!centerness.empty()) level.centerness = maps_of(centerness[l]);
    if (!anchors.empty()) level.anchors = check_anchors(l, anchors, t, call.alive);
    level.grid = {static_cast<float>(g[0]), static_cast<float>(g[1]), static_cast<float>(g[2]),
                  static_cast<float>(g[3]), static_cast<float>(g[4])};
    level.first_candidate = call.candidates;
    level.max_candidates = static_cast<int>(std::min<int64_t>(topk_candidates, level.pairs));
    call.candidates += level.max_candidates;
    call.levels.push_back(level);
  }
  STD_TORCH_CHECK(call.candidates <= int64_t(1) << 30, kOp,
                  ": at most 2^30 candidates of an image, got ", call.candidates);
  const Tensor& like = logits[0];
  const int64_t D = max_detections;
  call.boxes = torch::stable::new_empty(like, {N, D, 4}, ScalarType::Float);
  call.scores = torch::stable::new_empty(like, {N, D}, ScalarType::Float);
  call.labels = torch::stable::new_empty(like, {N, D}, ScalarType::Long);
  call.counts = torch::stable::new_empty(like, {N}, ScalarType::Long);
  call.dropped = torch::stable::new_empty(like, {N}, ScalarType::Long);
  return call;
}

// The operator. Backend::run(PostprocessCall&) does the work.
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> postprocess(
    const std::vector<Tensor>& logits, const std::vector<Tensor>& regression,
    const std::vector<Tensor>& centerness, const std::vector<Tensor>& anchors,
    const Tensor& image_sizes, const std::optional<Tensor>& original_sizes,
    const std::vector<double>& grids, const std::vector<double>& deltas, double score_threshold,
    double iou_threshold, int64_t topk_candidates, int64_t max_detections, int64_t max_apart,
    bool root, bool on_final, bool by_class, bool class_agnostic, bool clip, bool in_pixels,
    bool keep_empty, bool pixels, bool overlap_edges) {
  PostprocessCall call = make_postprocess_call(
      logits, regression, centerness, anchors, image_sizes, original_sizes, grids, deltas,
      score_threshold, iou_threshold, topk_candidates, max_detections, max_apart, root, on_final,
      by_class, class_agnostic, clip, in_pixels, keep_empty, pixels, overlap_edges);
  if (call.images > 0) Backend::run(call, logits[0]);
  return {call.boxes, call.scores, call.labels, call.counts, call.dropped};
}

}  // namespace fcos_ext
