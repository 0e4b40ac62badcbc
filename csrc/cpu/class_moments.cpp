// Per-class moments of a pooled feature map. Two phases: pool.cpp reads the map once into a samples x channels scratch;
// then one worker per channel tile folds each class's samples, in their order in the batch, into the state.
#include "class_moments.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.hpp"
#include "exponential.hpp"
#include "law.hpp"
#include "parallel.hpp"
#include "sample_order.hpp"
#include "scratch.hpp"

namespace discedit::DISCEDIT_LEVEL {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int together = 2;                     // registers of channels folded at once: two chains of additions
constexpr int least_tile = 8 * together;        // channels: a multiple of every register's lanes
constexpr int tile = 64;                        // channels of a work item: whole cache lines, several side by side
constexpr std::int64_t near_values = 1 << 12;   // pooled values brought together in L1
constexpr std::int64_t chunk_values = 1 << 13;  // pooled values that a thread takes at a time
static_assert(8 % pack_lanes == 0 && tile % least_tile == 0, "tiles hold whole registers");

// ---- kernels --------------------------------------------------------------------------------------------------------

// `Packs` neighbouring registers of channels, of which only `width` channels exist where not Full.
template <int Packs, bool Full>
struct Channels {
  int width;

  DISCEDIT_INLINE void load(const double* from, Pack (&to)[Packs]) const {
    for (int p = 0; p < Packs; ++p) to[p] = load_some(from + p * pack_lanes, width_of(p));
  }
  DISCEDIT_INLINE int width_of(int p) const {
    return Full ? pack_lanes : std::clamp(width - p * pack_lanes, 0, pack_lanes);
  }
};

// Values of the samples of one class: sample i, channel c at values[order[i] * stride + c], where no order means 0, 1,
// 2, ..; those of the next statistic lie `plane` further on.
struct Members {
  const double* values;
  const std::int64_t* order;
  std::int64_t count, stride, plane;

  DISCEDIT_INLINE const double* of(std::int64_t sample) const {
    return values + (order ? order[sample] : sample) * stride;
  }
  Members from_channel(std::int64_t channel) const { return {values + channel, order, count, stride, plane}; }
  DISCEDIT_INLINE void prefetch(int statistics, int channels) const {
    for (int k = 0; k < statistics; ++k)
      for (std::int64_t i = 0; i < count; ++i)
        for (int c = 0; c < channels; c += 8) __builtin_prefetch(of(i) + k * plane + c, 0, 2);
  }
};

// A copy of a class's samples in L1, for rows so far apart that they would throw each other out of it.
struct Near {
  alignas(64) double values[near_values];

