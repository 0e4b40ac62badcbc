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

#include "law_pair.hpp"

namespace discedit {

enum class Bound { fisher, minimax };
constexpr int max_dimension = 32;

namespace detail {

// A pair in units in which cov1 + cov2 has unit diagonal. A coordinate without variance whose difference is within the
// noise is 0 throughout, and so drops out.
template <typename Real, int Size>
struct ScaledPair {
  Real delta[Size];
  Real charge[Size];  // rounding of one term u_i delta_i, per unit of u_i
  Real ridge[Size];   // what the direction is found with on top of the variances
  Real cov1[lower(Size, 0)];
  Real cov2[lower(Size, 0)];
  MaskOf<Real> finite;     // differences and variances are; other entries show in the variance along a direction
  MaskOf<Real> separated;  // some coordinate alone has F > 1e18, where every bound rounds to 1
};

template <typename Real, int Size>
DISCEDIT_HD_INLINE ScaledPair<Real, Size> scale_pair(const LawPair<Real, Size>& pair, int d) {
  // Noise so far above the spread that no difference that is not `separated` can be told from it.
  constexpr double useless_noise = 1e25;
  ScaledPair<Real, Size> out;
  out.finite = Real(0) < Real(1);
  out.separated = Real(1) < Real(0);
  Real inverse[Size];
  for (int i = 0; i < d; ++i) {
    const Real first = pair.cov1[lower(i, i)], second = pair.cov2[lower(i, i)];
    const Real total = first + second;
    const Real size = absolute(pair.delta[i]), noise = pair.noise[i];
    const Real deviation = square_root(larger(total, Real(0)));
    out.finite = out.finite & (size < infinity) & (total < infinity);
    out.separated = out.separated | (size - noise > 1e9 * deviation);
    inverse[i] = select((deviation > 0.0) & (noise < useless_noise * deviation), 1.0 / deviation, Real(0));
    const Real scaled_noise = select(inverse[i] > 0.0, noise * inverse[i], Real(0));
    out.delta[i] = pair.delta[i] * inverse[i];
    out.charge[i] = (d + 1) * epsilon * absolute(out.delta[i]) + scaled_noise;
    // Keeps the factorisation alive, and the direction off coordinates whose difference is mostly noise.
    out.ridge[i] = 2 * d * epsilon + scaled_noise * scaled_noise;
    // One factor at a time: the product of two may overflow where the scaled entry does not.
    for (int j = 0; j < i; ++j) {
      out.cov1[lower(i, j)] = pair.cov1[lower(i, j)] * inverse[i] * inverse[j];
      out.cov2[lower(i, j)] = pair.cov2[lower(i, j)] * inverse[i] * inverse[j];
    }
    out.cov1[lower(i, i)] = larger(Real(0), first * inverse[i] * inverse[i]);
    out.cov2[lower(i, i)] = larger(Real(0), second * inverse[i] * inverse[i]);
  }
  return out;
}

// u = ((1 - l) S1 + l S2 + ridge)^-1 delta, up to a factor.
template <typename Real, int Size>
DISCEDIT_HD_INLINE void direction(const ScaledPair<Real, Size>& pair, int d, Real l, Real (&u)[Size]) {
  if constexpr (Size == 1) {
    u[0] = 1.0;
  } else {
    Real mixed[lower(Size, 0)];
    for (int i = 0; i < d; ++i) {
      for (int j = 0; j <= i; ++j) {
        const Real from = pair.cov1[lower(i, j)], to = pair.cov2[lower(i, j)];
        mixed[lower(i, j)] = (i == j ? from + pair.ridge[i] : from) + l * (to - from);
      }
      u[i] = pair.delta[i];
    }
    if constexpr (Size == 2) {  // by the adjugate
      u[0] = mixed[2] * pair.delta[0] - mixed[1] * pair.delta[1];
      u[1] = mixed[0] * pair.delta[1] - mixed[1] * pair.delta[0];
    } else {
      cholesky_solve<Real, Size>(mixed, u, d, 2 * d * epsilon);
    }
  }
}

// |u'delta|, less what rounding may have added.
template <typename Real, int Size>
DISCEDIT_HD_INLINE Real projected_gap(const ScaledPair<Real, Size>& pair, int d, const Real (&u)[Size]) {
  Real value = u[0] * pair.delta[0], rounding = absolute(u[0]) * pair.charge[0];
  for (int i = 1; i < d; ++i) {
    value += u[i] * pair.delta[i];
    rounding += absolute(u[i]) * pair.charge[i];
  }
  return larger(absolute(value) - rounding, Real(0));
}

// u'cov u, more what rounding may have taken.
template <typename Real, int Size>
DISCEDIT_HD_INLINE Real projected_variance(const Real (&cov)[lower(Size, 0)], int d, const Real (&u)[Size]) {
  Real value = 0, gross = 0;
  for (int i = 0; i < d; ++i) {
    Real row = 0, gross_row = 0;
    for (int j = 0; j < i; ++j) {
      const Real term = cov[lower(i, j)] * u[j];
      row += term;
      gross_row += absolute(term);
    }
    const Real own = cov[lower(i, i)] * (u[i] * u[i]);
    value += own + 2 * (u[i] * row);
    gross += own + 2 * (absolute(u[i]) * gross_row);
  }
  return larger(value, Real(0)) + ((2 * d + 2) * epsilon + rounding_of_moments) * gross;
}

// The pair along u(l).
template <typename Real>
struct Projection {
  Real gap, var1, var2;
};

template <typename Real, int Size>
DISCEDIT_HD_INLINE Projection<Real> project(const ScaledPair<Real, Size>& pair, int d, Real l) {
  Real u[Size];
  direction(pair, d, l, u);
  return {projected_gap(pair, d, u), projected_variance<Real, Size>(pair.cov1, d, u),
          projected_variance<Real, Size>(pair.cov2, d, u)};
}

// x / (1 + x) of x = gap^2 / variance; 0 where there is no gap.
template <typename Real>
DISCEDIT_HD_INLINE Real saturate(Real gap, Real variance) {
  const Real square = gap * gap;
  return select(square > 0.0, square / (variance + square), Real(0));
}

// Fisher's bound, from its direction: the middle of the curve.
template <typename Real, int Size>
DISCEDIT_HD_INLINE Real fisher_at(const ScaledPair<Real, Size>& pair, int d, const Projection<Real>& middle) {
  Real gap = middle.gap, variance = 2 * (middle.var1 + middle.var2);
  // Each coordinate alone is a direction too. Singular covariances can make it the better one: what `direction` cancels
  // between coordinates is charged in full. So more coordinates never give less than one of them.
  for (int i = 0; i < d && Size > 1; ++i) {
    const Real single = larger(absolute(pair.delta[i]) - pair.charge[i], Real(0));
    const Real total = 2 * (1 + 4 * epsilon + rounding_of_moments) * (pair.cov1[lower(i, i)] + pair.cov2[lower(i, i)]);
    const MaskOf<Real> more = single * single * variance > gap * gap * total;
    gap = select(more, single, gap);
    variance = select(more, total, variance);
  }
  return saturate(gap, variance);
}

// k at a point of the curve, and the fixed-point step from there (reweighted least squares), which always improves.
template <typename Real>
struct Point {
  Real k, target;
};

template <typename Real>
DISCEDIT_HD_INLINE Point<Real> point_of(const Projection<Real>& at) {
  const Real s1 = square_root(at.var1), s2 = square_root(at.var2);
  const Real inverse = 1.0 / (s1 + s2);
  return {select(s1 + s2 > 0.0, at.gap * inverse, Real(0)), s1 * inverse};
}

// The optimum of minimax lies on u(l), 0 <= l <= 1 (Anderson and Bahadur 1962), where (1 - l) s1 = l s2. The sign of
// s1 / (s1 + s2) - l is monotone along the curve, so its root can be bracketed. k is stationary there: an error of e in
// log(l / (1 - l)) is one of the order of e^2 in k.
//
// A lane that has converged stays where it is, so that its result does not depend on its neighbours.

// In two dimensions u(l), the adjugate, is linear in l, so that s1^2 and s2^2 are quadratic: Newton's method on
// log((1 - l)^2 s1^2) - log(l^2 s2^2) in log(l / (1 - l)), with log and exp by their first Pade approximants: one
// division for a step.
template <typename Real>
DISCEDIT_HD_INLINE Real optimum_in_the_plane(const ScaledPair<Real, 2>& pair, Real target) {
  Real from[2], way[2];
  direction(pair, 2, Real(0), from);
  direction(pair, 2, Real(1), way);
  const Real unit = 1.0 / (absolute(from[0]) + absolute(from[1]) + absolute(way[0]) + absolute(way[1]));
  for (int i = 0; i < 2; ++i) {
    from[i] *= unit;
    way[i] = way[i] * unit - from[i];
  }
  struct Quadratic {
    Real c0, c1, c2;
    DISCEDIT_HD_INLINE Real at(Real x) const { return c0 + x * (c1 + x * c2); }
    DISCEDIT_HD_INLINE Real slope(Real x) const { return c1 + (c2 + c2) * x; }
  };
  // With what `projected_variance` will charge, which decides where the covariances are all but singular: there, the
  // sum of the terms' sizes is twice that of the squares.
  constexpr double charged = 1 + 2 * (6 * epsilon + rounding_of_moments);
  const auto variance = [&](const Real(&cov)[lower(2, 0)]) -> Quadratic {
    const Real first = charged * cov[0], second = charged * cov[2];
    const Real along0 = first * from[0] + cov[1] * from[1], along1 = cov[1] * from[0] + second * from[1];
    const Real c2 = way[0] * (first * way[0] + 2 * (cov[1] * way[1])) + second * (way[1] * way[1]);
    return {from[0] * along0 + from[1] * along1, 2 * (way[0] * along0 + way[1] * along1), c2};
  };
  const Quadratic var1 = variance(pair.cov1), var2 = variance(pair.cov2);
  Real low = 0, high = 1, l = target;
  MaskOf<Real> active = pair.finite;
  for (int step = 0; step < 32; ++step) {
    const Real q1 = var1.at(l), q2 = var2.at(l), m = 1.0 - l;
    const Real a = m * m * q1, b = l * l * q2, both = q1 * q2;
    const Real sum = a + b, excess = a - b;
    const Real turn = (2 * both - l * m * (var1.slope(l) * q2 - var2.slope(l) * q1)) * sum, shift = excess * both;
    const Real up = l * (turn + shift), down = m * (turn - shift);
    const Real next = up / (up + down);
    low = select(excess > 0.0, l, low);
    high = select(excess > 0.0, high, l);
    const MaskOf<Real> inside = (next > low) & (next < high);
    const MaskOf<Real> far = (absolute(excess) > 1e-4 * sum) & (q1 > 0.0) & (q2 > 0.0);
    l = select(active, select(inside, next, select(far, (low + high) * 0.5, l)), l);
    active = active & far;
    if (!any(active)) break;
  }
  return l;
}

}  // namespace detail

// The bound in [0, 1], or NaN for a non-finite input; d <= Size is the dimension in use.
template <typename Real, int Size>
DISCEDIT_HD_INLINE Real bound_of(Bound bound, const LawPair<Real, Size>& laws, int d) {
  const detail::ScaledPair<Real, Size> pair = detail::scale_pair(laws, d);
  Real l = 0.5;
  detail::Projection<Real> at = detail::project(pair, d, l);
  const Real fisher = detail::fisher_at(pair, d, at);
  const MaskOf<Real> defined = pair.finite & (pair.separated | (at.var1 + at.var2 < infinity));
  const auto settled = [&](Real value) {
    return select(defined, select(pair.separated, Real(1), value), Real(not_a_number));
  };
  if (bound == Bound::fisher) return settled(fisher);

  detail::Point<Real> point = detail::point_of(at);
  Real best = point.k;
  if constexpr (Size > 1) {
    // Secant steps; the fixed-point step where they leave the bracket, and bisection where that does.
    Real low = 0, high = 1, last_l = 0, last_excess = 0;
    MaskOf<Real> active = pair.finite;
    for (int step = 0; step < 40; ++step) {
      const Real excess = point.target - l;
      low = select(excess > 0.0, l, low);
      high = select(excess > 0.0, high, l);
      active = active & (at.gap > 0.0) & (absolute(excess) > 3e-7 * (l * (1.0 - l))) & (high - low > 1e-12);
      if (!any(active)) break;
      Real next = l - excess * (l - last_l) / (excess - last_excess);
      if (step == 0) {
        // In the plane this is the optimum already, but for what rounding does to singular covariances.
        if constexpr (Size == 2) next = detail::optimum_in_the_plane(pair, point.target);
        else next = point.target;
      }
      next = select((next > low) & (next < high), next, point.target);
      if (step % 8 == 7) next = (low + high) * 0.5;
      next = select((next > low) & (next < high), next, (low + high) * 0.5);
      last_l = l;
      last_excess = excess;
      l = select(active, next, l);
      at = detail::project(pair, d, l);
      point = detail::point_of(at);
      best = larger(point.k, best);
    }
  }
  // (s1 + s2)^2 <= 2 (s1^2 + s2^2) at any u, so minimax contains fisher; the maximum keeps that true to the last bit.
  return settled(larger(fisher, best * best / (1.0 + best * best)));
}

}  // namespace discedit
