"""class_moments against the machine's read bandwidth and the torch idiom.

    python -m pytest benchmarks/bench_class_moments.py --benchmark-only -s

Bytes: every element of the map is read once in its own type; the state written is classes x channels x 40 bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._common import best_of, read_bandwidth
from discedit import ops, reference
from discedit._state import ClassMoments

CLASSES = 10
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def torch_idiom(x: Tensor, labels: Tensor) -> list[Tensor]:
    """What a user would write: pool, then sums of powers per class with index_add."""
    pooled = x.mean((2, 3)).double()
    sums = [
        torch.zeros(CLASSES, x.shape[1], dtype=torch.float64).index_add_(0, labels, pooled**p) for p in (1, 2, 3, 4)
    ]
    return [torch.bincount(labels, minlength=CLASSES), *sums]


@pytest.fixture(scope="module")
def ceiling() -> float:
    return read_bandwidth()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (64, 1024, 14, 14)])
def test_class_moments(benchmark: Any, ceiling: float, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(0, CLASSES, (shape[0],), generator=generator)

    ours = benchmark.pedantic(lambda: ops.class_moments(x, labels, CLASSES, backend="cpp"), rounds=9, warmup_rounds=2)

    exact = ClassMoments.empty(CLASSES, shape[1])
    reference.class_moments(x, 1, labels, exact)
    worst = 0.0
    for mine, theirs in zip(ours.tensors()[1:], exact.tensors()[1:], strict=True):
        scale = theirs.abs().max()
        worst = max(worst, float(((mine - theirs).abs().max()) / scale))
    assert worst < 1e-12
    assert torch.equal(ours.count, exact.count)

    size = x.numel() * x.element_size()
    rate = size / benchmark.stats.stats.min
    idiom = best_of(lambda: torch_idiom(x, labels), 3)
    print(
        f"\nclass_moments  {shape} {str(dtype)[6:]} {layout}  {rate / ceiling:.0%} of read  "
        f"{idiom / benchmark.stats.stats.min:.1f}x torch idiom\n"
        f"bytes: reads x once ({size / 1e6:.1f} MB), writes {CLASSES * shape[1] * 40 / 1e3:.0f} kB state. "
        f"answer checked against reference: max rel err {worst:.0e}."
    )
