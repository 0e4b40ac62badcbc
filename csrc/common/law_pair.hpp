// What a bound is computed from: the difference of two laws' means, how far it can be trusted, and their covariances.
#pragma once

namespace discedit {

constexpr double epsilon = 2.220446049250313e-16;  // of float64

// Relative rounding that a mean, a covariance entry, or a term of a merged moment sum must be taken to carry.
constexpr double rounding_of_moments = 16 * epsilon;

// `Size` is the capacity and row stride; a dimension d <= Size is in use.
template <int Size>
struct LawPair {
  double delta[Size];  // mean1 - mean2
  double noise[Size];  // absolute uncertainty of delta
  double cov1[Size][Size];
  double cov2[Size][Size];
};

}  // namespace discedit
