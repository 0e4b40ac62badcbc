"""Batched bounds of laws in one and two dimensions, one pair of laws per lane.

The mathematics of csrc/common/bounds.hpp: find a good direction u, then evaluate the bound at u with rounding charged
against it, so that what the solver misses costs tightness, never validity. One dimension is the plane with a second
coordinate that has neither variance nor difference, which drops out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discedit.kernels._launch import COMPILE

# ---- traits ---------------------------------------------------------------------------------------------------------

BLOCK = 128  # pairs
EPSILON = tl.constexpr(2.220446049250313e-16)
ROUNDING_OF_MOMENTS = tl.constexpr(16 * 2.220446049250313e-16)

# ---- the solver: functions of lanes ---------------------------------------------------------------------------------


@triton.jit
def larger(a, b):
    """b where either is NaN."""
    return tl.where(a > b, a, b)


@triton.jit
def positive_part(value):
    """0 where it is NaN."""
    return tl.where(value > 0.0, value, 0.0)


@triton.jit
def _any(mask):
    return tl.max(tl.ravel(mask.to(tl.int32)), 0) > 0


@triton.jit
def _scale(delta, noise, first, second):
    """A coordinate in units in which its variances sum to 1. Without variance, and no difference beyond noise, 0."""
    total = first + second
    size = tl.abs(delta)
    deviation = tl.sqrt(positive_part(total))
    finite = (size < float("inf")) & (total < float("inf"))
    separated = size - noise > 1e9 * deviation
    useful = (deviation > 0.0) & (noise < 1e25 * deviation)
    inverse = tl.where(useful, 1.0 / tl.where(useful, deviation, 1.0), 0.0)
    scaled_noise = tl.where(inverse > 0.0, noise * inverse, 0.0)
    scaled = delta * inverse
    charge = 3.0 * EPSILON * tl.abs(scaled) + scaled_noise
    # Keeps the determinant alive, and the direction off coordinates whose difference is mostly noise.
    ridge = 4.0 * EPSILON + scaled_noise * scaled_noise
    return scaled, charge, ridge, inverse, finite, separated


@triton.jit
def _direction(l, delta0, delta1, ridge0, ridge1, a00, a10, a11, b00, b10, b11):
    """((1 - l) S1 + l S2 + ridge)^-1 delta up to a factor, by the adjugate."""
    m00 = a00 + ridge0 + l * (b00 - a00)
    m10 = a10 + l * (b10 - a10)
    m11 = a11 + ridge1 + l * (b11 - a11)
    return m11 * delta0 - m10 * delta1, m00 * delta1 - m10 * delta0


@triton.jit
def _variance(c00, c10, c11, u0, u1):
    """u'cov u, more what rounding may have taken."""
    own0 = c00 * (u0 * u0)
    own1 = c11 * (u1 * u1)
    cross = c10 * u0
    value = own0 + (own1 + 2.0 * (u1 * cross))
    gross = own0 + (own1 + 2.0 * (tl.abs(u1) * tl.abs(cross)))
    return positive_part(value) + (6.0 * EPSILON + ROUNDING_OF_MOMENTS) * gross


@triton.jit
def _project(l, delta0, delta1, charge0, charge1, ridge0, ridge1, a00, a10, a11, b00, b10, b11):
    """Gap of the means and both variances along u(l)."""
    u0, u1 = _direction(l, delta0, delta1, ridge0, ridge1, a00, a10, a11, b00, b10, b11)
    value = u0 * delta0 + u1 * delta1
    rounding = tl.abs(u0) * charge0 + tl.abs(u1) * charge1
    gap = positive_part(tl.abs(value) - rounding)
    return gap, _variance(a00, a10, a11, u0, u1), _variance(b00, b10, b11, u0, u1)


@triton.jit
def _point(gap, var1, var2):
    """k there, and the fixed-point step (reweighted least squares), which always improves."""
    s1 = tl.sqrt(var1)
    both = s1 + tl.sqrt(var2)
    return tl.where(both > 0.0, gap / both, 0.0), s1 / both


@triton.jit
def _along(c00, c10, c11, from0, from1, way0, way1):
    """Variance along from + x way as c0 + c1 x + c2 x^2, with what `_variance` will charge."""
    charged: tl.constexpr = 1.0 + 2.0 * (6.0 * 2.220446049250313e-16 + 16.0 * 2.220446049250313e-16)
    first = c00 * charged
    second = c11 * charged
    along0 = first * from0 + c10 * from1
    along1 = c10 * from0 + second * from1
    c2 = way0 * (first * way0 + 2.0 * (c10 * way1)) + second * (way1 * way1)
    return from0 * along0 + from1 * along1, 2.0 * (way0 * along0 + way1 * along1), c2


