#include "../fcos_normalizers_args.h"
#include "kernel_table.cuh"
#include "launch.cuh"
#include "reduction.cuh"
#include "row_access.cuh"

namespace fcos_ext {
namespace {

struct Args {
  Integers labels;
  const float* centerness;
  int64_t rows;
  int64_t num_classes;
  int32_t* narrow;   // may be null
  double* partials;  // [2, tiles]: positives, sum of their centerness
  unsigned* ticket;
  float* out;  // [2]
};

__global__ void __launch_bounds__(kRowThreads) fcos_normalizers_kernel(const Args a) {
  const int64_t tiles = num_row_tiles(a.rows);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kRowTile + threadIdx.x;
    int count = 0;
    double sum = 0;
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int64_t row = first + k * kRowThreads;
      if (row >= a.rows) break;
      const int64_t label = a.labels[row];
      if (a.narrow) a.narrow[row] = narrowed(label, a.num_classes);
      if (static_cast<uint64_t>(label) >= static_cast<uint64_t>(a.num_classes)) continue;
      ++count;
      sum += static_cast<double>(a.centerness[row]);
    }
    count = block_sum<kRowThreads>(count);
    sum = block_sum<kRowThreads>(sum);
    if (threadIdx.x != 0) continue;
    a.partials[tile] = count;
    a.partials[tiles + tile] = sum;
  }
  if (!is_last_block(a.ticket)) return;
  const double count = sum_partials<kRowThreads>(a.partials, tiles);
  const double sum = sum_partials<kRowThreads>(a.partials + tiles, tiles);
  if (threadIdx.x != 0) return;
  a.out[0] = static_cast<float>(count);
  a.out[1] = static_cast<float>(sum);
}

const ListKernel kListed{"fcos_normalizers", &fcos_normalizers_kernel, kRowThreads};

struct Cuda {
  static Tensor run(const Tensor& labels, const Tensor& centerness, int64_t num_classes,
                    std::optional<Tensor> narrow) {
    Tensor out = torch::stable::new_empty(labels, {2}, ScalarType::Float);
    const int64_t rows = labels.numel(), tiles = num_row_tiles(rows);
    if (rows == 0) {
      clear(out.mutable_data_ptr(), 2 * sizeof(float), labels);
      return out;
    }
    const Tensor classes = torch::stable::contiguous(labels);
    const Tensor values = torch::stable::contiguous(centerness);
    Tensor partials = torch::stable::new_empty(labels, {2 * tiles}, ScalarType::Double);
    Tensor ticket = new_ticket(labels);
    const Args args{integers_of(classes),
                    values.const_data_ptr<float>(),
                    rows,
                    num_classes,
                    narrow ? narrow->mutable_data_ptr<int32_t>() : nullptr,
                    partials.mutable_data_ptr<double>(),
                    static_cast<unsigned*>(ticket.mutable_data_ptr()),
                    out.mutable_data_ptr<float>()};
    launch(&fcos_normalizers_kernel, grid_for(tiles), dim3(kRowThreads), 0, labels, args);
    return out;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  FCOS_IMPLEMENT_NORMALIZER_OPS(m, Cuda);
}

}  // namespace fcos_ext
