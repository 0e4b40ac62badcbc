// Moments of patches. Eight lanes stand beside each other, a channel in each, so that a tap is one load whatever
// stride, dilation and layout. Of a band of output rows, what its patches need is copied into a plane of such lanes, in
// float64 and around a value of the channel; then products of taps are summed over the patches, 3 x 3 pairs in
// registers. Split of work: groups of eight lanes, and where these are fewer than threads, the pairs as well.
#include "patch_moments.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "element.hpp"
#include "parallel.hpp"
#include "scratch.hpp"

namespace discedit::DISCEDIT_LEVEL {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int lanes = 8;                       // fixed: they say which samples are summed together
constexpr int side = 3;                        // of a tile of pairs of taps
constexpr int entries = side * side;           // their sums stay in registers
constexpr std::int64_t run = 32;               // patches between two looks at the next tile: they stay in L1
constexpr std::int64_t band_pixels = 1 << 13;  // of 64 bytes: a band stays in L2, where a few rows allow it
constexpr std::int64_t least_gap = 8;          // pixels that nothing needs, from which on they are left out
constexpr std::int64_t looked_at = 64;         // elements that a channel's centre is made of
static_assert(lanes % doubles == 0, "lanes fill registers");

// Differences from the centre: products of two that have 24 bits are exact in float64.
template <typename T>
using Narrow = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Map {  // strides in elements
  std::int64_t samples, channels, height, width;
  std::int64_t sample_stride, channel_stride, row_stride, column_stride;
};

// ---- which pixels the patches need, the same for all channels and samples -------------------------------------------

struct Run {  // neighbouring pixels of one row; `at` is their place in the plane
  std::int64_t row, column, count, at;
};

struct Band {
  std::vector<Run> inside, outside;  // the map, and in its padding
  std::vector<std::int64_t> places;  // of each patch in the plane, in doubles
};

std::vector<Run> runs_of(const std::vector<char>& needed, std::int64_t row, std::int64_t at, std::int64_t begin,
                         std::int64_t end) {
  std::vector<Run> runs;
  std::int64_t last = -least_gap - 2;
  for (std::int64_t column = begin; column < end; ++column) {
    if (!needed[static_cast<std::size_t>(at + column)]) continue;
    if (column - last > least_gap) runs.push_back({row, column, 0, at + column});
    last = column;
    runs.back().count = column - runs.back().column + 1;
  }
  return runs;
}

// All of what is to be done for one sample, and how large its plane is.
struct Plan {
  std::vector<Band> bands;
  std::vector<std::int64_t> taps;  // from a patch's place, in doubles; filled up to whole tiles
  std::int64_t pixels = 0;         // of the plane

