// Exact merge of two states, class by class: one channel per lane, (class, channel tile) split over threads.
#include "merge_moments.hpp"

#include <algorithm>

#include "../common/moments.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace discedit::DISCEDIT_LEVEL {
namespace {

constexpr int tile = 512;              // channels of one class merged together
constexpr std::int64_t grain = 16384;  // merges that pay for a thread

template <typename State, typename Merge>
void run(const State& into, const State& from, int threads, const Merge& merge_pack) {
  const std::int64_t tiles = (into.channels + tile - 1) / tile;
  parallel_for(into.classes * tiles, grain / tile, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t cls = item / tiles;
      if (from.count[cls] == 0) continue;
      const std::int64_t last = std::min(into.channels, (item % tiles + 1) * tile);
      for (std::int64_t channel = item % tiles * tile; channel < last; channel += pack_lanes)
        merge_pack(cls, channel, static_cast<int>(std::min<std::int64_t>(pack_lanes, last - channel)));
    }
  });
  for (std::int64_t cls = 0; cls < into.classes; ++cls) into.count[cls] += from.count[cls];
}

template <int Size>
void run_vector(const VectorState& into, const VectorState& from, int threads) {
  run(into, from, threads, [&, d = into.dimension](std::int64_t cls, std::int64_t channel, int width) {
    const auto at = [&](int i) { return (i * into.classes + cls) * into.channels + channel; };
    const auto load = [&](const VectorState& state) {
      VectorMomentsOf<Pack, Size> law;
      law.n = static_cast<double>(state.count[cls]);
      for (int i = 0; i < d; ++i) law.mean[i] = load_some(state.mean + at(i), width);
      for (int i = 0; i < lower(d, 0); ++i) law.scatter[i] = load_some(state.scatter + at(i), width);
      return law;
    };
    const VectorMomentsOf<Pack, Size> merged = merge(load(into), load(from), d);
    for (int i = 0; i < d; ++i) store_some(merged.mean[i], into.mean + at(i), width);
    for (int i = 0; i < lower(d, 0); ++i) store_some(merged.scatter[i], into.scatter + at(i), width);
  });
}

}  // namespace

void merge_moments(const MomentState& into, const MomentState& from, int threads) {
  run(into, from, threads, [&](std::int64_t cls, std::int64_t channel, int width) {
    const std::int64_t at = cls * into.channels + channel;
    const auto load = [&](const MomentState& state) -> MomentsOf<Pack> {
      return {static_cast<double>(state.count[cls]), load_some(state.mean + at, width), load_some(state.m2 + at, width),
              load_some(state.m3 + at, width), load_some(state.m4 + at, width)};
    };
    const MomentsOf<Pack> merged = merge(load(into), load(from));
    store_some(merged.mean, into.mean + at, width);
    store_some(merged.m2, into.m2 + at, width);
    store_some(merged.m3, into.m3 + at, width);
    store_some(merged.m4, into.m4 + at, width);
  });
}

void merge_vector_moments(const VectorState& into, const VectorState& from, int threads) {
  if (into.dimension <= 2) return run_vector<2>(into, from, threads);
  if (into.dimension <= 4) return run_vector<4>(into, from, threads);
  return run_vector<max_vector>(into, from, threads);
}

}  // namespace discedit::DISCEDIT_LEVEL
