// Smallest bound over all pairs of classes, pair by pair. Split of work: a block for each (channel, share of the pairs
// of class tiles), with both tiles' moments in shared memory; every thread keeps its best, the block's best goes to
// scratch, and a block for each channel picks the best of those.
#include "pairwise_min.hpp"

#include "law.hpp"

namespace discedit::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int threads = 256;
constexpr std::int64_t enough_blocks = 8192;
template <typename Kind>
constexpr int tile = Kind::fields > 16 ? 32 : 64;  // classes
constexpr int least_tile = 32;

// Ranks count the classes that have samples. No pair: first = -1.
struct Best {
  double value;
  std::int32_t first, second;
};
constexpr double none = infinity;

// NaN before any number, small before large, and of equals the pair that comes first: a total order, so that neither
// the split nor the order of the work changes the result.
__device__ __forceinline__ bool comes_first(const Best& a, const Best& b) {
  if (b.first < 0 || a.first < 0) return a.first >= 0;
  const bool undefined_a = a.value != a.value, undefined_b = b.value != b.value;
  if (undefined_a != undefined_b) return undefined_a;
  if (!undefined_a && a.value != b.value) return a.value < b.value;
  return a.first != b.first ? a.first < b.first : a.second < b.second;
}

// In scratch: ranks' classes, their number, and each block's best.
struct Scratch {
  std::int64_t *classes, *count;
  Best* best;  // [channel * shares + share]
  std::int64_t shares;

  static std::int64_t shares_of(std::int64_t classes, std::int64_t channels) {
    const std::int64_t tiles = ceil_div(classes, 2 * least_tile), pairs = tiles * (tiles + 1) / 2;
    return std::max<std::int64_t>(1, std::min(ceil_div(enough_blocks, std::max<std::int64_t>(1, channels)), pairs));
  }
};
static_assert(sizeof(Best) == 2 * sizeof(double) && sizeof(std::int64_t) == sizeof(double), "scratch is in float64");

// ---- kernels --------------------------------------------------------------------------------------------------------

// The classes with samples, in their order: one block.
// occupancy: 4 blocks of 256 threads per SM
__global__ void __launch_bounds__(threads, 4)
    find_present(const std::int64_t* count, std::int64_t classes, Scratch scratch) {
  __shared__ int of_warp[threads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  std::int64_t found = 0;
  for (std::int64_t from = 0; from < classes; from += threads) {
    const std::int64_t cls = from + threadIdx.x;
    const bool present = cls < classes && count[cls] != 0;
    const unsigned votes = __ballot_sync(whole_warp, present);
    if (lane == 0) of_warp[warp] = __popc(votes);
    __syncthreads();
    int place = __popc(votes & ((1u << lane) - 1)), here = 0;
    for (int other = 0; other < threads / 32; ++other) {
      if (other < warp) place += of_warp[other];
      here += of_warp[other];
    }
    if (present) scratch.classes[found + place] = cls;
    found += here;
    __syncthreads();
  }
  if (threadIdx.x == 0) *scratch.count = found;
}

// The block's best, for thread 0.
__device__ __forceinline__ Best best_of_block(const Best& mine) {
  __shared__ Best memory[threads];
  memory[threadIdx.x] = mine;
  __syncthreads();
  for (int half = threads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half && comes_first(memory[threadIdx.x + half], memory[threadIdx.x]))
      memory[threadIdx.x] = memory[threadIdx.x + half];
    __syncthreads();
  }
  return memory[0];
}

