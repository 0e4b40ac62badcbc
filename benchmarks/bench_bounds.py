"""The bounds from explicit means and covariances, against torch and CVXPY.

    python -m pytest benchmarks/bench_bounds.py --benchmark-only -s

Bytes per pair: 2 d + 2 d^2 float64 read, one written.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks._common import PlainRead, Table, against, best_of
from discedit import ops

TABLE = Table(
    "bounds",
    "Batched bounds from means and covariances",
    "Pairs of laws per second in float64, and times the rival's rate. Bytes per pair: 2 d + 2 d^2 float64 read, one "
    "written. Median of 11 rounds, the torch rivals run in turns with ours; CVXPY on 40 pairs. Every answer is checked "
    "against the rival's.",
    ("bound", "pairs", "ours, M pairs/s", "of plain read", "rival", "rival, M pairs/s", "ratio"),
)


def of_plain_read(rate: float, d: int, read: PlainRead) -> str:
    """The bandwidth that `rate` pairs per second take of what a plain read gets."""
    return f"{rate * 8 * (2 * d + 2 * d * d + 1) / read.rate():.2f}"


def laws(pairs: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def covariance() -> Tensor:
        root = randn(pairs, d, d)
        return root @ root.transpose(1, 2) / d + 0.1 * torch.eye(d, dtype=torch.float64)

    return randn(pairs, d), covariance(), randn(pairs, d), covariance()


def closed_form(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Fisher for d = 2 by Cramer's rule, a handful of elementwise ops."""
    total = cov1 + cov2
    a, b, c = total[:, 0, 0], total[:, 0, 1], total[:, 1, 1]
    d1, d2 = (mean1 - mean2).unbind(1)
    ratio = (c * d1 * d1 - 2 * b * d1 * d2 + a * d2 * d2) / (a * c - b * b)
    return ratio / (2 + ratio)


def cholesky(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    delta = (mean1 - mean2)[:, :, None]
    ratio = (delta * torch.cholesky_solve(delta, torch.linalg.cholesky(cov1 + cov2))).sum((1, 2))
    return ratio / (2 + ratio)


def linear_solve(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    delta = mean1 - mean2
    ratio = (delta * torch.linalg.solve(cov1 + cov2, delta)).sum(1)
    return ratio / (2 + ratio)


RIVALS = {"torch closed form": closed_form, "torch Cholesky solve": cholesky, "torch.linalg.solve": linear_solve}


@pytest.mark.parametrize(
    ("d", "pairs", "rival"),
    [
        (2, 1_000_000, "torch closed form"),
        (2, 1_000_000, "torch.linalg.solve"),
        (4, 200_000, "torch Cholesky solve"),
        (8, 100_000, "torch Cholesky solve"),
    ],
)
def test_fisher(
    benchmark: Any, read: PlainRead, table: Callable[[Table], Table], d: int, pairs: int, rival: str
) -> None:
    given = laws(pairs, d)
    theirs = RIVALS[rival]
    assert float((ops.fisher_bound(*given, backend="cpp") - theirs(*given)).abs().max()) < 1e-9

    ratios = against(benchmark, lambda: ops.fisher_bound(*given, backend="cpp"), lambda: theirs(*given))

    ratio = stats.median(ratios)
    rate = pairs / stats.median(benchmark.stats.stats.data)
    table(TABLE).add(
        f"fisher {d} x {d}",
        f"{pairs:,}",
        f"{rate / 1e6:.1f}",
        of_plain_read(rate, d, read),
        rival,
        f"{rate / ratio / 1e6:.2f}",
        f"{ratio:.1f}",
    )


def second_order_cone(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """minimax as a user of CVXPY states it: one problem per pair of laws."""
    import cvxpy

    u = cvxpy.Variable(len(mean1))
    roots = [np.linalg.cholesky(cov).T for cov in (cov1, cov2)]
    problem = cvxpy.Problem(cvxpy.Minimize(sum(cvxpy.norm(root @ u) for root in roots)), [(mean1 - mean2) @ u == 1])
    k = 1 / problem.solve()
    return float(k * k / (1 + k * k))


@pytest.mark.parametrize("d", [2, 8])
def test_minimax(benchmark: Any, read: PlainRead, table: Callable[[Table], Table], d: int) -> None:
    pytest.importorskip("cvxpy")
    pairs, few = (1_000_000 if d == 2 else 100_000), 40
    given = laws(pairs, d)
    ours = ops.minimax_bound(*given, backend="cpp")
    arrays = [value[:few].numpy() for value in given]

    def theirs() -> list[float]:
        return [second_order_cone(*law) for law in zip(*arrays, strict=True)]

    assert np.abs(ours[:few].numpy() - np.array(theirs())).max() < 1e-6

    benchmark.pedantic(lambda: ops.minimax_bound(*given, backend="cpp"), rounds=11, warmup_rounds=2)

    rate = pairs / stats.median(benchmark.stats.stats.data)
    rival = few / best_of(theirs, 3)
    table(TABLE).add(
        f"minimax {d} x {d}",
        f"{pairs:,}",
        f"{rate / 1e6:.1f}",
        of_plain_read(rate, d, read),
        "CVXPY",
        f"{rival / 1e6:.5f}",
        f"{rate / rival:,.0f}",
    )
