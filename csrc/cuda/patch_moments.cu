// Moments of patches. Split of work: a warp takes the patches of one span and a tile of pairs of taps, whose sums stay
// in its registers; its lanes are neighbouring positions of one channel or, where channels lie side by side,
// neighbouring channels. Spans are cut by shapes alone and brought together in their order.
#include "patch_moments.hpp"

#include <cmath>

#include "element.hpp"
#include "launch.hpp"

namespace discedit::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int threads = 128, warps = threads / 32;
constexpr int whole_side = 9;                   // taps that one tile holds whole: those of 3 x 3
constexpr int pair_side = 7;                    // taps on each side of a tile of larger kernels
constexpr std::int64_t enough_warps = 4096;     // from which on patches are not cut: every machine has work
constexpr std::int64_t least_span = 16;         // patches of a lane, below which summing up costs more than it gives
constexpr std::int64_t least_side_by_side = 8;  // channels for which a warp's lanes are channels
constexpr std::int64_t looked_at = 32;          // elements that a channel's centre is made of: one for each lane

// ---- how the work is cut --------------------------------------------------------------------------------------------

struct Map {  // strides in elements
  std::int64_t samples, channels, sample_stride, channel_stride, row_stride, column_stride;
};

struct Cut {
  std::int64_t patches, taps, sides, groups, tiles, spans, span;  // groups: of channels; span: patches of one
  bool side_by_side;

  Cut(const TensorView& x, const Window& rows, const Window& columns, std::int64_t positions)
      : patches(x.shape[0] * positions), taps(rows.kernel * columns.kernel) {
    side_by_side = x.stride[1] == 1 && (x.shape[3] == 1 || x.stride[3] != 1) && x.shape[1] >= least_side_by_side;
    sides = taps <= whole_side ? 1 : ceil_div(taps, pair_side);
    tiles = sides * (sides + 1) / 2;
    groups = side_by_side ? ceil_div(x.shape[1], 32) : x.shape[1];
    const std::int64_t most = ceil_div(patches, least_span * (side_by_side ? 1 : 32));
    const std::int64_t wanted = ceil_div(enough_warps, std::max<std::int64_t>(1, groups * tiles));
    span = ceil_div(patches, std::max<std::int64_t>(1, std::min(most, wanted)));
    spans = patches == 0 ? 0 : ceil_div(patches, span);
  }

  std::int64_t entries() const { return taps + taps * (taps + 1) / 2; }
};

// Working memory: sums of each span, entry and channel about the channel's centre, then the centres. Entries are the
// taps, then the pairs of taps i <= j, row by row.
struct Sums {
  double *data, *centre;
  std::int64_t channels, taps, entries;

  __device__ __forceinline__ std::int64_t pair(std::int64_t i, std::int64_t j) const {
    return taps + i * taps - i * (i - 1) / 2 + (j - i);
  }
  __device__ __forceinline__ double& at(std::int64_t span, std::int64_t entry, std::int64_t channel) const {
    return data[(span * entries + entry) * channels + channel];
  }
};

// ---- kernels --------------------------------------------------------------------------------------------------------

// The quotient and rest of numbers that most often have 32 bits.
__device__ __forceinline__ std::int64_t divide(std::int64_t a, std::int64_t b, std::int64_t& rest) {
  std::int64_t quotient;
  if (((a | b) >> 32) == 0) quotient = static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  else quotient = a / b;
  rest = a - quotient * b;
  return quotient;
}

// A finite value in the middle of some elements of a channel, exactly that of a constant one; 0 where others would be
// lost beside it. `each` calls its argument with every element.
template <typename Each>
__device__ __forceinline__ double centre_of(const Each& each) {
  double first = 0, sum = 0, finite = 0;
  each([&](double value) {
    if (!(fabs(value) < INFINITY)) return;
    if (finite == 0) first = value;
    sum += value - first;
    finite += 1;
  });
  const double centre = finite == 0 ? 0 : first + sum / finite;
  return fabs(centre) < 0x1p100 ? centre : 0;
}

