"""one_vs_rest, per bound, against the torch reference.

    python -m pytest benchmarks/bench_one_vs_rest.py --benchmark-only -s

Bytes: the state is read once (classes x channels x 32 bytes), one float64 per channel and class is written.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks._common import Table, best_of
from discedit import ops

TABLE = Table(
    "one_vs_rest",
    "one_vs_rest",
    "Quadratic witness; merging the rest included. The torch reference solves the same problems in float64, vectorised "
    "over channels. Every answer is checked against it. Bytes: 32 per channel and class read, 8 written.",
    ("bound", "channels", "classes", "ns per bound", "x torch reference"),
)


@pytest.mark.parametrize("bound", ["fisher", "minimax"])
@pytest.mark.parametrize(("channels", "classes"), [(2048, 10), (512, 100), (2048, 1000)])
def test_one_vs_rest(benchmark: Any, table: Callable[[Table], Table], channels: int, classes: int, bound: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40 * classes) % classes
    centres = 0.5 * torch.randn(classes, channels, generator=generator)
    moments = ops.ClassMoments.empty(classes, channels)
    for part in labels.split(4000):
        x = torch.randn(len(part), channels, generator=generator) + centres[part]
        ops.class_moments(x, part, classes, out=moments)

    exact = ops.one_vs_rest(moments, bound=bound, backend="reference")
    assert float((ops.one_vs_rest(moments, bound=bound, backend="cpp") - exact).abs().max()) < 1e-10

    benchmark.pedantic(lambda: ops.one_vs_rest(moments, bound=bound, backend="cpp"), rounds=9, warmup_rounds=2)

    seconds = stats.median(benchmark.stats.stats.data)
    reference = best_of(lambda: ops.one_vs_rest(moments, bound=bound, backend="reference"), 2)
    table(TABLE).add(
        bound,
        f"{channels:,}",
        f"{classes:,}",
        f"{1e9 * seconds / (channels * classes):.1f}",
        f"{reference / seconds:.0f}",
    )
