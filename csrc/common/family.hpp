// The other members of the family, beside fisher and minimax of bounds.hpp:
//
//   minimax_published  (k / (sqrt 2 + k))^2, k as in minimax
//   robust             fisher at the worst means within balls of given radius, variances raised by rho
//   hellinger          1 - BC of Gaussians with these moments: a baseline, no bound
//   witness            (E1 f - E2 f)^2 / (sqrt(E1 f^2) + sqrt(E2 f^2))^2 of a scalar f
//   witness_published  the same over 2 (E1 f^2 + E2 f^2)
//   certified          minimax in one dimension at the worst moments that the samples allow, f in a known range
//
// As in bounds.hpp rounding is charged against what claims to be a lower bound.
#pragma once

#include "bounds.hpp"
#include "moments.hpp"
#include "witness.hpp"

namespace discedit {

enum class Member { fisher, minimax, minimax_published, robust, hellinger, witness, witness_published, certified };

// A member and what it needs beyond the two laws.
struct Rule {
  Member member;
  double radius = 0;    // robust: of the ball around each mean; with `between`, in standard errors of the mean
  double rho = 0;       // robust: added to every variance; with `between`, in units of the two laws' summed variance
  double log_term = 0;  // certified: ln(1 / probability of one of its events)
  double low = 0, high = 1;  // certified: the range of f
};

namespace detail {

template <typename Real>
DISCEDIT_HD_INLINE Real smaller(Real a, Real b) {  // b where either is NaN
  return select(a < b, a, b);
}

// x / (1 + x) for x = k^2, and its inverse.
template <typename Real>
DISCEDIT_HD_INLINE Real published(Real minimax) {
  const Real k = square_root(minimax / (1.0 - minimax)), root = k / (1.4142135623730951 + k);
  return select(minimax < 1.0, root * root, minimax);
}

// What robust is computed from, in units of the largest of deviation, difference and radius: one for all coordinates,
// or a ball would not stay one.
template <typename Real, int Size>
struct Ball {
  Real delta[Size], noise[Size];
  Real total[lower(Size, 0)];  // cov1 + cov2
  Real radius, rho;
};

// u = (total + shift I)^-1 delta, factored in units of the diagonal.
template <typename Real, int Size>
DISCEDIT_HD_INLINE void shifted_direction(const Ball<Real, Size>& ball, int d, Real shift, Real (&u)[Size]) {
  Real matrix[lower(Size, 0)], unit[Size];
  for (int i = 0; i < d; ++i) {
    const Real deviation = square_root(larger(ball.total[lower(i, i)], Real(0)) + shift);
    unit[i] = select(deviation > 0.0, 1.0 / deviation, Real(0));
    for (int j = 0; j < i; ++j) matrix[lower(i, j)] = ball.total[lower(i, j)] * unit[i] * unit[j];
    // Off coordinates whose difference is mostly noise, as in bounds.hpp.
    const Real noise = ball.noise[i] * unit[i];
    matrix[lower(i, i)] = 1.0 + 2 * d * epsilon + noise * noise;
    u[i] = ball.delta[i] * unit[i];
  }
  cholesky_solve<Real, Size>(matrix, u, d, 2 * d * epsilon);
  for (int i = 0; i < d; ++i) u[i] *= unit[i];
}

template <typename Real, int Size>
DISCEDIT_HD_INLINE Real length(const Real (&u)[Size], int d) {
  Real square = 0;
  for (int i = 0; i < d; ++i) square += u[i] * u[i];
  return square_root(square);
}

// Keeps the better of two directions, as gap^2 over variance.
template <typename Real>
DISCEDIT_HD_INLINE void keep_better(Real& gap, Real& variance, Real other_gap, Real other_variance) {
  const MaskOf<Real> more = other_gap * other_gap * variance > gap * gap * other_variance;
  gap = select(more, other_gap, gap);
  variance = select(more, other_variance, variance);
}

}  // namespace detail

// max_u (|u'delta| - radius |u|)^2 / u'(cov1 + cov2 + rho I) u = F at the worst means; F / (2 + F). Every u is valid.
// The best is (cov1 + cov2 + (rho + mu) I)^-1 delta where mu |u| = radius, a secular equation whose root is bracketed:
// mu - radius / |u(mu)| rises along it, and 1 / |u(mu)| is all but linear (More and Sorensen 1983).
template <typename Real, int Size>
DISCEDIT_HD_INLINE Real robust_of(const LawPair<Real, Size>& laws, Real radius, Real rho, int d) {
  detail::Ball<Real, Size> ball;
  Real most = rho, largest = radius;
  MaskOf<Real> finite = (radius < infinity) & (rho < infinity);
  for (int i = 0; i < d; ++i) {
    const Real total = laws.cov1[lower(i, i)] + laws.cov2[lower(i, i)];
    finite = finite & (total < infinity) & (absolute(laws.delta[i]) < infinity);
    for (int j = 0; j < i; ++j)
      finite = finite & (absolute(laws.cov1[lower(i, j)] + laws.cov2[lower(i, j)]) < infinity);
    most = larger(total, most);
    largest = larger(absolute(laws.delta[i]), largest);
  }
  const Real unit = larger(square_root(larger(most, Real(0))), largest);
  const Real inverse = select(unit > std::numeric_limits<double>::min(), 1.0 / unit, Real(0));
  ball.radius = radius * inverse;
  ball.rho = rho * inverse * inverse;
  MaskOf<Real> separated = Real(1) < Real(0);
  Real size = 0, along = 0, trace = 0, gap = 0, variance = 1;
  for (int i = 0; i < d; ++i) {
    ball.delta[i] = laws.delta[i] * inverse;
    ball.noise[i] = (d + 1) * epsilon * absolute(ball.delta[i]) + laws.noise[i] * inverse;
    for (int j = 0; j <= i; ++j)
      ball.total[lower(i, j)] = (laws.cov1[lower(i, j)] + laws.cov2[lower(i, j)]) * inverse * inverse;
    // Each coordinate alone is a direction too.
    const Real own = larger(ball.total[lower(i, i)], Real(0)) + ball.rho;
    const Real alone = larger(absolute(ball.delta[i]) - ball.noise[i] - ball.radius, Real(0));
    separated = separated | (alone > 1e9 * square_root(own));
    detail::keep_better<Real>(gap, variance, alone, own * (1 + 8 * epsilon + rounding_of_moments));
    size += ball.delta[i] * ball.delta[i];
    along += own * ball.delta[i] * ball.delta[i];
    trace += own;
  }
  size = square_root(size);
  const MaskOf<Real> apart = size > ball.radius;
  if constexpr (Size > 1) {
    const Real share = select(apart, ball.radius / (size - ball.radius), Real(0));
    Real low = 0, high = trace * share, mu = select(apart, along / (size * size) * share, Real(0));
    Real last_mu = 0, last_excess = 0;
    MaskOf<Real> active = finite & apart & (d > 1 ? Real(0) < Real(1) : Real(1) < Real(0));
    for (int step = 0; step < 60; ++step) {
      if (!any(active)) break;
      Real u[Size];
      detail::shifted_direction(ball, d, ball.rho + mu, u);
      const Real norm = detail::length<Real, Size>(u, d);
      Real value = 0, rounding = 0, sum[lower(Size, 0)];
      for (int i = 0; i < d; ++i) {
        value += u[i] * ball.delta[i];
        rounding += absolute(u[i]) * ball.noise[i];
      }
      for (int i = 0; i < lower(d, 0); ++i) sum[i] = ball.total[i];
      for (int i = 0; i < d; ++i) sum[lower(i, i)] = larger(sum[lower(i, i)], Real(0)) + ball.rho;
      const Real left = larger(absolute(value) - rounding - ball.radius * norm * (1 + (d + 2) * epsilon), Real(0));
      // A lane that has converged evaluates its last point again, which changes nothing.
      detail::keep_better<Real>(gap, variance, select(active, left, Real(0)),
                                detail::projected_variance<Real, Size>(sum, d, u));
      const Real target = ball.radius / norm, excess = 1.0 / norm - mu / ball.radius;
      active = active & (norm > 0.0) & (ball.radius > 0.0) & (absolute(target - mu) > 1e-8 * mu);
      low = select(target > mu, mu, low);
      high = select(target > mu, high, mu);
      Real next = mu - excess * (mu - last_mu) / (excess - last_excess);
      if (step == 0) next = target;
      next = select((next > low) & (next < high), next, target);
      if (step % 6 == 5) next = select(low > 0.0, square_root(low * high), 0.5 * (low + high));
      next = select((next > low) & (next < high), next, 0.5 * (low + high));
      last_mu = mu;
      last_excess = excess;
      mu = select(active, next, mu);
    }
  }
  Real value = select(separated, Real(1), detail::saturate<Real>(gap, 2 * variance));
  value = select(apart, value, Real(0));
  if (any(radius == 0.0)) {  // without a ball each coordinate may have its own unit
    LawPair<Real, Size> raised = laws;
    for (int i = 0; i < d; ++i) {
      raised.cov1[lower(i, i)] += 0.5 * rho;
      raised.cov2[lower(i, i)] += 0.5 * rho;
    }
    value = select(radius == 0.0, bound_of(Bound::fisher, raised, d), value);
  }
  return select(finite, value, Real(not_a_number));
}

// Directions in which neither law varies drop out, or decide alone where the means differ along them. Where one law
// alone is constant along a direction, the Gaussians share no mass: 1.
template <typename Real, int Size>
DISCEDIT_HD_INLINE Real hellinger_of(const LawPair<Real, Size>& laws, int d) {
  const detail::ScaledPair<Real, Size> pair = detail::scale_pair(laws, d);
  Real total[lower(Size, 0)], one[lower(Size, 0)], two[lower(Size, 0)], y[Size];
  Real error[Size], error1[Size], error2[Size];  // what rounding may have left of a pivot
  MaskOf<Real> kept[Size];
  Real ratio = 1, distance = 0;
  for (int i = 0; i < d; ++i) {
    y[i] = pair.delta[i];
    error[i] = 32 * d * epsilon;
    for (int j = 0; j <= i; ++j) total[lower(i, j)] = pair.cov1[lower(i, j)] + pair.cov2[lower(i, j)];
  }
  const auto eliminate = [&](Real(&a)[lower(Size, 0)], Real(&left)[Size], int j, Real inverse, Real* x) {
    for (int i = d - 1; i > j; --i) {
      const Real factor = a[lower(i, j)] * inverse;
      left[i] += factor * (factor * left[j]) + 4 * epsilon * absolute(factor * a[lower(i, j)]);
      for (int k = j + 1; k <= i; ++k) a[lower(i, k)] -= factor * a[lower(k, j)];
      if (x) x[i] -= factor * x[j];
    }
  };
  for (int j = 0; j < d; ++j) {
    const Real pivot = total[lower(j, j)], least = error[j];
    kept[j] = pivot > least;
    // Of a dependent coordinate, what rounding cannot have left.
    const Real left = larger(absolute(y[j]) - 64 * d * epsilon - pair.charge[j], Real(0));
    const Real residual = select(kept[j], y[j], left);
    distance += residual * residual / larger(pivot, least);
    eliminate(total, error, j, select(kept[j], 1.0 / larger(pivot, least), Real(0)), y);
  }
  for (int i = 0; i < d; ++i) {
    for (int j = 0; j <= i; ++j) {
      const MaskOf<Real> both = kept[i] & kept[j];
      const Real instead = i == j ? 0.5 : 0.0;
      one[lower(i, j)] = select(both, pair.cov1[lower(i, j)], instead);
      two[lower(i, j)] = select(both, pair.cov2[lower(i, j)], instead);
      total[lower(i, j)] = one[lower(i, j)] + two[lower(i, j)];
    }
    error1[i] = 32 * d * epsilon * one[lower(i, i)];
    error2[i] = 32 * d * epsilon * two[lower(i, i)];
  }
  for (int j = 0; j < d; ++j) {
    const Real both = total[lower(j, j)];
    const Real p1 = select(one[lower(j, j)] > error1[j], one[lower(j, j)], Real(0));
    const Real p2 = select(two[lower(j, j)] > error2[j], two[lower(j, j)], Real(0));
    ratio *= 4 * (p1 / both) * (p2 / both);
    eliminate(one, error1, j, select(p1 > 0.0, 1.0 / p1, Real(0)), nullptr);
    eliminate(two, error2, j, select(p2 > 0.0, 1.0 / p2, Real(0)), nullptr);
    eliminate(total, error, j, 1.0 / both, nullptr);
  }
  const Real affinity = square_root(square_root(larger(ratio, Real(0)))) * exponential(-0.25 * distance);
  const Real value = larger(1.0 - affinity, Real(0));
  const MaskOf<Real> defined = pair.finite & (pair.separated | (distance < infinity));
  return select(defined, select(pair.separated, Real(1), value), Real(not_a_number));
}

// From raw second moments, in units in which the larger is about 1. Not the same for f + b: see docs/bounds.md.
template <typename Real>
DISCEDIT_HD_INLINE Real witness_of(bool published, Real mean1, Real second1, Real mean2, Real second2) {
  const MaskOf<Real> finite =
      (absolute(mean1) < infinity) & (absolute(mean2) < infinity) & (second1 < infinity) & (second2 < infinity);
  const Real unit = square_root(larger(second1, second2));
  const Real inverse = select(unit > std::numeric_limits<double>::min(), 1.0 / unit, Real(0));
  const Real one = mean1 * inverse, two = mean2 * inverse;
  const Real square1 = second1 * inverse * inverse, square2 = second2 * inverse * inverse;
  const Real gap = larger(absolute(one - two) - rounding_of_moments * (absolute(one) + absolute(two)), Real(0));
  const Real root = square_root(square1) + square_root(square2);
  const Real below = (published ? 2 * (square1 + square2) : root * root) * (1 + 4 * epsilon + rounding_of_moments);
  const Real value = select(gap > 0.0, detail::smaller<Real>(gap * gap / below, Real(1)), Real(0));
  return select(finite, value, Real(not_a_number));
}

template <typename Real>
DISCEDIT_HD_INLINE Real witness_between(bool published, const MomentsOf<Real>& one, const MomentsOf<Real>& two) {
  const Real var1 = one.m2 / one.n, var2 = two.m2 / two.n;
  const Real unit = larger(larger(absolute(one.mean), absolute(two.mean)), square_root(larger(var1, var2)));
  const Real inverse = select(unit > std::numeric_limits<double>::min(), 1.0 / unit, Real(0));
  const Real mean1 = one.mean * inverse, mean2 = two.mean * inverse;
  const Real value = witness_of<Real>(published, mean1, var1 * inverse * inverse + mean1 * mean1, mean2,
                                      var2 * inverse * inverse + mean2 * mean2);
  const MaskOf<Real> finite =
      (absolute(one.mean) < infinity) & (absolute(two.mean) < infinity) & (var1 < infinity) & (var2 < infinity);
  return select(finite, value, Real(not_a_number));
}

// Six events of probability exp(-log_term) each, three for a law: its deviation above `most` (Maurer and Pontil 2009,
// Theorem 10: for independent samples, of one law or not), its mean to either side further than `error` (Bernstein).
// Outside all six, the value is minimax in one dimension at moments no better than the true ones. A law on [0, 1] with
// mean m has variance m (1 - m) at most, which bounds the deviation once more, and that the mean.
template <typename Real>
DISCEDIT_HD_INLINE Real certified_between(const Rule& rule, const MomentsOf<Real>& one, const MomentsOf<Real>& two) {
  const double inverse = 1.0 / (rule.high - rule.low), l = rule.log_term;
  Real most[2], error[2], finite_sum = 0;
  MaskOf<Real> enough = Real(0) < Real(1);
  for (int side = 0; side < 2; ++side) {
    const MomentsOf<Real>& law = side == 0 ? one : two;
    const Real deviation = square_root(law.m2 / (law.n - 1.0)) * inverse, mean = (law.mean - rule.low) * inverse;
    const Real from_middle = absolute(mean - 0.5) * (1 - 4 * epsilon) -
                             rounding_of_moments * (absolute(law.mean) + absolute(Real(rule.low))) * inverse;
    most[side] = detail::smaller<Real>(deviation + square_root(2 * l / (law.n - 1.0)), Real(0.5));
    for (int round = 0; round < 3; ++round) {
      error[side] = most[side] * square_root(2 * l / law.n) + l / (3.0 * law.n);
      const Real nearest = larger(from_middle - error[side], Real(0));
      const Real variance = larger(0.25 - nearest * nearest, Real(0));
      most[side] = detail::smaller<Real>(square_root(variance), most[side]);
    }
    enough = enough & (law.n > 1.0);
    finite_sum += law.mean * 0.0 + law.m2 * 0.0;
  }
  const Real rounding = rounding_of_moments * (absolute(one.mean) + absolute(two.mean)) * inverse;
  const Real gap = absolute(one.mean - two.mean) * inverse - rounding - error[0] - error[1];
  const Real k = larger(gap, Real(0)) / (most[0] + most[1]), square = k * k;
  const Real value = select(enough & (gap > 0.0), square / (1.0 + square) * (1 - 16 * epsilon), Real(0));
  return select(finite_sum == 0.0, value, Real(not_a_number));
}

// A member for an explicit pair of laws; `radius` is that of both balls together.
template <typename Real, int Size>
DISCEDIT_HD_INLINE Real member_of(const Rule& rule, const LawPair<Real, Size>& laws, Real radius, int d) {
  switch (rule.member) {
    case Member::fisher: return bound_of(Bound::fisher, laws, d);
    case Member::robust: return robust_of(laws, radius, Real(rule.rho), d);
    case Member::hellinger: return hellinger_of(laws, d);
    case Member::minimax_published: return detail::published<Real>(bound_of(Bound::minimax, laws, d));
    default: return bound_of(Bound::minimax, laws, d);
  }
}

// The same from what is known of two samples of n1 and n2. For robust: coordinates in units of their summed variance,
// so that nothing depends on their scales, and the radius of a ball in standard errors of its mean.
template <typename Real, int Size>
DISCEDIT_HD_INLINE Real member_between(const Rule& rule, const LawPair<Real, Size>& laws, Real n1, Real n2, int d) {
  if (rule.member != Member::robust) return member_of(rule, laws, Real(0), d);
  const detail::ScaledPair<Real, Size> scaled = detail::scale_pair(laws, d);
  LawPair<Real, Size> unit;
  Real trace1 = 0, trace2 = 0;
  for (int i = 0; i < d; ++i) {
    unit.delta[i] = scaled.delta[i];
    unit.noise[i] = scaled.charge[i];
    trace1 += scaled.cov1[lower(i, i)];
    trace2 += scaled.cov2[lower(i, i)];
  }
  for (int i = 0; i < lower(d, 0); ++i) unit.cov1[i] = scaled.cov1[i], unit.cov2[i] = scaled.cov2[i];
  const Real radius = rule.radius * (square_root(trace1 / n1) + square_root(trace2 / n2));
  const Real value = robust_of(unit, radius, Real(rule.rho), d);
  // Without variance there is no standard error: constant and different is 1, as in fisher.
  return select(scaled.finite, select(scaled.separated, Real(1), value), Real(not_a_number));
}

}  // namespace discedit
