"""Per-class moments of pooled features, merged into a state: a program takes one class of the batch and some channels.

The program of a sample position works if that sample is the first of its class in the batch; the others leave at once.
So the work depends on the samples, not on how many classes there are, and no program needs to know what another does.
Two passes over a class's samples, a block of them at a time: the mean, then central sums about it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from discedit.common.state import ClassMoments, State, VectorMoments
from discedit.kernels._launch import COMPILE, power_of_two

# ---- traits ---------------------------------------------------------------------------------------------------------

TILE = 32  # channels
SAMPLES = 32  # read at once
UNSORTED = 2048  # samples up to which a class's members are found by looking at every label

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _begins_class(labels, position, label, classes, SORTED: tl.constexpr, BLOCK: tl.constexpr):
    """Whether this is a class's label and no earlier position has it."""
    earlier = tl.zeros([BLOCK], tl.int32)
    if SORTED:
        if position > 0:
            before = tl.load(labels + position - 1)
            earlier += (before == label).to(tl.int32)
    else:
        for start in range(0, position, BLOCK):
            at = start + tl.arange(0, BLOCK)
            other = tl.load(labels + at, at < position, -1)
            earlier += ((other == label) & (at < position)).to(tl.int32)
    return (tl.max(earlier, 0) == 0) & (label >= 0) & (label < classes)


@triton.jit
def _end_of_class(labels, position, label, samples, SORTED: tl.constexpr, BLOCK: tl.constexpr):
    """A position behind the last one with this label."""
    end = samples
    if SORTED:
        end = tl.minimum(position + BLOCK, samples)
        last = tl.load(labels + end - 1)
        while (end < samples) & (last == label):
            end = tl.minimum(end + BLOCK, samples)
            last = tl.load(labels + end - 1)
    return end


