// Feature levels [N, C, H, W], as the losses take them.
#pragma once

#include <vector>

#include "checks.h"

namespace fcos_ext {

using Tensors = std::vector<Tensor>;

// Levels that one launch takes: their sizes and pointers travel as kernel arguments.
constexpr size_t kMaxFeatureLevels = 8;

// Whether t [N, C, H, W] lies in memory without gaps, with dimension 1 the second (planes) or the
// last. Dimensions of size 1 do not count, so that a tensor can be both.
inline bool is_dense(const Tensor& t, bool planes) {
  if (t.numel() == 0) return true;
  const int planes_order[] = {3, 2, 1, 0}, rows_order[] = {1, 3, 2, 0};
  int64_t stride = 1;
  for (int d : planes ? planes_order : rows_order) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

// `some` are tensors like the levels.
inline void check_same_levels(const char* op, const char* name, const Tensors& some,
                              const char* levels_name, const Tensors& levels) {
  STD_TORCH_CHECK(some.size() == levels.size(), op, ": ", name, " must have ", levels.size(),
                  " levels, got ", some.size());
  for (size_t l = 0; l < levels.size(); ++l) {
    check_same_device(op, levels_name, levels[l], name, some[l]);
    STD_TORCH_CHECK(some[l].sizes().equals(levels[l].sizes()) &&
                        some[l].scalar_type() == levels[l].scalar_type(),
                    op, ": ", name, " must have the shapes and the dtype of ", levels_name);
  }
}

}  // namespace fcos_ext
