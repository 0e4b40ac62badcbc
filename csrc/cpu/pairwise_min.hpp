#pragma once

#include "one_vs_rest.hpp"

namespace discedit {

// Smallest bound over all pairs of classes with samples: values[channel], and a pair that attains it:
// pairs[2 * channel] < pairs[2 * channel + 1]. NaN and -1, -1 where fewer than two classes have samples, or where a
// class's moments are not finite.
using PairwiseMin = void(const MomentState& state, Bound bound, Witness witness, double* values, std::int64_t* pairs,
                         int threads);
using PairwiseMinVector = void(const VectorState& state, Bound bound, double* values, std::int64_t* pairs, int threads);

}  // namespace discedit
