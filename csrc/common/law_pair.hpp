// What a bound is computed from: the difference of two laws' means, how far it can be trusted, and their covariances.
#pragma once

#include "cholesky.hpp"

namespace discedit {

constexpr double epsilon = 2.220446049250313e-16;  // of float64

// Relative rounding that a mean, a covariance entry, or a term of a merged moment sum must be taken to carry.
constexpr double rounding_of_moments = 16 * epsilon;

// `Size` is the capacity; a dimension d <= Size is in use.
template <typename Real, int Size>
struct LawPair {
  Real delta[Size];           // mean1 - mean2
  Real noise[Size];           // absolute uncertainty of delta
  Real cov1[lower(Size, 0)];  // lower triangles
  Real cov2[lower(Size, 0)];
};

}  // namespace discedit
