#include <array>

#include "../nms.h"
#include "../nms_args.h"
#include "kernel_table.cuh"
#include "launch.cuh"
#include "memory.cuh"

// Boxes are decided in order of falling score, a band of ranks at a time:
//   1. suppress_kernel tests the band against all that was kept of the bands before;
//   2. mask_kernel tests the band's boxes against each other, for bits in memory;
//   3. scan_kernel walks through those bits in order, and appends what stays to the result.
// So memory does not grow with the square of the number of boxes, and nothing is computed for
// boxes that went in an earlier band. All of it is queued at once: a later band learns from memory
// what the earlier ones kept, and that enough may have been kept already.

namespace fcos_ext {
namespace {

constexpr int kTile = 64;  // ranks that share a word of bits
#ifdef FCOS_SIMT
constexpr int kBandTiles = 3;  // so that small inputs have several bands
#else
constexpr int kBandTiles = 64;  // 2 MiB of bits
#endif
constexpr int kBand = kBandTiles * kTile;

constexpr int kThreads = 256;
constexpr int kScanThreads = 512;
constexpr unsigned kWholeWarp = 0xffffffffu;

using Word = unsigned long long;

__device__ __forceinline__ Word bit(int i) { return Word(1) << i; }

struct Args {
  const Box* boxes;
  const int64_t* groups;  // null if ungrouped
  const int64_t* order;   // index of the box of each rank
  int64_t n;
  float threshold;
  int64_t limit;
  unsigned* removed;  // a bit for each rank, of whole tiles: suppressed, or without a score
  Word* mask;         // [kBandTiles][kBand]: of a tile's boxes, those that a rank suppresses
  int64_t* keep;      // [limit]: the result, as far as it goes
  int64_t* count;     // of keep
};

__device__ __forceinline__ Box load_box(const Box* p) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(p));
  return {v.x, v.y, v.z, v.w};
}

// Boxes of a tile in shared memory, all that is compared a column of its own.
template <bool kGrouped, int kSize>
struct Tile {
  float4 box[kSize];
  float area[kSize];
  int64_t group[kGrouped ? kSize : 1];

  __device__ __forceinline__ void set(int at, const Args& a, int64_t index) {
    const Box b = load_box(a.boxes + index);
    box[at] = {b.x0, b.y0, b.x1, b.y1};
    area[at] = area_of(b);
    if (kGrouped) group[at] = a.groups[index];
  }
};

// Whether two boxes of the same group overlap by more than the threshold. Most do not overlap at
// all, and have their division saved.
template <bool kGrouped, int kSize>
__device__ __forceinline__ bool overlaps(const Tile<kGrouped, kSize>& tile, int at, const Box& b,
                                         float area, int64_t group, float threshold) {
  if (kGrouped && tile.group[at] != group) return false;
  const float4 v = tile.box[at];
  return iou_above({v.x, v.y, v.z, v.w}, tile.area[at], b, area, threshold);
}

