// Per-class moments of a pooled feature map. Two phases: pool.cpp reads the map once into a samples x channels scratch;
// then one worker per channel tile folds each class's samples, in their order in the batch, into the state.
#include "class_moments.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "pool.hpp"

namespace discedit {
namespace {

constexpr int tile = 64;               // channels folded together: five float64 rows of it stay in L1
constexpr std::int64_t grain = 16384;  // pooled values that pay for a thread

struct SamplesByClass {
  std::vector<std::int64_t> order;  // sample indices, stable within a class
  std::vector<std::int64_t> start;  // classes + 1 offsets into `order`
};

SamplesByClass sort_by_class(const std::int64_t* labels, std::int64_t samples, std::int64_t classes) {
  SamplesByClass sorted;
  sorted.start.assign(static_cast<std::size_t>(classes) + 1, 0);
  for (std::int64_t i = 0; i < samples; ++i) {
    if (labels[i] < 0 || labels[i] >= classes)
      throw std::invalid_argument("class_moments: labels must lie in 0.." + std::to_string(classes - 1) +
                                  " (num_classes=" + std::to_string(classes) + "), found " + std::to_string(labels[i]) +
                                  " at position " + std::to_string(i) + ".");
    ++sorted.start[static_cast<std::size_t>(labels[i]) + 1];
  }
  for (std::size_t cls = 1; cls < sorted.start.size(); ++cls) sorted.start[cls] += sorted.start[cls - 1];
  std::vector<std::int64_t> next(sorted.start.begin(), sorted.start.end() - 1);
  sorted.order.resize(static_cast<std::size_t>(samples));
  for (std::int64_t i = 0; i < samples; ++i)
    sorted.order[static_cast<std::size_t>(next[static_cast<std::size_t>(labels[i])]++)] = i;
  return sorted;
}

// Moments of `count` samples for `width` channels: mean first, then central sums about it.
DISCEDIT_CLONES
void fold(const double* pooled, std::int64_t channels, const std::int64_t* order, std::int64_t count, int width,
          double* mean, double* m2, double* m3, double* m4) {
  const double n = static_cast<double>(count);
  const double* first = pooled + order[0] * channels;
  double residual[tile] = {};
  // Deviations from the first sample: a constant channel gets its exact mean and exact zeros.
  for (std::int64_t i = 1; i < count; ++i) {
    const double* row = pooled + order[i] * channels;
    for (int c = 0; c < width; ++c) residual[c] += row[c] - first[c];
  }
  for (int c = 0; c < width; ++c) {
    mean[c] = first[c] + residual[c] / n;
    residual[c] = m2[c] = m3[c] = m4[c] = 0;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const double* row = pooled + order[i] * channels;
    for (int c = 0; c < width; ++c) {
      const double d = row[c] - mean[c];
      const double d2 = d * d;
      residual[c] += d;
      m2[c] += d2;
      m3[c] += d2 * d;
      m4[c] += d2 * d2;
    }
  }
  // The stored mean is rounded; what that leaves in the deviations is known and taken out to first order.
  for (int c = 0; c < width; ++c) {
    const double r = residual[c] / n;
    m4[c] -= 4 * r * m3[c];
    m3[c] -= 3 * r * m2[c];
    m2[c] = std::max(m2[c] - r * residual[c], 0.0);
  }
}

}  // namespace

void class_moments(const TensorView& x, int channel_axis, const std::int64_t* labels, const MomentState& state,
                   int threads) {
  const std::int64_t samples = x.shape[0], channels = state.channels;
  const SamplesByClass sorted = sort_by_class(labels, samples, state.classes);

  // Features already pooled, in the scratch's own form, need no copy.
  const bool ready = x.axes == 2 && x.dtype == DType::float64 && x.contiguous();
  std::vector<double> scratch;
  const double* pooled = static_cast<const double*>(x.data);
  if (!ready) {
    scratch.resize(static_cast<std::size_t>(samples * channels));
    pool_mean(x, channel_axis, scratch.data(), threads);
    pooled = scratch.data();
  }

  const std::int64_t tiles = (channels + tile - 1) / tile;
  parallel_for(tiles, grain / std::max<std::int64_t>(1, samples * tile) + 1, threads,
               [&](std::int64_t begin, std::int64_t end) {
                 double mean[tile], m2[tile], m3[tile], m4[tile];
                 for (std::int64_t t = begin; t < end; ++t) {
                   const std::int64_t base = t * tile;
                   const int width = static_cast<int>(std::min<std::int64_t>(tile, channels - base));
                   for (std::int64_t cls = 0; cls < state.classes; ++cls) {
                     const std::int64_t from = sorted.start[static_cast<std::size_t>(cls)];
                     const std::int64_t count = sorted.start[static_cast<std::size_t>(cls) + 1] - from;
                     if (count == 0) continue;
                     fold(pooled + base, channels, sorted.order.data() + from, count, width, mean, m2, m3, m4);
                     for (int c = 0; c < width; ++c) {
                       const Moments batch{static_cast<double>(count), mean[c], m2[c], m3[c], m4[c]};
                       state.put(cls, base + c, merge(state.at(cls, base + c), batch));
                     }
                   }
                 }
               });
  for (std::int64_t cls = 0; cls < state.classes; ++cls)
    state.count[cls] += sorted.start[static_cast<std::size_t>(cls) + 1] - sorted.start[static_cast<std::size_t>(cls)];
}

}  // namespace discedit
