// The rounding that inputs of the bounds must be taken to carry.
#pragma once

namespace discedit {

constexpr double epsilon = 2.220446049250313e-16;  // of float64

// Relative rounding of a mean, a covariance entry, or a term of a merged moment sum.
constexpr double rounding_of_moments = 16 * epsilon;

}  // namespace discedit