@triton.jit
def _optimum(target, finite, delta0, delta1, ridge0, ridge1, a00, a10, a11, b00, b10, b11):
    """Where (1 - l) s1 = l s2 on the curve (Anderson and Bahadur 1962): Newton in log(l / (1 - l)), bracketed."""
    zero = target * 0.0
    from0, from1 = _direction(zero, delta0, delta1, ridge0, ridge1, a00, a10, a11, b00, b10, b11)
    way0, way1 = _direction(zero + 1.0, delta0, delta1, ridge0, ridge1, a00, a10, a11, b00, b10, b11)
    unit = 1.0 / (tl.abs(from0) + tl.abs(from1) + tl.abs(way0) + tl.abs(way1))
    from0 *= unit
    from1 *= unit
    way0 = way0 * unit - from0
    way1 = way1 * unit - from1
    p0, p1, p2 = _along(a00, a10, a11, from0, from1, way0, way1)
    r0, r1, r2 = _along(b00, b10, b11, from0, from1, way0, way1)
    low = tl.zeros_like(target)
    high = tl.zeros_like(target) + 1.0
    l = target
    active = finite
    step = 0
    while (step < 32) & _any(active):
        q1 = p0 + l * (p1 + l * p2)
        q2 = r0 + l * (r1 + l * r2)
        m = 1.0 - l
        a = m * m * q1
        b = l * l * q2
        both = q1 * q2
        total = a + b
        excess = a - b
        slope1 = p1 + (p2 + p2) * l
        slope2 = r1 + (r2 + r2) * l
        turn = (2.0 * both - l * m * (slope1 * q2 - slope2 * q1)) * total
        shift = excess * both
        up = l * (turn + shift)
        down = m * (turn - shift)
        ahead = up / (up + down)
        low = tl.where(excess > 0.0, l, low)
        high = tl.where(excess > 0.0, high, l)
        inside = (ahead > low) & (ahead < high)
        far = (tl.abs(excess) > 1e-4 * total) & (q1 > 0.0) & (q2 > 0.0)
        l = tl.where(active, tl.where(inside, ahead, tl.where(far, (low + high) * 0.5, l)), l)
        active = active & far
        step += 1
    return l


@triton.jit
def _best_of_curve(
    l, gap, var1, var2, finite, delta0, delta1, charge0, charge1, ridge0, ridge1, a00, a10, a11, b00, b10, b11
):
    """The greatest k found on the curve from its middle on: secant steps, the fixed-point step where they leave the
    bracket, and bisection where that does. A lane that has converged stays where it is."""
    best, target = _point(gap, var1, var2)
    low = tl.zeros_like(l)
    high = tl.zeros_like(l) + 1.0
    last_l = tl.zeros_like(l)
    last_excess = tl.zeros_like(l)
    active = finite
    going = True
    step = 0
    while (step < 40) & going:
        excess = target - l
        low = tl.where(excess > 0.0, l, low)
        high = tl.where(excess > 0.0, high, l)
        active = active & (gap > 0.0) & (tl.abs(excess) > 3e-7 * (l * (1.0 - l))) & (high - low > 1e-12)
        going = _any(active)
        if going:
            ahead = l - excess * (l - last_l) / (excess - last_excess)
            if step == 0:
                ahead = _optimum(target, finite, delta0, delta1, ridge0, ridge1, a00, a10, a11, b00, b10, b11)
            ahead = tl.where((ahead > low) & (ahead < high), ahead, target)
            if step % 8 == 7:
                ahead = (low + high) * 0.5
            ahead = tl.where((ahead > low) & (ahead < high), ahead, (low + high) * 0.5)
            last_l = l
            last_excess = excess
            l = tl.where(active, ahead, l)
            gap, var1, var2 = _project(
                l, delta0, delta1, charge0, charge1, ridge0, ridge1, a00, a10, a11, b00, b10, b11
            )
            k, target = _point(gap, var1, var2)
            best = larger(k, best)
        step += 1
    return best


