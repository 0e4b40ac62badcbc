// Per-class moments of a pooled feature map. Two phases: pool.cpp reads the map once into a samples x channels scratch;
// then one worker per channel tile folds each class's samples, in their order in the batch, into the state.
#include "class_moments.hpp"

#include <algorithm>
#include <cmath>

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
};

// Both passes over a class's samples go over a copy in L1: strides of a power of two would throw each other out.
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
        double* to = values + (k * from.count + i) * stride;
        std::int64_t c = 0;
        for (; c + pack_lanes <= width; c += pack_lanes) Pack::load(row + c).store(to + c);
        for (; c < width; ++c) to[c] = row[c];
      }
    return {values, nullptr, from.count, stride, from.count * stride};
  }
};

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

// Calls body(members, width, target) for each class of the batch and each stretch of `width` <= tile channels, on
// several threads, and adds the counts.
template <typename State, typename Body>
void over_classes(const double* pooled, int statistics, const SampleOrder& sorted, const State& state, int threads,
                  const Body& body) {
  const std::int64_t channels = state.channels;
  const auto samples = static_cast<std::int64_t>(sorted.order.size());
  const std::int64_t work = std::max<std::int64_t>(1, samples * statistics * tile);
  parallel_for((channels + tile - 1) / tile, chunk_values / work, threads, [&](std::int64_t begin, std::int64_t end) {
    Near near;
    for (const auto& group : sorted.groups) {
      const std::int64_t count = group.end - group.begin, fits = Near::width(count, statistics);
      const std::int64_t step = fits ? fits : tile, last = std::min(end * tile, channels);
      for (std::int64_t first = begin * tile; first < last; first += step) {
        const std::int64_t width = std::min(step, last - first);
        const Members far{pooled + first, sorted.order.data() + group.begin, count, channels, samples * channels};
        body(fits && count > 1 ? near.copy(far, width, statistics) : far, static_cast<int>(width),
             Target{group.cls, first, state.count[group.cls] > 0});
      }
    }
  });
  for (const auto& group : sorted.groups) state.count[group.cls] += group.end - group.begin;
}

void fold_batch(const double* pooled, const SampleOrder& sorted, const MomentState& state, int threads) {
  over_classes(pooled, 1, sorted, state, threads, [&](const Members& members, int width, const Target& target) {
    constexpr int step = together * pack_lanes;
    for (int c = 0; c < width; c += step) {
      const Members here = members.from_channel(c);
      const Target there{target.cls, target.channel + c, target.seen};
      if (width - c >= step) fold(Channels<together, true>{step}, here, state, there);
      else fold(Channels<together, false>{width - c}, here, state, there);
    }
  });
}

template <int D>
void fold_vector_batch(const double* pooled, const SampleOrder& sorted, const VectorState& state, int threads) {
  over_classes(pooled, D, sorted, state, threads, [&](const Members& members, int width, const Target& target) {
    for (int c = 0; c < width; c += pack_lanes) {
      const Members here = members.from_channel(c);
      const Target there{target.cls, target.channel + c, target.seen};
      if (width - c >= pack_lanes) fold_vector<D>(Channels<1, true>{pack_lanes}, here, state, there);
      else fold_vector<D>(Channels<1, false>{width - c}, here, state, there);
    }
  });
}

void fold_vector_of_any(const double* pooled, const SampleOrder& sorted, const VectorState& state, int threads) {
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

void exponentials(const double* from, double scale, std::int64_t size, double* to, int threads) {
  parallel_for((size + 7) / 8, chunk_values / 8, threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t last = std::min(end * 8, size);
    std::int64_t i = begin * 8;
    for (; i + pack_lanes <= last; i += pack_lanes) exponential(Pack::load(from + i) * Pack(-scale)).store(to + i);
    for (; i < last; ++i) {
      double lanes[pack_lanes] = {from[i]};
      exponential(Pack::load(lanes) * Pack(-scale)).store(lanes);
      to[i] = lanes[0];
    }
  });
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void fold_moments(const double* pooled, double scale, const Labels& labels, const MomentState& state, int threads) {
  const SampleOrder sorted = order_by_class(labels, state.classes);
  if (scale != 0) {
    const std::int64_t size = labels.samples * state.channels;
    double* transformed = scratch(0, static_cast<std::size_t>(size));
    exponentials(pooled, scale, size, transformed, threads);
    pooled = transformed;
  }
  fold_batch(pooled, sorted, state, threads);
}

void fold_vector_moments(const double* pooled, const Labels& labels, const VectorState& state, int threads) {
  fold_vector_of_any(pooled, order_by_class(labels, state.classes), state, threads);
}

void class_moments(const TensorView& x, int channel_axis, Statistic statistic, double scale, const Labels& labels,
                   const MomentState& state, int threads) {
  const SampleOrder sorted = order_by_class(labels, state.classes);
  const std::int64_t size = labels.samples * state.channels;
  double* pooled = scratch(0, static_cast<std::size_t>(size));
  Statistics only;
  only.count = 1;
  only.list[0] = statistic;
  DISCEDIT_LEVEL::pool(x, channel_axis, only, pooled, threads);
  if (scale != 0) exponentials(pooled, scale, size, pooled, threads);
  fold_batch(pooled, sorted, state, threads);
}

void class_vector_moments(const TensorView& x, int channel_axis, const Statistics& statistics, const Labels& labels,
                          const VectorState& state, int threads) {
  const SampleOrder sorted = order_by_class(labels, state.classes);
  double* pooled = scratch(0, static_cast<std::size_t>(labels.samples * state.channels * state.dimension));
  DISCEDIT_LEVEL::pool(x, channel_axis, statistics, pooled, threads);
  fold_vector_of_any(pooled, sorted, state, threads);
}

}  // namespace discedit::DISCEDIT_LEVEL