@triton.jit
def _deviations(
    values,
    labels,
    order,
    start,
    end,
    label,
    shift,
    channel,
    in_range,
    channels,
    scale,
    SORTED: tl.constexpr,
    EXP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the class's samples at positions [start, start + BLOCK): value - shift, and 0 for all others; their number."""
    position = start + tl.arange(0, BLOCK)
    member = (position < end) & (tl.load(labels + position, position < end, -1) == label)
    row = tl.load(order + position, member, 0) if SORTED else position
    mask = member[:, None] & in_range[None, :]
    value = tl.load(values + row.to(tl.int64)[:, None] * channels + channel[None, :], mask, 0.0)
    if EXP:
        value = tl.exp(-scale * value)
    return tl.where(mask, value - shift[None, :], 0.0), tl.sum(member.to(tl.int32), 0)


@triton.jit
def _mean_of_class(
    values,
    labels,
    order,
    position,
    end,
    label,
    channel,
    in_range,
    channels,
    scale,
    SORTED: tl.constexpr,
    EXP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean as first sample + mean deviation from it, exact for a constant channel; and the number of samples."""
    row = tl.load(order + position) if SORTED else position
    first = tl.load(values + row.to(tl.int64) * channels + channel, in_range, 0.0)
    if EXP:
        first = tl.exp(-scale * first)
    total = tl.zeros_like(first)
    number = 0
    for start in range(position, end, BLOCK):
        deviation, members = _deviations(
            values, labels, order, start, end, label, first, channel, in_range, channels, scale, SORTED, EXP, BLOCK
        )
        total += tl.sum(deviation, 0)
        number += members
    count = number.to(tl.float64)
    return first + total / count, count


@triton.jit
def fold_kernel(
    pooled,
    labels,
    order,
    scales,
    count,
    mean,
    m2,
    m3,
    m4,
    samples,
    classes,
    channels,
    SORTED: tl.constexpr,
    EXP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Central moment sums of one statistic. `count` already holds the batch."""
    position = tl.program_id(0)
    label = tl.load(labels + position)
    if _begins_class(labels, position, label, classes, SORTED, BLOCK):
        channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
        in_range = channel < channels
        scale = tl.load(scales) if EXP else 0.0
        end = _end_of_class(labels, position, label, samples, SORTED, BLOCK)
        own, n = _mean_of_class(
            pooled, labels, order, position, end, label, channel, in_range, channels, scale, SORTED, EXP, BLOCK
        )
        residual = tl.zeros_like(own)
        s2 = tl.zeros_like(own)
        s3 = tl.zeros_like(own)
        s4 = tl.zeros_like(own)
        for start in range(position, end, BLOCK):
            d, members = _deviations(
                pooled,
                labels,
                order,
                start,
                end,
                label,
                own,
                channel,
                in_range,
                channels,
                scale,
                SORTED,
                EXP,
                BLOCK,
            )
            d2 = d * d
            residual += tl.sum(d, 0)
            s2 += tl.sum(d2, 0)
            s3 += tl.sum(d2 * d, 0)
            s4 += tl.sum(d2 * d2, 0)
        # The mean is rounded; what that leaves in the deviations is known and taken out to first order.
        r = residual / n
        s4 -= 4.0 * r * s3
        s3 -= 3.0 * r * s2
        s2 = tl.maximum(s2 - r * residual, 0.0, propagate_nan=tl.PropagateNan.ALL)
        # Merged with what the class has (Chan, Golub and LeVeque 1979; Pebay 2008).
        before = tl.load(count + label).to(tl.float64) - n
        at = label * channels + channel
        if before > 0:
            old = tl.load(mean + at, in_range, 0.0)
            o2 = tl.load(m2 + at, in_range, 0.0)
            o3 = tl.load(m3 + at, in_range, 0.0)
            o4 = tl.load(m4 + at, in_range, 0.0)
            both = before + n
            wa = before / both
            wb = n / both
            pair = before * wb
            delta = own - old
            delta2 = delta * delta
            s4 = (
                o4
                + s4
                + delta
                * (
                    delta * (delta2 * pair * (wa * wa - wa * wb + wb * wb) + 6.0 * (wa * wa * s2 + wb * wb * o2))
                    + 4.0 * (wa * s3 - wb * o3)
                )
            )
            s3 = o3 + s3 + delta * (delta2 * pair * (wa - wb) + 3.0 * (wa * s2 - wb * o2))
            s2 = o2 + s2 + delta2 * pair
            own = old + delta * wb
        tl.store(mean + at, own, in_range)
        tl.store(m2 + at, s2, in_range)
        tl.store(m3 + at, s3, in_range)
        tl.store(m4 + at, s4, in_range)


@triton.jit
def fold_scatter_kernel(
    pooled,
    labels,
    order,
    rows,
    columns,
    count,
    mean,
    scatter,
    samples,
    classes,
    channels,
    SORTED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One entry (i, j) of the scatter matrices of vectors of statistics; reads the means, which `fold_mean_kernel` will
    then bring up to date. `count` already holds the batch."""
    position = tl.program_id(0)
    label = tl.load(labels + position)
    if _begins_class(labels, position, label, classes, SORTED, BLOCK):
        channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
        in_range = channel < channels
        entry = tl.program_id(2)
        i = tl.load(rows + entry).to(tl.int64)
        j = tl.load(columns + entry).to(tl.int64)
        end = _end_of_class(labels, position, label, samples, SORTED, BLOCK)
        one = pooled + i * samples * channels
        two = pooled + j * samples * channels
        mean1, n = _mean_of_class(
            one, labels, order, position, end, label, channel, in_range, channels, 0.0, SORTED, False, BLOCK
        )
        mean2, n = _mean_of_class(
            two, labels, order, position, end, label, channel, in_range, channels, 0.0, SORTED, False, BLOCK
        )
        residual1 = tl.zeros_like(mean1)
        residual2 = tl.zeros_like(mean1)
        product = tl.zeros_like(mean1)
        for start in range(position, end, BLOCK):
            d1, members = _deviations(
                one, labels, order, start, end, label, mean1, channel, in_range, channels, 0.0, SORTED, False, BLOCK
            )
            d2, members = _deviations(
                two, labels, order, start, end, label, mean2, channel, in_range, channels, 0.0, SORTED, False, BLOCK
            )
            residual1 += tl.sum(d1, 0)
            residual2 += tl.sum(d2, 0)
            product += tl.sum(d1 * d2, 0)
        product -= residual1 * (residual2 / n)
        if i == j:
            product = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)
        before = tl.load(count + label).to(tl.float64) - n
        at = (entry.to(tl.int64) * classes + label) * channels + channel
        if before > 0:
            delta1 = mean1 - tl.load(mean + (i * classes + label) * channels + channel, in_range, 0.0)
            delta2 = mean2 - tl.load(mean + (j * classes + label) * channels + channel, in_range, 0.0)
            product += tl.load(scatter + at, in_range, 0.0) + delta1 * delta2 * (before * (n / (before + n)))
        tl.store(scatter + at, product, in_range)


@triton.jit
def fold_mean_kernel(
    pooled,
    labels,
    order,
    count,
    mean,
    samples,
    classes,
    channels,
    SORTED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One statistic's means of vectors of statistics. `count` already holds the batch."""
    position = tl.program_id(0)
    label = tl.load(labels + position)
    if _begins_class(labels, position, label, classes, SORTED, BLOCK):
        channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
        in_range = channel < channels
        statistic = tl.program_id(2).to(tl.int64)
        end = _end_of_class(labels, position, label, samples, SORTED, BLOCK)
        own, n = _mean_of_class(
            pooled + statistic * samples * channels,
            labels,
            order,
            position,
            end,
            label,
            channel,
            in_range,
            channels,
            0.0,
            SORTED,
            False,
            BLOCK,
        )
        before = tl.load(count + label).to(tl.float64) - n
        at = (statistic * classes + label) * channels + channel
        if before > 0:
            old = tl.load(mean + at, in_range, 0.0)
            own = old + (own - old) * (n / (before + n))
        tl.store(mean + at, own, in_range)


# ---- launchers ------------------------------------------------------------------------------------------------------


def fold_moments(pooled: Tensor, scale: float, labels: Tensor, state: State) -> None:
    """As `discedit.reference.fold_moments`. Labels outside 0..classes - 1 are the caller's to refuse."""
    _, samples, channels = pooled.shape
    if samples == 0:
        return
    is_sorted = samples > UNSORTED
    order = labels
    if is_sorted:
        labels, order = torch.sort(labels, stable=True)
    state.count.index_add_(0, labels, torch.ones_like(labels))
    if channels == 0:
        return
    tile = min(TILE, power_of_two(channels))
    options: dict[str, Any] = {
        "SORTED": is_sorted,
        "TILE": tile,
        "BLOCK": min(SAMPLES, power_of_two(samples)),
        **COMPILE,
    }
    grid = (samples, -(-channels // tile))
    if isinstance(state, ClassMoments):
        # A float argument would be rounded to float32. Without a scale the kernel does not read it.
        scales = torch.full((1,), scale, dtype=torch.float64, device=pooled.device) if scale else pooled
        fold_kernel[grid](
            pooled,
            labels,
            order,
            scales,
            *state.tensors(),
            samples,
            state.num_classes,
            channels,
            EXP=scale != 0,
            **options,
        )
        return
    _fold_vectors(pooled, labels, order, state, grid, options)


def _fold_vectors(
    pooled: Tensor, labels: Tensor, order: Tensor, state: VectorMoments, grid: tuple[int, int], options: dict[str, Any]
) -> None:
    _, samples, channels = pooled.shape
    rows, columns = torch.tril_indices(
        state.dimension, state.dimension, dtype=torch.int32, device=pooled.device
    ).contiguous()
    sizes = (samples, state.num_classes, channels)
    entries, statistics = (*grid, len(rows)), (*grid, state.dimension)
    fold_scatter_kernel[entries](
        pooled, labels, order, rows, columns, state.count, state.mean, state.scatter, *sizes, **options
    )
    fold_mean_kernel[statistics](pooled, labels, order, state.count, state.mean, *sizes, **options)
