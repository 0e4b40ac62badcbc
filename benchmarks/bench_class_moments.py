"""class_moments against the machine's read bandwidth and the best torch idiom.

    python -m pytest benchmarks/bench_class_moments.py --benchmark-only -s

Every round is paired with a plain read of 200 MB in the same process. Bytes: every element of the map is read once, in
its own type; the pooled features (8 bytes per sample, channel and statistic) stay in the caches, and the state is
classes x channels x 40 bytes (mean) or x 80 (three statistics).
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._common import PlainRead, Table, against, best_of
from benchmarks.idioms import CLASSES, LAYOUTS, STATISTICS, feature_map, pooling, sums_per_class
from discedit import ops, reference
from discedit.backends import select

SHAPES = {"56x56x256": (64, 256, 56, 56), "14x14x1024": (256, 1024, 14, 14), "197x768": (256, 768, 197)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TABLE = Table(
    "class_moments",
    "class_moments",
    "Share of the plain read bandwidth (ceiling 1), and times the best torch idiom for the same cell. Bytes: "
    "each element "
    "of the map once, in its own type. Batches of 64, 256 and 256 samples. Median of 11 rounds, each paired with "
    "a plain "
    "read; every answer is checked against float64.",
    ("map", "type", "layout", "statistics", "GB/s", "plain read, GB/s", "of plain read", "x torch idiom", "idiom"),
)


@pytest.fixture(scope="module")
def cached() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_class_moments(
    benchmark: Any,
    read: PlainRead,
    table: Callable[[Table], Table],
    cached: dict[str, Any],
    shape: str,
    dtype: str,
    layout: str,
    statistics: str,
) -> None:
    if cached.get("key") != (shape, dtype, layout):
        cached["key"] = (shape, dtype, layout)
        cached["map"] = feature_map(SHAPES[shape], DTYPES[dtype], layout)
    x, named = cached["map"]
    labels = torch.arange(len(x)) % CLASSES
    names = STATISTICS[statistics]
    options: dict[str, Any] = {"layout": named}
    options |= {"statistic": names[0]} if len(names) == 1 else {"statistic": names, "witness": "vector"}
    state = ops.class_moments(x, labels, CLASSES, backend="cpp", **options)
    check(state, x, named, labels, names)

    ratios = against(
        benchmark, lambda: ops.class_moments(x, labels, CLASSES, out=state, backend="cpp", **options), read
    )

    size = x.numel() * x.element_size()
    share = stats.median(ratios) * size / read.bytes
    seconds = stats.median(benchmark.stats.stats.data)
    ways = pooling(x, named, names)
    times = {way: best_of(lambda pool=pool: sums_per_class(pool(), labels), 2) for way, pool in ways.items()}
    fastest = min(times, key=lambda way: times[way])
    table(TABLE).add(
        shape,
        dtype,
        layout,
        statistics,
        f"{size / seconds / 1e9:.1f}",
        f"{size / seconds / share / 1e9:.1f}",
        f"{share:.2f}",
        f"{times[fastest] / seconds:.1f}",
        fastest,
    )


LIMITS = Table(
    "class_moments_limits",
    "What the instructions alone allow",
    "One sample of 14x14x1024 pooled 16 times over on one core, from its own cache, and the fold of 32 samples' pooled "
    "features likewise. Last column: what all cores would then read over the plain read, if memory gave everything at "
    "once. Where it is well above 1 and the cell above stays below, the rest is memory: streams that several rows "
    "share, and pooled features that leave the cache before they are folded.",
    ("type", "layout", "statistics", "pool, GB/s per core", "fold, ns per value", "all cores over plain read"),
)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_limits(
    benchmark: Any, read: PlainRead, table: Callable[[Table], Table], dtype: str, layout: str, statistics: str
) -> None:
    cores, names = torch.get_num_threads(), STATISTICS[statistics]
    x = feature_map((1, *SHAPES["14x14x1024"][1:]), DTYPES[dtype], layout)[0].expand(16, -1, -1, -1)
    planes = torch.empty(len(names), *x.shape[:2], dtype=torch.float64)
    pooled = torch.randn(len(names), 32, x.shape[1], dtype=torch.float64)
    labels = torch.arange(pooled.shape[1]) % CLASSES
    shape = (CLASSES, x.shape[1])
    state = ops.VectorMoments.empty(len(names), *shape) if len(names) > 1 else ops.ClassMoments.empty(*shape)
    pool, fold = (select(op, "cpp", x.device) for op in ("pool", "fold_moments"))
    torch.set_num_threads(1)
    try:
        folding = best_of(lambda: fold(pooled, 0.0, labels, state), 50) / pooled.numel()
        benchmark.pedantic(lambda: pool(x, 1, names, planes), rounds=100, warmup_rounds=5)
    finally:
        torch.set_num_threads(cores)
    assert int(state.count.sum()) == 51 * pooled.shape[1]
    torch.testing.assert_close(planes, reference.pool(x, 1, names), rtol=1e-6, atol=1e-6)
    pooling = benchmark.stats.stats.min
    size, values = x.numel() * x.element_size(), x.shape[1] * len(names)
    rate = cores * size / (pooling + folding * values)
    table(LIMITS).add(
        dtype,
        layout,
        statistics,
        f"{size / pooling / 1e9:.1f}",
        f"{folding * 1e9:.2f}",
        f"{rate / read.rate():.2f}",
    )


def check(state: Any, x: Tensor, layout: str, labels: Tensor, names: tuple[str, ...]) -> None:
    """Against float64 in torch, a few samples at a time."""
    axis = 2 if layout == "tokens" else 1
    pooled = torch.cat([reference.pool(part, axis, names) for part in x.split(16)], dim=1)
    shape = (CLASSES, pooled.shape[2])
    exact = ops.VectorMoments.empty(len(names), *shape) if len(names) > 1 else ops.ClassMoments.empty(*shape)
    reference.fold_moments(pooled, 0.0, labels, exact)
    assert torch.equal(state.count, exact.count)
    tolerance = 1e-6 if x.element_size() == 2 else 1e-10  # 16-bit elements are added in fours in float32
    for mine, theirs in zip(state.tensors()[1:], exact.tensors()[1:], strict=True):
        assert float((mine - theirs).abs().max()) <= tolerance * float(theirs.abs().max())
