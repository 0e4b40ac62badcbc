// Exact merge of two states, class by class: one channel per lane, (class, channel tile) split over threads.
#include "merge_moments.hpp"

#include <algorithm>

#include "dispatch.hpp"
#include "law.hpp"
#include "parallel.hpp"

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
    const auto load = [&](const VectorState& state) { return load_law<Size>(state, d, cls, channel, width); };
    store_law(merge(load(into), load(from), d), into, d, cls, channel, width);
  });
}

}  // namespace

void merge_moments(const MomentState& into, const MomentState& from, int threads) {
  run(into, from, threads, [&](std::int64_t cls, std::int64_t channel, int width) {
    const auto load = [&](const MomentState& state) { return load_law(state, cls, channel, width); };
    store_law(merge(load(into), load(from)), into, cls, channel, width);
  });
}

void merge_vector_moments(const VectorState& into, const VectorState& from, int threads) {
  if (into.dimension <= 2) return run_vector<2>(into, from, threads);
  if (into.dimension <= 4) return run_vector<4>(into, from, threads);
  return run_vector<max_vector>(into, from, threads);
}

}  // namespace discedit::DISCEDIT_LEVEL
