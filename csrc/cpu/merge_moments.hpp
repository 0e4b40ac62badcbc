#pragma once

#include "../common/moment_state.hpp"

namespace discedit {

// Merges `from` into `into`; both have the same classes and channels.
using MergeMoments = void(const MomentState& into, const MomentState& from, int threads);
using MergeVectorMoments = void(const VectorState& into, const VectorState& from, int threads);

}  // namespace discedit
