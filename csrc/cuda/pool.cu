// Statistics of a feature map in one read. Split of work: where the channels lie side by side (channels_last, tokens),
// a block takes a tile of channels of one sample and its warps walk over the positions; else a few lanes, a warp or a
// block take each (sample, channel) row. Maps too few to fill the machine are cut into spans, which a second kernel
// merges.
#include "pool.hpp"

#include <cmath>
#include <limits>

#include "../common/map_layout.hpp"
#include "element.hpp"
#include "launch.hpp"

namespace discedit::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int threads = 256, warps = threads / 32;
constexpr int chunk_bytes = 16;               // what a thread loads at a time where alignment allows
constexpr int in_flight = 4;                  // chunks that a thread asks for before it uses the first
constexpr int widest = 16;                    // threads side by side over channels: 256 bytes of one position
constexpr std::int64_t enough_blocks = 1024;  // from which on maps are not cut: every machine has work
static_assert(threads % widest == 0 && widest <= 32, "a warp reads whole tiles of positions");

// The integers in whose order the extremes are found: sign-extended bits.
__device__ __forceinline__ std::int64_t key_of(double x) { return as<std::int64_t>(x); }
__device__ __forceinline__ std::int32_t key_of(float x) { return as<std::int32_t>(x); }
__device__ __forceinline__ std::int32_t key_of(Float16 x) { return static_cast<std::int16_t>(x.bits); }
__device__ __forceinline__ std::int32_t key_of(BFloat16 x) { return static_cast<std::int16_t>(x.bits); }

template <typename T>
using Key = decltype(key_of(T()));
template <typename T>
constexpr Key<T> magnitude = static_cast<Key<T>>((std::uint64_t{1} << (8 * sizeof(T) - 1)) - 1);

template <typename T>
__device__ __forceinline__ double value_of(Key<T> key) {
  if constexpr (sizeof(T) == 2) return widen(T{static_cast<std::uint16_t>(key)});
  else return widen(as<T>(key));
}
// Floating-point numbers in the order of integers; its own inverse.
template <typename T>
__device__ __forceinline__ Key<T> ordered(Key<T> key) {
  return key ^ ((key >> (8 * sizeof(T) - 1)) & magnitude<T>);
}

// What one map or span comes to, in the order of the bits of `Parts`.
struct Totals {
  double part[5] = {0, 0, 0, 0, 0};
};
constexpr int all_parts = 31;

// NaN in `top` stays, and `finish` lets it speak for the others; in `peak` it is what a thread without elements has.
template <int part>
__device__ __forceinline__ double merged(double a, double b) {
  if constexpr (part == Parts::top) return a >= b || a != a ? a : b;
  else if constexpr (part == Parts::peak) return a > b || b != b ? a : b;
  else return a + b;
}
template <typename Body>
__device__ __forceinline__ void for_each_part(const Body& body) {
  body(std::integral_constant<int, 0>());
  body(std::integral_constant<int, 1>());
  body(std::integral_constant<int, 2>());
  body(std::integral_constant<int, 3>());
  body(std::integral_constant<int, 4>());
}

// Accumulators of one thread and map.
template <typename T, int parts>
struct Sums {
  double sum = 0, square = 0;
  Key<T> top = 0, peak = ~magnitude<T>;
  std::int32_t positive = 0;

  __device__ __forceinline__ void add_raw(T x) {
    const Key<T> key = key_of(x);
    if constexpr (parts & Parts::top) top = greater(top, key & magnitude<T>);
    if constexpr (parts & Parts::peak) peak = greater(peak, ordered<T>(key));
    if constexpr (parts & Parts::positive) positive += key > 0;
  }
  __device__ __forceinline__ void add(T x) {
    const double value = widen(x);
    if constexpr (parts & Parts::sum) sum += value;
    if constexpr (parts & Parts::square) square += value * value;
    add_raw(x);
  }
  // Float16 fits float32 with all its squares: one conversion to float64 for four. Off by 2^-22 of the absolute terms.
  __device__ __forceinline__ void add(T a, T b, T c, T d) {
    if constexpr (std::is_same_v<T, Float16>) {
      const float x = narrow(a), y = narrow(b), z = narrow(c), w = narrow(d);
      if constexpr (parts & Parts::sum) sum += (x + y) + (z + w);
      if constexpr (parts & Parts::square) square += (x * x + y * y) + (z * z + w * w);
      add_raw(a), add_raw(b), add_raw(c), add_raw(d);
    } else {
      add(a), add(b), add(c), add(d);
    }
  }

