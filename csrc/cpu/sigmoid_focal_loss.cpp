// Fused multiply-adds are welcome here. Before any header, or what they define stays without.
#pragma GCC optimize("fp-contract=fast")

#include "../sigmoid_focal_loss.h"

#include <algorithm>
#include <vector>

#include "../sigmoid_focal_loss_args.h"
#include "simd.h"

namespace fcos_ext {
namespace {

// Logits of one work item. A fixed size, whatever the number of threads, makes the sum the same
// to the bit on any of them.
constexpr int64_t kTile = 16384;
// Logits that are converted to the type of the computation at a time; they stay in L1.
constexpr int64_t kBlock = 512;

// Splits rows [begin, end) of C logits into stretches that are treated alike, as ranges of flat
// indices: negatives(i, j), ignored(i, j), and one positive(i) at a time. Almost all rows are
// background, so that the stretches are long and a loop over one has nothing to decide.
template <typename Negatives, typename Ignored, typename Positive>
FCOS_INLINE void visit_rows(const Labels labels, int64_t begin, int64_t end, int64_t C,
                            const Negatives& negatives, const Ignored& ignored,
                            const Positive& positive) {
  int64_t start = begin * C;  // of the stretch of negatives that is still open
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = labels[row];
    if (label == kBackground) continue;
    if (label >= 0 && label < C) {
      const int64_t i = row * C + label;
      negatives(start, i);
      positive(i);
      start = i + 1;
    } else {
      negatives(start, row * C);
      ignored(row * C, (row + 1) * C);
      start = (row + 1) * C;
    }
  }
  negatives(start, end * C);
}

// Calls body(x, n, i) with the logits i .. i + n of [begin, end), converted to acc, block by block.
template <typename acc, typename scalar_t, typename Body>
FCOS_INLINE void for_each_block(const scalar_t* logits, int64_t begin, int64_t end,
                                const Body& body) {
  acc x[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = static_cast<int>(std::min(kBlock, end - i));
    for (int k = 0; k < n; ++k) x[k] = static_cast<acc>(logits[i + k]);
    body(x, n, i);
  }
}

// Sum over rows [begin, end).
template <typename scalar_t, typename Gamma>
FCOS_INLINE double sum_rows(const scalar_t* logits, Labels labels, int64_t begin, int64_t end,
                            int64_t C, acc_t<scalar_t> alpha, Gamma gamma) {
  using acc = acc_t<scalar_t>;
  double negatives = 0, positives = 0;
  visit_rows(
      labels, begin, end, C,
      [&](int64_t i, int64_t j) {
        for_each_block<acc>(logits, i, j, [&](const acc* x, int n, int64_t) {
          acc sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int k = 0; k < n; ++k) sum += focal_loss(x[k], gamma);
          negatives += sum;
        });
      },
      [](int64_t, int64_t) {},
      [&](int64_t i) { positives += focal_loss(-static_cast<acc>(logits[i]), gamma); });
  return double(acc(1) - alpha) * negatives + double(alpha) * positives;
}

// out = loss of each logit of rows [begin, end).
template <typename scalar_t, typename Gamma>
FCOS_INLINE void loss_rows(const scalar_t* logits, Labels labels, scalar_t* out, int64_t begin,
                           int64_t end, int64_t C, acc_t<scalar_t> alpha, Gamma gamma) {
  using acc = acc_t<scalar_t>;
  visit_rows(
      labels, begin, end, C,
      [&](int64_t i, int64_t j) {
        for_each_block<acc>(logits, i, j, [&](const acc* x, int n, int64_t at) {
          for (int k = 0; k < n; ++k)
            out[at + k] = static_cast<scalar_t>((acc(1) - alpha) * focal_loss(x[k], gamma));
        });
      },
      [&](int64_t i, int64_t j) { std::fill(out + i, out + j, scalar_t(0)); },
      [&](int64_t i) {
        out[i] = static_cast<scalar_t>(alpha * focal_loss(-static_cast<acc>(logits[i]), gamma));
      });
}

// out = grad times the derivative of the loss of each logit of rows [begin, end), where grad is
// scale, times grads[i] if that is given.
template <typename scalar_t, typename Gamma>
FCOS_INLINE void derivative_rows(const scalar_t* logits, Labels labels, const scalar_t* grads,
                                 acc_t<scalar_t> scale, scalar_t* out, int64_t begin, int64_t end,
                                 int64_t C, acc_t<scalar_t> alpha, Gamma gamma) {
  using acc = acc_t<scalar_t>;
  const acc negative = scale * (acc(1) - alpha), positive = -scale * alpha;
  visit_rows(
      labels, begin, end, C,
      [&](int64_t i, int64_t j) {
        for_each_block<acc>(logits, i, j, [&](const acc* x, int n, int64_t at) {
          if (grads)
            for (int k = 0; k < n; ++k)
              out[at + k] = static_cast<scalar_t>(negative * static_cast<acc>(grads[at + k]) *
                                                  focal_loss_derivative(x[k], gamma));
          else
            for (int k = 0; k < n; ++k)
              out[at + k] = static_cast<scalar_t>(negative * focal_loss_derivative(x[k], gamma));
        });
      },
      [&](int64_t i, int64_t j) { std::fill(out + i, out + j, scalar_t(0)); },
      [&](int64_t i) {
        const acc grad = grads ? positive * static_cast<acc>(grads[i]) : positive;
        out[i] = static_cast<scalar_t>(grad *
                                       focal_loss_derivative(-static_cast<acc>(logits[i]), gamma));
      });
}