  Plan(const Window& rows, const Window& columns, const Positions& positions) {
    const std::int64_t width = columns.padded(), outputs = columns.outputs();
    for (std::int64_t i = 0; i < rows.kernel; ++i)
      for (std::int64_t j = 0; j < columns.kernel; ++j)
        taps.push_back((i * rows.dilation * width + j * columns.dilation) * lanes);
    const std::size_t real = taps.size();
    taps.resize((real + side - 1) / side * side, 0);  // what those give is left out

    std::vector<std::int64_t> sorted(static_cast<std::size_t>(positions.count));
    if (positions.list) std::copy(positions.list, positions.list + positions.count, sorted.begin());
    else std::iota(sorted.begin(), sorted.end(), 0);
    std::sort(sorted.begin(), sorted.end());

    const std::int64_t fitting = std::max(rows.extent(), band_pixels / width);  // rows of the plane
    const std::int64_t height = std::min(rows.padded(), fitting);
    const std::int64_t step = (fitting - rows.extent()) / rows.stride + 1;  // rows of the output
    pixels = height * width;
    std::vector<char> needed(static_cast<std::size_t>(pixels));
    for (auto next = sorted.begin(); next != sorted.end();) {
      const std::int64_t first = *next / outputs / step * step;
      std::fill(needed.begin(), needed.end(), 0);
      Band band;
      for (; next != sorted.end() && *next < (first + step) * outputs; ++next) {
        const std::int64_t row = *next / outputs - first, column = *next % outputs;
        const std::int64_t place = (row * rows.stride * width + column * columns.stride) * lanes;
        band.places.push_back(place);
        for (std::size_t tap = 0; tap < real; ++tap) needed[static_cast<std::size_t>((place + taps[tap]) / lanes)] = 1;
      }
      for (std::int64_t i = 0; i < height; ++i) {
        const std::int64_t row = first * rows.stride + i - rows.before;
        const bool within = row >= 0 && row < rows.size;
        const std::int64_t begin = within ? columns.before : width, end = within ? begin + columns.size : width;
        for (Run found : runs_of(needed, row, i * width, begin, end)) {
          found.column -= columns.before;
          band.inside.push_back(found);
        }
        for (const Run& found : runs_of(needed, row, i * width, 0, begin)) band.outside.push_back(found);
        for (const Run& found : runs_of(needed, row, i * width, end, width)) band.outside.push_back(found);
      }
      bands.push_back(std::move(band));
    }
  }
};

// ---- load: a band of one sample into the plane ----------------------------------------------------------------------

DISCEDIT_INLINE Vector<double> wide(const double* from) { return load<Vector<double>>(from); }

// `doubles` elements in the type of their deviations.
using Half = Vector<float, vector_bytes / 2>;
DISCEDIT_INLINE Vector<double> narrow(const double* from) { return wide(from); }
DISCEDIT_INLINE Half narrow(const float* from) { return load<Half>(from); }
template <typename T>
DISCEDIT_INLINE Half narrow(const T* from) {
  using Integers = Vector<std::uint32_t, vector_bytes / 2>;
  const auto bits = __builtin_convertvector((load<Vector<std::uint16_t, vector_bytes / 4>>(from)), Integers);
  if constexpr (std::is_same_v<T, BFloat16>) return as<Half>(bits << 16);
  else return widen_half_bits<Half>(bits);
}

// Of `doubles` elements side by side, from one centre or from one each.
template <typename T, typename Centre>
DISCEDIT_INLINE Vector<double> deviations(const T* from, Centre centre) {
  return __builtin_convertvector(narrow(from) - centre, Vector<double>);
}

// Rows become columns, in log2(doubles) rounds. Each deals out rows i and i + half in turns, like two packs of cards.
template <std::size_t... Lane>
DISCEDIT_INLINE void transpose(Vector<double> (&rows)[doubles], std::index_sequence<Lane...>) {
  for (int round = 1; round < doubles; round *= 2) {
    Vector<double> dealt[doubles];
    for (int i = 0; i < doubles / 2; ++i) {
      const Vector<double> a = rows[i], b = rows[i + doubles / 2];
      dealt[2 * i] = __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * doubles)...);
      dealt[2 * i + 1] = __builtin_shufflevector(a, b, (Lane / 2 + doubles / 2 + Lane % 2 * doubles)...);
    }
    std::copy(dealt, dealt + doubles, rows);
  }
}

template <typename T>
struct Group {
  const T* map[lanes];      // of one channel and sample; null: zeros, padding included
  Narrow<T> centre[lanes];  // 0 for those
};

// Where the channels lie side by side.
template <typename T>
DISCEDIT_INLINE void load_pixels(const Map& x, const Group<T>& group, const Run& pixels, double* to) {
  const T* from = group.map[0] + pixels.row * x.row_stride + pixels.column * x.column_stride;
  for (std::int64_t i = 0; i < pixels.count; ++i, from += x.column_stride, to += lanes)
    for (int lane = 0; lane < lanes; lane += doubles)
      store(to + lane, deviations(from + lane, narrow(group.centre + lane)));
}