  __device__ __forceinline__ Totals totals() const {
    Totals out;
    if constexpr (parts & Parts::sum) out.part[0] = sum;
    if constexpr (parts & Parts::square) out.part[1] = square;
    if constexpr (parts & Parts::top) out.part[2] = value_of<T>(top);
    if constexpr (parts & Parts::peak) out.part[3] = value_of<T>(ordered<T>(peak));
    if constexpr (parts & Parts::positive) out.part[4] = positive;
    return out;
  }

 private:
  __device__ __forceinline__ static Key<T> greater(Key<T> a, Key<T> b) { return a > b ? a : b; }
};

// Neighbouring elements as they lie in memory.
template <typename T>
struct Chunk {
  static constexpr int size = chunk_bytes / static_cast<int>(sizeof(T));
  std::uint32_t word[4] = {0, 0, 0, 0};

  __device__ __forceinline__ T at(int i) const {
    if constexpr (sizeof(T) == 2) return T{static_cast<std::uint16_t>(word[i / 2] >> (16 * (i % 2)))};
    else if constexpr (sizeof(T) == 4) return as<T>(word[i]);
    else return as<T>(word[2 * i] | static_cast<std::uint64_t>(word[2 * i + 1]) << 32);
  }
};

struct alignas(16) FourWords {
  std::uint32_t x, y, z, w;
};
struct alignas(8) TwoWords {
  std::uint32_t x, y;
};

// `width`: bytes that every chunk is aligned to, at least an element. The same elements in the same places for each.
template <typename T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* from, int width) {
  Chunk<T> chunk;
  if (width == 16) {
    const FourWords all = *reinterpret_cast<const FourWords*>(from);
    chunk.word[0] = all.x, chunk.word[1] = all.y, chunk.word[2] = all.z, chunk.word[3] = all.w;
  } else if (width == 8) {
    const TwoWords low = reinterpret_cast<const TwoWords*>(from)[0], high = reinterpret_cast<const TwoWords*>(from)[1];
    chunk.word[0] = low.x, chunk.word[1] = low.y, chunk.word[2] = high.x, chunk.word[3] = high.y;
  } else if (width == 4) {
    for (int i = 0; i < 4; ++i) chunk.word[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
  } else {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(from);
    for (int i = 0; i < 4; ++i) chunk.word[i] = halves[2 * i] | static_cast<std::uint32_t>(halves[2 * i + 1]) << 16;
  }
  return chunk;
}
// The first `count` elements, the others zero.
template <typename T>
__device__ __forceinline__ Chunk<T> load_some(const T* from, int count) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < Chunk<T>::size; ++i) {
    if (i >= count) continue;
    if constexpr (sizeof(T) == 2) chunk.word[i / 2] |= static_cast<std::uint32_t>(from[i].bits) << (16 * (i % 2));
    else if constexpr (sizeof(T) == 4) chunk.word[i] = as<std::uint32_t>(from[i]);
    else {
      const auto bits = as<std::uint64_t>(from[i]);
      chunk.word[2 * i] = static_cast<std::uint32_t>(bits),
                     chunk.word[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
    }
  }
  return chunk;
}

// How the work is cut, by shapes alone, and how it may be read.
struct Cut {
  std::int64_t outputs, spans, span;  // (sample, channel) maps, each in `spans` spans of `span` elements
  std::int64_t tiles, items;          // tiles of channels, or groups of rows; blocks' worth of work
  int lanes;                          // threads side by side over the channels of a tile, or over one row
  int width;                          // bytes that chunks are aligned to
  bool columns, chunks;               // rows are read by chunks

  DISCEDIT_HD std::int64_t end_of(std::int64_t index, std::int64_t elements) const {
    return index + 1 == spans ? elements : (index + 1) * span;
  }
};

// Where an item's totals go: to the statistics, or to partial[(part * spans + span) * outputs + output].
struct Target {
  Statistics statistics;
  double *out, *partial;
  double elements;
};

// ---- kernels --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void finish(const Totals& totals, const Target& target, std::int64_t output,
                                       std::int64_t outputs) {
  const bool undefined = totals.part[2] != totals.part[2];
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  for (int k = 0; k < target.statistics.count; ++k) {
    double value = 0;
    switch (target.statistics.list[k]) {
      case Statistic::mean: value = totals.part[0] / target.elements; break;
      case Statistic::sum: value = totals.part[0]; break;
      case Statistic::l2: value = sqrt(totals.part[1]); break;
      case Statistic::rms: value = sqrt(totals.part[1] / target.elements); break;
      case Statistic::absmax: value = totals.part[2]; break;
      case Statistic::max: value = undefined ? nan : totals.part[3]; break;
      case Statistic::positive_fraction: value = undefined ? nan : totals.part[4] / target.elements; break;
    }
    target.out[k * outputs + output] = value;
  }
}

