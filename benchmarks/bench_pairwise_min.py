"""pairwise_min over all pairs of classes, against the torch closed form over the same pairs.

    python -m pytest benchmarks/bench_pairwise_min.py --benchmark-only -s

Bytes: the state is read once (classes x channels x 32 bytes); 24 bytes per channel are written. Peak memory is that of
the process beyond state and outputs, measured in a fresh process.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._common import Table, best_of, in_a_fresh_process
from discedit import ops
from discedit.common.state import ClassMoments

TABLE = Table(
    "pairwise_min",
    "pairwise_min: the smallest bound over all pairs of classes",
    "Quadratic witness, 1,000 classes: 499,500 pairs per channel. `spread`: class means as far apart as samples "
    "of a class "
    "are, as real channels have them. `one mean`: all class means equal, the worst case, where no pair can be left out "
    "for its means. Rate: pairs answered for per second; pairs that a cheaper lower bound rules out count. The "
    "rival is "
    "torch's closed form (fisher) over the same pairs, streamed class by class, on 64 channels. A sample of "
    "channels is "
    "checked against the reference.",
    ("bound", "data", "channels", "seconds", "M pairs/s", "x torch closed form", "peak memory, MB"),
)
CLASSES = 1000


def state(channels: int, data: str) -> ClassMoments:
    """A state as a layer of gamma-distributed features would leave it after 50 samples per class."""
    generator = torch.Generator().manual_seed(channels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(CLASSES, channels, generator=generator, dtype=torch.float64)

    count = torch.full((CLASSES,), 50)
    n = count.double()[:, None]
    mean = uniform(1.0, 2.0) if data == "spread" else torch.ones(CLASSES, channels, dtype=torch.float64)
    deviation = uniform(0.2, 0.6)
    skewness, excess = uniform(0.5, 1.5), uniform(0.5, 3.0)
    kurtosis = 3 + excess + skewness**2  # any law has at least 1 + skewness^2
    return ClassMoments(count, mean, n * deviation**2, n * skewness * deviation**3, n * kurtosis * deviation**4)


def torch_closed_form(moments: ClassMoments) -> Tensor:
    """The smallest F / (2 + F) over all pairs, one class against all later ones at a time."""
    n = moments.count.double()[:, None]
    shift = moments.mean.mean(0)
    mean = moments.mean - shift
    m2, m3, m4 = moments.m2 / n, moments.m3 / n, moments.m4 / n
    square = m2 + mean**2
    cross = m3 + 2 * mean * m2
    tail = m4 - m2**2 + 4 * mean * m3 + 4 * mean**2 * m2
    best = torch.full_like(shift, torch.inf)
    for k in range(moments.num_classes - 1):
        d1, d2 = mean[k] - mean[k + 1 :], square[k] - square[k + 1 :]
        a, b, c = m2[k] + m2[k + 1 :], cross[k] + cross[k + 1 :], tail[k] + tail[k + 1 :]
        ratio = (c * d1 * d1 - 2 * b * d1 * d2 + a * d2 * d2) / (a * c - b * b)
        best = torch.minimum(best, (ratio / (2 + ratio)).amin(0))
    return best


def over_every_pair(moments: ClassMoments, channel: int, bound: str) -> float:
    """The minimum for one channel, with every pair's bound worked out on its own."""
    n = moments.count.double()
    mean, m2, m3, m4 = (part[:, channel] for part in moments.tensors()[1:])
    mean, m2, m3, m4 = mean - mean.mean(), m2 / n, m3 / n, m4 / n
    means = torch.stack([mean, m2 + mean**2], dim=1)
    cross = m3 + 2 * mean * m2
    tail = m4 - m2**2 + 4 * mean * m3 + 4 * mean**2 * m2
    covariances = torch.stack([torch.stack([m2, cross], 1), torch.stack([cross, tail], 1)], 1)
    one, two = torch.triu_indices(len(n), len(n), 1)
    solver = {"fisher": ops.fisher_bound, "minimax": ops.minimax_bound}[bound]
    return float(solver(means[one], covariances[one], means[two], covariances[two]).min())


PEAK = """
    from benchmarks._common import peak_of, resident
    from benchmarks.bench_pairwise_min import state
    from discedit import ops
    moments = state({channels}, "{data}")
    ops.pairwise_min(state(8, "{data}"), bound="{bound}")  # threads and code are there
    before = resident()
    peak, _ = peak_of(lambda: ops.pairwise_min(moments, bound="{bound}"))
    print((peak - before) / 1e6)
"""


def peak_memory(channels: int, data: str, bound: str) -> float:
    """MB that a call adds to a fresh process, its small outputs included."""
    (megabytes,) = in_a_fresh_process(PEAK.format(channels=channels, data=data, bound=bound))
    return megabytes


@pytest.fixture(scope="module")
def rival() -> dict[str, float]:
    return {}


@pytest.mark.parametrize("channels", [2048, 26560])
@pytest.mark.parametrize("data", ["spread", "one mean"])
@pytest.mark.parametrize("bound", ["fisher", "minimax"])
def test_pairwise_min(
    benchmark: Any, table: Callable[[Table], Table], rival: dict[str, float], bound: str, data: str, channels: int
) -> None:
    moments = state(channels, data)
    values, pair = ops.pairwise_min(moments, bound=bound, backend="cpp")
    for channel in (0, channels // 2, channels - 1):
        assert abs(float(values[channel]) - over_every_pair(moments, channel, bound)) < 1e-9
    assert bool((pair[:, 0] < pair[:, 1]).all())

    benchmark.pedantic(
        lambda: ops.pairwise_min(moments, bound=bound, backend="cpp"), rounds=5 if channels < 10_000 else 3
    )

    seconds = stats.median(benchmark.stats.stats.data)
    pairs = CLASSES * (CLASSES - 1) // 2
    if data not in rival:
        some = ClassMoments(moments.count, *(part[:, :64].contiguous() for part in moments.tensors()[1:]))
        rival[data] = 64 * pairs / best_of(lambda: torch_closed_form(some), 3)
    rate = channels * pairs / seconds
    table(TABLE).add(
        bound,
        data,
        f"{channels:,}",
        f"{seconds:.2f}",
        f"{rate / 1e6:,.0f}",
        f"{rate / rival[data]:.0f}",
        f"{peak_memory(channels, data, bound):.0f}",
    )
