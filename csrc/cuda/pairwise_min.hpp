#pragma once

#include "one_vs_rest.hpp"

namespace discedit::cuda {

// Number of float64 that `scratch` must hold.
std::int64_t pairwise_min_scratch(std::int64_t classes, std::int64_t channels);

// Smallest bound over all pairs of classes with samples: values[channel], and the first pair that attains it:
// pairs[2 * channel] < pairs[2 * channel + 1]. NaN and -1, -1 where fewer than two classes have samples, or where a
// class's moments are not finite.
void pairwise_min(const MomentState& state, Bound bound, Witness witness, double* values, std::int64_t* pairs,
                  double* scratch, Stream stream);
void pairwise_min_vector(const VectorState& state, Bound bound, double* values, std::int64_t* pairs, double* scratch,
                         Stream stream);

}  // namespace discedit::cuda
