// Mean and covariance of a witness phi(t) under two laws of t, from the merged central moments of t.
#pragma once

#include "law_pair.hpp"
#include "moments.hpp"

namespace discedit {

enum class Witness { linear, quadratic };  // of a scalar statistic

namespace detail {

template <typename Real>
struct Standardised {       // moments of z = (t - shift) / scale under one law
  Real shift;               // E z
  Real var, third, fourth;  // central
  Real noise;               // rounding of E z
};

// One power of 1 / scale at a time: scale^4 alone may leave the range when the quotient does not.
template <typename Real>
DISCEDIT_HD_INLINE Standardised<Real> standardise(const MomentsOf<Real>& law, Real shift, Real inverse_scale) {
  const Real share = 1.0 / law.n;
  Standardised<Real> z;
  z.shift = shift * inverse_scale;
  z.var = law.m2 * share * inverse_scale * inverse_scale;
  z.third = law.m3 * share * inverse_scale * inverse_scale * inverse_scale;
  z.fourth = law.m4 * share * inverse_scale * inverse_scale * inverse_scale * inverse_scale;
  z.noise = rounding_of_moments * (absolute(law.mean) * inverse_scale);
  return z;
}

// E z^4 >= (E z^2)^2 for every law. Where the sums say otherwise, or are not finite, t^4 left the range of float64.
template <typename Real>
DISCEDIT_HD_INLINE MaskOf<Real> fourth_is_sound(const Standardised<Real>& z) {
  return (z.fourth >= z.var * z.var * (1 - 1e-9)) & (z.fourth < infinity) & (absolute(z.third) < infinity);
}

// What the variance of z^2 is summed from, and the sum of its terms' sizes; z = d + y, y centred.
template <typename Real>
DISCEDIT_HD_INLINE Real variance_of_square(const Standardised<Real>& z, Real& gross) {
  const Real square = z.var * z.var, cross = 4 * (z.shift * z.third), drift = 4 * (z.shift * z.shift * z.var);
  gross = z.fourth + square + absolute(cross) + drift;
  return z.fourth - square + cross + drift;
}

// Covariance of (z, z^2); of z alone where z^2 is of no use.
template <typename Real>
DISCEDIT_HD_INLINE void quadratic_covariance(const Standardised<Real>& z, MaskOf<Real> useful,
                                             Real (&cov)[lower(2, 0)]) {
  Real gross;
  const Real square = variance_of_square(z, gross);
  cov[0] = z.var;
  cov[1] = select(useful, z.third + 2 * (z.shift * z.var), Real(0));
  cov[2] = select(useful, larger(square, Real(0)) + rounding_of_moments * gross, Real(0));
}

// Both laws in units of a common shift (the midpoint of the means) and scale. Where both are constant and equal, all of
// it is 0, and so will be the bound.
template <typename Real>
DISCEDIT_HD_INLINE void standardise_both(const MomentsOf<Real>& one, const MomentsOf<Real>& two, Standardised<Real>& z1,
                                         Standardised<Real>& z2) {
  constexpr double least = std::numeric_limits<double>::min();  // below, 1 / scale may be infinite
  const Real gap = two.mean - one.mean;
  const Real scale = larger(absolute(gap), square_root(one.m2 / one.n + two.m2 / two.n));
  const Real inverse_scale = select(scale < least, Real(0), 1.0 / scale);
  z1 = standardise(one, gap * -0.5, inverse_scale);
  z2 = standardise(two, gap * 0.5, inverse_scale);
}

// The coordinate z, which every witness has.
template <typename Real, int Size>
DISCEDIT_HD_INLINE void fill_linear(const Standardised<Real>& z1, const Standardised<Real>& z2,
                                    LawPair<Real, Size>& out) {
  out.delta[0] = z1.shift - z2.shift;
  out.noise[0] = z1.noise + z2.noise;
  out.cov1[0] = z1.var;
  out.cov2[0] = z2.var;
}

}  // namespace detail

// All want samples in both laws. The span of (1, t, t^2) does not depend on shift and scale of t, so standardising
// changes nothing but the condition.
template <typename Real>
DISCEDIT_HD_INLINE LawPair<Real, 1> linear_witness(const MomentsOf<Real>& one, const MomentsOf<Real>& two) {
  detail::Standardised<Real> z1, z2;
  detail::standardise_both(one, two, z1, z2);
  LawPair<Real, 1> out;
  detail::fill_linear(z1, z2, out);
  return out;
}

template <typename Real>
DISCEDIT_HD_INLINE LawPair<Real, 2> quadratic_witness(const MomentsOf<Real>& one, const MomentsOf<Real>& two) {
  detail::Standardised<Real> z1, z2;
  detail::standardise_both(one, two, z1, z2);
  LawPair<Real, 2> out;
  detail::fill_linear(z1, z2, out);
  // Where t^4 is not sound, t alone still is: z^2 drops out, as a coordinate without variance and without difference.
  const MaskOf<Real> sound = detail::fourth_is_sound(z1) & detail::fourth_is_sound(z2);
  // The squared shifts are equal by choice of the midpoint.
  out.delta[1] = select(sound, z1.var - z2.var, Real(0));
  out.noise[1] = select(sound, rounding_of_moments * (z1.var + z2.var), Real(0));
  detail::quadratic_covariance(z1, sound, out.cov1);
  detail::quadratic_covariance(z2, sound, out.cov2);
  return out;
}

// Several statistics at once: phi(t) = t, a vector.
template <typename Real, int Size>
DISCEDIT_HD_INLINE LawPair<Real, Size> vector_witness(const VectorMomentsOf<Real, Size>& one,
                                                      const VectorMomentsOf<Real, Size>& two, int d) {
  LawPair<Real, Size> out;
  const Real share1 = 1.0 / one.n, share2 = 1.0 / two.n;
  for (int i = 0; i < d; ++i) {
    out.delta[i] = one.mean[i] - two.mean[i];
    out.noise[i] = rounding_of_moments * absolute(one.mean[i]) + rounding_of_moments * absolute(two.mean[i]);
    for (int j = 0; j <= i; ++j) {
      out.cov1[lower(i, j)] = one.scatter[lower(i, j)] * share1;
      out.cov2[lower(i, j)] = two.scatter[lower(i, j)] * share2;
    }
  }
  return out;
}

}  // namespace discedit
