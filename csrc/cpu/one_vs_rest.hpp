#pragma once

#include "../common/bounds.hpp"
#include "class_moments.hpp"

namespace discedit {

enum class Witness { linear, quadratic };

// Bound between each class and the union of the others: out[channel * classes + class]. NaN where either has no sample.
void one_vs_rest(const MomentState& state, Bound bound, Witness witness, double* out, int threads);

}  // namespace discedit