  // Widest number of channels that fits; 0 where even the least does not.
  static std::int64_t width(std::int64_t count, int statistics) {
    return std::min<std::int64_t>(tile, near_values / (count * statistics) / least_tile * least_tile);
  }
  Members copy(const Members& from, std::int64_t width, int statistics) {
    const std::int64_t stride = (width + 7) / 8 * 8;
    for (int k = 0; k < statistics; ++k)
      for (std::int64_t i = 0; i < from.count; ++i) {
        const double* row = from.of(i) + k * from.plane;
        std::memcpy(values + (k * from.count + i) * stride, row, static_cast<std::size_t>(width) * sizeof(double));
      }
    return {values, nullptr, from.count, stride, from.count * stride};
  }
};

// Rows whose first channels share few of L1's sets, which are chosen by 6 bits of the number of the cache line.
bool rows_collide(std::int64_t row) { return row % 64 == 0; }

// Pooled features in this thread's scratch memory. Rows are an odd number of cache lines.
Planes<double> scratch_planes(std::int64_t statistics, std::int64_t samples, std::int64_t channels) {
  const std::int64_t row = ((channels + 7) / 8 | 1) * 8;
  return {scratch(0, static_cast<std::size_t>(statistics * samples * row)), row, samples * row};
}
Planes<const double> read_only(const Planes<double>& planes) { return {planes.data, planes.row, planes.plane}; }

// Mean of each channel and statistic, as first sample + mean deviation from it: a constant channel gets its exact
// value.
template <int D, int Packs, bool Full>
DISCEDIT_INLINE void means_of(const Channels<Packs, Full>& at, const Members& members, Pack (&mean)[D][Packs]) {
  Pack first[D][Packs], x[Packs], residual[D][Packs];
  for (int k = 0; k < D; ++k) {
    at.load(members.of(0) + k * members.plane, first[k]);
    for (Pack& sum : residual[k]) sum = Pack(0.0);
  }
  for (std::int64_t i = 1; i < members.count; ++i)
    for (int k = 0; k < D; ++k) {
      at.load(members.of(i) + k * members.plane, x);
      for (int p = 0; p < Packs; ++p) residual[k][p] += x[p] - first[k][p];
    }
  const Pack n(static_cast<double>(members.count));
  for (int k = 0; k < D; ++k)
    for (int p = 0; p < Packs; ++p) mean[k][p] = first[k][p] + residual[k][p] / n;
}

// Where a class's samples go.
struct Target {
  std::int64_t cls, channel;
  bool seen;  // the class has samples already
};

// Moments of one class's samples, merged into the state.
template <int Packs, bool Full>
DISCEDIT_INLINE void fold(const Channels<Packs, Full>& at, const Members& members, const MomentState& state,
                          const Target& target) {
  const Pack n(static_cast<double>(members.count));
  Pack mean[1][Packs], x[Packs], residual[Packs], m2[Packs], m3[Packs], m4[Packs];
  means_of(at, members, mean);
  for (int p = 0; p < Packs; ++p) residual[p] = m2[p] = m3[p] = m4[p] = Pack(0.0);
  // A single sample is its own mean, up to the sign of a NaN.
  for (std::int64_t i = 0; i < members.count; ++i) {
    at.load(members.of(i), x);
    for (int p = 0; p < Packs; ++p) {
      const Pack d = x[p] - mean[0][p], d2 = d * d;
      residual[p] += d;
      m2[p] += d2;
      m3[p] += d2 * d;
      m4[p] += d2 * d2;
    }
  }
  // The stored mean is rounded; what that leaves in the deviations is known and taken out to first order.
  MomentsOf<Pack> law[Packs];
  for (int p = 0; p < Packs; ++p) {
    const Pack r = residual[p] / n;
    m4[p] -= Pack(4.0) * r * m3[p];
    m3[p] -= Pack(3.0) * r * m2[p];
    const Pack central = m2[p] - r * residual[p];
    law[p] = {n, mean[0][p], select(central < Pack(0.0), Pack(0.0), central), m3[p], m4[p]};
  }
  // Loads first: the compiler must take every store for one that later loads depend on.
  const auto channel = [&](int p) { return target.channel + p * pack_lanes; };
  if (target.seen) {
    MomentsOf<Pack> before[Packs];
    for (int p = 0; p < Packs; ++p) before[p] = load_law(state, target.cls, channel(p), at.width_of(p));
    for (int p = 0; p < Packs; ++p) law[p] = merge(before[p], law[p]);
  }
  for (int p = 0; p < Packs; ++p) store_law(law[p], state, target.cls, channel(p), at.width_of(p));
}

// The same for vectors of D statistics.
template <int D, bool Full>
DISCEDIT_INLINE void fold_vector(const Channels<1, Full>& at, const Members& members, const VectorState& state,
                                 const Target& target) {
  Pack mean[D][1], x[D][1], residual[D];
  VectorMomentsOf<Pack, D> law;
  means_of(at, members, mean);
  for (Pack& sum : residual) sum = Pack(0.0);
  for (Pack& sum : law.scatter) sum = Pack(0.0);
  for (std::int64_t sample = 0; sample < members.count; ++sample) {
    for (int i = 0; i < D; ++i) {
      at.load(members.of(sample) + i * members.plane, x[i]);
      x[i][0] -= mean[i][0];
      residual[i] += x[i][0];
    }
    for (int i = 0; i < D; ++i)
      for (int j = 0; j <= i; ++j) law.scatter[lower(i, j)] += x[i][0] * x[j][0];
  }
  law.n = static_cast<double>(members.count);
  for (int i = 0; i < D; ++i) {
    law.mean[i] = mean[i][0];
    for (int j = 0; j <= i; ++j) law.scatter[lower(i, j)] -= residual[i] * (residual[j] / law.n);
    Pack& own = law.scatter[lower(i, i)];
    own = select(own < Pack(0.0), Pack(0.0), own);
  }
  if (target.seen) law = merge(load_law<D>(state, D, target.cls, target.channel, at.width_of(0)), law, D);
  store_law(law, state, D, target.cls, target.channel, at.width_of(0));
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// Calls body(members, width, target) for each class of the batch and each stretch of `width` <= step channels, on
// several threads, and adds the counts.
template <int step, typename State, typename Body>
void over_classes(const Planes<const double>& pooled, int statistics, const SampleOrder& sorted, const State& state,
                  int threads, const Body& body) {
  const auto samples = static_cast<std::int64_t>(sorted.order.size());
  const std::int64_t work = std::max<std::int64_t>(1, samples * statistics * tile);
  const std::int64_t tiles = (state.channels + tile - 1) / tile;
  const bool collide = rows_collide(pooled.row);
  const auto members_of = [&](const SampleOrder::Group& group, std::int64_t channel) {
    return Members{pooled.data + channel, sorted.order.data() + group.begin, group.end - group.begin, pooled.row,
                   pooled.plane};
  };
  parallel_for(tiles, chunk_values / work, threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t last = std::min(end * tile, state.channels);
    Near near;
    for (std::size_t g = 0; g < sorted.groups.size(); ++g) {
      const auto& group = sorted.groups[g];
      const std::int64_t count = group.end - group.begin;
      const std::int64_t fits = collide && count > 1 ? Near::width(count, statistics) : 0;
      const std::int64_t at_once = fits ? fits : tile;
      for (std::int64_t first = begin * tile; first < last; first += at_once) {
        const int width = static_cast<int>(std::min(at_once, last - first));
        const Members far = members_of(group, first);
        const Members members = fits ? near.copy(far, width, statistics) : far;
        for (int c = 0; c < width; c += step) {
          const std::int64_t channel = first + c;
          // The next class's samples lie scattered over the batch: the hardware does not see them coming.
          if (g + 1 < sorted.groups.size()) members_of(sorted.groups[g + 1], channel).prefetch(statistics, step);
          body(members.from_channel(c), std::min(step, width - c),
               Target{group.cls, channel, state.count[group.cls] > 0});
        }
      }
    }
  });
  for (const auto& group : sorted.groups) state.count[group.cls] += group.end - group.begin;
}

void fold_batch(const Planes<const double>& pooled, const SampleOrder& sorted, const MomentState& state, int threads) {
  constexpr int step = together * pack_lanes;
  over_classes<step>(pooled, 1, sorted, state, threads, [&](const Members& members, int width, const Target& target) {
    if (width == step) fold(Channels<together, true>{step}, members, state, target);
    else fold(Channels<together, false>{width}, members, state, target);
  });
}

template <int D>
void fold_vector_batch(const Planes<const double>& pooled, const SampleOrder& sorted, const VectorState& state,
                       int threads) {
  constexpr int step = pack_lanes;
  over_classes<step>(pooled, D, sorted, state, threads, [&](const Members& members, int width, const Target& target) {
    if (width == step) fold_vector<D>(Channels<1, true>{step}, members, state, target);
    else fold_vector<D>(Channels<1, false>{width}, members, state, target);
  });
}

void fold_vector_of_any(const Planes<const double>& pooled, const SampleOrder& sorted, const VectorState& state,
                        int threads) {
  switch (state.dimension) {
    case 1: return fold_vector_batch<1>(pooled, sorted, state, threads);
    case 2: return fold_vector_batch<2>(pooled, sorted, state, threads);
    case 3: return fold_vector_batch<3>(pooled, sorted, state, threads);
    case 4: return fold_vector_batch<4>(pooled, sorted, state, threads);
    case 5: return fold_vector_batch<5>(pooled, sorted, state, threads);
    case 6: return fold_vector_batch<6>(pooled, sorted, state, threads);
    case 7: return fold_vector_batch<7>(pooled, sorted, state, threads);
    default: return fold_vector_batch<8>(pooled, sorted, state, threads);
  }
}

// exp(-scale t) of one statistic's features.
void exponentials(const Planes<const double>& from, double scale, std::int64_t samples, std::int64_t channels,
                  const Planes<double>& to, int threads) {
  parallel_for(samples, chunk_values / channels, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t sample = begin; sample < end; ++sample)
      for (std::int64_t c = 0; c < channels; c += pack_lanes) {
        const int width = static_cast<int>(std::min<std::int64_t>(pack_lanes, channels - c));
        const Pack t = load_some(from.data + sample * from.row + c, width);
        store_some(exponential(t * Pack(-scale)), to.data + sample * to.row + c, width);
      }
  });
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void fold_moments(const Planes<const double>& pooled, double scale, const Labels& labels, const MomentState& state,
                  int threads) {
  const SampleOrder sorted = order_by_class(labels, state.classes);
  if (scale == 0) return fold_batch(pooled, sorted, state, threads);
  const Planes<double> transformed = scratch_planes(1, labels.samples, state.channels);
  exponentials(pooled, scale, labels.samples, state.channels, transformed, threads);
  fold_batch(read_only(transformed), sorted, state, threads);
}

