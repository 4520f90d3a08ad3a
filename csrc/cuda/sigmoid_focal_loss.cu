#include <type_traits>

#include "../sigmoid_focal_loss.h"
#include "../sigmoid_focal_loss_args.h"
#include "kernel_table.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace fcos_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;  // independent 16-byte loads in flight

// Logits of one work item of a block. A fixed size, whatever the GPU, makes the sum the same to
// the bit on any of them.
template <typename scalar_t>
constexpr int kTile = kThreads * kVectorsPerThread * Vector<scalar_t>::kSize;

enum class Mode {
  kSum,       // partial[tile] = sum of the losses of a tile
  kLoss,      // out = loss of each logit
  kSumGrad,   // out = grad[0] / normalizer * derivative of each loss
  kLossGrad,  // out = grad * derivative of each loss
};

template <typename scalar_t>
struct Args {
  const scalar_t* logits;
  Labels labels;
  const scalar_t* grads;               // kLossGrad
  const acc_t<scalar_t>* grad_of_sum;  // kSumGrad
  const acc_t<scalar_t>* normalizer;   // kSumGrad; may be null
  scalar_t* out;                       // all but kSum
  acc_t<scalar_t>* partial;            // kSum
  int64_t numel;
  FastDivision num_classes;
  acc_t<scalar_t> alpha;
};

constexpr int kIgnored = -2;

// The label of a row in 32 bits, kIgnored for all that take no part.
__device__ __forceinline__ int label_of_row(const Labels& labels, int64_t row, int C) {
  const int64_t label = labels[row];
  return label >= kBackground && label < C ? static_cast<int>(label) : kIgnored;
}

// One vector of logits that starts at flat index i, class c of its row. kOneRow: C is a multiple
// of the vector's size, so that a vector has one label; else the row is tracked element by element.
template <Mode kMode, bool kOneRow, typename scalar_t, typename Gamma>
__device__ __forceinline__ void process_vector(const Args<scalar_t>& a, int64_t row, int c,
                                               const scalar_t* logits, const scalar_t* grads,
                                               scalar_t* out, int n, acc_t<scalar_t> scale,
                                               Gamma gamma, acc_t<scalar_t>& sum) {
  using acc = acc_t<scalar_t>;
  const int C = static_cast<int>(a.num_classes.divisor);
  int label = label_of_row(a.labels, row, C);
#pragma unroll
  for (int k = 0; k < Vector<scalar_t>::kSize; ++k) {
    if (!kOneRow) {
      if (k >= n) break;
      if (c + k == C) {
        c -= C;
        label = label_of_row(a.labels, ++row, C);
      }
    }
    const acc x = static_cast<acc>(logits[k]);
    const bool positive = label == c + k;
    const bool counts = label != kIgnored;
    const acc z = positive ? -x : x;
    const acc weight = counts ? (positive ? a.alpha : acc(1) - a.alpha) : acc(0);
    if (kMode == Mode::kSum) {
      sum += counts ? weight * focal_loss(z, gamma) : acc(0);
    } else if (kMode == Mode::kLoss) {
      out[k] = static_cast<scalar_t>(counts ? weight * focal_loss(z, gamma) : acc(0));
    } else {
      acc factor = scale * (positive ? -weight : weight);
      if (kMode == Mode::kLossGrad) factor *= static_cast<acc>(grads[k]);
      out[k] = static_cast<scalar_t>(counts ? factor * focal_loss_derivative(z, gamma) : acc(0));
    }
  }
}

