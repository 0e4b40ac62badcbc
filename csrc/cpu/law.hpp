// Moments of one class and neighbouring channels, one channel per lane: from a state into registers and back. `width`
// channels exist, the lanes beyond them are zeros.
#pragma once

#include "../common/moment_state.hpp"
#include "../common/moments.hpp"
#include "simd.hpp"

namespace discedit::DISCEDIT_LEVEL {

DISCEDIT_INLINE MomentsOf<Pack> load_law(const MomentState& state, std::int64_t cls, std::int64_t channel, int width) {
  const std::int64_t at = cls * state.channels + channel;
  return {static_cast<double>(state.count[cls]), load_some(state.mean + at, width), load_some(state.m2 + at, width),
          load_some(state.m3 + at, width), load_some(state.m4 + at, width)};
}

DISCEDIT_INLINE void store_law(const MomentsOf<Pack>& law, const MomentState& state, std::int64_t cls,
                               std::int64_t channel, int width) {
  const std::int64_t at = cls * state.channels + channel;
  store_some(law.mean, state.mean + at, width);
  store_some(law.m2, state.m2 + at, width);
  store_some(law.m3, state.m3 + at, width);
  store_some(law.m4, state.m4 + at, width);
}

// `d` is the state's dimension, as a constant where the caller has one.
template <int Size>
DISCEDIT_INLINE VectorMomentsOf<Pack, Size> load_law(const VectorState& state, int d, std::int64_t cls,
                                                     std::int64_t channel, int width) {
  const std::int64_t plane = state.classes * state.channels, at = cls * state.channels + channel;
  VectorMomentsOf<Pack, Size> law;
  law.n = static_cast<double>(state.count[cls]);
  for (int i = 0; i < d; ++i) law.mean[i] = load_some(state.mean + i * plane + at, width);
  for (int i = 0; i < lower(d, 0); ++i) law.scatter[i] = load_some(state.scatter + i * plane + at, width);
  return law;
}

template <int Size>
DISCEDIT_INLINE void store_law(const VectorMomentsOf<Pack, Size>& law, const VectorState& state, int d,
                               std::int64_t cls, std::int64_t channel, int width) {
  const std::int64_t plane = state.classes * state.channels, at = cls * state.channels + channel;
  for (int i = 0; i < d; ++i) store_some(law.mean[i], state.mean + i * plane + at, width);
  for (int i = 0; i < lower(d, 0); ++i) store_some(law.scatter[i], state.scatter + i * plane + at, width);
}

}  // namespace discedit::DISCEDIT_LEVEL
