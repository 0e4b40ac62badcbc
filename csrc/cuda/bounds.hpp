#pragma once

#include <cstdint>

#include "../common/bounds.hpp"
#include "stream.hpp"

namespace discedit::cuda {

// `pairs` bounds from contiguous means (pairs, d) and covariances (pairs, d, d).
void batched_bound(Bound bound, std::int64_t pairs, int d, const double* mean1, const double* cov1, const double* mean2,
                   const double* cov2, double* out, Stream stream);

}  // namespace discedit::cuda
