#pragma once

#include <cstdint>

#include "../common/bounds.hpp"
#include "stream.hpp"

namespace discedit::cuda {

// Beyond, one thread's problem would take kilobytes of local memory, and the device gigabytes of it.
constexpr int most_dimensions = 8;

// `pairs` bounds from contiguous means (pairs, d) and covariances (pairs, d, d).
void batched_bound(Bound bound, std::int64_t pairs, int d, const double* mean1, const double* cov1, const double* mean2,
                   const double* cov2, double* out, Stream stream);

}  // namespace discedit::cuda
