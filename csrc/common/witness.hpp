// Mean and covariance of a witness phi(t) under two laws of t, from the merged central moments of t.
#pragma once

#include <cmath>
#include <limits>

#include "host_device.hpp"
#include "law_pair.hpp"
#include "moments.hpp"

namespace discedit {

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

// Both laws in units of a common shift (the midpoint of the means) and scale; false when both are constant and equal.
DISCEDIT_HD inline bool standardise_both(const Moments& one, const Moments& two, Standardised& z1, Standardised& z2) {
  const double gap = two.mean - one.mean;
  const double scale = std::sqrt(one.m2 / one.n + two.m2 / two.n + gap * gap);
  if (scale == 0) return false;
  z1 = standardise(one, -gap / 2, scale);
  z2 = standardise(two, gap / 2, scale);
  return true;
}

// The coordinate z, which every witness has.
template <int Size>
DISCEDIT_HD inline void fill_linear(const Standardised& z1, const Standardised& z2, LawPair<Size>& out) {
  out.delta[0] = z1.shift - z2.shift;
  out.noise[0] = z1.noise + z2.noise;
  out.cov1[0][0] = z1.var;
  out.cov2[0][0] = z2.var;
}

}  // namespace detail

// Both return false where the two laws are constant and equal: every bound on them is 0.
// The span of (1, t, t^2) does not depend on shift and scale of t, so standardising changes nothing but the condition.
DISCEDIT_HD inline bool linear_witness(const Moments& one, const Moments& two, LawPair<1>& out) {
  detail::Standardised z1, z2;
  if (!detail::standardise_both(one, two, z1, z2)) return false;
  detail::fill_linear(z1, z2, out);
  return true;
}

DISCEDIT_HD inline bool quadratic_witness(const Moments& one, const Moments& two, LawPair<2>& out) {
  detail::Standardised z1, z2;
  if (!detail::standardise_both(one, two, z1, z2)) return false;
  out = LawPair<2>{};
  detail::fill_linear(z1, z2, out);
  // Where t^4 is not sound, t alone still is: z^2 drops out, as a coordinate without variance and without difference.
  if (!detail::fourth_is_sound(z1) || !detail::fourth_is_sound(z2)) return true;
  out.delta[1] = z1.var - z2.var;  // the squared shifts are equal by choice of the midpoint
  out.noise[1] = rounding_of_moments * (z1.var + z2.var);
  detail::quadratic_covariance(z1, out.cov1);
  detail::quadratic_covariance(z2, out.cov2);
  return true;
}

}  // namespace discedit