// Any layout: a register of columns of each lane, turned round.
template <typename T>
DISCEDIT_INLINE void load_columns(const Map& x, const Group<T>& group, const Run& pixels, double* to) {
  const std::int64_t offset = pixels.row * x.row_stride + pixels.column * x.column_stride;
  // Up to here the elements of a map follow each other, with or without others between rows.
  const std::int64_t end = std::max<std::int64_t>(0, (x.height - 1) * x.row_stride) + x.width;
  for (std::int64_t i = 0; i < pixels.count; i += doubles) {
    const int count = static_cast<int>(std::min<std::int64_t>(doubles, pixels.count - i));
    const std::int64_t at = offset + i * x.column_stride;
    const bool readable = x.column_stride == 1 && at + doubles <= end;
    for (int lane = 0; lane < lanes; lane += doubles) {
      Vector<double> rows[doubles];
      for (int row = 0; row < doubles; ++row) {
        const T* from = group.map[lane + row];
        T few[doubles] = {};
        if (from && !readable)
          for (int k = 0; k < count; ++k) few[k] = from[at + k * x.column_stride];
        rows[row] = deviations(from && readable ? from + at : few, group.centre[lane + row]);
      }
      transpose(rows, std::make_index_sequence<doubles>());
      for (int k = 0; k < count; ++k) store(to + (i + k) * lanes + lane, rows[k]);
    }
  }
}

template <typename T>
void load_band(const Map& x, const Group<T>& group, bool side_by_side, const Band& band, double* plane) {
  for (const Run& pixels : band.inside) {
    if (side_by_side) load_pixels(x, group, pixels, plane + pixels.at * lanes);
    else load_columns(x, group, pixels, plane + pixels.at * lanes);
  }
  for (const Run& pixels : band.outside)
    for (std::int64_t i = 0; i < pixels.count; ++i)
      for (int lane = 0; lane < lanes; ++lane)
        plane[(pixels.at + i) * lanes + lane] = -static_cast<double>(group.centre[lane]);
}

// ---- compute --------------------------------------------------------------------------------------------------------

template <bool exact>
DISCEDIT_INLINE Vector<double> add_product(Vector<double> sum, Vector<double> x, Vector<double> y) {
  if constexpr (exact) return add_exact_product(sum, x, y);
  else return sum + x * y;
}

// Adds the patches' products of taps a and taps b; on the diagonal, where these are the same: the taps' sums, squares
// and three products. One register of lanes at a time.
template <bool exact, bool diagonal>
DISCEDIT_INLINE void add_tile(const double* plane, const std::int64_t* places, std::int64_t count,
                              const std::int64_t* a, const std::int64_t* b, double* sums) {
  for (int lane = 0; lane < lanes; lane += doubles) {
    Vector<double> sum[entries] = {};  // of a run, and then runs: less is rounded away than patch by patch
    for (std::int64_t i = 0; i < count; ++i) {
      const double* patch = plane + places[i] + lane;
      const Vector<double> x[side] = {wide(patch + a[0]), wide(patch + a[1]), wide(patch + a[2])};
      if constexpr (diagonal) {
        for (int k = 0; k < side; ++k) {
          const int next = (k + 1) % side;
          sum[k] += x[k];
          sum[side + k] = add_product<exact>(sum[side + k], x[k], x[k]);
          sum[2 * side + k] = add_product<exact>(sum[2 * side + k], x[k], x[next]);
        }
      } else {
        for (int l = 0; l < side; ++l) {
          const Vector<double> y = wide(patch + b[l]);
          for (int k = 0; k < side; ++k) sum[side * k + l] = add_product<exact>(sum[side * k + l], x[k], y);
        }
      }
    }
    for (int i = 0; i < entries; ++i) store(sums + i * lanes + lane, wide(sums + i * lanes + lane) + sum[i]);
  }
}

struct Tile {
  std::int64_t first, second;  // taps that its sides begin with

  bool diagonal() const { return first == second; }
};

struct Results {  // sums of deviations from the centre until `finish`
  double *mean, *scatter;
  std::int64_t taps;

  void put(std::int64_t channel, std::int64_t a, std::int64_t b, double value) const {
    if (a < taps && b < taps) scatter[(channel * taps + a) * taps + b] = value;
  }

