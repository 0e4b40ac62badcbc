"""Least bound over all pairs of classes: a program takes some channels and every `splits`-th class, to compare with
all later classes, a block of them at a time. Nothing of classes x classes is ever stored.

Of pairs with the same bound the first in the order of their classes counts, however the work is split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discedit.common.state import State, VectorMoments
from discedit.kernels._launch import COMPILE
from discedit.kernels.bounds import ROUNDING_OF_MOMENTS, bound_in_the_plane, bound_on_the_line, larger, positive_part

# ---- traits ---------------------------------------------------------------------------------------------------------

CHANNELS = 8  # of a program: neighbours in memory
CLASSES = 16  # compared with one at a time
ENOUGH_PROGRAMS = 2048

# ---- witnesses: from the moments of a statistic to the law of the features (csrc/common/witness.hpp) -----------------


@triton.jit
def _standardise(n, mean, m2, m3, m4, shift, inverse):
    """Mean, central moments and rounding of the mean of z = (t - origin) / scale."""
    share = inverse / n
    noise = ROUNDING_OF_MOMENTS * (tl.abs(mean) * inverse)
    # One power of 1 / scale at a time: scale^4 alone may leave the range when the quotient does not.
    return (
        shift * inverse,
        m2 * share * inverse,
        m3 * share * inverse * inverse,
        m4 * share * inverse * inverse * inverse,
        noise,
    )


@triton.jit
def _square(shift, var, third, fourth, useful):
    """Covariance of z and z^2, and variance of z^2; 0 where z^2 is of no use."""
    square = var * var
    cross = 4.0 * (shift * third)
    drift = 4.0 * (shift * shift * var)
    gross = fourth + square + tl.abs(cross) + drift
    value = positive_part(fourth - square + cross + drift) + ROUNDING_OF_MOMENTS * gross
    return tl.where(useful, third + 2.0 * (shift * var), 0.0), tl.where(useful, value, 0.0)


@triton.jit
def _sound(var, third, fourth):
    """E z^4 >= (E z^2)^2 for every law. Where the sums say otherwise, t^4 left the range of float64."""
    slack: tl.constexpr = 1.0 - 1e-9
    return (fourth >= var * var * slack) & (fourth < float("inf")) & (tl.abs(third) < float("inf"))


@triton.jit
def bound_of_scalars(n1, mean1, p2, p3, p4, n2, mean2, q2, q3, q4, QUADRATIC: tl.constexpr, MINIMAX: tl.constexpr):
    """Between two laws of a statistic, from their moment sums."""
    gap = mean2 - mean1
    scale = larger(tl.abs(gap), tl.sqrt(p2 / n1 + q2 / n2))
    usable = scale >= 2.2250738585072014e-308  # below, 1 / scale may be infinite
    inverse = tl.where(scale < 2.2250738585072014e-308, 0.0, 1.0 / tl.where(usable, scale, scale + 1.0))
    shift1, var1, third1, fourth1, noise1 = _standardise(n1, mean1, p2, p3, p4, gap * -0.5, inverse)
    shift2, var2, third2, fourth2, noise2 = _standardise(n2, mean2, q2, q3, q4, gap * 0.5, inverse)
    delta = shift1 - shift2
    noise = noise1 + noise2
    if QUADRATIC:
        sound = _sound(var1, third1, fourth1) & _sound(var2, third2, fourth2)
        # The squared shifts are equal by choice of the midpoint.
        delta_of_square = tl.where(sound, var1 - var2, 0.0)
        noise_of_square = tl.where(sound, ROUNDING_OF_MOMENTS * (var1 + var2), 0.0)
        a10, a11 = _square(shift1, var1, third1, fourth1, sound)
        b10, b11 = _square(shift2, var2, third2, fourth2, sound)
        value = bound_in_the_plane(
            delta, delta_of_square, noise, noise_of_square, var1, a10, a11, var2, b10, b11, MINIMAX
        )
    else:
        value = bound_on_the_line(delta, noise, var1, var2, MINIMAX)
    return value


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def pairwise_min_kernel(
    count,
    mean,
    second,
    third,
    fourth,
    values,
    pairs,
    classes,
    channels,
    splits,
    DIMENSION: tl.constexpr,
    QUADRATIC: tl.constexpr,
    MINIMAX: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """DIMENSION 0: of a scalar statistic, `second`.. being its m2, m3 and m4. Else of a vector, `second` its scatter.

    values: (splits, channels) float64, inf where a split has no pair, NaN where a bound is not defined; pairs: the same
    shape, int64, first * classes + second.
    """
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    in_range = (channel < channels)[None, :]
    plane = tl.zeros_like(channel) + channels
    plane = (plane * classes)[None, :]
    best = tl.full([CLASSES, CHANNELS], float("inf"), tl.float64)
    pair = tl.full([CLASSES, CHANNELS], 2**62, tl.int64)
    undefined = tl.zeros([CLASSES, CHANNELS], tl.int32)
    for i in range(tl.program_id(1), classes - 1, splits):
        n = tl.load(count + i)
        if n > 0:
            own = (tl.zeros_like(channel) + i) * channels + channel
            own = own[None, :]
            n1 = tl.zeros([CLASSES, CHANNELS], tl.float64) + n.to(tl.float64)
            for start in range(i + 1, classes, CLASSES):
                j = (start + tl.arange(0, CLASSES)).to(tl.int64)[:, None]
                number = tl.load(count + j, j < classes, 0)
                mask = in_range & (number > 0)
                n2 = tl.zeros([CLASSES, CHANNELS], tl.float64) + tl.maximum(number, 1).to(tl.float64)
                at = j * channels + channel[None, :]
                m1 = tl.load(mean + own, in_range, 0.0) + tl.zeros_like(n1)
                m2 = tl.load(mean + at, mask, 0.0)
                s1 = tl.load(second + own, in_range, 0.0) + tl.zeros_like(n1)
                s2 = tl.load(second + at, mask, 0.0)
                if DIMENSION == 0:
                    t1 = tl.load(third + own, in_range, 0.0) + tl.zeros_like(n1)
                    f1 = tl.load(fourth + own, in_range, 0.0) + tl.zeros_like(n1)
                    t2 = tl.load(third + at, mask, 0.0)
                    f2 = tl.load(fourth + at, mask, 0.0)
                    value = bound_of_scalars(n1, m1, s1, t1, f1, n2, m2, s2, t2, f2, QUADRATIC, MINIMAX)
                else:
                    noise0 = ROUNDING_OF_MOMENTS * tl.abs(m1) + ROUNDING_OF_MOMENTS * tl.abs(m2)
                    if DIMENSION == 2:
                        o1 = tl.load(mean + plane + own, in_range, 0.0) + tl.zeros_like(n1)
                        o2 = tl.load(mean + plane + at, mask, 0.0)
                        noise1 = ROUNDING_OF_MOMENTS * tl.abs(o1) + ROUNDING_OF_MOMENTS * tl.abs(o2)
                        a10 = tl.load(second + plane + own, in_range, 0.0) / n1
                        a11 = tl.load(second + 2 * plane + own, in_range, 0.0) / n1
                        b10 = tl.load(second + plane + at, mask, 0.0) / n2
                        b11 = tl.load(second + 2 * plane + at, mask, 0.0) / n2
                        value = bound_in_the_plane(
                            m1 - m2, o1 - o2, noise0, noise1, s1 / n1, a10, a11, s2 / n2, b10, b11, MINIMAX
                        )
                    else:
                        value = bound_on_the_line(m1 - m2, noise0, s1 / n1, s2 / n2, MINIMAX)
                # Classes ascend within a lane: the first of equals stays.
                less = mask & (value < best)
                best = tl.where(less, value, best)
                pair = tl.where(less, (tl.zeros_like(j) + i) * classes + j, pair)
                undefined += (mask & (value != value)).to(tl.int32)
    least = tl.min(best, 0)
    first = tl.min(tl.where(best == least[None, :], pair, 2**62), 0)
    least = tl.where(tl.max(undefined, 0) > 0, float("nan"), least)
    to = tl.program_id(1).to(tl.int64) * channels + channel
    tl.store(values + to, least, channel < channels)
    tl.store(pairs + to, first, channel < channels)


@triton.jit
def merge_splits_kernel(values, pairs, out, out_pairs, classes, channels, splits, BLOCK: tl.constexpr):
    """The least of the splits of a channel; NaN and -1, -1 where there is no pair or one is not defined."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    best = tl.full([BLOCK], float("inf"), tl.float64)
    pair = tl.full([BLOCK], 2**62, tl.int64)
    undefined = tl.zeros([BLOCK], tl.int32)
    for split in range(splits):
        at = (tl.zeros_like(channel) + split) * channels + channel
        value = tl.load(values + at, mask, 0.0)
        other = tl.load(pairs + at, mask, 0)
        undefined += (value != value).to(tl.int32)
        less = (value < best) | ((value == best) & (other < pair))
        best = tl.where(less, value, best)
        pair = tl.where(less, other, pair)
    defined = (undefined == 0) & (best < float("inf"))
    tl.store(out + channel, tl.where(defined, best, float("nan")), mask)
    tl.store(out_pairs + 2 * channel, tl.where(defined, pair // classes, -1), mask)
    tl.store(out_pairs + 2 * channel + 1, tl.where(defined, pair % classes, -1), mask)


# ---- launcher -------------------------------------------------------------------------------------------------------


def pairwise_min(moments: State, bound: str, witness: str) -> tuple[Tensor, Tensor]:
    """As `discedit.reference.pairwise_min`, for scalar states and vectors of at most two statistics."""
    classes, channels = moments.num_classes, moments.channels
    device = moments.device
    programs = -(-channels // CHANNELS)
    splits = max(1, min(classes - 1, -(-ENOUGH_PROGRAMS // max(1, programs))))
    values = torch.empty(splits, channels, dtype=torch.float64, device=device)
    pairs = torch.empty(splits, channels, dtype=torch.int64, device=device)
    out = torch.empty(channels, dtype=torch.float64, device=device)
    out_pairs = torch.empty(channels, 2, dtype=torch.int64, device=device)
    if channels == 0:
        return out, out_pairs
    count, mean, second, *higher = moments.tensors()
    pairwise_min_kernel[(programs, splits)](
        count,
        mean,
        second,
        *(higher or (second, second)),
        values,
        pairs,
        classes,
        channels,
        splits,
        DIMENSION=moments.dimension if isinstance(moments, VectorMoments) else 0,
        QUADRATIC=witness == "quadratic",
        MINIMAX=bound == "minimax",
        CHANNELS=CHANNELS,
        CLASSES=CLASSES,
        **COMPILE,
    )
    block = 128
    merge_splits_kernel[(-(-channels // block),)](
        values, pairs, out, out_pairs, classes, channels, splits, BLOCK=block, **COMPILE
    )
    return out, out_pairs
