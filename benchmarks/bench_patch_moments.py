"""patch_moments against torch's unfold with a batched matrix product, and the machine's read bandwidth.

    python -m pytest benchmarks/bench_patch_moments.py --benchmark-only -s

Maps of ResNet-50 at 224 x 224. Bytes: every element of the map is read once, in its own type, and K (K + 1) x 8 are
written for each channel of K taps. Products, K (K + 1) / 2 for each patch, cost more than that: the share of the plain
read says by how much.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._common import PlainRead, Table, against, best_of
from benchmarks.idioms import PATCHES, patch_moments
from discedit import ops

SAMPLES = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TABLE = Table(
    "patch_moments",
    "patch_moments",
    f"Batches of {SAMPLES} samples. Times the faster torch idiom for the same cell: unfold in float32 and a batched "
    "product of the patches as they are, their mean taken out afterwards, or of centred ones. Share of the plain read "
    "bandwidth (ceiling 1). Bytes: each element of the map once, in its own type. Median of 11 rounds, each paired "
    "with a plain read; every answer is checked against float64.",
    ("map", "type", "layout", "ms", "ns per patch", "of plain read", "x torch idiom", "idiom"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PATCHES)
def test_patch_moments(
    benchmark: Any, read: PlainRead, table: Callable[[Table], Table], name: str, dtype: str, layout: str
) -> None:
    shape, (kernel, stride, padding) = PATCHES[name]
    x = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0)).add_(0.5).relu_()
    x = x.to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])

    def ours() -> tuple[int, Tensor, Tensor]:
        return ops.patch_moments(x, kernel, stride=stride, padding=padding, backend="cpp")

    count, *exact = ops.patch_moments(x, kernel, stride=stride, padding=padding, backend="reference")
    ways = patch_moments(x, kernel, stride, padding)
    for moments, tolerance in ((ours()[1:], 1e-7), *((way(), 1e-4) for way in ways.values())):
        for mine, theirs in zip(moments, exact, strict=True):
            assert float((mine - theirs).abs().max()) <= tolerance * float(theirs.abs().max())

    ratios = against(benchmark, ours, read)

    size = x.numel() * x.element_size()
    seconds = stats.median(benchmark.stats.stats.data)
    times = {way: best_of(run, 3) for way, run in ways.items()}
    fastest = min(times, key=lambda way: times[way])
    table(TABLE).add(
        name,
        dtype,
        layout,
        f"{1e3 * seconds:.2f}",
        f"{1e9 * seconds / (count * shape[0]):.2f}",
        f"{stats.median(ratios) * size / read.bytes:.3f}",
        f"{times[fastest] / seconds:.1f}",
        fastest,
    )
