// Where the rows of a strided tensor [..., K] lie, so that kernels read the network's outputs as
// they are: [N, L, 4] as a view of [N, 4, L], a level of a longer tensor, channels_last.
#pragma once

#include "common.h"
#include "math.h"

namespace fcos_ext {

// Row numbers count over all dimensions but the last, of which up to three can be told apart.
template <typename Pointer>
struct Rows {
  Pointer data;
  ScalarType dtype;
  // Innermost first. The size of the outermost is not needed.
  int64_t size0, size1;
  int64_t stride0, stride1, stride2;  // in elements
  int64_t stride;                     // between the values of a row
  bool is_flat;                       // one stride does for all rows
  bool is_vector;                     // the 4 values of a row are side by side and aligned

  // Elements from `data` to the first value of a row.
  FCOS_INLINE int64_t offset(int64_t row) const {
    if (is_flat) return row * stride0;
    if (((row | size0 | size1) >> 32) == 0) {  // 32-bit division is several times faster
      const uint32_t r = uint32_t(row), outer = r / uint32_t(size0);
      const uint32_t outermost = outer / uint32_t(size1);
      return int64_t(r - outer * uint32_t(size0)) * stride0 +
             int64_t(outer - outermost * uint32_t(size1)) * stride1 + int64_t(outermost) * stride2;
    }
    const int64_t outer = row / size0, outermost = outer / size1;
    return (row - outer * size0) * stride0 + (outer - outermost * size1) * stride1 +
           outermost * stride2;
  }
};

using ConstRows = Rows<const void*>;
using MutableRows = Rows<void*>;

// The rows of t over its first `batch_dims` dimensions. nullopt: they need more than three strides.
template <typename Pointer>
std::optional<Rows<Pointer>> find_rows(Pointer data, const Tensor& t, int64_t batch_dims) {
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {0, 0, 0};
  int64_t count = 0;
  for (int64_t d = batch_dims - 1; d >= 0; --d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    if (count > 0 && stride == strides[count - 1] * sizes[count - 1]) {
      sizes[count - 1] *= size;
      continue;
    }
    if (count == 3) return std::nullopt;
    sizes[count] = size;
    strides[count] = stride;
    ++count;
  }
  const int64_t stride = batch_dims < t.dim() ? t.stride(batch_dims) : 1;
  const int64_t alignment = 4 * int64_t(t.element_size()) < 16 ? 8 : 16;
  const bool is_vector = stride == 1 && strides[0] % 4 == 0 && strides[1] % 4 == 0 &&
                         strides[2] % 4 == 0 &&
                         reinterpret_cast<uintptr_t>(data) % uintptr_t(alignment) == 0;
  return Rows<Pointer>{data,       t.scalar_type(), sizes[0], sizes[1],   strides[0],
                       strides[1], strides[2],      stride,   count <= 1, is_vector};
}

// A tensor to read, and its rows; a copy where it has more than three batch dimensions that no
// stride joins.
struct Input {
  Tensor tensor;
  ConstRows rows;

  Input(const Tensor& t, int64_t batch_dims) : tensor(t) {
    auto found = find_rows(t.const_data_ptr(), t, batch_dims);
    if (!found) {
      tensor = torch::stable::contiguous(t);
      found = find_rows(tensor.const_data_ptr(), tensor, batch_dims);
    }
    rows = *found;
  }
};

// A new tensor like t, strides included, to write: through `rows`, and then finish().
struct Output {
  Tensor result, written;
  MutableRows rows;

  Output(const Tensor& t, int64_t batch_dims)
      : result(torch::stable::empty_like(t)), written(result) {
    auto found = find_rows(result.mutable_data_ptr(), result, batch_dims);
    if (!found) {
      written = torch::stable::new_empty(t, t.sizes());
      found = find_rows(written.mutable_data_ptr(), written, batch_dims);
    }
    rows = *found;
  }
  Tensor finish() {
    if (written.mutable_data_ptr() != result.mutable_data_ptr())
      torch::stable::copy_(result, written);
    return result;
  }
};

// Where a location of a level [N, K, H, W] lies: image, and position row by row.
struct Place {
  int64_t image, position;
};

// The rows of K values at the locations of a level, in either memory layout or a slice of it.
template <typename Pointer>
struct LevelRows {
  Pointer data;
  ScalarType dtype;
  bool is_vector;                           // 4 values of a row are side by side and aligned
  int64_t per_image, per_position, stride;  // in elements; the last between the values of a row

  LevelRows() = default;
  LevelRows(Pointer pointer, const Tensor& t, int64_t image_stride, int64_t position_stride,
            int64_t value_stride)
      : data(pointer),
        dtype(t.scalar_type()),
        per_image(image_stride),
        per_position(position_stride),
        stride(value_stride) {
    const int64_t alignment = 4 * int64_t(t.element_size()) < 16 ? 8 : 16;
    is_vector = stride == 1 && per_image % 4 == 0 && per_position % 4 == 0 &&
                reinterpret_cast<uintptr_t>(data) % uintptr_t(alignment) == 0;
  }

  FCOS_INLINE int64_t offset(Place p) const {
    return p.image * per_image + p.position * per_position;
  }
};

// Of t [N, K, H, W]. nullopt: no one stride leads from each location of an image to the next.
template <typename Pointer>
std::optional<LevelRows<Pointer>> find_level_rows(Pointer data, const Tensor& t) {
  const int64_t H = t.size(2), W = t.size(3);
  if (t.numel() == 0) return LevelRows<Pointer>(data, t, 0, 0, 0);
  if (H > 1 && W > 1 && t.stride(2) != W * t.stride(3)) return std::nullopt;
  return LevelRows<Pointer>(data, t, t.size(0) > 1 ? t.stride(0) : 0,
                            W > 1   ? t.stride(3)
                            : H > 1 ? t.stride(2)
                                    : 0,
                            t.size(1) > 1 ? t.stride(1) : 1);
}

// Of rows [L, K] or [N, L, K], or [L] or [N, L]: those of a level whose locations are in one line.
template <typename Pointer>
LevelRows<Pointer> level_rows_of(Pointer data, const Tensor& t, int64_t batch_dims) {
  return LevelRows<Pointer>(data, t, batch_dims == 2 && t.size(0) > 1 ? t.stride(0) : 0,
                            t.stride(batch_dims - 1),
                            batch_dims < t.dim() ? t.stride(batch_dims) : 1);
}

}  // namespace fcos_ext
