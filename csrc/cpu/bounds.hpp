#pragma once

#include <cstdint>

#include "../common/family.hpp"

namespace discedit {

// `pairs` bounds from contiguous means (pairs, d) and covariances (pairs, d, d).
using BatchedBound = void(Bound bound, std::int64_t pairs, int d, const double* mean1, const double* cov1,
                          const double* mean2, const double* cov2, double* out, int threads);

// The same for any member but those of a scalar witness. `radius`: of both balls together, one for each pair; may be
// null.
using BatchedMember = void(const Rule& rule, std::int64_t pairs, int d, const double* mean1, const double* cov1,
                           const double* mean2, const double* cov2, const double* radius, double* out, int threads);

// From means and raw second moments of a scalar, one of each for a pair.
using BatchedWitness = void(bool published, std::int64_t pairs, const double* mean1, const double* second1,
                            const double* mean2, const double* second2, double* out, int threads);

}  // namespace discedit