template <int parts>
__device__ __forceinline__ void store(const Totals& totals, const Target& target, const Cut& cut, std::int64_t output,
                                      std::int64_t span) {
  if (cut.spans == 1) return finish(totals, target, output, cut.outputs);
  for_each_part([&](auto index) {
    if constexpr (parts & (1 << index()))
      target.partial[(index() * cut.spans + span) * cut.outputs + output] = totals.part[index()];
  });
}

// Over the lanes of a warp that differ in bits from..to of their number: a fixed tree.
template <int parts>
__device__ __forceinline__ void reduce_lanes(Totals& totals, int from, int to) {
  for (int step = from; step < to; step *= 2)
    for_each_part([&](auto index) {
      if constexpr (parts & (1 << index()))
        totals.part[index()] =
            merged<1 << index()>(totals.part[index()], __shfl_xor_sync(whole_warp, totals.part[index()], step));
    });
}

// One row, or a span of it, for each group of `cut.lanes` threads.
// occupancy: 4 blocks of 256 threads per SM
template <typename T, int parts>
__global__ void __launch_bounds__(threads, 4)
    pool_rows(const T* data, const __grid_constant__ Layout layout, const __grid_constant__ Cut cut,
              const __grid_constant__ Target target) {
  const int lanes = cut.lanes, lane = threadIdx.x % lanes, rows = threads / lanes;
  const std::int64_t all = cut.outputs * cut.spans;
  for (std::int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const std::int64_t index = item * rows + threadIdx.x / lanes;
    const bool present = index < all;
    const std::int64_t output = cut.spans == 1 ? index : index / cut.spans,
                       span = cut.spans == 1 ? 0 : index % cut.spans;
    Sums<T, parts> sums;
    if (present) {
      const std::int64_t begin = span * cut.span, count = cut.end_of(span, layout.elements) - begin;
      const T* map =
          data + output / layout.channels * layout.sample_stride + output % layout.channels * layout.channel_stride;
      if (cut.chunks) {
        constexpr int size = Chunk<T>::size;
        const T* from = map + begin;
        const std::int64_t chunks = count / size;
        const auto add = [&](const Chunk<T>& x) {
#pragma unroll
          for (int i = 0; i < size / 4 * 4; i += 4) sums.add(x.at(i), x.at(i + 1), x.at(i + 2), x.at(i + 3));
          if constexpr (size == 2) sums.add(x.at(0)), sums.add(x.at(1));
        };
        std::int64_t i = lane;
        for (; i + (in_flight - 1) * lanes < chunks; i += in_flight * lanes) {
          Chunk<T> x[in_flight];
#pragma unroll
          for (int k = 0; k < in_flight; ++k) x[k] = load_chunk(from + (i + k * lanes) * size, cut.width);
#pragma unroll
          for (int k = 0; k < in_flight; ++k) add(x[k]);
        }
        for (; i < chunks; i += lanes) add(load_chunk(from + i * size, cut.width));
        for (i = chunks * size + lane; i < count; i += lanes) sums.add(from[i]);
      } else {
        // Within one axis no division is needed to find an element.
        const bool even = layout.axes <= 1;
        const std::int64_t step = layout.inner_stride();
        const auto at = [&](std::int64_t i) { return map[even ? i * step : layout.offset(i)]; };
        std::int64_t i = begin + lane;
        const std::int64_t end = begin + count;
        for (; i + (in_flight - 1) * lanes < end; i += in_flight * lanes) {
          const T a = at(i), b = at(i + lanes), c = at(i + 2 * lanes), d = at(i + 3 * lanes);
          sums.add(a, b, c, d);
        }
        for (; i < end; i += lanes) sums.add(at(i));
      }
    }
    Totals totals = sums.totals();
    reduce_lanes<parts>(totals, 1, lanes < 32 ? lanes : 32);
    if (lanes > 32) {
      __shared__ double of_warp[warps][5];
      if (threadIdx.x % 32 == 0) for_each_part([&](auto i) { of_warp[threadIdx.x / 32][i()] = totals.part[i()]; });
      __syncthreads();
      if (threadIdx.x == 0)
        for (int warp = 1; warp < warps; ++warp)
          for_each_part([&](auto i) {
            if constexpr (parts & (1 << i())) totals.part[i()] = merged<1 << i()>(totals.part[i()], of_warp[warp][i()]);
          });
      __syncthreads();
    }
    if (present && lane == 0) store<parts>(totals, target, cut, output, span);
  }
}

