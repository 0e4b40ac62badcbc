// Count, mean and central moment sums of one (class, channel), merged exactly.
//
// Formulas: Chan, Golub and LeVeque 1979 (order 2), Pebay 2008 (orders 3 and 4). No power of the raw value is ever
// formed, so a large common offset costs precision in the mean alone.
#pragma once

#include "cholesky.hpp"

namespace discedit {

// Of a scalar t.
template <typename Real>
struct MomentsOf {
  Real n = 0;     // number of samples
  Real mean = 0;  // sum(t) / n
  Real m2 = 0;    // sum((t - mean)^2)
  Real m3 = 0;    // sum((t - mean)^3)
  Real m4 = 0;    // sum((t - mean)^4)
};
using Moments = MomentsOf<double>;

// Of a vector t of d <= Size entries.
template <typename Real, int Size>
struct VectorMomentsOf {
  Real n = 0;
  Real mean[Size] = {};
  Real scatter[lower(Size, 0)] = {};  // sum((t - mean) (t - mean)'), lower triangle
};

template <typename Real>
DISCEDIT_HD_INLINE MomentsOf<Real> merge(const MomentsOf<Real>& a, const MomentsOf<Real>& b) {
  const Real n = a.n + b.n;
  const Real delta = b.mean - a.mean;
  const Real delta2 = delta * delta;
  const Real wa = a.n / n;
  const Real wb = b.n / n;
  const Real pair = a.n * wb;  // na nb / n
  const Real mean = a.mean + delta * wb;
  const Real m2 = a.m2 + b.m2 + delta2 * pair;
  const Real m3 = a.m3 + b.m3 + delta * (delta2 * pair * (wa - wb) + 3 * (wa * b.m2 - wb * a.m2));
  const Real m4 =
      a.m4 + b.m4 +
      delta * (delta * (delta2 * pair * (wa * wa - wa * wb + wb * wb) + 6 * (wa * wa * b.m2 + wb * wb * a.m2)) +
               4 * (wa * b.m3 - wb * a.m3));
  // Copying the other side keeps its bits: an empty state is a true neutral element.
  const MaskOf<Real> only_a = b.n == 0.0, only_b = a.n == 0.0;
  const auto keep = [&](Real one, Real two, Real both) { return select(only_a, one, select(only_b, two, both)); };
  return {n, keep(a.mean, b.mean, mean), keep(a.m2, b.m2, m2), keep(a.m3, b.m3, m3), keep(a.m4, b.m4, m4)};
}

template <typename Real, int Size>
DISCEDIT_HD_INLINE VectorMomentsOf<Real, Size> merge(const VectorMomentsOf<Real, Size>& a,
                                                     const VectorMomentsOf<Real, Size>& b, int d) {
  VectorMomentsOf<Real, Size> out;
  out.n = a.n + b.n;
  const Real wb = b.n / out.n;
  const Real pair = a.n * wb;
  const MaskOf<Real> only_a = b.n == 0.0, only_b = a.n == 0.0;
  const auto keep = [&](Real one, Real two, Real both) { return select(only_a, one, select(only_b, two, both)); };
  for (int i = 0; i < d; ++i) {
    const Real delta = b.mean[i] - a.mean[i];
    out.mean[i] = keep(a.mean[i], b.mean[i], a.mean[i] + delta * wb);
    for (int j = 0; j <= i; ++j) {
      const int at = lower(i, j);
      const Real both = a.scatter[at] + b.scatter[at] + delta * (b.mean[j] - a.mean[j]) * pair;
      out.scatter[at] = keep(a.scatter[at], b.scatter[at], both);
    }
  }
  return out;
}

}  // namespace discedit