// Calls f(begin, end, tile) for every tile of rows, on all threads, each compiled for this CPU.
template <typename F>
void for_each_tile(int64_t rows, int64_t C, const F& f) {
  const int64_t rows_per_tile = std::max<int64_t>(1, kTile / C);
  const int64_t tiles = (rows + rows_per_tile - 1) / rows_per_tile;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    with_cpu_isa([&] {
      for (int64_t tile = first; tile < last; ++tile)
        f(tile * rows_per_tile, std::min(rows, (tile + 1) * rows_per_tile), tile);
    });
  });
}

int64_t num_tiles(int64_t rows, int64_t C) {
  const int64_t rows_per_tile = std::max<int64_t>(1, kTile / C);
  return (rows + rows_per_tile - 1) / rows_per_tile;
}

template <typename F>
void dispatch_gamma(double gamma, const F& f) {
  if (gamma == 2.0) return f(GammaTwo{});
  f(GammaAny{gamma});
}

template <typename scalar_t>
double value_of(const std::optional<Tensor>& scalar) {
  return *static_cast<const acc_t<scalar_t>*>(scalar->const_data_ptr());
}

// A sum is divided by this: at least 1, so that a batch without positives is ordinary.
template <typename scalar_t>
double divisor(const std::optional<Tensor>& normalizer) {
  return normalizer ? std::max(1.0, value_of<scalar_t>(normalizer)) : 1.0;
}

Tensor sigmoid_focal_loss_cpu(const Tensor& logits, const Tensor& labels,
                              const std::optional<Tensor>& normalizer, double alpha, double gamma,
                              bool reduce) {
  check_sigmoid_focal_loss(logits, labels, normalizer);
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor y = torch::stable::contiguous(labels);
  const int64_t C = x.size(-1), rows = y.numel();
  Tensor out =
      reduce ? torch::stable::new_empty(x, {}, acc_dtype(x)) : torch::stable::empty_like(x);
  dispatch_floating(x.scalar_type(), "sigmoid_focal_loss", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc = acc_t<scalar_t>;
    const auto* logits_ptr = x.const_data_ptr<scalar_t>();
    const Labels label_of = labels_of(y);
    dispatch_gamma(gamma, [&](auto policy) {
      if (!reduce) {
        if (x.numel() == 0) return;
        auto* out_ptr = out.mutable_data_ptr<scalar_t>();
        for_each_tile(rows, C, [&](int64_t begin, int64_t end, int64_t) {
          loss_rows(logits_ptr, label_of, out_ptr, begin, end, C, acc(alpha), policy);
        });
        return;
      }
      std::vector<double> partial(x.numel() == 0 ? 0 : num_tiles(rows, C));
      if (!partial.empty())
        for_each_tile(rows, C, [&](int64_t begin, int64_t end, int64_t tile) {
          partial[tile] = sum_rows(logits_ptr, label_of, begin, end, C, acc(alpha), policy);
        });
      double sum = 0;
      for (double p : partial) sum += p;
      *out.mutable_data_ptr<acc>() = static_cast<acc>(sum / divisor<scalar_t>(normalizer));
    });
  });
  return out;
}

Tensor sigmoid_focal_loss_backward_cpu(const Tensor& grad, const Tensor& logits,
                                       const Tensor& labels,
                                       const std::optional<Tensor>& normalizer, double alpha,
                                       double gamma) {
  check_sigmoid_focal_loss(logits, labels, normalizer);
  check_sigmoid_focal_loss_grad(grad, logits);
  const Tensor g = torch::stable::contiguous(grad);
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor y = torch::stable::contiguous(labels);
  const int64_t C = x.size(-1), rows = y.numel();
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  dispatch_floating(x.scalar_type(), "sigmoid_focal_loss_backward", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc = acc_t<scalar_t>;
    const auto* logits_ptr = x.const_data_ptr<scalar_t>();
    const Labels label_of = labels_of(y);
    const scalar_t* grads = g.dim() == 0 ? nullptr : g.const_data_ptr<scalar_t>();
    const double grad_of_sum = grads ? 1.0 : *static_cast<const acc*>(g.const_data_ptr());
    const acc scale = static_cast<acc>(grad_of_sum / divisor<scalar_t>(normalizer));
    auto* out_ptr = out.mutable_data_ptr<scalar_t>();
    dispatch_gamma(gamma, [&](auto policy) {
      for_each_tile(rows, C, [&](int64_t begin, int64_t end, int64_t) {
        derivative_rows(logits_ptr, label_of, grads, scale, out_ptr, begin, end, C, acc(alpha),
                        policy);
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cpu));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cpu));
}

}  // namespace fcos_ext
