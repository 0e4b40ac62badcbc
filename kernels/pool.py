"""Statistics of a feature map in one read: a program takes a tile of channels of one sample and walks over their maps.

Where channels lie side by side (channels_last, tokens) tiles are wide and blocks of elements short, else the other way
round, so that neighbouring threads read neighbouring memory. Maps that are long and few are cut into spans, whose
accumulators a second kernel brings together in their order. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discedit.kernels._launch import COMPILE, Layout, layout_of, power_of_two

# ---- traits ---------------------------------------------------------------------------------------------------------

NAMES = ("mean", "sum", "l2", "rms", "absmax", "max", "positive_fraction")
INTEGERS = {torch.float64: tl.int64, torch.float32: tl.int32, torch.float16: tl.int16, torch.bfloat16: tl.int16}

TILE = 64  # channels, where they lie side by side: a cache line of 16-bit elements
TILE_ELEMENTS = 2048  # of a tile and block
LONGEST_BLOCK = 1024  # elements of a map
ENOUGH_PROGRAMS = 1024  # maps are cut where there are fewer
LEAST_SPAN = 1 << 14  # elements
PARTS = 5  # sum, square, top, peak, positive

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _widen(value, INTEGER: tl.constexpr):
    """Exact float64. bfloat16 by its bits, which no conversion can flush to zero."""
    FLOAT: tl.constexpr = value.dtype
    if FLOAT == tl.float64:
        wide = value
    elif FLOAT == tl.bfloat16:
        wide = (value.to(INTEGER, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        wide = value.to(tl.float32).to(tl.float64)
    return wide


@triton.jit
def _ordered(bits, INTEGER: tl.constexpr):
    """Floating-point numbers in the order of their bits read as integers; its own inverse."""
    greatest: tl.constexpr = 2 ** (INTEGER.primitive_bitwidth - 1) - 1
    return (bits ^ ((bits >> (INTEGER.primitive_bitwidth - 1)) & greatest)).to(INTEGER)


@triton.jit
def _finish(total, square, top, peak, positive, elements, out, index, plane, mask, PLACES: tl.constexpr):
    """From accumulators to statistics. NaN in `top` says that the map has one."""
    count = tl.zeros_like(total) + elements
    plane = tl.zeros_like(index) + plane  # 64 bits
    undefined = tl.where(top == top, 0.0, top)
    if PLACES[0] >= 0:
        tl.store(out + PLACES[0] * plane + index, total / count, mask)
    if PLACES[1] >= 0:
        tl.store(out + PLACES[1] * plane + index, total, mask)
    if PLACES[2] >= 0:
        tl.store(out + PLACES[2] * plane + index, tl.sqrt(square), mask)
    if PLACES[3] >= 0:
        tl.store(out + PLACES[3] * plane + index, tl.sqrt(square / count), mask)
    if PLACES[4] >= 0:
        tl.store(out + PLACES[4] * plane + index, top, mask)
    if PLACES[5] >= 0:
        tl.store(out + PLACES[5] * plane + index, peak + undefined, mask)
    if PLACES[6] >= 0:
        tl.store(out + PLACES[6] * plane + index, positive / count + undefined, mask)


@triton.jit
def pool_kernel(
    x,
    out,
    partial,
    channels,
    tiles,
    elements,
    span,
    plane,
    sample_stride,
    channel_stride,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    AXES: tl.constexpr,
    PLACES: tl.constexpr,
    CUT: tl.constexpr,
    INTEGER: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x: the map, any strides. out: (statistics, samples, channels) float64, `plane` numbers per statistic. Where CUT,
    partial: (5, spans, samples, channels) float64 instead."""
    FLOAT: tl.constexpr = x.dtype.element_ty
    SUM: tl.constexpr = PLACES[0] >= 0 or PLACES[1] >= 0
    SQUARE: tl.constexpr = PLACES[2] >= 0 or PLACES[3] >= 0
    ORDER: tl.constexpr = PLACES[4] >= 0 or PLACES[5] >= 0 or PLACES[6] >= 0
    greatest: tl.constexpr = 2 ** (INTEGER.primitive_bitwidth - 1) - 1

    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    channel = (program % tiles) * TILE + tl.arange(0, TILE)
    in_range = channel < channels
    maps = x + sample * sample_stride + channel.to(tl.int64) * channel_stride
    first = tl.program_id(1).to(tl.int64) * span
    last = tl.minimum(first + span, elements)

    total = tl.zeros([TILE, BLOCK], tl.float64)
    square = tl.zeros([TILE, BLOCK], tl.float64)
    lowest = tl.full([TILE, BLOCK], -greatest - 1, INTEGER)
    top = tl.zeros([TILE, BLOCK], INTEGER)
    peak = lowest
    positive = tl.zeros([TILE, BLOCK], tl.int32)
    for start in range(first, last, BLOCK):
        element = start + tl.arange(0, BLOCK)
        mask = in_range[:, None] & (element < last)[None, :]
        if AXES == 1:
            offset = element * stride2
        else:
            outer = element // size2
            offset = (element % size2) * stride2 + (outer % size1) * stride1 + (outer // size1) * stride0
        value = tl.load(maps[:, None] + offset[None, :], mask=mask, other=0.0)
        if SUM or SQUARE:
            wide = _widen(value, INTEGER)
            if SUM:
                total += wide
            if SQUARE:
                square += wide * wide
        if ORDER:  # as integers: NaN lies above infinity
            bits = value.to(INTEGER, bitcast=True)
            top = tl.maximum(top, (bits & greatest).to(INTEGER))
            peak = tl.maximum(peak, tl.where(mask, _ordered(bits, INTEGER), lowest))
            positive += (bits > 0).to(tl.int32)

    sum_of_map = tl.sum(total, 1)
    square_of_map = tl.sum(square, 1)
    top_of_map = _widen(tl.max(top, 1).to(INTEGER).to(FLOAT, bitcast=True), INTEGER)
    peak_of_map = _widen(_ordered(tl.max(peak, 1).to(INTEGER), INTEGER).to(FLOAT, bitcast=True), INTEGER)
    positive_of_map = tl.sum(positive, 1).to(tl.float64)
    index = sample * channels + channel
    if CUT:
        to = partial + tl.program_id(1).to(tl.int64) * plane + index
        part = tl.num_programs(1).to(tl.int64) * plane
        tl.store(to, sum_of_map, in_range)
        tl.store(to + part, square_of_map, in_range)
        tl.store(to + 2 * part, top_of_map, in_range)
        tl.store(to + 3 * part, peak_of_map, in_range)
        tl.store(to + 4 * part, positive_of_map, in_range)
    else:
        _finish(
            sum_of_map,
            square_of_map,
            top_of_map,
            peak_of_map,
            positive_of_map,
            elements,
            out,
            index,
            plane,
            in_range,
            PLACES,
        )


@triton.jit
def merge_spans_kernel(partial, out, spans, elements, plane, PLACES: tl.constexpr, TILE: tl.constexpr):
    """Accumulators of maps in several spans, in their order: partial (5, spans, samples, channels)."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = index < plane
    part = plane * spans
    total = tl.zeros([TILE], tl.float64)
    square = tl.zeros([TILE], tl.float64)
    top = tl.zeros([TILE], tl.float64)
    peak = tl.full([TILE], float("-inf"), tl.float64)
    positive = tl.zeros([TILE], tl.float64)
    for span in range(spans):
        at = partial + span * plane + index
        total += tl.load(at, mask, 0.0)
        square += tl.load(at + part, mask, 0.0)
        other = tl.load(at + 2 * part, mask, 0.0)
        top = tl.where((top >= other) | (top != top), top, other)
        higher = tl.load(at + 3 * part, mask, 0.0)
        peak = tl.where(peak >= higher, peak, higher)
        positive += tl.load(at + 4 * part, mask, 0.0)
    _finish(total, square, top, peak, positive, elements, out, index, plane, mask, PLACES)


# ---- launchers ------------------------------------------------------------------------------------------------------


def tile_of(layout: Layout) -> tuple[int, int]:
    """Channels of a tile, and elements of a block."""
    if layout.channels_are_neighbours:
        tile = min(TILE, power_of_two(layout.channels))
        return tile, min(power_of_two(layout.elements), max(1, TILE_ELEMENTS // tile))
    block = min(LONGEST_BLOCK, power_of_two(layout.elements))
    return min(power_of_two(layout.channels), TILE_ELEMENTS // block), block


def spans_of(layout: Layout, programs: int, block: int) -> tuple[int, int]:
    """Number of spans and elements of each; from shapes alone, so that every device gives the same bits."""
    most = max(1, layout.elements // LEAST_SPAN)
    wanted = min(most, -(-ENOUGH_PROGRAMS // max(1, programs)))
    span = -(-layout.elements // wanted // block) * block
    return -(-layout.elements // span), span


def pool(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor | None = None) -> Tensor:
    """As `discedit.reference.pool`, for the statistics in `NAMES`: (statistics, samples, channels), float64."""
    layout = layout_of(x, channel_axis)
    shape = (len(statistics), layout.samples, layout.channels)
    if out is None:
        out = torch.empty(shape, dtype=torch.float64, device=x.device)
    plane = layout.samples * layout.channels
    if plane == 0:
        return out
    tile, block = tile_of(layout)
    tiles = -(-layout.channels // tile)
    spans, span = spans_of(layout, layout.samples * tiles, block)
    places = tuple(statistics.index(name) if name in statistics else -1 for name in NAMES)
    partial = torch.empty(PARTS, spans, plane, dtype=torch.float64, device=x.device) if spans > 1 else out
    pool_kernel[(layout.samples * tiles, spans)](
        x,
        out,
        partial,
        layout.channels,
        tiles,
        layout.elements,
        span,
        plane,
        layout.sample_stride,
        layout.channel_stride,
        *layout.sizes[1:],
        *layout.strides,
        AXES=layout.axes,
        PLACES=places,
        CUT=spans > 1,
        INTEGER=INTEGERS[x.dtype],
        TILE=tile,
        BLOCK=block,
        **COMPILE,
    )
    if spans > 1:
        merge_spans_kernel[(-(-plane // TILE),)](
            partial, out, spans, layout.elements, plane, PLACES=places, TILE=TILE, **COMPILE
        )
    return out