template <Mode kMode, bool kOneRow, typename scalar_t, typename Gamma>
__global__ void __launch_bounds__(kThreads)
    sigmoid_focal_loss_kernel(const Args<scalar_t> a, const Gamma gamma) {
  using acc = acc_t<scalar_t>;
  using Vec = Vector<scalar_t>;
  constexpr int kN = Vec::kSize;
  // Tracking rows takes registers: then fewer vectors are in flight at a time.
  constexpr int kInFlight = kOneRow ? kVectorsPerThread : kVectorsPerThread / 2;
  const int64_t C = a.num_classes.divisor;
  acc scale = acc(1);
  if (kMode == Mode::kSumGrad) {
    scale = *a.grad_of_sum;
    if (a.normalizer) scale /= *a.normalizer > acc(1) ? *a.normalizer : acc(1);
  }
  const int64_t tiles = (a.numel + kTile<scalar_t> - 1) / kTile<scalar_t>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    // 64-bit arithmetic once a tile; inside it 32 bits suffice.
    const int64_t start = tile * kTile<scalar_t>;
    const int64_t first_row = start / C;
    const uint32_t first_class = static_cast<uint32_t>(start - first_row * C);
    acc sum = 0;
#pragma unroll 1
    for (int first = 0; first < kVectorsPerThread; first += kInFlight) {
      Vec x[kInFlight];
#pragma unroll
      for (int v = 0; v < kInFlight; ++v) {
        const int64_t i = start + ((first + v) * kThreads + static_cast<int>(threadIdx.x)) * kN;
        if (i + kN <= a.numel) x[v] = load_streaming(a.logits + i);
      }
#pragma unroll
      for (int v = 0; v < kInFlight; ++v) {
        const int offset = ((first + v) * kThreads + static_cast<int>(threadIdx.x)) * kN;
        const int64_t i = start + offset;
        if (i >= a.numel) break;
        const uint32_t from_row = first_class + offset;
        const uint32_t rows = a.num_classes.quotient(from_row);
        const int64_t row = first_row + rows;
        const int c = static_cast<int>(from_row - rows * a.num_classes.divisor);
        // Where a vector lies in one row, none is cut off by the end.
        const bool whole = kOneRow || i + kN <= a.numel;
        const int n = whole ? kN : static_cast<int>(a.numel - i);
        Vec out, grads;
        if (!whole) x[v] = load_part(a.logits + i, n);
        if (kMode == Mode::kLossGrad)
          grads = whole ? load_streaming(a.grads + i) : load_part(a.grads + i, n);
        process_vector<kMode, kOneRow>(a, row, c, x[v].values, grads.values, out.values, n, scale,
                                       gamma, sum);
        if (kMode == Mode::kSum) continue;
        if (whole)
          store_streaming(a.out + i, out);
        else
          store_part(a.out + i, out, n);
      }
    }
    if (kMode == Mode::kSum) {
      sum = block_sum<kThreads>(sum);
      if (threadIdx.x == 0) a.partial[tile] = sum;
    }
  }
}

// out = sum of the partials / max(normalizer, 1), by one block, in a fixed order.
template <typename acc>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const acc* __restrict__ partial, int64_t n,
                        const acc* __restrict__ normalizer, acc* __restrict__ out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += partial[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x != 0) return;
  if (normalizer) sum /= *normalizer > acc(1) ? *normalizer : acc(1);
  *out = static_cast<acc>(sum);
}

// The sums, which training runs on, are compiled for gamma 2 and for whole vectors a row; the
// rest, and float64, take the general code.
template <Mode kMode, typename scalar_t>
void launch_kernel(const Args<scalar_t>& args, double gamma, const Tensor& on) {
  constexpr bool kSpecialize =
      !std::is_same_v<scalar_t, double> && (kMode == Mode::kSum || kMode == Mode::kSumGrad);
  const dim3 grid = grid_for((args.numel + kTile<scalar_t> - 1) / kTile<scalar_t>);
  const auto start = [&](auto one_row, auto policy) {
    launch(&sigmoid_focal_loss_kernel<kMode, decltype(one_row)::value, scalar_t, decltype(policy)>,
           grid, dim3(kThreads), 0, on, args, policy);
  };
  if constexpr (kSpecialize) {
    const bool one_row = args.num_classes.divisor % Vector<scalar_t>::kSize == 0;
    if (gamma == 2.0)
      return one_row ? start(std::true_type{}, GammaTwo{}) : start(std::false_type{}, GammaTwo{});
    if (one_row) return start(std::true_type{}, GammaAny{gamma});
  }
  start(std::false_type{}, GammaAny{gamma});
}

// Contiguous and aligned for 16-byte accesses, which a slice of a larger tensor may not be.
Tensor vectorizable(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  return is_vector_aligned(c.const_data_ptr()) ? c : torch::stable::clone(c);
}

