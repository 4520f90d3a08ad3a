// Boxes are decided in order of falling score, a band of ranks at a time:
//   1. suppress_kernel tests the band against all that was kept of the bands before;
//   2. mask_kernel tests the band's boxes against each other, for bits in memory;
//   3. scan_kernel walks through those bits in order, and appends what stays to the result.
// So memory does not grow with the square of the number of boxes, and nothing is computed for
// boxes that went in an earlier band. All of it is queued at once: a later band learns from memory
// what the earlier ones kept, and that enough may have been kept already.
#pragma once

#include "../nms.h"
#include "launch.cuh"
#include "memory.cuh"

namespace fcos_ext {
namespace bands {

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

}  // namespace bands
}  // namespace fcos_ext