// What a tile's sums are of: taps k of its first side, then pairs (k, l), l of its second side. A whole tile has one
// side, and pairs k <= l.
template <int side, bool whole>
struct Tile {
  static constexpr int pairs = whole ? side * (side + 1) / 2 : side * side;
  static constexpr int sums = side + pairs, registers = (sums + 31) / 32 * 32, taps = whole ? side : 2 * side;
  std::int64_t first, second;

  __device__ __forceinline__ explicit Tile(std::int64_t number, std::int64_t sides) : first(0) {
    while (number >= sides - first) number -= sides - first++;
    second = (first + number) * side;
    first *= side;
  }
  __device__ __forceinline__ std::int64_t tap(int i) const { return i < side ? first + i : second + i - side; }

  // Of sum number i: its entry, or -1 where another tile has it or no tap is.
  __device__ __forceinline__ std::int64_t entry(int i, const Sums& target) const {
    if (i < side) return first == second && first + i < target.taps ? first + i : -1;
    i -= side;
    int k = 0, l = 0;
    if constexpr (whole) {
      while (i >= side - k) i -= side - k++;
      l = k + i;
    } else {
      k = i / side;
      l = i % side;
    }
    const std::int64_t a = first + k, b = second + l;
    return a <= b && b < target.taps ? target.pair(a, b) : -1;
  }
};

// The sum of each of 32 values over a warp: lane i gets that of value i. Half of the lanes hands on what the other half
// keeps, so that each round has half as many values left.
template <int half = 16>
__device__ __forceinline__ double over_lanes(double* values) {
  const bool upper = threadIdx.x & half;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const double given = upper ? values[i] : values[i + half];
    const double kept = upper ? values[i + half] : values[i];
    values[i] = kept + __shfl_xor_sync(whole_warp, given, half);
  }
  if constexpr (half > 1) return over_lanes<half / 2>(values);
  else return values[0];
}