template <typename scalar_t>
Args<scalar_t> arguments(const Tensor& logits, const Tensor& labels, double alpha) {
  Args<scalar_t> a{nullptr, {}, nullptr, nullptr, nullptr, nullptr, nullptr, 0, FastDivision(1), 0};
  a.logits = logits.const_data_ptr<scalar_t>();
  a.labels = labels_of(labels);
  a.numel = logits.numel();
  a.num_classes = FastDivision(static_cast<uint32_t>(logits.size(-1)));
  a.alpha = static_cast<acc_t<scalar_t>>(alpha);
  return a;
}

using torch::headeronly::BFloat16;
const ListKernel kListed[] = {
    {"sigmoid_focal_loss sum bf16",
     &sigmoid_focal_loss_kernel<Mode::kSum, true, BFloat16, GammaTwo>, kThreads},
    {"sigmoid_focal_loss gradient bf16",
     &sigmoid_focal_loss_kernel<Mode::kSumGrad, true, BFloat16, GammaTwo>, kThreads},
    {"sigmoid_focal_loss sum fp32", &sigmoid_focal_loss_kernel<Mode::kSum, true, float, GammaTwo>,
     kThreads},
    {"sigmoid_focal_loss gradient fp32",
     &sigmoid_focal_loss_kernel<Mode::kSumGrad, true, float, GammaTwo>, kThreads},
};

void check_num_classes(const Tensor& logits) {
  STD_TORCH_CHECK(logits.size(-1) < (int64_t(1) << 30),
                  "sigmoid_focal_loss: at most 2^30 classes, got ", logits.size(-1));
}

template <typename acc>
const acc* optional_pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<acc>() : nullptr;
}

Tensor sigmoid_focal_loss_cuda(const Tensor& logits, const Tensor& labels,
                               const std::optional<Tensor>& normalizer, double alpha, double gamma,
                               bool reduce) {
  check_sigmoid_focal_loss(logits, labels, normalizer);
  check_num_classes(logits);
  const Tensor x = vectorizable(logits);
  const Tensor y = torch::stable::contiguous(labels);
  if (x.numel() == 0)
    return reduce ? torch::stable::new_zeros(x, {}, acc_dtype(x)) : torch::stable::empty_like(x);
  Tensor out =
      reduce ? torch::stable::new_empty(x, {}, acc_dtype(x)) : torch::stable::empty_like(x);
  dispatch_floating(x.scalar_type(), "sigmoid_focal_loss", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc = acc_t<scalar_t>;
    Args<scalar_t> args = arguments<scalar_t>(x, y, alpha);
    if (!reduce) {
      args.out = out.mutable_data_ptr<scalar_t>();
      return launch_kernel<Mode::kLoss>(args, gamma, x);
    }
    const int64_t tiles = (args.numel + kTile<scalar_t> - 1) / kTile<scalar_t>;
    Tensor partial = torch::stable::new_empty(x, {tiles}, acc_dtype(x));
    args.partial = partial.mutable_data_ptr<acc>();
    launch_kernel<Mode::kSum>(args, gamma, x);
    launch(&sum_partials_kernel<acc>, dim3(1), dim3(kThreads), 0, x, args.partial, tiles,
           optional_pointer<acc>(normalizer), out.mutable_data_ptr<acc>());
  });
  return out;
}

Tensor sigmoid_focal_loss_backward_cuda(const Tensor& grad, const Tensor& logits,
                                        const Tensor& labels,
                                        const std::optional<Tensor>& normalizer, double alpha,
                                        double gamma) {
  check_sigmoid_focal_loss(logits, labels, normalizer);
  check_sigmoid_focal_loss_grad(grad, logits);
  check_num_classes(logits);
  const Tensor x = vectorizable(logits);
  const Tensor y = torch::stable::contiguous(labels);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const Tensor g = grad.dim() == 0 ? grad : vectorizable(grad);
  dispatch_floating(x.scalar_type(), "sigmoid_focal_loss_backward", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc = acc_t<scalar_t>;
    Args<scalar_t> args = arguments<scalar_t>(x, y, alpha);
    args.out = out.mutable_data_ptr<scalar_t>();
    if (g.dim() == 0) {
      args.grad_of_sum = g.const_data_ptr<acc>();
      args.normalizer = optional_pointer<acc>(normalizer);
      return launch_kernel<Mode::kSumGrad>(args, gamma, x);
    }
    args.grads = g.const_data_ptr<scalar_t>();
    launch_kernel<Mode::kLossGrad>(args, gamma, x);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cuda));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cuda));
}

}  // namespace fcos_ext