  // A tile's sums of one channel.
  void put(std::int64_t channel, const Tile& tile, const double (&sum)[entries]) const {
    if (!tile.diagonal()) {
      for (int i = 0; i < entries; ++i) put(channel, tile.first + i / side, tile.second + i % side, sum[i]);
      return;
    }
    for (int k = 0; k < side && tile.first + k < taps; ++k) {
      mean[channel * taps + tile.first + k] = sum[k];
      const int next = (k + 1) % side;
      put(channel, tile.first + k, tile.first + k, sum[side + k]);
      put(channel, tile.first + std::min(k, next), tile.first + std::max(k, next), sum[2 * side + k]);
    }
  }

  void finish(std::int64_t channel, double centre, double patches) const {
    double* first = mean + channel * taps;
    double* second = scatter + channel * taps * taps;
    for (std::int64_t i = 0; i < taps; ++i)
      for (std::int64_t j = i; j < taps; ++j) {
        double value = second[i * taps + j] - first[i] * (first[j] / patches);
        if (i == j && value < 0) value = 0;
        second[i * taps + j] = second[j * taps + i] = value;
      }
    for (std::int64_t i = 0; i < taps; ++i) first[i] = centre + first[i] / patches;
  }
};

// Elements of a channel that are spread over the whole of it.
std::vector<std::int64_t> sample_of(const Map& x) {
  const std::int64_t map = x.height * x.width, all = x.samples * map, count = std::min(all, looked_at);
  std::vector<std::int64_t> offsets;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t at = all / count * i + all % count * i / count, pixel = at % map;
    offsets.push_back(at / map * x.sample_stride + pixel / x.width * x.row_stride + pixel % x.width * x.column_stride);
  }
  return offsets;
}

