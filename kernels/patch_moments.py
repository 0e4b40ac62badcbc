"""Moments of patches: a program takes the patches of one span and channel (or of a tile of channels that lie side by
side) and a pair of tiles of taps, whose products it keeps in registers until all patches are seen.

Spans are cut by shapes alone, and a second kernel brings them together in their order. No atomics: the same input gives
the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from discedit.common.window import Window
from discedit.kernels._launch import COMPILE, power_of_two
from discedit.kernels.pool import INTEGERS, _widen

# ---- traits ---------------------------------------------------------------------------------------------------------

SIDE = 4  # taps of a tile: 16 products for 8 loads
LANES = 128  # patches and channels that are read at once: one for each thread
SIDE_BY_SIDE = 32  # channels, where they are neighbours in memory
LOOKED_AT = 32  # elements that a channel's centre is made of
ENOUGH_PROGRAMS = 2048  # patches are cut where there are fewer
LEAST_SPAN = 16  # blocks of patches
MERGED = 128  # entries that a program brings together
INT32 = 2**31 - 1

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def centre_kernel(
    x,
    centre,
    channels,
    elements,
    height,
    width,
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    INTEGER: tl.constexpr,
    COUNT: tl.constexpr,
):
    """A finite value in the middle of COUNT elements of each channel, exactly that of a constant one; 0 where others
    would be lost beside it."""
    channel = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, COUNT).to(tl.int64)
    place = elements // COUNT * number + elements % COUNT * number // COUNT
    pixel = place % (height * width)
    offset = place // (height * width) * sample_stride + pixel // width * row_stride + pixel % width * column_stride
    value = _widen(tl.load(x + channel * channel_stride + offset), INTEGER)
    finite = tl.abs(value) < float("inf")
    # Any of the finite ones, so that the others' differences from it sum up to nothing where all are equal.
    first = tl.max(tl.where(finite, value, -float("inf")), 0)
    found = tl.sum(finite.to(tl.float64), 0)
    middle = first + tl.sum(tl.where(finite, value - first, 0.0), 0) / found
    tl.store(centre + channel, tl.where(tl.abs(middle) < 2.0**100, middle, 0.0))


@triton.jit
def _taps(tap, kernel_columns, dilation_rows, dilation_columns):
    """Rows and columns of taps from their patch's corner."""
    return (tap // kernel_columns) * dilation_rows, (tap % kernel_columns) * dilation_columns


@triton.jit
def _deviations(corner, i, j, exists, middle, height, width, row_stride, column_stride, INTEGER: tl.constexpr):
    """Pixels less their channels' centres; padding counts as 0, and what does not exist is 0."""
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width) & exists
    at = corner + i.to(tl.int64) * row_stride + j.to(tl.int64) * column_stride
    return tl.where(exists, _widen(tl.load(at, inside, 0.0), INTEGER) - middle, 0.0)