// occupancy: 2 blocks of 128 threads per SM
template <typename T, int side, bool whole, bool side_by_side>
__global__ void __launch_bounds__(threads, 2)
    sum_patches(const T* x, const __grid_constant__ Map map, const __grid_constant__ Window rows,
                const __grid_constant__ Window columns, const __grid_constant__ Positions positions,
                const __grid_constant__ Cut cut, const __grid_constant__ Sums target) {
  using Pairs = Tile<side, whole>;
  struct Tap {
    std::int64_t offset;
    std::int32_t row, column;
  };
  __shared__ Tap of_warp[warps][Pairs::taps];
  const int lane = threadIdx.x % 32;
  Tap* taps = of_warp[threadIdx.x / 32];
  const auto height = static_cast<std::uint32_t>(rows.size), width = static_cast<std::uint32_t>(columns.size);
  const std::int64_t outputs = columns.outputs(), items = cut.groups * cut.tiles * cut.spans;
  const std::int64_t step = side_by_side ? 1 : 32, samples = step / positions.count, rest = step % positions.count;
  for (std::int64_t item = blockIdx.x * std::int64_t{warps} + threadIdx.x / 32; item < items;
       item += gridDim.x * std::int64_t{warps}) {
    const Pairs tile(item % cut.tiles, cut.sides);
    const std::int64_t group = item / cut.tiles % cut.groups, span = item / cut.tiles / cut.groups;
    const std::int64_t channel = side_by_side ? group * 32 + lane : group;
    const bool exists = channel < map.channels;
    const T* own = x + (exists ? channel : 0) * map.channel_stride;

    for (int i = lane; i < Pairs::taps; i += 32) {
      std::int64_t column;
      const std::int64_t row = divide(tile.tap(i), columns.kernel, column) * rows.dilation;
      column *= columns.dilation;
      taps[i] = {row * map.row_stride + column * map.column_stride, static_cast<std::int32_t>(row),
                 static_cast<std::int32_t>(column)};
      if (tile.tap(i) >= cut.taps)
        taps[i] = {0, INT32_MAX / 2, 0};  // below every map: read as padding, and given to none
    }
    const std::int64_t area = rows.size * columns.size, all = map.samples * area;
    const auto element = [&](std::int64_t i) {  // of those that are spread over the whole channel
      std::int64_t pixel, column;
      const std::int64_t sample = divide(all / looked_at * i + all % looked_at * i / looked_at, area, pixel);
      const std::int64_t row = divide(pixel, columns.size, column);
      return widen(own[sample * map.sample_stride + row * map.row_stride + column * map.column_stride]);
    };
    double centre;
    if constexpr (side_by_side) {
      centre = centre_of([&](const auto& take) {
#pragma unroll 8
        for (std::int64_t i = 0; i < looked_at; ++i) take(element(i));
      });
    } else {
      const double mine = element(lane);
      centre = centre_of([&](const auto& take) {
        for (int i = 0; i < looked_at; ++i) take(__shfl_sync(whole_warp, mine, i));
      });
    }
    __syncwarp();

    double sums[Pairs::registers] = {};
    const std::int64_t begin = span * cut.span, end = begin + cut.span < cut.patches ? begin + cut.span : cut.patches;
    std::int64_t patch = begin + (side_by_side ? 0 : lane), place;
    std::int64_t sample = divide(patch, positions.count, place);
    for (; patch < end && exists; patch += step) {
      std::int64_t column;
      const std::int64_t position = positions.list ? positions.list[place] : place;
      const std::int64_t row = divide(position, outputs, column) * rows.stride - rows.before;
      column = column * columns.stride - columns.before;
      const T* from = own + (sample * map.sample_stride + row * map.row_stride + column * map.column_stride);
      double value[Pairs::taps];
#pragma unroll
      for (int i = 0; i < Pairs::taps; ++i) {
        const Tap tap = taps[i];
        const bool inside = static_cast<std::uint32_t>(static_cast<std::int32_t>(row) + tap.row) < height &&
                            static_cast<std::uint32_t>(static_cast<std::int32_t>(column) + tap.column) < width;
        value[i] = (inside ? widen(from[tap.offset]) : 0.0) - centre;
      }
#pragma unroll
      for (int k = 0; k < side; ++k) sums[k] += value[k];
      int at = side;
#pragma unroll
      for (int k = 0; k < side; ++k)
#pragma unroll
        for (int l = whole ? k : 0; l < side; ++l) sums[at++] += value[k] * value[whole ? l : side + l];
      sample += samples;
      place += rest;
      if (place >= positions.count) {
        place -= positions.count;
        ++sample;
      }
    }

    if (exists && span == 0 && tile.second == 0 && (side_by_side || lane == 0)) target.centre[channel] = centre;
    if constexpr (side_by_side) {
#pragma unroll
      for (int i = 0; i < Pairs::sums; ++i) {
        const std::int64_t entry = tile.entry(i, target);
        if (exists && entry >= 0) target.at(span, entry, channel) = sums[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < Pairs::registers; i += 32) {
        const double total = over_lanes(sums + i);
        const std::int64_t entry = i + lane < Pairs::sums ? tile.entry(i + lane, target) : -1;
        if (entry >= 0) target.at(span, entry, channel) = total;
      }
    }
    __syncwarp();  // before the taps are filled again
  }
}

// The sums of all spans, in the place of the first: 32 of them for a block, whose warps take the spans in turn.
// occupancy: 8 blocks of 128 threads per SM
__global__ void __launch_bounds__(threads, 8) merge_spans(const __grid_constant__ Sums target, std::int64_t spans) {
  __shared__ double of_warp[warps][32];
  const std::int64_t size = target.entries * target.channels;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (std::int64_t first = blockIdx.x * std::int64_t{32}; first < size; first += gridDim.x * std::int64_t{32}) {
    const std::int64_t i = first + lane;
    double sum = 0;
    if (i < size)
      for (std::int64_t span = warp; span < spans; span += warps) sum += target.data[span * size + i];
    of_warp[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && i < size) {
      for (int other = 1; other < warps; ++other) sum += of_warp[other][lane];
      target.data[i] = sum;
    }
    __syncthreads();
  }
}

// From sums about the centre to mean and scatter; zeros without patches.
// occupancy: 8 blocks of 128 threads per SM
__global__ void __launch_bounds__(threads, 8)
    finish(const __grid_constant__ Sums sums, double patches, double* mean, double* scatter) {
  const std::int64_t taps = sums.taps, size = sums.channels * taps * taps;
  for (std::int64_t at = blockIdx.x * std::int64_t{threads} + threadIdx.x; at < size;
       at += gridDim.x * std::int64_t{threads}) {
    const std::int64_t one = at / taps % taps, two = at % taps, channel = at / taps / taps;
    const std::int64_t i = one < two ? one : two, j = one < two ? two : one;
    double value = 0;
    if (patches > 0) {
      const double first = sums.at(0, i, channel);
      value = sums.at(0, sums.pair(i, j), channel) - first * (sums.at(0, j, channel) / patches);
      if (i == j && value < 0) value = 0;
      if (i == j) mean[channel * taps + i] = sums.centre[channel] + first / patches;
    } else if (i == j) {
      mean[channel * taps + i] = 0;
    }
    scatter[at] = value;
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

template <typename T, int side, bool whole, bool side_by_side>
void sum(const TensorView& x, const Window& rows, const Window& columns, const Positions& positions, const Cut& cut,
         const Sums& target, Stream stream) {
  const Map map{x.shape[0], x.shape[1], x.stride[0], x.stride[1], x.stride[2], x.stride[3]};
  launch("patch_moments", sum_patches<T, side, whole, side_by_side>,
         ceil_div(cut.groups * cut.tiles * cut.spans, warps), threads, stream, static_cast<const T*>(x.data), map, rows,
         columns, positions, cut, target);
}

template <typename T>
void sum_of(const TensorView& x, const Window& rows, const Window& columns, const Positions& positions, const Cut& cut,
            const Sums& target, Stream stream) {
  const auto run = [&](const auto& one, const auto& other) {
    (cut.side_by_side ? one : other)(x, rows, columns, positions, cut, target, stream);
  };
  if (cut.taps == 1) run(sum<T, 1, true, true>, sum<T, 1, true, false>);
  else if (cut.sides == 1) run(sum<T, whole_side, true, true>, sum<T, whole_side, true, false>);
  else run(sum<T, pair_side, false, true>, sum<T, pair_side, false, false>);
}

Sums sums_in(double* scratch, const TensorView& x, const Cut& cut) {
  return {scratch, scratch + cut.spans * cut.entries() * x.shape[1], x.shape[1], cut.taps, cut.entries()};
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

std::int64_t patch_moments_scratch(const TensorView& x, const Window& rows, const Window& columns,
                                   std::int64_t positions) {
  const Cut cut(x, rows, columns, positions);
  return (cut.spans * cut.entries() + 1) * x.shape[1];
}

void patch_moments(const TensorView& x, const Window& rows, const Window& columns, const Positions& positions,
                   double* mean, double* scatter, double* scratch, Stream stream) {
  const Cut cut(x, rows, columns, positions.count);
  const Sums sums = sums_in(scratch, x, cut);
  if (cut.patches > 0) switch (x.dtype) {
      case DType::float32: sum_of<float>(x, rows, columns, positions, cut, sums, stream); break;
      case DType::float64: sum_of<double>(x, rows, columns, positions, cut, sums, stream); break;
      case DType::bfloat16: sum_of<BFloat16>(x, rows, columns, positions, cut, sums, stream); break;
      case DType::float16: sum_of<Float16>(x, rows, columns, positions, cut, sums, stream); break;
      default:
        throw std::invalid_argument(
            std::string("patch_moments: x must be float16, bfloat16, float32 or float64, got ") + name(x.dtype) + ".");
    }
  if (cut.spans > 1)
    launch("patch_moments", merge_spans, ceil_div(sums.entries * sums.channels, 32), threads, stream, sums, cut.spans);
  launch("patch_moments", finish, ceil_div(sums.channels * cut.taps * cut.taps, threads), threads, stream, sums,
         static_cast<double>(cut.patches), mean, scatter);
}

}  // namespace discedit::cuda