// A finite value in the middle of those elements, exactly that of a constant channel; 0 where others would be lost
// beside it.
template <typename T>
Narrow<T> centre_of(const T* channel, const std::vector<std::int64_t>& sample) {
  double first = 0, sum = 0, finite = 0;
  for (const std::int64_t at : sample) {
    const double value = widen(channel[at]);
    if (!std::isfinite(value)) continue;
    if (finite == 0) first = value;
    sum += value - first;
    finite += 1;
  }
  const double centre = finite == 0 ? 0 : first + sum / finite;
  return static_cast<Narrow<T>>(std::abs(centre) < 0x1p100 ? centre : 0);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

// Working memory that begins with a cache line: a load of eight lanes then touches one.
double* aligned_scratch(int slot, std::size_t size) {
  constexpr std::size_t line = 64;
  double* memory = scratch(slot, size + line / sizeof(double));
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  return memory + ((address + line - 1) / line * line - address) / sizeof(double);
}

template <typename T>
struct Job {
  const Map x;
  const T* data;
  const Plan plan;
  const std::int64_t width = std::min<std::int64_t>(lanes, x.channels);  // channels of a group
  const std::int64_t abreast = lanes / width;  // samples: lanes that few channels leave empty take others
  std::vector<Tile> tiles;
  std::vector<Narrow<T>> centres;

  Job(const TensorView& view, const Window& rows, const Window& columns, const Positions& positions)
      : x{view.shape[0],  view.shape[1],  view.shape[2],  view.shape[3],
          view.stride[0], view.stride[1], view.stride[2], view.stride[3]},
        data(static_cast<const T*>(view.data)),
        plan(rows, columns, positions),
        centres(static_cast<std::size_t>(x.channels)) {
    const auto taps = static_cast<std::int64_t>(plan.taps.size());
    for (std::int64_t i = 0; i < taps; i += side)
      for (std::int64_t j = i; j < taps; j += side) tiles.push_back({i, j});
  }

  Narrow<T>& centre(std::int64_t channel) { return centres[static_cast<std::size_t>(channel)]; }
  Narrow<T> centre(std::int64_t channel) const { return centres[static_cast<std::size_t>(channel)]; }

  Group<T> group(std::int64_t channel, std::int64_t sample) const {
    Group<T> result{};
    for (std::int64_t lane = 0; lane < width * abreast; ++lane) {
      const std::int64_t own = channel + lane % width, other = sample + lane / width;
      if (own >= x.channels || other >= x.samples) continue;
      result.map[lane] = data + own * x.channel_stride + other * x.sample_stride;
      result.centre[lane] = centre(own);
    }
    return result;
  }

  // Tiles [from, to) of the group of channels that begins with this one.
  void sum(std::int64_t channel, std::size_t from, std::size_t to, const Results& results) const {
    constexpr bool exact = !std::is_same_v<T, double>;
    double* plane = aligned_scratch(0, static_cast<std::size_t>(plan.pixels * lanes));
    double* sums = aligned_scratch(1, (to - from) * entries * lanes);
    std::fill_n(sums, (to - from) * entries * lanes, 0.0);
    const bool side_by_side = x.channel_stride == 1 && channel + lanes <= x.channels;
    for (std::int64_t sample = 0; sample < x.samples; sample += abreast) {
      const Group<T> maps = group(channel, sample);
      for (const Band& band : plan.bands) {
        load_band(x, maps, side_by_side, band, plane);
        const auto patches = static_cast<std::int64_t>(band.places.size());
        for (std::int64_t at = 0; at < patches; at += run) {
          double* into = sums;
          for (std::size_t i = from; i < to; ++i, into += entries * lanes) {
            const auto add = tiles[i].diagonal() ? add_tile<exact, true> : add_tile<exact, false>;
            add(plane, band.places.data() + at, std::min(run, patches - at), plan.taps.data() + tiles[i].first,
                plan.taps.data() + tiles[i].second, into);
          }
        }
      }
    }
    for (std::size_t i = from; i < to; ++i, sums += entries * lanes)
      for (std::int64_t own = 0; own < width && channel + own < x.channels; ++own) {
        double sum[entries] = {};
        for (int k = 0; k < entries; ++k)
          for (std::int64_t part = 0; part < abreast; ++part) sum[k] += sums[k * lanes + part * width + own];
        results.put(channel + own, tiles[i], sum);
      }
  }
};

template <typename T>
void launch(const TensorView& view, const Window& rows, const Window& columns, const Positions& positions,
            const Results& results, int threads) {
  Job<T> job(view, rows, columns, positions);
  const std::int64_t channels = job.x.channels, groups = (channels + job.width - 1) / job.width;
  const std::vector<std::int64_t> sample = sample_of(job.x);
  parallel_for(channels, lanes, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) job.centre(i) = centre_of(job.data + i * job.x.channel_stride, sample);
  });
  const std::size_t tiles = job.tiles.size();
  const auto shares = std::min(tiles, static_cast<std::size_t>((std::max(1, threads) + groups - 1) / groups));
  parallel_for(groups * static_cast<std::int64_t>(shares), 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::size_t share = static_cast<std::size_t>(i) % shares;
      job.sum(i / static_cast<std::int64_t>(shares) * job.width, tiles * share / shares, tiles * (share + 1) / shares,
              results);
    }
  });
  const double patches = static_cast<double>(job.x.samples) * static_cast<double>(positions.count);
  parallel_for(channels, lanes, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) results.finish(i, static_cast<double>(job.centre(i)), patches);
  });
}

}  // namespace

void patch_moments(const TensorView& x, const Window& rows, const Window& columns, const Positions& positions,
                   double* mean, double* scatter, int threads) {
  const std::int64_t channels = x.shape[1];
  const Results results{mean, scatter, rows.kernel * columns.kernel};
  if (channels == 0 || x.shape[0] == 0 || positions.count == 0) {
    std::fill_n(mean, channels * results.taps, 0.0);
    std::fill_n(scatter, channels * results.taps * results.taps, 0.0);
    return;
  }
  switch (x.dtype) {
    case DType::float32: return launch<float>(x, rows, columns, positions, results, threads);
    case DType::float64: return launch<double>(x, rows, columns, positions, results, threads);
    case DType::bfloat16: return launch<BFloat16>(x, rows, columns, positions, results, threads);
    case DType::float16: return launch<Float16>(x, rows, columns, positions, results, threads);
    default:
      throw std::invalid_argument(std::string("patch_moments: x must be float16, bfloat16, float32 or float64, got ") +
                                  name(x.dtype) + ".");
  }
}

}  // namespace discedit::DISCEDIT_LEVEL
