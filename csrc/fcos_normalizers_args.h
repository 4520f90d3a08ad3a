// The argument rules of fcos_normalizers, the same for CPU and CUDA.
#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "integers.h"

namespace fcos_ext {

// Of a label: itself, if it names a class or is -1, the background; else -2.
FCOS_INLINE int32_t narrowed(int64_t label, int64_t num_classes) {
  // one comparison for -1 <= label < num_classes
  return static_cast<uint64_t>(label) + 1 <= static_cast<uint64_t>(num_classes)
             ? static_cast<int32_t>(label)
             : -2;
}

inline void check_fcos_normalizers(const Tensor& labels, const Tensor& centerness,
                                   int64_t num_classes) {
  constexpr const char* kOp = "fcos_normalizers";
  check_integer(kOp, "labels", labels);
  STD_TORCH_CHECK(centerness.scalar_type() == ScalarType::Float, kOp,
                  ": centerness must be Float, got ",
                  torch::headeronly::toString(centerness.scalar_type()));
  STD_TORCH_CHECK(centerness.sizes().equals(labels.sizes()), kOp,
                  ": centerness must have the shape of labels");
  check_same_device(kOp, "labels", labels, "centerness", centerness);
  STD_TORCH_CHECK(num_classes >= 0, kOp, ": num_classes must be >= 0, got ", num_classes);
}

// The operators. Backend::run(labels, centerness, num_classes, narrow) returns the sums, and writes
// the narrowed labels, if they are wanted.
template <typename Backend>
struct NormalizerOps {
  static Tensor sums(const Tensor& labels, const Tensor& centerness, int64_t num_classes) {
    check_fcos_normalizers(labels, centerness, num_classes);
    return Backend::run(labels, centerness, num_classes, std::nullopt);
  }

  static std::tuple<Tensor, Tensor> sums_and_labels(const Tensor& labels, const Tensor& centerness,
                                                    int64_t num_classes) {
    check_fcos_normalizers(labels, centerness, num_classes);
    STD_TORCH_CHECK(num_classes <= std::numeric_limits<int32_t>::max(),
                    "fcos_normalizers_and_labels: num_classes must be below 2^31, got ",
                    num_classes);
    const Tensor narrow = torch::stable::new_empty(labels, labels.sizes(), ScalarType::Int);
    return {Backend::run(labels, centerness, num_classes, narrow), narrow};
  }
};

// Registers them, from within STABLE_TORCH_LIBRARY_IMPL.
#define FCOS_IMPLEMENT_NORMALIZER_OPS(m, Backend)                       \
  m.impl("fcos_normalizers", TORCH_BOX(&NormalizerOps<Backend>::sums)); \
  m.impl("fcos_normalizers_and_labels", TORCH_BOX(&NormalizerOps<Backend>::sums_and_labels))

}  // namespace fcos_ext