// A tile of neighbouring channels of one sample, or a span of its positions, for each block.
// occupancy: 2 blocks of 256 threads per SM
template <typename T, int parts>
__global__ void __launch_bounds__(threads, 2)
    pool_columns(const T* data, const __grid_constant__ Layout layout, const __grid_constant__ Cut cut,
                 const __grid_constant__ Target target) {
  constexpr int size = Chunk<T>::size;
  __shared__ double of_warp[warps][widest * size];
  const int lanes = cut.lanes, lane = threadIdx.x % lanes, steps = threads / lanes;
  for (std::int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const std::int64_t span = item % cut.spans, tile = item / cut.spans % cut.tiles,
                       sample = item / cut.spans / cut.tiles;
    const std::int64_t first = tile * (lanes * size), channel = first + lane * size;
    const std::int64_t left = layout.channels - channel;
    const int width = left >= size ? cut.width : 0, some = left > 0 ? static_cast<int>(left) : 0;
    const T* column = data + sample * layout.sample_stride + channel;
    const bool even = layout.axes <= 1;
    const std::int64_t step = layout.inner_stride();
    const auto load = [&](std::int64_t position) {
      const T* from = column + (even ? position * step : layout.offset(position));
      return width ? load_chunk(from, width) : load_some(from, some);
    };
    Sums<T, parts> sums[size];
    const std::int64_t end = cut.end_of(span, layout.elements);
    std::int64_t i = span * cut.span + threadIdx.x / lanes;
    for (; i + (in_flight - 1) * steps < end; i += in_flight * steps) {
      Chunk<T> x[in_flight];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) x[k] = load(i + k * steps);
#pragma unroll
      for (int c = 0; c < size; ++c) sums[c].add(x[0].at(c), x[1].at(c), x[2].at(c), x[3].at(c));
    }
    for (; i < end; i += steps) {
      const Chunk<T> x = load(i);
#pragma unroll
      for (int c = 0; c < size; ++c) sums[c].add(x.at(c));
    }
    Totals mine;
    Totals of_channel[size];
#pragma unroll
    for (int c = 0; c < size; ++c) {
      of_channel[c] = sums[c].totals();
      reduce_lanes<parts>(of_channel[c], lanes, 32);
    }
    for_each_part([&](auto part) {
      if constexpr (parts & (1 << part())) {
        if (threadIdx.x % 32 < static_cast<unsigned>(lanes)) {
#pragma unroll
          for (int c = 0; c < size; ++c) of_warp[threadIdx.x / 32][lane * size + c] = of_channel[c].part[part()];
        }
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < lanes * size) {
          mine.part[part()] = of_warp[0][threadIdx.x];
          for (int warp = 1; warp < warps; ++warp)
            mine.part[part()] = merged<1 << part()>(mine.part[part()], of_warp[warp][threadIdx.x]);
        }
        __syncthreads();
      }
    });
    const std::int64_t own = first + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < lanes * size && own < layout.channels)
      store<parts>(mine, target, cut, sample * layout.channels + own, span);
  }
}

