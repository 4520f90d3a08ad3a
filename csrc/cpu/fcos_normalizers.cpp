#include <vector>

#include "../fcos_normalizers_args.h"
#include "row_blocks.h"

namespace fcos_ext {
namespace {

// Tiles that are worth a thread: about 50 us.
constexpr int64_t kGrain = 32;

struct Cpu {
  static Tensor run(const Tensor& labels, const Tensor& centerness, int64_t num_classes,
                    std::optional<Tensor> narrow) {
    const Tensor rows = torch::stable::contiguous(labels),
                 values = torch::stable::contiguous(centerness);
    const Integers classes = integers_of(rows);
    const float* weights = values.const_data_ptr<float>();
    int32_t* narrow_labels = narrow ? narrow->mutable_data_ptr<int32_t>() : nullptr;
    struct Sums {
      double count = 0, centerness = 0;
    };
    std::vector<Sums> partials(num_row_tiles(rows.numel()));
    for_each_row_tile(
        rows.numel(),
        [&](int64_t begin, int64_t end, int64_t tile) {
          Sums sums;
          for_each_row_block(classes, num_classes, begin, end,
                             [&](const int64_t* positives, int n) {
                               sums.count += n;
                               for (int i = 0; i < n; ++i)
                                 sums.centerness += double(weights[positives[i]]);
                             });
          if (narrow_labels) narrow_all(classes, num_classes, begin, end, narrow_labels);
          partials[tile] = sums;
        },
        kGrain);
    Sums total;
    for (const Sums& partial : partials) {
      total.count += partial.count;
      total.centerness += partial.centerness;
    }
    Tensor out = torch::stable::new_empty(labels, {2}, ScalarType::Float);
    out.mutable_data_ptr<float>()[0] = static_cast<float>(total.count);
    out.mutable_data_ptr<float>()[1] = static_cast<float>(total.centerness);
    return out;
  }

  FCOS_INLINE static void narrow_all(const Integers& labels, int64_t num_classes, int64_t begin,
                                     int64_t end, int32_t* out) {
    for (int64_t i = begin; i < end; ++i) out[i] = narrowed(labels[i], num_classes);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) { FCOS_IMPLEMENT_NORMALIZER_OPS(m, Cpu); }

}  // namespace fcos_ext
