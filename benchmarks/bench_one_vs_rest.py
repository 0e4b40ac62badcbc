"""one_vs_rest, per bound, against the torch reference.

    python -m pytest benchmarks/bench_one_vs_rest.py --benchmark-only -s

Bytes: the state is read once (classes x channels x 32 bytes), one float64 per channel and class is written.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks._common import best_of
from discedit import ops


@pytest.mark.parametrize("bound", ["fisher", "minimax"])
@pytest.mark.parametrize(("channels", "classes"), [(2048, 10), (512, 100)])
def test_one_vs_rest(benchmark: Any, channels: int, classes: int, bound: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40 * classes) % classes
    x = (
        torch.randn(len(labels), channels, generator=generator)
        + 0.5 * torch.randn(classes, channels, generator=generator)[labels]
    )
    moments = ops.class_moments(x, labels, classes)

    ours = benchmark.pedantic(lambda: ops.one_vs_rest(moments, bound=bound, backend="cpp"), rounds=9, warmup_rounds=2)

    exact = ops.one_vs_rest(moments, bound=bound, backend="reference")
    error = float((ours - exact).abs().max())
    assert error < 1e-10
    reference = best_of(lambda: ops.one_vs_rest(moments, bound=bound, backend="reference"), 3)
    seconds = benchmark.stats.stats.min
    print(
        f"\none_vs_rest  {channels} channels x {classes} classes  {bound} quadratic  "
        f"{1e9 * seconds / (channels * classes):.0f} ns per bound  {reference / seconds:.0f}x torch reference\n"
        f"bytes: reads {channels * classes * 32 / 1e6:.1f} MB, writes {channels * classes * 8 / 1e6:.1f} MB. "
        f"answer checked against reference: max error {error:.0e}."
    )
