"""Whether certified scores and confidence intervals keep what they promise, over simulated data sets.

    python -m benchmarks.bench_coverage [--sets 2000] [--write]

For pairs of laws whose total variation and moments are known, each of 2,000 data sets of n samples per class is scored.
Certified scores may exceed the total variation in at most alpha of them; intervals of 95 % should hold the value that
the bound has at the exact moments in 95 % of them. Ends with status 1 where a certified score fails more often than
alpha, or an interval holds less often than 92 %. `--write` writes the tables to benchmarks/coverage.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import discedit
from benchmarks._common import machine
from discedit import ops

RESULT = Path(__file__).with_name("coverage.md")
SIZES = (20, 50, 200, 1000)
ALPHA = 0.05
CONFIDENCE = 0.95
LEAST = 0.92  # of intervals that hold
BLOCKS = 10
GRID = 2_000_000  # quantiles that stand for a law


@dataclass(frozen=True)
class Pair:
    """Two laws by their inverse distribution functions, with monotone likelihood ratio: their total variation is then
    the largest difference of their distribution functions."""

    name: str
    one: Callable[[Tensor], Tensor]
    two: Callable[[Tensor], Tensor]
    bounded: bool = False  # to [0, 1]
    positive: bool = False

    def total_variation(self) -> float:
        u = _levels()
        t = torch.cat([self.one(u), self.two(u)]).unique()
        first, second = (torch.searchsorted(law(u), t, right=True) / len(u) for law in (self.one, self.two))
        return float((first - second).abs().max())


def _levels() -> Tensor:
    return (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID


def _normal(mean: float, deviation: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda u: mean + deviation * torch.special.ndtri(u)


def _laplace(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, (2 * u).log(), -(2 * (1 - u)).log())


PAIRS = (
    Pair("equal normal", _normal(0), _normal(0)),
    Pair("normal, shift 1", _normal(0), _normal(1)),
    Pair("normal, shift 3", _normal(0), _normal(3)),
    Pair("Laplace, shift 1", _laplace, lambda u: 1 + _laplace(u)),
    Pair("exponential, scale 3", lambda u: -torch.log1p(-u), lambda u: -3 * torch.log1p(-u), positive=True),
    Pair("rectified normal, shift 1", lambda u: _normal(0)(u).relu(), lambda u: _normal(1)(u).relu(), positive=True),
    Pair("uniform, [0.3, 1]", lambda u: u, lambda u: 0.3 + 0.7 * u, bounded=True, positive=True),
    Pair("Bernoulli, 0.1 and 0.9", lambda u: (u >= 0.9).double(), lambda u: (u >= 0.1).double(), True, True),
)
UNSIGNED = ("equal normal",)  # of which the quadratic witness's separation is 0


def samples(pair: Pair, n: int, sets: int, generator: torch.Generator) -> Tensor:
    """(2 n, sets): a data set for each channel, classes one after the other."""
    u = torch.rand(2 * n, sets, generator=generator, dtype=torch.float64).clamp(1e-15, 1 - 1e-15)
    return torch.cat([pair.one(u[:n]), pair.two(u[n:])])


def exact(pair: Pair, bound: str, witness: str) -> float:
    """The bound at the moments of the laws."""
    u = _levels()
    x, labels = torch.cat([pair.one(u), pair.two(u)])[:, None], torch.arange(2 * GRID) // GRID
    return float(ops.one_vs_rest(ops.class_moments(x, labels, 2), bound=bound, witness=witness)[0, 0])


def held(scores: discedit.Scores, value: float) -> float:
    """Share of the data sets whose interval holds the value."""
    low, high = scores.interval(CONFIDENCE)["layer"][:, 0].unbind(-1)
    return float(((low <= value + 1e-12) & (value - 1e-12 <= high)).double().mean())


def moments(x: Tensor, labels: Tensor, **options: object) -> discedit.Moments:
    found = discedit.Moments(2, **options)
    found.update("layer", x, labels)
    return found


def certified(pair: Pair, x: Tensor, labels: Tensor, truth: float) -> tuple[float, float]:
    """Share of the data sets whose certified score exceeds the total variation, and the mean score."""
    if pair.bounded:
        state = ops.class_moments(x, labels, 2)
        options = {"witness": "linear", "value_range": (0, 1)}
    else:
        state = ops.class_moments(x, labels, 2, witness="exp", scale=1.0)
        options = {"witness": "exp"}
    values = ops.one_vs_rest(state, bound="certified", alpha=ALPHA, comparisons=1, **options)[:, 0]
    return float((values > truth).double().mean()), float(values.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    failures = 0
    sizes = " | ".join(f"n = {n}" for n in SIZES)
    rule = " | ".join("---" for _ in range(len(SIZES) + 2))
    intervals = [f"| laws | bound, witness, error | {sizes} |", f"| {rule} |"]
    certificates = [f"| laws | total variation | minimax, exact moments | {sizes} |", f"| {rule} | --- |"]
    for pair in PAIRS:
        truth = pair.total_variation()
        rows: dict[str, list[str]] = {}
        shown = []
        for n in SIZES:
            x, labels = samples(pair, n, arguments.sets, generator), torch.arange(2 * n) // n
            whole = moments(x, labels)
            for bound in ("minimax", "fisher"):
                scores = discedit.score(whole, bound=bound, witness="linear", errors=True)
                share = held(scores, exact(pair, bound, "linear"))
                failures += share < LEAST
                rows.setdefault(f"{bound}, linear, delta method", []).append(f"{share:.3f}")
            blocks = [moments(x[b::BLOCKS], labels[b::BLOCKS]) for b in range(BLOCKS)]
            if pair.name.startswith("Bernoulli"):  # of two values: t^2 is t
                rows.setdefault("minimax, quadratic, jackknife", []).append("-")
            else:
                share = held(discedit.score(blocks), exact(pair, "minimax", "quadratic"))
                failures += share < LEAST
                rows.setdefault("minimax, quadratic, jackknife", []).append(f"{share:.3f}")
            if pair.positive:
                wrong, mean = certified(pair, x, labels, truth)
                failures += wrong > ALPHA
                shown.append(f"{mean:.2f} ({wrong:.4f})")
        intervals += [f"| {pair.name} | {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
        if shown:
            best = exact(pair, "minimax", "linear")
            certificates.append(f"| {pair.name} | {truth:.3f} | {best:.3f} | {' | '.join(shown)} |")
        print(pair.name, f"TV {truth:.4f}", rows, shown, flush=True)
    text = f"""# Coverage

`python -m benchmarks.bench_coverage --write`: {arguments.sets:,} simulated data sets for each pair of laws and size, n
samples per class. {machine()}.

## Confidence intervals

Share of {CONFIDENCE:.0%} intervals (`Scores.interval`) that hold the value of the bound at the exact moments;
{1.96 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / arguments.sets):.3f} is two standard errors of a share. Jackknife over
{BLOCKS} blocks.

{chr(10).join(intervals)}

## Certified scores

Mean certified score at alpha = {ALPHA} for one comparison, and in brackets the share of the data sets in which it
exceeds the total variation, of which alpha are allowed. f is t itself for laws on [0, 1] and exp(-t) for the others.

{chr(10).join(certificates)}
"""
    if arguments.write:
        RESULT.write_text(text)
    print(f"{failures} shares are outside what is promised.")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
