#pragma once

#include "../common/moment_state.hpp"
#include "stream.hpp"

namespace discedit::cuda {

// Merges the moments of a batch's pooled features, contiguous (statistics, samples, channels), into the state, class by
// class. `scale` != 0: of exp(-scale t) instead of t (scalar states only). `order` names the samples by class, within a
// class as in the batch; without it every class looks through all labels, which is fine for some thousands of samples.
// A sample whose label lies outside [0, classes) is left out: whoever wants an error checks the labels before.
void fold_moments(const double* pooled, double scale, const Labels& labels, const std::int64_t* order,
                  const MomentState& state, Stream stream);
void fold_vector_moments(const double* pooled, const Labels& labels, const std::int64_t* order,
                         const VectorState& state, Stream stream);

}  // namespace discedit::cuda