void fold_vector_moments(const Planes<const double>& pooled, const Labels& labels, const VectorState& state,
                         int threads) {
  fold_vector_of_any(pooled, order_by_class(labels, state.classes), state, threads);
}

void class_moments(const TensorView& x, int channel_axis, Statistic statistic, double scale, const Labels& labels,
                   const MomentState& state, int threads) {
  const SampleOrder sorted = order_by_class(labels, state.classes);
  const Planes<double> pooled = scratch_planes(1, labels.samples, state.channels);
  Statistics only;
  only.count = 1;
  only.list[0] = statistic;
  DISCEDIT_LEVEL::pool(x, channel_axis, only, pooled, threads);
  if (scale != 0) exponentials(read_only(pooled), scale, labels.samples, state.channels, pooled, threads);
  fold_batch(read_only(pooled), sorted, state, threads);
}

void class_vector_moments(const TensorView& x, int channel_axis, const Statistics& statistics, const Labels& labels,
                          const VectorState& state, int threads) {
  const SampleOrder sorted = order_by_class(labels, state.classes);
  const Planes<double> pooled = scratch_planes(state.dimension, labels.samples, state.channels);
  DISCEDIT_LEVEL::pool(x, channel_axis, statistics, pooled, threads);
  fold_vector_of_any(read_only(pooled), sorted, state, threads);
}

}  // namespace discedit::DISCEDIT_LEVEL