// occupancy: 1 block of 256 threads per SM
// local memory: 768 bytes per thread
template <typename Kind>
__global__ void __launch_bounds__(threads, Kind::fields > 16 ? 1 : 2)
    best_of_share(Kind kind, Bound bound, Scratch scratch, std::int64_t items) {
  constexpr int width = tile<Kind>;
  __shared__ double laws[2][Kind::fields][width];
  const std::int64_t count = *scratch.count, tiles = (count + width - 1) / width, pairs = tiles * (tiles + 1) / 2;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t channel = item / scratch.shares;
    Best best{none, -1, -1};
    for (std::int64_t pair = item % scratch.shares; pair < pairs; pair += scratch.shares) {
      // Pairs of tiles (a, b), a <= b, row by row from the last row: row r from the end has r + 1.
      std::int64_t row = static_cast<std::int64_t>((sqrt(8.0 * static_cast<double>(pair) + 1) - 1) / 2);
      while (row * (row + 1) / 2 > pair) --row;
      while ((row + 1) * (row + 2) / 2 <= pair) ++row;
      const std::int64_t first[2] = {(tiles - 1 - row) * width, (tiles - 1 - (pair - row * (row + 1) / 2)) * width};
      for (int i = static_cast<int>(threadIdx.x); i < 2 * width; i += threads) {
        const std::int64_t rank = (i < width ? first[0] : first[1]) + i % width;
        if (rank >= count) continue;
        const auto law = kind.load(scratch.classes[rank], channel);
        kind.each(law, [&](int field, double value) { laws[i / width][field][i % width] = value; });
      }
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < width * width; i += threads) {
        const int one = i / width, two = i % width;
        const std::int64_t a = first[0] + one, b = first[1] + two;
        if (a >= b || b >= count) continue;
        typename Kind::Law law_a, law_b;
        kind.each(law_a, [&](int field, double& value) { value = laws[0][field][one]; });
        kind.each(law_b, [&](int field, double& value) { value = laws[1][field][two]; });
        const Best here{kind.between(bound, law_a, law_b), static_cast<std::int32_t>(a), static_cast<std::int32_t>(b)};
        if (comes_first(here, best)) best = here;
      }
      __syncthreads();
    }
    best = best_of_block(best);
    if (threadIdx.x == 0) scratch.best[item] = best;
    __syncthreads();
  }
}

// occupancy: 4 blocks of 256 threads per SM
__global__ void __launch_bounds__(threads, 4)
    best_of_channel(Scratch scratch, std::int64_t channels, double* values, std::int64_t* pairs) {
  for (std::int64_t channel = blockIdx.x; channel < channels; channel += gridDim.x) {
    Best best{none, -1, -1};
    for (std::int64_t share = threadIdx.x; share < scratch.shares; share += threads) {
      const Best here = scratch.best[channel * scratch.shares + share];
      if (comes_first(here, best)) best = here;
    }
    best = best_of_block(best);
    if (threadIdx.x == 0) {
      const bool defined = best.first >= 0 && best.value == best.value;
      values[channel] = defined ? best.value : not_a_number;
      pairs[2 * channel] = defined ? scratch.classes[best.first] : -1;
      pairs[2 * channel + 1] = defined ? scratch.classes[best.second] : -1;
    }
    __syncthreads();
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename Kind>
void run(const Kind& kind, Bound bound, double* values, std::int64_t* pairs, double* memory, Stream stream) {
  constexpr const char* op = "pairwise_min";
  const std::int64_t classes = kind.state.classes, channels = kind.state.channels;
  if (channels == 0) return;
  const std::int64_t shares = Scratch::shares_of(classes, channels);
  auto* whole = reinterpret_cast<std::int64_t*>(memory);
  const Scratch scratch{whole + 1, whole, reinterpret_cast<Best*>(memory + classes + 1 + (classes + 1) % 2), shares};
  launch(op, find_present, 1, threads, stream, kind.state.count, classes, scratch);
  launch(op, best_of_share<Kind>, channels * shares, threads, stream, kind, bound, scratch, channels * shares);
  launch(op, best_of_channel, channels, threads, stream, scratch, channels, values, pairs);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

std::int64_t pairwise_min_scratch(std::int64_t classes, std::int64_t channels) {
  return classes + 1 + (classes + 1) % 2 + 2 * channels * Scratch::shares_of(classes, channels);
}

void pairwise_min(const MomentState& state, Bound bound, Witness witness, double* values, std::int64_t* pairs,
                  double* scratch, Stream stream) {
  if (witness == Witness::linear) return run(ScalarLaw<Witness::linear>{state}, bound, values, pairs, scratch, stream);
  return run(ScalarLaw<Witness::quadratic>{state}, bound, values, pairs, scratch, stream);
}

void pairwise_min_vector(const VectorState& state, Bound bound, double* values, std::int64_t* pairs, double* scratch,
                         Stream stream) {
  switch (state.dimension) {
    case 1: return run(VectorLaw<1>{state}, bound, values, pairs, scratch, stream);
    case 2: return run(VectorLaw<2>{state}, bound, values, pairs, scratch, stream);
    case 3: return run(VectorLaw<3>{state}, bound, values, pairs, scratch, stream);
    case 4: return run(VectorLaw<4>{state}, bound, values, pairs, scratch, stream);
    default: return run(VectorLaw<max_vector>{state}, bound, values, pairs, scratch, stream);
  }
}

}  // namespace discedit::cuda