// removed = ranks that are none, or have a NaN for a score; count = 0. A thread for each rank.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    start_kernel(const scalar_t* __restrict__ sorted_scores, int64_t n, int64_t padded,
                 unsigned* __restrict__ removed, int64_t* __restrict__ count) {
  for (int64_t first = int64_t(blockIdx.x) * kThreads; first < padded;
       first += int64_t(gridDim.x) * kThreads) {
    const int64_t rank = first + threadIdx.x;
    bool absent = true;
    if (rank < n) {
      const acc_t<scalar_t> score = static_cast<acc_t<scalar_t>>(sorted_scores[rank]);
      absent = score != score;
    }
    const unsigned bits = __ballot_sync(kWholeWarp, absent);
    if (threadIdx.x % 32 == 0 && rank < padded) removed[rank / 32] = bits;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *count = 0;
}

// Marks in `removed` which ranks [start, start + kBand) what was kept before suppresses. A block
// takes kThreads ranks (blockIdx.y), one a thread, and every gridDim.x-th tile of kept boxes.
template <bool kGrouped>
__global__ void __launch_bounds__(kThreads) suppress_kernel(const Args a, int64_t start) {
  __shared__ Tile<kGrouped, kThreads> tile;
  const int64_t kept = *a.count;
  if (kept >= a.limit) return;
  const int64_t rank = start + int64_t(blockIdx.y) * kThreads + threadIdx.x;
  const bool present = rank < a.n && rank < start + kBand;
  Box b = {};
  int64_t group = 0;
  if (present) {
    const int64_t index = a.order[rank];
    b = load_box(a.boxes + index);
    if (kGrouped) group = a.groups[index];
  }
  const float area = area_of(b);
  bool suppressed = false;
  for (int64_t first = int64_t(blockIdx.x) * kThreads; first < kept;
       first += int64_t(gridDim.x) * kThreads) {
    // A barrier too: the tile before is no longer read.
    if (__syncthreads_and(suppressed || !present)) break;
    if (first + threadIdx.x < kept) tile.set(threadIdx.x, a, a.keep[first + threadIdx.x]);
    __syncthreads();
    const int size = static_cast<int>(min(int64_t(kThreads), kept - first));
    for (int i = 0; present && !suppressed && i < size; ++i)
      suppressed = overlaps(tile, i, b, area, group, a.threshold);
  }
  const unsigned bits = __ballot_sync(kWholeWarp, suppressed);
  if (threadIdx.x % 32 == 0 && bits) atomicOr(a.removed + rank / 32, bits);
}

// mask[c][r] = which boxes of tile c rank r suppresses, for the ranks r of tiles up to c. In tile c
// itself: which boxes before r suppress r, as the scan asks it there. One block a pair of tiles,
// kLanesPerRow threads a row.
constexpr int kLanesPerRow = kThreads / kTile;

template <bool kGrouped>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(const Args a, int64_t start, int num_pairs) {
  __shared__ Tile<kGrouped, kTile> columns;
  if (*a.count >= a.limit) return;
  const int row = threadIdx.x / kLanesPerRow, lane = threadIdx.x % kLanesPerRow;
  for (int pair = blockIdx.x; pair < num_pairs; pair += gridDim.x) {
    // pair = c (c + 1) / 2 + r with r <= c
    int c = static_cast<int>((sqrtf(8.0f * pair + 1.0f) - 1.0f) * 0.5f);
    while (c * (c + 1) / 2 > pair) --c;
    while ((c + 1) * (c + 2) / 2 <= pair) ++c;
    const int r = pair - c * (c + 1) / 2;
    const int64_t column_rank = start + int64_t(c) * kTile;
    const int64_t row_rank = start + int64_t(r) * kTile + row;
    __syncthreads();  // the tile before is no longer read
    if (threadIdx.x < kTile && column_rank + threadIdx.x < a.n)
      columns.set(threadIdx.x, a, a.order[column_rank + threadIdx.x]);
    __syncthreads();
    // Rows that are gone already are never asked for.
    const bool present =
        row_rank < a.n && !(a.removed[row_rank / 32] >> static_cast<int>(row_rank % 32) & 1u);
    Word word = 0;
    if (present) {
      const int64_t index = a.order[row_rank];
      const Box b = load_box(a.boxes + index);
      const float area = area_of(b);
      const int64_t group = kGrouped ? a.groups[index] : 0;
      const int size = static_cast<int>(min(int64_t(kTile), a.n - column_rank));
      const int end = r == c ? row : size;
      // The lanes of a row read neighbouring boxes, from different banks of shared memory.
#pragma unroll 4
      for (int i = lane; i < end; i += kLanesPerRow)
        if (overlaps(columns, i, b, area, group, a.threshold)) word |= bit(i);
    }
    for (int offset = 1; offset < kLanesPerRow; offset *= 2)
      word |= __shfl_xor_sync(kWholeWarp, word, offset);
    if (lane == 0 && present) a.mask[c * kBand + r * kTile + row] = word;
  }
}

// Which of the ranks of a tile stay, by one warp. `alive` are those that no earlier tile
// suppresses; lane l brings which ranks before l, and before l + 32, suppress those two. As that
// depends on earlier ranks alone, each round settles at least one more, and usually three suffice.
__device__ __forceinline__ Word resolve(Word alive, Word suppressors, Word upper_suppressors) {
  const int lane = threadIdx.x % 32;
  Word stay = alive;
  for (;;) {
    const unsigned low = __ballot_sync(kWholeWarp, (alive & bit(lane)) && !(suppressors & stay));
    const unsigned high =
        __ballot_sync(kWholeWarp, (alive & bit(lane + 32)) && !(upper_suppressors & stay));
    const Word next = Word(high) << 32 | low;
    if (next == stay) return stay;
    stay = next;
  }
}

// Walks through the tiles of a band; one block. A tile's boxes are gone if `removed` says so or a
// box that stays, of a tile before, suppresses them; what is left decides among itself.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const Args a, int64_t start, int num_tiles) {
  constexpr int kWarps = kScanThreads / 32;
  __shared__ Word stays[kBandTiles];
  __shared__ Word gone[kWarps];
  __shared__ int64_t count;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) count = *a.count;
  __syncthreads();
  for (int tile = 0; tile < num_tiles; ++tile) {
    if (count >= a.limit) break;
    const Word* mask = a.mask + tile * kBand;
    Word word = 0;
#pragma unroll 4
    for (int row = threadIdx.x; row < tile * kTile; row += kScanThreads)
      if (stays[row / kTile] & bit(row % kTile)) word |= mask[row];
    for (int offset = 16; offset > 0; offset /= 2)
      word |= __shfl_xor_sync(kWholeWarp, word, offset);
    if (lane == 0) gone[warp] = word;
    __syncthreads();
    if (warp == 0) {
      word = lane < kWarps ? gone[lane] : 0;
      for (int offset = 16; offset > 0; offset /= 2)
        word |= __shfl_xor_sync(kWholeWarp, word, offset);
      const int64_t first = start + int64_t(tile) * kTile;
      const unsigned* removed = a.removed + first / 32;
      const Word alive = ~(word | Word(removed[1]) << 32 | removed[0]);
      // What belongs to ranks that are not alive was never written, and is not looked at.
      const Word* diagonal = mask + tile * kTile;
      const Word stay = resolve(alive, diagonal[lane], diagonal[lane + 32]);
      const int64_t before = count;
      for (int i = lane; i < kTile; i += 32) {
        const int64_t at = before + __popcll(stay & (bit(i) - 1));
        if ((stay & bit(i)) && at < a.limit) a.keep[at] = a.order[first + i];
      }
      __syncwarp();
      if (lane == 0) {
        stays[tile] = stay;
        count = min(a.limit, before + __popcll(stay));
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *a.count = count;
}

template <bool kGrouped>
void launch_bands(const Args& a, const Tensor& on) {
  for (int64_t start = 0; start < a.n; start += kBand) {
    const int64_t size = std::min<int64_t>(kBand, a.n - start);
    const int tiles = static_cast<int>((size + kTile - 1) / kTile);
    if (start > 0) {
      // No more can have been kept than there were ranks, or than are wanted.
      const int64_t kept = std::min(start, a.limit);
      dim3 grid = grid_for(std::min<int64_t>(64, (kept + kThreads - 1) / kThreads));
      grid.y = static_cast<unsigned>((size + kThreads - 1) / kThreads);
      launch(&suppress_kernel<kGrouped>, grid, dim3(kThreads), 0, on, a, start);
    }
    const int pairs = tiles * (tiles + 1) / 2;
    launch(&mask_kernel<kGrouped>, grid_for(pairs), dim3(kThreads), 0, on, a, start, pairs);
    launch(&scan_kernel, dim3(1), dim3(kScanThreads), 0, on, a, start, tiles);
  }
}

const ListKernel kListed[] = {
    {"nms start fp32", &start_kernel<float>, kThreads},
    {"nms suppress", &suppress_kernel<false>, kThreads},
    {"nms suppress, grouped", &suppress_kernel<true>, kThreads},
    {"nms mask", &mask_kernel<false>, kThreads},
    {"nms mask, grouped", &mask_kernel<true>, kThreads},
    {"nms scan", &scan_kernel, kScanThreads},
};

struct Sorted {
  Tensor values, indices;
};

// By falling value, of equal ones the lower index first. The headers of early versions of torch do
// not have torch::stable::sort.
Sorted sort_falling(const Tensor& t) {
  std::array<StableIValue, 4> stack = {
      torch::stable::detail::from(t), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The one value on the host: waits for the device.
int64_t value_of(const Tensor& scalar) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return *torch::stable::to(scalar, cpu).const_data_ptr<int64_t>();
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups,
                double iou_threshold, int64_t max_detections) {
  check_nms(boxes, scores, groups);
  Tensor b = float_boxes(boxes);
  if (!is_vector_aligned(b.const_data_ptr())) b = torch::stable::clone(b);
  const int64_t n = b.size(0), limit = keep_limit(n, max_detections);
  Tensor keep = torch::stable::new_empty(b, {limit}, ScalarType::Long);
  if (limit == 0) return keep;

  const Sorted sorted = sort_falling(scores);
  const int64_t padded = (n + kTile - 1) / kTile * kTile;
  const int64_t mask_words = std::min<int64_t>(padded / kTile, kBandTiles) * kBand;
  Tensor mask = torch::stable::new_empty(b, {mask_words}, ScalarType::Long);
  Tensor removed = torch::stable::new_empty(b, {padded / 32}, ScalarType::Int);
  Tensor count = torch::stable::new_empty(b, {}, ScalarType::Long);
  std::optional<Tensor> g;
  if (groups) g = torch::stable::contiguous(*groups);

  const Args args = {static_cast<const Box*>(b.const_data_ptr()),
                     g ? g->const_data_ptr<int64_t>() : nullptr,
                     sorted.indices.const_data_ptr<int64_t>(),
                     n,
                     static_cast<float>(iou_threshold),
                     limit,
                     static_cast<unsigned*>(removed.mutable_data_ptr()),
                     static_cast<Word*>(mask.mutable_data_ptr()),
                     keep.mutable_data_ptr<int64_t>(),
                     count.mutable_data_ptr<int64_t>()};
  dispatch_floating(sorted.values.scalar_type(), "nms", [&](auto zero) {
    using scalar_t = decltype(zero);
    launch(&start_kernel<scalar_t>, grid_for((padded + kThreads - 1) / kThreads), dim3(kThreads), 0,
           b, sorted.values.const_data_ptr<scalar_t>(), n, padded, args.removed, args.count);
  });
  if (g)
    launch_bands<true>(args, b);
  else
    launch_bands<false>(args, b);
  return torch::stable::narrow(keep, 0, 0, value_of(count));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_NAMESPACE, FCOS_CUDA_KEY, m) { m.impl("nms", TORCH_BOX(&nms_cuda)); }

}  // namespace fcos_ext
