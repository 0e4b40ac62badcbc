#pragma once

#include "../common/bounds.hpp"
#include "../common/moment_state.hpp"
#include "../common/witness.hpp"

namespace discedit {

// Bound between each class and the union of the others: out[channel * classes + class]. NaN where either has no sample.
using OneVsRest = void(const MomentState& state, Bound bound, Witness witness, double* out, int threads);
using OneVsRestVector = void(const VectorState& state, Bound bound, double* out, int threads);

}  // namespace discedit
