"""Greedy elimination (the criterion "reconstruction") against its formula, which updates everything at every step.

OMP_NUM_THREADS=1 python -m pytest benchmarks/bench_elimination.py --benchmark-only -s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._common import Table, seconds
from discedit.moments.covariances import LayerMoments
from discedit.selection.importance import REDUCTION_OF, RIDGE, ConsumerStatistics

TABLE = Table(
    "elimination",
    "Order of components by what their reader loses",
    "Sizes of ResNet-50, float64, neighbouring inputs correlated. The formula (optimal brain surgery) solves for the "
    "costs of all components and updates the whole inverse and all weights at each step. Both in turns, the best of "
    "three (of one from 2,304 inputs); the order must be the same, the losses within 1e-9.",
    ("components", "kernel", "outputs", "seconds", "of the formula", "ratio"),
)
SIZES = [(width, kernel, width * (4 if kernel == 1 else 1)) for width in (64, 128, 256, 512) for kernel in (1, 3)]


def reader_of(components: int, kernel: int, outputs: int) -> ConsumerStatistics:
    generator = torch.Generator().manual_seed(components)
    inputs = components * kernel**2
    xx = torch.randn(2 * inputs, inputs, generator=generator).cumsum(1).relu().double().T.cov(correction=0)
    weights = torch.randn(outputs, inputs, generator=generator).double()
    fit = LayerMoments(xx[0], xx[0], xx, xx, ((weights @ xx) * weights).sum(1))
    return ConsumerStatistics(fit, components, weights, torch.rand(outputs, generator=generator).double())


def by_the_formula(reader: ConsumerStatistics, blocks: list[list[int]]) -> Tensor:
    xx, weights, columns = reader.fit.xx, reader.weights.clone(), reader.columns(blocks)
    inverse = torch.linalg.inv(xx + RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype))
    left, lost, total = torch.arange(len(blocks)), torch.zeros(len(blocks), dtype=xx.dtype), 0.0
    while len(left):
        index = columns[left]
        own = weights[:, index].permute(1, 2, 0)  # components, columns, outputs
        solved = torch.linalg.solve(inverse[index[:, :, None], index[:, None, :]], own)
        costs = (own * solved).sum(1) @ reader.output_weight / reader.total
        cheapest = int(costs.argmin())
        total += float(costs[cheapest])
        lost[left[cheapest]] = total
        gone, left = index[cheapest], left[left != left[cheapest]]
        gain = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weights -= weights[:, gone] @ gain
        inverse -= inverse[:, gone] @ gain
    return lost


@pytest.mark.parametrize(("components", "kernel", "outputs"), SIZES)
def test_elimination(
    benchmark: Any, table: Callable[[Table], Table], components: int, kernel: int, outputs: int
) -> None:
    parts = (reader_of(components, kernel, outputs), [[index] for index in range(components)])
    found: dict[str, Tensor] = {}
    ours = lambda: found.update(ours=REDUCTION_OF["reconstruction"]([parts]))  # noqa: E731
    formula = lambda: found.update(formula=by_the_formula(*parts))  # noqa: E731
    turns = [(seconds(ours), seconds(formula)) for _ in range(1 if components * kernel**2 >= 2304 else 3)]
    benchmark.pedantic(ours, rounds=1)
    assert found["ours"].argsort().equal(found["formula"].argsort())
    torch.testing.assert_close(found["ours"], found["formula"], rtol=1e-9, atol=0)
    mine, theirs = (min(times) for times in zip(*turns, strict=True))
    window = f"{kernel} x {kernel}"
    table(TABLE).add(f"{components}", window, f"{outputs:,}", f"{mine:.2f}", f"{theirs:.2f}", f"{theirs / mine:.1f}")
