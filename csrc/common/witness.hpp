// Mean and covariance of a witness phi(t) under two laws of t, from the merged central moments of t.
#pragma once

#include <cmath>
#include <limits>

#include "host_device.hpp"
#include "moments.hpp"
#include "rounding.hpp"

namespace discedit {

// All that `fisher` and `minimax` need. `noise` is the absolute uncertainty of `delta`.
template <int D>
struct WitnessPair {
  double delta[D];
  double noise[D];
  double cov1[D][D];
  double cov2[D][D];
};

namespace detail {

struct Standardised {         // moments of z = (t - shift) / scale under one law
  double shift;               // E z
  double var, third, fourth;  // central
  double noise;               // rounding of E z
};

DISCEDIT_HD inline Standardised standardise(const Moments& law, double shift, double scale) {
  Standardised z;
  z.shift = shift / scale;
  // One division per power: scale^4 alone may underflow when the quotient does not.
  z.var = law.m2 / law.n / scale / scale;
  z.third = law.m3 / law.n / scale / scale / scale;
  z.fourth = law.m4 / law.n / scale / scale / scale / scale;
  z.noise = rounding_of_moments * (std::fabs(law.mean) / scale);
  return z;
}

// E z^4 >= (E z^2)^2 for every law. Where the sums say otherwise, or are not finite, t^4 left the range of float64.
DISCEDIT_HD inline bool fourth_is_sound(const Standardised& z) {
  return z.fourth >= z.var * z.var * (1 - 1e-9) && z.fourth < std::numeric_limits<double>::infinity() &&
         std::fabs(z.third) < std::numeric_limits<double>::infinity();
}

// Covariance of (z, z^2) with z = d + y, y centred.
DISCEDIT_HD inline void quadratic_covariance(const Standardised& z, double (&cov)[2][2]) {
  const double d = z.shift;
  const double gross = z.fourth + z.var * z.var + 4 * std::fabs(d * z.third) + 4 * d * d * z.var;
  const double square = z.fourth - z.var * z.var + 4 * d * z.third + 4 * d * d * z.var;
  cov[0][0] = z.var;
  cov[0][1] = cov[1][0] = z.third + 2 * d * z.var;
  cov[1][1] = (square > 0 ? square : 0) + rounding_of_moments * gross;
}

// Common shift (the midpoint of the means) and scale of two laws; scale 0 when both are constant and equal.
DISCEDIT_HD inline double common_scale(const Moments& one, const Moments& two) {
  const double gap = two.mean - one.mean;
  return std::sqrt(one.m2 / one.n + two.m2 / two.n + gap * gap);
}

}  // namespace detail

// Both return false where the two laws are constant and equal: every bound on them is 0.
// The span of (1, t, t^2) does not depend on shift and scale of t, so standardising changes nothing but the condition.
DISCEDIT_HD inline bool linear_witness(const Moments& one, const Moments& two, WitnessPair<1>& out) {
  const double scale = detail::common_scale(one, two);
  if (scale == 0) return false;
  const double half_gap = (two.mean - one.mean) / 2;
  const detail::Standardised z1 = detail::standardise(one, -half_gap, scale);
  const detail::Standardised z2 = detail::standardise(two, half_gap, scale);
  out.delta[0] = z1.shift - z2.shift;
  out.noise[0] = z1.noise + z2.noise;
  out.cov1[0][0] = z1.var;
  out.cov2[0][0] = z2.var;
  return true;
}

DISCEDIT_HD inline bool quadratic_witness(const Moments& one, const Moments& two, WitnessPair<2>& out) {
  const double scale = detail::common_scale(one, two);
  if (scale == 0) return false;
  const double half_gap = (two.mean - one.mean) / 2;
  const detail::Standardised z1 = detail::standardise(one, -half_gap, scale);
  const detail::Standardised z2 = detail::standardise(two, half_gap, scale);
  out.delta[0] = z1.shift - z2.shift;
  if (!detail::fourth_is_sound(z1) || !detail::fourth_is_sound(z2)) {
    // t alone is still sound: z^2 drops out as a coordinate without variance and without difference.
    out.delta[1] = out.noise[1] = 0;
    out.noise[0] = z1.noise + z2.noise;
    out.cov1[0][0] = z1.var;
    out.cov2[0][0] = z2.var;
    out.cov1[0][1] = out.cov1[1][0] = out.cov1[1][1] = 0;
    out.cov2[0][1] = out.cov2[1][0] = out.cov2[1][1] = 0;
    return true;
  }
  out.delta[1] = z1.var - z2.var;  // the squared shifts are equal by choice of the midpoint
  out.noise[0] = z1.noise + z2.noise;
  out.noise[1] = rounding_of_moments * (z1.var + z2.var);
  detail::quadratic_covariance(z1, out.cov1);
  detail::quadratic_covariance(z2, out.cov2);
  return true;
}

}  // namespace discedit
