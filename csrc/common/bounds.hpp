// Lower bounds on the total variation of two laws from mean difference and covariances. Host and device, one copy.
//
//   fisher   F / (2 + F),      F = delta' (S1 + S2)^-1 delta
//   minimax  k^2 / (1 + k^2),  k = max_u u'delta / (sqrt(u'S1 u) + sqrt(u'S2 u))
//
// Every direction u gives a valid bound, so a solver only has to find a good u; the bound is then *evaluated* at that u
// with rounding charged against it: that of each sum here, and that of the moments given (`noise` for the means, a few
// ulps of each term for the covariances). Ill-conditioned and singular covariances therefore cost tightness of the
// order of rounding, never validity, and need no rank decision.
#pragma once

#include <cmath>
#include <limits>

#include "cholesky.hpp"
#include "host_device.hpp"
#include "law_pair.hpp"

namespace discedit {

enum class Bound { fisher, minimax };

namespace detail {

enum class Scaling { ordinary, separated, undefined };

// Brings a pair to units in which cov1 + cov2 has unit diagonal. `separated`: some coordinate alone has F > 1e18, where
// every bound rounds to 1. `undefined`: a non-finite input. A coordinate without variance whose difference is within
// the noise drops out.
template <int Size>
DISCEDIT_HD inline Scaling scale_pair(LawPair<Size>& pair, int d) {
  double inverse[Size];
  Scaling result = Scaling::ordinary;
  for (int i = 0; i < d; ++i) {
    const double total = pair.cov1[i][i] + pair.cov2[i][i];
    const double deviation = std::sqrt(total > 0 ? total : 0);
    if (!(std::fabs(pair.delta[i]) < std::numeric_limits<double>::infinity()) ||
        !(std::fabs(total) < std::numeric_limits<double>::infinity()))
      return Scaling::undefined;
    if (std::fabs(pair.delta[i]) - pair.noise[i] > 1e9 * deviation) result = Scaling::separated;
    inverse[i] = deviation > 0 ? 1 / deviation : 0;
  }
  if (result == Scaling::separated) return result;
  for (int i = 0; i < d; ++i) {
    pair.delta[i] *= inverse[i];
    pair.noise[i] *= inverse[i];
    for (int j = 0; j < d; ++j) {
      pair.cov1[i][j] = pair.cov1[i][j] * inverse[i] * inverse[j];
      pair.cov2[i][j] = pair.cov2[i][j] * inverse[i] * inverse[j];
      if (!(std::fabs(pair.cov1[i][j] + pair.cov2[i][j]) < std::numeric_limits<double>::infinity()))
        return Scaling::undefined;
    }
  }
  return Scaling::ordinary;
}

template <int Size>
DISCEDIT_HD inline double projected_gap(const double (&u)[Size], const LawPair<Size>& pair, int d) {
  double value = 0, rounding = 0;
  for (int i = 0; i < d; ++i) {
    const double term = u[i] * pair.delta[i];
    value += term;
    rounding += (d + 1) * epsilon * std::fabs(term) + std::fabs(u[i]) * pair.noise[i];
  }
  const double safe = std::fabs(value) - rounding;
  return safe > 0 ? safe : 0;
}

template <int Size>
DISCEDIT_HD inline double projected_variance(const double (&u)[Size], const double (&cov)[Size][Size], int d) {
  double value = 0, gross = 0;
  for (int i = 0; i < d; ++i)
    for (int j = 0; j < d; ++j) {
      const double term = u[i] * cov[i][j] * u[j];
      value += term;
      gross += std::fabs(term);
    }
  return (value > 0 ? value : 0) + ((2 * d + 2) * epsilon + rounding_of_moments) * gross;
}

// u = ((1 - l) S1 + l S2 + ridge)^-1 delta. The ridge keeps the factorisation alive, and u off coordinates whose
// difference is mostly noise.
template <int Size>
DISCEDIT_HD inline void direction(const LawPair<Size>& pair, int d, double l, double (&u)[Size]) {
  double mixed[Size][Size];
  for (int i = 0; i < d; ++i) {
    u[i] = pair.delta[i];
    for (int j = 0; j <= i; ++j) mixed[i][j] = (1 - l) * pair.cov1[i][j] + l * pair.cov2[i][j];
    mixed[i][i] += pair.noise[i] * pair.noise[i];
  }
  cholesky_solve<Size>(mixed, u, d, 2 * d * epsilon);
  // Direction only: unit largest entry keeps the quadratic forms in range.
  double largest = 0;
  for (int i = 0; i < d; ++i) largest = std::fabs(u[i]) > largest ? std::fabs(u[i]) : largest;
  if (largest > 0)
    for (int i = 0; i < d; ++i) u[i] /= largest;
}

DISCEDIT_HD inline double squared_ratio(double gap, double deviation) {
  if (gap == 0) return 0;
  if (deviation == 0) return std::numeric_limits<double>::infinity();
  const double ratio = gap / deviation;
  return ratio * ratio;
}

// x / (1 + x) without inf / inf.
DISCEDIT_HD inline double saturate(double x) { return x > 1e300 ? 1.0 : x / (1 + x); }

}  // namespace detail

// Both return the bound in [0, 1], or NaN for a non-finite input; d <= Size is the dimension in use.
template <int Size>
DISCEDIT_HD inline double fisher_bound(LawPair<Size> pair, int d) {
  for (int i = 0; i < d; ++i)
    for (int j = 0; j < d; ++j) {
      pair.cov1[i][j] += pair.cov2[i][j];
      pair.cov2[i][j] = 0;
    }
  switch (detail::scale_pair<Size>(pair, d)) {
    case detail::Scaling::undefined: return std::numeric_limits<double>::quiet_NaN();
    case detail::Scaling::separated: return 1;
    case detail::Scaling::ordinary: break;
  }
  double u[Size];
  detail::direction<Size>(pair, d, 0, u);
  const double gap = detail::projected_gap<Size>(u, pair, d);
  const double variance = detail::projected_variance<Size>(u, pair.cov1, d);
  return detail::saturate(detail::squared_ratio(gap, std::sqrt(variance)) / 2);
}

template <int Size>
DISCEDIT_HD inline double minimax_bound(LawPair<Size> pair, int d) {
  switch (detail::scale_pair<Size>(pair, d)) {
    case detail::Scaling::undefined: return std::numeric_limits<double>::quiet_NaN();
    case detail::Scaling::separated: return 1;
    case detail::Scaling::ordinary: break;
  }
  // The optimum lies on u(l), 0 <= l <= 1 (Anderson and Bahadur 1962), where (1 - l) s1 = l s2. The sign of
  // s1 / (s1 + s2) - l is monotone along the curve: bracketed root find, secant steps, bisection where they leave.
  double u[Size];
  double best = 0;
  double low = 0, high = 1, l = 0.5;
  double last_l = 0, last_excess = 0;
  for (int step = 0; step < 60; ++step) {
    detail::direction<Size>(pair, d, l, u);
    const double gap = detail::projected_gap<Size>(u, pair, d);
    const double s1 = std::sqrt(detail::projected_variance<Size>(u, pair.cov1, d));
    const double s2 = std::sqrt(detail::projected_variance<Size>(u, pair.cov2, d));
    const double ratio = detail::squared_ratio(gap, s1 + s2);
    best = ratio > best ? ratio : best;
    if (d == 1 || gap == 0 || s1 + s2 == 0) break;  // one direction only, or nothing left to gain
    const double target = s1 / (s1 + s2);           // the fixed-point step (reweighted least squares): always improves
    const double excess = target - l;
    if (excess > 0) low = l;
    else high = l;
    // k is stationary at the root: an error of 1e-9 in l is one of 1e-18 in k, relative to its curvature.
    if (std::fabs(excess) < 1e-10 || high - low < 1e-12) break;
    double next = target;
    if (step > 0 && excess != last_excess) next = l - excess * (l - last_l) / (excess - last_excess);
    if (!(next > low && next < high)) next = target;
    if (!(next > low && next < high) || step % 8 == 7) next = (low + high) / 2;
    last_l = l;
    last_excess = excess;
    l = next;
  }
  return detail::saturate(best);
}

template <int Size>
DISCEDIT_HD inline double bound_of(Bound bound, const LawPair<Size>& pair, int d) {
  if (bound == Bound::fisher) return fisher_bound<Size>(pair, d);
  // (s1 + s2)^2 <= 2 (s1^2 + s2^2) at any u, so minimax contains fisher; the maximum keeps that true to the last bit.
  const double minimax = minimax_bound<Size>(pair, d);
  const double fisher = fisher_bound<Size>(pair, d);
  return fisher > minimax ? fisher : minimax;
}

}  // namespace discedit