@triton.jit
def bound_in_the_plane(delta0, delta1, noise0, noise1, a00, a10, a11, b00, b10, b11, MINIMAX: tl.constexpr):
    """The bound of two laws with mean difference `delta`, uncertain by `noise`, and covariances a and b: in [0, 1], or
    NaN where an input is not finite."""
    delta0, charge0, ridge0, inverse0, finite0, separated0 = _scale(delta0, noise0, a00, b00)
    delta1, charge1, ridge1, inverse1, finite1, separated1 = _scale(delta1, noise1, a11, b11)
    finite = finite0 & finite1
    separated = separated0 | separated1
    # One factor at a time: the product of two may overflow where the scaled entry does not.
    a10 = a10 * inverse1 * inverse0
    b10 = b10 * inverse1 * inverse0
    a00 = positive_part(a00 * inverse0 * inverse0)
    a11 = positive_part(a11 * inverse1 * inverse1)
    b00 = positive_part(b00 * inverse0 * inverse0)
    b11 = positive_part(b11 * inverse1 * inverse1)
    l = tl.zeros_like(delta0) + 0.5
    gap, var1, var2 = _project(l, delta0, delta1, charge0, charge1, ridge0, ridge1, a00, a10, a11, b00, b10, b11)
    defined = finite & (separated | (var1 + var2 < float("inf")))

    # Fisher's bound, from the middle of the curve, or from one coordinate alone where singular covariances make that
    # the better direction.
    best_gap = gap
    variance = 2.0 * (var1 + var2)
    own: tl.constexpr = 2.0 * (1.0 + 4.0 * 2.220446049250313e-16 + 16.0 * 2.220446049250313e-16)
    single = positive_part(tl.abs(delta0) - charge0)
    alone = (a00 + b00) * own
    more = single * single * variance > best_gap * best_gap * alone
    best_gap = tl.where(more, single, best_gap)
    variance = tl.where(more, alone, variance)
    single = positive_part(tl.abs(delta1) - charge1)
    alone = (a11 + b11) * own
    more = single * single * variance > best_gap * best_gap * alone
    best_gap = tl.where(more, single, best_gap)
    variance = tl.where(more, alone, variance)
    square = best_gap * best_gap
    value = tl.where(square > 0.0, square / (variance + square), 0.0)

    if MINIMAX:
        best = _best_of_curve(
            l, gap, var1, var2, finite, delta0, delta1, charge0, charge1, ridge0, ridge1, a00, a10, a11, b00, b10, b11
        )
        value = larger(value, best * best / (1.0 + best * best))
    value = tl.where(separated, 1.0, value)
    return tl.where(defined, value, float("nan"))


@triton.jit
def bound_on_the_line(delta, noise, a, b, MINIMAX: tl.constexpr):
    """The same in one dimension: the plane, with a second coordinate that drops out."""
    nothing = tl.zeros_like(delta)
    return bound_in_the_plane(delta, nothing, noise, nothing, a, nothing, nothing, b, nothing, nothing, MINIMAX)


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def bound_kernel(
    mean1, cov1, mean2, cov2, out, pairs, DIMENSION: tl.constexpr, MINIMAX: tl.constexpr, BLOCK: tl.constexpr
):
    """Means (pairs, d), covariances (pairs, d, d), out (pairs): float64."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < pairs
    at = pair * DIMENSION
    corner = at * DIMENSION
    first = tl.load(mean1 + at, mask, 0.0)
    second = tl.load(mean2 + at, mask, 0.0)
    delta0 = first - second
    noise0 = ROUNDING_OF_MOMENTS * tl.abs(first) + ROUNDING_OF_MOMENTS * tl.abs(second)
    a00 = tl.load(cov1 + corner, mask, 0.0)
    b00 = tl.load(cov2 + corner, mask, 0.0)
    if DIMENSION == 2:
        first = tl.load(mean1 + at + 1, mask, 0.0)
        second = tl.load(mean2 + at + 1, mask, 0.0)
        delta1 = first - second
        noise1 = ROUNDING_OF_MOMENTS * tl.abs(first) + ROUNDING_OF_MOMENTS * tl.abs(second)
        a10 = tl.load(cov1 + corner + 2, mask, 0.0)
        a11 = tl.load(cov1 + corner + 3, mask, 0.0)
        b10 = tl.load(cov2 + corner + 2, mask, 0.0)
        b11 = tl.load(cov2 + corner + 3, mask, 0.0)
        value = bound_in_the_plane(delta0, delta1, noise0, noise1, a00, a10, a11, b00, b10, b11, MINIMAX)
    else:
        value = bound_on_the_line(delta0, noise0, a00, b00, MINIMAX)
    tl.store(out + pair, value, mask)


# ---- launcher -------------------------------------------------------------------------------------------------------


def bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, name: str) -> Tensor:
    """`name` ("fisher" or "minimax") of laws with contiguous float64 means (pairs, d) and covariances (pairs, d, d),
    d = 1 or 2: shape (pairs,)."""
    pairs, dimension = mean1.shape
    out = torch.empty(pairs, dtype=torch.float64, device=mean1.device)
    if pairs:
        bound_kernel[(-(-pairs // BLOCK),)](
            mean1, cov1, mean2, cov2, out, pairs, DIMENSION=dimension, MINIMAX=name == "minimax", BLOCK=BLOCK, **COMPILE
        )
    return out
