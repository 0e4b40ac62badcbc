#pragma once

#include "../common/bounds.hpp"
#include "../common/moment_state.hpp"
#include "../common/witness.hpp"
#include "stream.hpp"

namespace discedit::cuda {

// Number of float64 that `scratch` must hold, for a state of this dimension (0: scalar).
std::int64_t one_vs_rest_scratch(int dimension, std::int64_t classes, std::int64_t channels);

// Bound between each class and the union of the others: out[channel * classes + class]. NaN where either has no sample.
void one_vs_rest(const MomentState& state, Bound bound, Witness witness, double* out, double* scratch, Stream stream);
void one_vs_rest_vector(const VectorState& state, Bound bound, double* out, double* scratch, Stream stream);

}  // namespace discedit::cuda