// One output per thread: its spans in their order.
// occupancy: 4 blocks of 256 threads per SM
template <int parts>
__global__ void __launch_bounds__(threads, 4)
    merge_spans(const __grid_constant__ Cut cut, const __grid_constant__ Target target) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * threads;
  for (std::int64_t output = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; output < cut.outputs;
       output += step) {
    Totals totals;
    for_each_part([&](auto part) {
      if constexpr (parts & (1 << part())) {
        const double* partial = target.partial + part() * cut.spans * cut.outputs + output;
        totals.part[part()] = partial[0];
        for (std::int64_t span = 1; span < cut.spans; ++span)
          totals.part[part()] = merged<1 << part()>(totals.part[part()], partial[span * cut.outputs]);
      }
    });
    finish(totals, target, output, cut.outputs);
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

int power_of_two(std::int64_t least, int most) {
  int result = 1;
  while (result < least && result < most) result *= 2;
  return result;
}

// Largest power of two, up to a chunk, that divides the address of every chunk.
int alignment_of(const TensorView& x, const Layout& layout, std::int64_t element_bytes, bool columns) {
  auto bits = reinterpret_cast<std::uintptr_t>(x.data) | chunk_bytes;
  const auto also = [&](std::int64_t axis_size, std::int64_t stride) {
    if (axis_size > 1) bits |= static_cast<std::uintptr_t>(stride * element_bytes);
  };
  also(layout.samples, layout.sample_stride);
  if (!columns) also(layout.channels, layout.channel_stride);
  else
    for (int axis = 0; axis < layout.axes; ++axis) also(layout.size[axis], layout.stride[axis]);
  return static_cast<int>(bits & (~bits + 1));
}

Cut cut_of(const TensorView& x, const Layout& layout) {
  const std::int64_t bytes = x.dtype == DType::float64   ? 8
                             : x.dtype == DType::float32 ? 4
                                                         : 2,
                     size = chunk_bytes / bytes;
  Cut cut{};
  cut.outputs = layout.samples * layout.channels;
  cut.columns = layout.by_columns();
  cut.width = alignment_of(x, layout, bytes, cut.columns);
  std::int64_t least, blocks;  // elements that are worth a span, and blocks without cutting
  if (cut.columns) {
    cut.lanes = power_of_two(ceil_div(layout.channels, size), widest);
    cut.tiles = ceil_div(layout.channels, cut.lanes * size);
    blocks = layout.samples * cut.tiles;
    least = in_flight * 2 * (threads / cut.lanes);
  } else {
    const bool dense = layout.axes == 0 || (layout.axes == 1 && layout.inner_stride() == 1);
    cut.chunks = dense && layout.elements >= 32 * size;
    const std::int64_t loads = cut.chunks ? layout.elements / size : layout.elements;  // about 8 for a thread
    cut.lanes = loads > 32 * 16 ? threads : power_of_two(ceil_div(loads, 8), 32);
    blocks = ceil_div(cut.outputs * cut.lanes, threads);
    least = 16 * threads;
  }
  const std::int64_t wanted =
      std::min(ceil_div(enough_blocks, std::max<std::int64_t>(1, blocks)), layout.elements / least);
  cut.spans = std::max<std::int64_t>(1, wanted);
  cut.span = ceil_div(ceil_div(layout.elements, cut.spans), size) * size;  // spans begin with whole chunks
  cut.spans = std::max<std::int64_t>(1, ceil_div(layout.elements, cut.span));
  cut.items = cut.columns ? blocks * cut.spans : ceil_div(cut.outputs * cut.spans, threads / cut.lanes);
  return cut;
}

template <typename T, int parts>
void run(const T* data, const Layout& layout, const Cut& cut, const Target& target, Stream stream) {
  launch("pool", cut.columns ? pool_columns<T, parts> : pool_rows<T, parts>, cut.items, threads, stream, data, layout,
         cut, target);
  if (cut.spans > 1) launch("pool", merge_spans<parts>, ceil_div(cut.outputs, threads), threads, stream, cut, target);
}

// One kernel for each usual set of accumulators; any other set runs in the next larger.
template <typename T>
void run(const TensorView& x, const Layout& layout, const Cut& cut, const Target& target, Stream stream) {
  const T* data = static_cast<const T*>(x.data);
  const int parts = parts_of(target.statistics);
  constexpr int sums = Parts::sum | Parts::square;
  if (parts == Parts::sum) return run<T, Parts::sum>(data, layout, cut, target, stream);
  if ((parts & ~sums) == 0) return run<T, sums>(data, layout, cut, target, stream);
  return run<T, all_parts>(data, layout, cut, target, stream);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

std::int64_t pool_scratch(const TensorView& x, int channel_axis) {
  const Layout layout = layout_of(x, channel_axis);
  if (layout.samples * layout.channels == 0) return 0;
  const Cut cut = cut_of(x, layout);
  return cut.spans > 1 ? 5 * cut.spans * cut.outputs : 0;
}

void pool(const TensorView& x, int channel_axis, const Statistics& statistics, double* out, double* scratch,
          Stream stream) {
  const Layout layout = layout_of(x, channel_axis);
  const bool nothing = layout.samples * layout.channels == 0;
  const Cut cut = nothing ? Cut{} : cut_of(x, layout);
  const Target target{statistics, out, scratch, static_cast<double>(layout.elements)};
  switch (x.dtype) {
    case DType::float32: return run<float>(x, layout, cut, target, stream);
    case DType::float64: return run<double>(x, layout, cut, target, stream);
    case DType::bfloat16: return run<BFloat16>(x, layout, cut, target, stream);
    case DType::float16: return run<Float16>(x, layout, cut, target, stream);
    default:
      throw std::invalid_argument(std::string("pool: x must be float16, bfloat16, float32 or float64, got ") +
                                  name(x.dtype) + ".");
  }
}

}  // namespace discedit::cuda
