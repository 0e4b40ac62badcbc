#pragma once

#include <cstdint>

#include "../common/bounds.hpp"

namespace discedit {

// `pairs` bounds from contiguous means (pairs, d) and covariances (pairs, d, d).
using BatchedBound = void(Bound bound, std::int64_t pairs, int d, const double* mean1, const double* cov1,
                          const double* mean2, const double* cov2, double* out, int threads);

}  // namespace discedit