@triton.jit
def sum_kernel(
    x,
    positions,
    centre,
    partial,
    samples,
    channels,
    count,
    height,
    width,
    outputs,
    taps,
    sides,
    entries,
    groups,
    blocks,
    all_blocks,
    span,
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    kernel_columns,
    stride_rows,
    stride_columns,
    before_rows,
    before_columns,
    dilation_rows,
    dilation_columns,
    CHOSEN: tl.constexpr,
    INDEX: tl.constexpr,
    INTEGER: tl.constexpr,
    SIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    PLACES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of deviations from the centre, then of their products: partial (spans, taps + taps * taps, channels) in
    float64, `entries` numbers per span. Products of tiles i <= j alone are written."""
    LANES: tl.constexpr = SAMPLES * PLACES * TILE
    program = tl.program_id(0)
    group = program % groups
    first = 0
    second = (program // groups).to(tl.int64)
    while second >= sides - first:
        second -= sides - first
        first += 1
    second = (first + second) * SIDE
    first = first * SIDE

    # Everything has three axes, so that all of it lies in registers alike: taps, taps, lanes.
    lane = tl.arange(0, LANES)[None, None, :]
    one = first + tl.arange(0, SIDE)[:, None, None]
    two = second + tl.arange(0, SIDE)[None, :, None]
    channel = group * TILE + lane % TILE
    in_range = channel < channels
    middle = tl.load(centre + channel, in_range, 0.0)
    own = x + channel.to(tl.int64) * channel_stride
    row1, column1 = _taps(one, kernel_columns, dilation_rows, dilation_columns)
    row2, column2 = _taps(two, kernel_columns, dilation_rows, dilation_columns)
    total = tl.zeros([SIDE, 1, LANES], tl.float64)
    product = tl.zeros([SIDE, SIDE, LANES], tl.float64)
    begin = tl.program_id(1) * span
    for block in range(begin, tl.minimum(begin + span, all_blocks)):
        sample = block // blocks * SAMPLES + lane // (PLACES * TILE)
        place = block % blocks * PLACES + lane // TILE % PLACES
        exists = in_range & (sample < samples) & (place < count)
        position = place.to(INDEX)
        if CHOSEN:
            position = tl.load(positions + place, exists, 0).to(INDEX)
        row = ((position // outputs) * stride_rows - before_rows).to(tl.int32)
        column = ((position % outputs) * stride_columns - before_columns).to(tl.int32)
        corner = own + sample.to(tl.int64) * sample_stride
        there1, there2 = exists & (one < taps), exists & (two < taps)
        a = _deviations(
            corner, row + row1, column + column1, there1, middle, height, width, row_stride, column_stride, INTEGER
        )
        b = _deviations(
            corner, row + row2, column + column2, there2, middle, height, width, row_stride, column_stride, INTEGER
        )
        total += a
        product += a * b

    PATCHES: tl.constexpr = SAMPLES * PLACES
    sums = tl.sum(tl.reshape(total, [SIDE, PATCHES, TILE]), 1)
    products = tl.sum(tl.reshape(product, [SIDE, SIDE, PATCHES, TILE]), 2)
    to = partial + tl.program_id(1).to(tl.int64) * entries
    channel = (group * TILE + tl.arange(0, TILE)).to(tl.int64)
    one = (first + tl.arange(0, SIDE)).to(tl.int64)
    two = (second + tl.arange(0, SIDE)).to(tl.int64)
    mask = (one < taps)[:, None] & (channel < channels)[None, :]
    if first == second:
        tl.store(to + one[:, None] * channels + channel[None, :], sums, mask)
    entry = one[:, None] * taps + two[None, :] + taps
    tl.store(
        to + entry[:, :, None] * channels + channel[None, None, :],
        products,
        mask[:, None, :] & (two < taps)[None, :, None],
    )


@triton.jit
def merge_kernel(partial, spans, size, BLOCK: tl.constexpr):
    """The sums of all spans, in their order, in the place of the first: partial (spans, size)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros([BLOCK], tl.float64)
    at = partial + index
    for _ in range(spans):
        total += tl.load(at, mask, 0.0)
        at += size
    tl.store(partial + index, total, mask)


@triton.jit
def finish_kernel(sums, centre, mean, scatter, patches, channels, taps, size, BLOCK: tl.constexpr):
    """From sums about the centre to mean and scatter: an entry of the scatter for each lane."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    one = at // taps % taps
    two = at % taps
    channel = at // taps // taps
    i = tl.minimum(one, two)
    j = tl.maximum(one, two)
    patches = (tl.zeros_like(at) + patches).to(tl.float64)
    first = tl.load(sums + i * channels + channel, mask, 0.0)
    second = tl.load(sums + j * channels + channel, mask, 0.0)
    value = tl.load(sums + (taps + i * taps + j) * channels + channel, mask, 0.0) - first * (second / patches)
    value = tl.where((i == j) & (value < 0.0), 0.0, value)
    tl.store(scatter + at, value, mask)
    tl.store(mean + channel * taps + i, tl.load(centre + channel, mask, 0.0) + first / patches, mask & (one == two))


# ---- launchers ------------------------------------------------------------------------------------------------------


def lanes_of(x: Tensor, count: int) -> tuple[int, int, int]:
    """Samples, positions and channels that a block of lanes holds: together LANES, or fewer where there are fewer."""
    channels = x.shape[1]
    neighbours = x.stride(1) == 1 and (x.shape[3] == 1 or x.stride(3) != 1) and channels > 1
    tile = min(SIDE_BY_SIDE, power_of_two(channels)) if neighbours else 1
    places = min(LANES // tile, power_of_two(count))
    return min(LANES // tile // places, power_of_two(len(x))), places, tile


def spans_of(programs: int, blocks: int) -> tuple[int, int]:
    """Number of spans, and blocks of patches of each; from shapes alone."""
    wanted = min(-(-blocks // LEAST_SPAN), -(-ENOUGH_PROGRAMS // programs))
    span = -(-blocks // max(1, wanted))
    return -(-blocks // span), span


def patch_moments(x: Tensor, window: Window, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `discedit.reference.patch_moments`. Positions must be in range."""
    samples, channels, height, width = x.shape
    rows, columns = window.outputs(x)
    taps, count = window.taps, rows * columns if positions is None else len(positions)
    options: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
    if samples == 0 or channels == 0 or count == 0:
        return torch.zeros(channels, taps, **options), torch.zeros(channels, taps, taps, **options)
    mean, scatter = torch.empty(channels, taps, **options), torch.empty(channels, taps, taps, **options)
    centre = torch.empty(channels, **options)
    integer, strides = INTEGERS[x.dtype], x.stride()
    elements = samples * height * width
    centre_kernel[(channels,)](
        x, centre, channels, elements, height, width, *strides, INTEGER=integer, COUNT=LOOKED_AT, **COMPILE
    )
    side = min(SIDE, power_of_two(taps))
    sides = -(-taps // side)
    batch, places, tile = lanes_of(x, count)
    groups, blocks = -(-channels // tile), -(-count // places)
    programs = groups * (sides * (sides + 1) // 2)
    all_blocks = -(-samples // batch) * blocks
    spans, span = spans_of(programs, all_blocks)
    entries = (taps + taps * taps) * channels
    partial = torch.empty(spans, entries, **options)
    sum_kernel[(programs, spans)](
        x,
        x if positions is None else positions,
        centre,
        partial,
        samples,
        channels,
        count,
        height,
        width,
        columns,
        taps,
        sides,
        entries,
        groups,
        blocks,
        all_blocks,
        span,
        *strides,
        window.kernel[1],
        *window.stride,
        window.padding[0],
        window.padding[2],
        *window.dilation,
        CHOSEN=positions is not None,
        INDEX=tl.int32 if rows * columns <= INT32 else tl.int64,
        INTEGER=integer,
        SIDE=side,
        SAMPLES=batch,
        PLACES=places,
        TILE=tile,
        num_warps=LANES // (64 if torch.version.hip else 32),
        **COMPILE,
    )
    if spans > 1:
        merge_kernel[(-(-entries // MERGED),)](partial, spans, entries, BLOCK=MERGED, **COMPILE)
    size = channels * taps * taps
    finish_kernel[(-(-size // MERGED),)](
        partial, centre, mean, scatter, samples * count, channels, taps, size, BLOCK=MERGED, **COMPILE
    )
    return mean, scatter
