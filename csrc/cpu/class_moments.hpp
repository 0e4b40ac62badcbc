#pragma once

#include <cstdint>

#include "../common/moment_state.hpp"
#include "../common/tensor_view.hpp"
#include "pool.hpp"

namespace discedit {

// Pools the feature map and merges the batch's per-class moments into the state. `scale` != 0: of exp(-scale t) instead
// of t (scalar states only). A vector state has one dimension per statistic.
using ClassMoments = void(const TensorView& x, int channel_axis, Statistic statistic, double scale,
                          const Labels& labels, const MomentState& state, int threads);
using ClassVectorMoments = void(const TensorView& x, int channel_axis, const Statistics& statistics,
                                const Labels& labels, const VectorState& state, int threads);
// The same from pooled features.
using FoldMoments = void(const Planes<const double>& pooled, double scale, const Labels& labels,
                         const MomentState& state, int threads);
using FoldVectorMoments = void(const Planes<const double>& pooled, const Labels& labels, const VectorState& state,
                               int threads);

}  // namespace discedit
