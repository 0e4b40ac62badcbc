"""Whether the bounds are bounds, how tight they are, how near to an exact optimum, and what each of them costs.

    python -m benchmarks.bench_validity                           # everything, prints the tables
    python -m benchmarks.bench_validity --parts laws --pairs 1000000
    python -m benchmarks.bench_validity --write                   # and writes what was measured to benchmarks/bounds.md

Parts: `laws` compares every bound with the exact total variation of random pairs of discrete laws, `cvxpy`, `plane` and
`mpmath` compare the solvers with convex programming, with a search over all directions of the plane and with 40 digits,
and `cost` times every bound with every witness. The exit status is 1 where a bound exceeds the total variation, or
where a solver is further from its oracle than it may be.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks._common import Table, machine, seconds
from discedit import ops
from discedit.backends import arguments
from discedit.common.state import ClassMoments, State, VectorMoments

PAGE = Path(__file__).with_name("bounds.md")
CSRC = Path(__file__).parent.parent / "csrc"
ATOMS = (2, 3, 4, 6, 10, 25, 64)
DIMENSIONS = (1, 2, 3, 8)
RADII = (0.01, 0.3, 3.0)  # of robust, in units of the largest deviation of a coordinate
RHOS = (0.0, 0.5)
ALLOWED = 1e-9  # what a bound may exceed the exact total variation by
NO_BOUND = "hellinger"
Moments = tuple[Tensor, Tensor, Tensor, Tensor]  # mean1, cov1, mean2, cov2
Array = np.ndarray[Any, Any]

# ---- pairs of discrete laws -----------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Pairs of laws on common atoms."""

    p: Tensor  # (pairs, atoms)
    q: Tensor
    values: Tensor  # (pairs, atoms, d)

    def moments(self) -> Moments:
        mean1, cov1 = law(self.p, self.values)
        mean2, cov2 = law(self.q, self.values)
        return mean1, cov1, mean2, cov2

    def total_variation(self) -> Tensor:
        """Of the laws of the values: atoms that have the same value are one."""
        same = (self.values[:, :, None] == self.values[:, None]).all(-1).double()
        moved = (same @ (self.p - self.q)[..., None])[..., 0].abs()
        return (moved / same.sum(-1)).sum(-1) / 2


def law(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of values (..., atoms, d) under weights (..., atoms)."""
    mean = (weights[..., None] * values).sum(-2)
    centred = values - mean[..., None, :]
    return mean, (weights[..., None] * centred).mT @ centred


def random_weights(pairs: int, atoms: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Generic, sparse, nearly equal, far from even, disjoint, one or both of them constant, and a mixture with a small
    share of something else: an eighth of the pairs each."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    p = torch.empty(2, pairs, atoms, dtype=torch.float64).exponential_(generator=generator)
    kind = (torch.arange(pairs) % 8)[:, None]
    keep = uniform(2, pairs, atoms) < 0.4
    keep[..., 0] |= ~keep.any(-1)
    p = torch.where(kind == 1, p * keep, p)
    p[1] = torch.where(kind == 2, p[0] * (1 + 1e-6 * (uniform(pairs, atoms) - 0.5)), p[1])
    p = torch.where(kind == 3, p**6, p)
    side = uniform(pairs, atoms) < 0.5
    side[:, 0], side[:, 1] = True, False
    p = torch.where(kind == 4, p * torch.stack([side, ~side]), p)
    alone = torch.nn.functional.one_hot((uniform(2, pairs) * atoms).long(), atoms).double()
    p[0] = torch.where((kind == 5) | (kind == 6), alone[0], p[0])
    p[1] = torch.where(kind == 6, alone[1], p[1])
    p = p / p.sum(-1, keepdim=True)
    share = 10 ** (-6 * uniform(pairs, 1))
    p[1] = torch.where(kind == 7, (1 - share) * p[0] + share * p[1], p[1])
    p = p / p.sum(-1, keepdim=True)
    return p[0], p[1]


def random_values(pairs: int, atoms: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Coordinates: normal, with heavy tails (a fifth power, Cauchy), few distinct values, far from 0, rarely on,
    constant. In several dimensions also squares of each other and linear functions of each other."""
    shape = (pairs, atoms, dimension)
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 15, (pairs, 1, dimension), generator=generator)
    t = torch.where(kind == 1, t**5, t)
    t = torch.where(kind == 2, torch.empty_like(t).cauchy_(generator=generator), t)
    t = torch.where(kind == 3, (2 * t).round().clamp(-1, 1), t)
    t = torch.where(kind == 4, t + 50, t)
    t = torch.where(kind == 5, t.clamp(min=1) - 1, t)
    t = torch.where(kind == 6, 1e6 * t + 1e9, t)
    t = torch.where(kind == 14, 0.1, t)
    if dimension > 1:
        kind = torch.randint(0, 4, (pairs, 1), generator=generator)
        t[..., 1] = torch.where(kind == 1, t[..., 0] ** 2, t[..., 1])
        t[..., -1] = torch.where(kind == 2, 3 * t[..., 0] - t[..., -2], t[..., -1])
        t[..., -1] = torch.where(kind == 3, t[..., 0], t[..., -1])
    return t


def random_pairs(pairs: int, atoms: int, dimension: int, generator: torch.Generator) -> Pairs:
    p, q = random_weights(pairs, atoms, generator)
    return Pairs(p, q, random_values(pairs, atoms, dimension, generator))


def state_of(pairs: Pairs, samples: int = 1000) -> ClassMoments:
    """Two classes whose laws these are (d = 1), one pair in each channel."""
    rows = []
    for weights in (pairs.p, pairs.q):
        t = pairs.values[..., 0]
        anchor = t.gather(1, weights.argmax(1, keepdim=True))  # of a constant, exact zeros are left
        y = t - anchor
        mean = anchor[:, 0] + (weights * y).sum(-1)
        y = y - (weights * y).sum(-1, keepdim=True)
        rows.append([mean, *(samples * (weights * y**power).sum(-1) for power in (2, 3, 4))])
    parts = [torch.stack(part) for part in zip(*rows, strict=True)]
    return ClassMoments(torch.tensor([samples, samples]), *parts)


def misjudged(moments: Moments, radius: Tensor, rho: float, generator: torch.Generator) -> Moments:
    """Moments whose means are off by up to `radius` each, and whose variances are too small, together by up to rho."""
    mean1, cov1, mean2, cov2 = moments
    means, covariances = [], []
    for mean, cov in ((mean1, cov1), (mean2, cov2)):
        step = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        reach = radius * torch.rand(radius.shape, generator=generator, dtype=torch.float64)
        means.append(mean + step / step.norm(dim=-1, keepdim=True) * reach[:, None])
        trace = torch.diagonal(cov, dim1=-2, dim2=-1).sum(-1)
        share = torch.where(trace > 0, (rho / 2 / trace).clamp(max=1), 0.0)
        covariances.append(cov * (1 - share)[:, None, None])
    return means[0], covariances[0], means[1], covariances[1]


def bounds_of(pairs: Pairs, generator: torch.Generator, backend: str = "auto") -> Iterator[tuple[str, Tensor]]:
    """Every bound that the laws' dimension has, by name, (pairs,) each. `robust` also gets moments that are wrong by as
    much as it allows for."""
    moments = pairs.moments()
    yield "fisher", ops.fisher_bound(*moments, backend=backend)
    yield "minimax", ops.minimax_bound(*moments, backend=backend)
    yield "minimax_published", ops.minimax_bound(*moments, published=True, backend=backend)
    yield "hellinger", ops.hellinger_bound(*moments, backend=backend)
    largest = torch.diagonal(moments[1] + moments[3], dim1=-2, dim2=-1).amax(-1).sqrt()
    for size in RADII:
        for rho in RHOS:
            for given, what in ((moments, ""), (misjudged(moments, size * largest, rho, generator), ", wrong moments")):
                reach = size * largest
                bound = ops.robust_bound(*given, radius1=reach, radius2=reach, rho=rho, backend=backend)
                yield f"robust{what}", bound
    if pairs.values.shape[-1] == 1:
        f = pairs.values[..., 0]
        raw = [moment for w in (pairs.p, pairs.q) for moment in ((w * f).sum(-1), (w * f * f).sum(-1))]
        yield "witness", ops.witness_bound(*raw, backend=backend)
        yield "witness_published", ops.witness_bound(*raw, published=True, backend=backend)


def bounds_of_state(pairs: Pairs, backend: str = "auto") -> Iterator[tuple[str, Tensor]]:
    """Of the witness (t, t^2), through central moments of t."""
    state = state_of(pairs)
    for bound in ("fisher", "minimax", "minimax_published", "robust", "hellinger"):
        yield bound, ops.one_vs_rest(state, bound=bound, witness="quadratic", backend=backend)[:, 0]


@dataclass
class Tally:
    """What was seen of one bound."""

    pairs: int = 0
    violations: int = 0
    worst: float = -math.inf  # largest bound - total variation
    ratios: float = 0.0  # sum of bound / total variation, where that is not 0
    counted: int = 0
    least: float = math.inf

    def add(self, bound: Tensor, exact: Tensor) -> None:
        assert not bool(bound.isnan().any()), "NaN from finite moments"
        excess = bound - exact
        self.pairs += len(bound)
        self.violations += int((excess > ALLOWED).sum())
        self.worst = max(self.worst, float(excess.max()))
        ratio = (bound / exact)[exact > 1e-9]
        self.ratios += float(ratio.sum())
        self.counted += len(ratio)
        self.least = min(self.least, float(ratio.min()))


def check_laws(number: int) -> tuple[list[Table], list[str]]:
    """`number` pairs for each dimension, and as many for the witness (t, t^2)."""
    table = Table(
        "laws",
        "Against the exact total variation",
        "Random pairs of discrete laws with 2 to 64 atoms: generic, sparse, nearly equal, far from even, disjoint, "
        "constant, and with a small share of something else; values normal, with heavy tails, few, far from 0, rarely "
        "on, constant, squares and linear functions of each other. Violations: bound > exact total variation + 1e-9. "
        "Tightness: bound over total variation, on average over these pairs and at worst. `robust`: radii of 0.01, 0.3 "
        "and 3 of the largest deviation with rho 0 and 0.5, at the true moments, and at moments that are wrong by up "
        "to that much. (t, t^2): `quadratic`, through central moments of t. `hellinger` claims nothing: its violations "
        "show that it is no bound.",
        ("bound", "d", "values", "violations", "worst excess", "mean tightness", "worst tightness"),
    )
    failures = []
    for dimension in (*map(str, DIMENSIONS), "(t, t^2)"):
        generator = torch.Generator().manual_seed(len(dimension))
        tallies: dict[str, Tally] = {}
        share = math.ceil(number / len(ATOMS))
        for atoms in ATOMS:
            for start in range(0, share, chunk := max(64, 400_000 // atoms**2 * 4)):
                d = 1 if dimension == "(t, t^2)" else int(dimension)
                pairs = random_pairs(min(chunk, share - start), atoms, d, generator)
                exact = pairs.total_variation()
                found = bounds_of_state(pairs) if dimension == "(t, t^2)" else bounds_of(pairs, generator)
                for name, bound in found:
                    tallies.setdefault(name, Tally()).add(bound, exact)
        for name, tally in tallies.items():
            if tally.violations and name != NO_BOUND:
                failures.append(f"{name}, d = {dimension}: {tally.violations} violations, worst {tally.worst:.3g}")
            mean = tally.ratios / tally.counted
            table.add(
                name if name != NO_BOUND else f"{name} (no bound)",
                dimension,
                f"{tally.pairs:,}",
                f"{tally.violations:,}",
                f"{tally.worst:.1e}",
                *(("", "") if name == NO_BOUND else (f"{mean:.3f}", f"{tally.least:.1g}")),
            )
    return [table], failures


# ---- oracles --------------------------------------------------------------------------------------------------------


def random_problems(problems: int, d: int, generator: torch.Generator, spread: float = 2.0) -> Moments:
    """Covariances of full rank, of which one may be larger than the other by up to 10^(2 spread)."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    root = torch.randn(2, problems, d, d, generator=generator, dtype=torch.float64)
    cov = (root @ root.mT / d + 0.05 * torch.eye(d, dtype=torch.float64)) * 10 ** uniform(
        -spread, spread, 2, problems, 1, 1
    )
    mean = torch.randn(2, problems, d, generator=generator, dtype=torch.float64) * 10 ** uniform(-1, 1, problems, 1)
    return mean[0], cov[0], mean[1], cov[1]


TOLERANCES = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}


class Minimax:
    """k as a second-order cone program: the least sqrt(u'S1 u) + sqrt(u'S2 u) with u'delta = 1 is 1 / k."""

    def __init__(self, d: int) -> None:
        import cvxpy

        self.roots = [cvxpy.Parameter((d, d)) for _ in range(2)]
        self.delta = cvxpy.Parameter(d)
        u = cvxpy.Variable(d)
        total = sum(cvxpy.norm(root @ u) for root in self.roots)
        self.problem = cvxpy.Problem(cvxpy.Minimize(total), [self.delta @ u == 1])

    def __call__(self, mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
        unit = math.sqrt(np.trace(cov1 + cov2))
        size = float(np.linalg.norm(mean1 - mean2))
        for root, cov in zip(self.roots, (cov1, cov2), strict=True):
            root.value = np.linalg.cholesky(cov).T / unit
        self.delta.value = (mean1 - mean2) / size
        k = size / (solved(self.problem) * unit)
        return k**2 / (1 + k**2)


class Robust:
    """The least F over differences of the means within a ball, F / (2 + F)."""

    def __init__(self, d: int) -> None:
        import cvxpy

        self.whiten = cvxpy.Parameter((d, d))
        self.start = cvxpy.Parameter(d)
        self.radius = cvxpy.Parameter(nonneg=True)
        v = cvxpy.Variable(d)
        objective = cvxpy.Minimize(cvxpy.norm(self.start + self.whiten @ v))
        self.problem = cvxpy.Problem(objective, [cvxpy.norm(v) <= self.radius])

    def __call__(self, mean1: Array, cov1: Array, mean2: Array, cov2: Array, radius: float, rho: float) -> float:
        total = cov1 + cov2 + rho * np.eye(len(mean1))
        whiten = np.linalg.inv(np.linalg.cholesky(total))
        unit = float(np.linalg.norm(whiten))
        size = float(np.linalg.norm(mean1 - mean2))
        self.whiten.value = whiten / unit
        self.start.value = whiten @ (mean1 - mean2) / (unit * size)
        self.radius.value = radius / size
        root = solved(self.problem) * unit * size
        return root**2 / (2 + root**2)


def solved(problem: Any) -> float:
    """The optimum, or NaN where the solver does not call it accurate."""
    import cvxpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an inaccurate solution
        try:
            problem.solve(solver="CLARABEL", **TOLERANCES)
        except cvxpy.SolverError:
            return math.nan
    return float(problem.value) if problem.status == "optimal" else math.nan


def best_in_the_plane(moments: Moments) -> Tensor:
    """minimax for d = 2 by golden section over the angle of u, in units in which cov1 + cov2 is the identity. Along
    the angle the ratio has one maximum: a linear function over a convex one."""
    mean1, cov1, mean2, cov2 = (part.numpy() for part in moments)
    whiten = np.linalg.inv(np.linalg.cholesky(cov1 + cov2))
    delta = (whiten @ (mean1 - mean2)[..., None])[..., 0]
    covariances = [whiten @ cov @ whiten.swapaxes(1, 2) for cov in (cov1, cov2)]
    heading = np.arctan2(delta[:, 1], delta[:, 0])

    def ratio(angle: Array) -> Array:
        u = np.stack([np.cos(heading + angle), np.sin(heading + angle)], -1)
        first, second = (np.sqrt(np.einsum("ni,nij,nj->n", u, cov, u).clip(0)) for cov in covariances)
        return np.asarray((u * delta).sum(-1) / (first + second))

    low, high = np.full_like(heading, -math.pi / 2), np.full_like(heading, math.pi / 2)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - golden * (high - low), low + golden * (high - low)
        rising = ratio(left) < ratio(right)
        low, high = np.where(rising, left, low), np.where(rising, high, right)
    k2 = ratio((low + high) / 2) ** 2
    return torch.from_numpy(k2 / (1 + k2))


class Exact(NamedTuple):
    """In 40 digits."""

    fisher: Any
    minimax: Any
    robust: Any
    hellinger: Any


def exact_bounds(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, radius: float) -> Exact:
    """Of one pair of laws, its moments taken as they are: mpmath, from eigenvectors."""
    import mpmath
    from mpmath import mp, mpf

    def matrix(values: Tensor) -> Any:
        return mpmath.matrix(values.tolist())

    with mpmath.workdps(40):
        first, total = matrix(cov1), matrix(cov1) + matrix(cov2)
        delta = matrix(mean1) - matrix(mean2)
        d = len(mean1)
        # In units in which cov1 + cov2 is the identity, cov1 has eigenvalues p and cov2 has 1 - p.
        whiten = mp.cholesky(total) ** -1
        p, vectors = mp.eigsy(whiten * first * whiten.T)
        y = vectors.T * (whiten * delta)
        f = sum(y[i] ** 2 for i in range(d))

        def along(share: Any) -> tuple[Any, Any, Any]:
            u = [y[i] / ((1 - share) * p[i] + share * (1 - p[i])) for i in range(d)]
            s1, s2 = (mp.sqrt(sum(w[i] * u[i] ** 2 for i in range(d))) for w in (p, [1 - p[i] for i in range(d)]))
            return sum(u[i] * y[i] for i in range(d)), s1, s2

        low, high = mpf(0), mpf(1)
        for _ in range(70):
            share = (low + high) / 2
            _, s1, s2 = along(share)
            low, high = (share, high) if s1 > share * (s1 + s2) else (low, share)
        gap, s1, s2 = along(low)
        k2 = (gap / (s1 + s2)) ** 2
        # The ball, in the eigenvectors of cov1 + cov2.
        values, vectors = mp.eigsy(total)
        y = vectors.T * delta
        size = mp.sqrt(sum(y[i] ** 2 for i in range(d)))
        worst = mpf(0)
        if size > radius:
            low, high = mpf(0), max(values) * radius / (size - radius)
            for _ in range(120):
                mu = (low + high) / 2
                norm = mp.sqrt(sum((y[i] / (values[i] + mu)) ** 2 for i in range(d)))
                low, high = (mu, high) if mu * norm < radius else (low, mu)
            u = [y[i] / (values[i] + low) for i in range(d)]
            left = sum(u[i] * y[i] for i in range(d)) - radius * mp.sqrt(sum(x**2 for x in u))
            worst = left**2 / sum(values[i] * u[i] ** 2 for i in range(d))
        ratio = mp.fprod(4 * p[i] * (1 - p[i]) for i in range(d))
        affinity = mp.root(max(ratio, mpf(0)), 4) * mp.exp(-f / 4)
        return Exact(f / (2 + f), k2 / (1 + k2), worst / (2 + worst), 1 - affinity)


def conditioned_problem(d: int, condition: float, generator: torch.Generator) -> Moments:
    """Covariances of one condition, most of them with common eigenvectors: their sum then has it too."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def rotation() -> Tensor:
        return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q

    common, alike = rotation(), float(uniform(1)) < 0.8
    covariances = []
    for _ in range(2):
        values = condition ** -uniform(d)
        values[0], values[-1] = 1 / condition, 1.0
        own = common if alike else rotation()
        cov = own @ (values[:, None] * own.T) * float(10 ** (4 * uniform(1) - 2))
        covariances.append((cov + cov.T) / 2)
    total = covariances[0] + covariances[1]
    z = torch.randn(d, generator=generator, dtype=torch.float64)
    # Along the spread of the laws, or anywhere: then all but separated along the directions with little variance.
    delta = torch.linalg.cholesky(total) @ z if float(uniform(1)) < 0.7 else z
    delta = delta * float(10 ** (3 * uniform(1) - 2))
    return delta, covariances[0], torch.zeros(d, dtype=torch.float64), covariances[1]


def scaled_condition(cov: Tensor) -> float:
    """Of the matrix in units in which its diagonal is 1, those in which the bounds are worked out."""
    unit = torch.diagonal(cov).rsqrt()
    return float(torch.linalg.cond(cov * unit[:, None] * unit))


AGREEMENT = (
    "solver",
    "oracle",
    "problems",
    "solved by the oracle",
    "largest relative difference",
    "median",
    "allowed",
)


def agreement_table() -> Table:
    return Table(
        "agreement",
        "Against convex programming and a search over all directions",
        "Relative difference of the bounds. CVXPY: dimensions 1 to 8 in equal parts, one covariance up to 1e4 times "
        "the other, solved to a tolerance of 1e-9 wherever the solver calls that reached; minimax as a second-order "
        "cone program, robust as the least F over a ball. The plane: d = 2, one covariance up to 1e6 times the other, "
        "golden section over the angle of u.",
        AGREEMENT,
    )


def compared(table: Table, solver: str, oracle: str, ours: Tensor, theirs: Tensor, allowed: float) -> list[str]:
    """Adds a row. NaN: the oracle found nothing accurate."""
    solved = theirs.isfinite()
    difference = ((ours - theirs).abs() / theirs.clamp(min=1e-3))[solved]  # of what is all but 0, absolutely
    worst = float(difference.max())
    numbers = f"{len(ours):,}", f"{int(solved.sum()):,}", f"{worst:.1e}", f"{float(difference.median()):.1e}"
    table.add(solver, oracle, *numbers, f"{allowed:.0e}")
    return [f"{solver} against {oracle}: {worst:.3g} apart, {allowed:g} allowed"] if worst > allowed else []


def by_cvxpy(moments: Moments, radius: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """minimax and robust of each pair, NaN where the solver found nothing accurate."""
    d = moments[0].shape[-1]
    minimax, robust = Minimax(d), Robust(d)
    values = []
    for *arrays, ball in zip(*(part.numpy() for part in moments), radius.tolist(), strict=True):
        values.append((minimax(*arrays), robust(*arrays, ball, rho)))
    one, two = torch.tensor(values, dtype=torch.float64).T
    return one, two


def within_reach(moments: Moments, generator: torch.Generator) -> Tensor:
    """Radii below the distance of the means."""
    distance = (moments[0] - moments[2]).norm(dim=-1)
    return 0.98 * distance * torch.rand(distance.shape, generator=generator, dtype=torch.float64)


def check_cvxpy(table: Table, problems: int) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for d in range(1, 9):
        moments = random_problems(math.ceil(problems / 8), d, generator)
        radius, rho = within_reach(moments, generator), 0.1 * d
        ours = ops.robust_bound(*moments, radius1=radius / 3, radius2=radius * 2 / 3, rho=rho)
        found.append((ops.minimax_bound(*moments), ours, *by_cvxpy(moments, radius, rho)))
    minimax, robust, *theirs = (torch.cat(part) for part in zip(*found, strict=True))
    failures = compared(table, "minimax", "CVXPY (Clarabel)", minimax, theirs[0], 1e-6)
    return failures + compared(table, "robust", "CVXPY (Clarabel)", robust, theirs[1], 1e-6)


def check_plane(table: Table, problems: int) -> list[str]:
    moments = random_problems(problems, 2, torch.Generator().manual_seed(4), spread=3.0)
    ours, theirs = ops.minimax_bound(*moments), best_in_the_plane(moments)
    return compared(table, "minimax, d = 2", "search over all directions", ours, theirs, 1e-9)


LEAST, CHARGED = 2e-7, 40.0


def allowed_loss(condition: float) -> float:
    """Relative: rounding of the given moments is charged, 16 ulps of each. Its square root shows where a single one of
    the covariances is all but singular, for a deviation is the root of a variance."""
    return LEAST + CHARGED * condition * 2.0**-52


class Problem(NamedTuple):
    moments: Moments
    radius: float
    condition: float
    exact: Exact

    def losses(self, backend: str = "auto") -> dict[str, tuple[float, float]]:
        """Of each bound, ours - exact and (exact - ours) / exact; of `hellinger`, the latter is |ours - exact|."""
        ours = {
            "fisher": ops.fisher_bound(*self.moments, backend=backend),
            "minimax": ops.minimax_bound(*self.moments, backend=backend),
            "robust": ops.robust_bound(*self.moments, radius1=self.radius, backend=backend),
            "hellinger": ops.hellinger_bound(*self.moments, backend=backend),
        }
        losses = {}
        for name, value in ours.items():
            exact = getattr(self.exact, name)
            above = float(float(value) - exact)
            losses[name] = above, abs(above) if name == NO_BOUND else -above / float(exact)
        return losses


def conditioned_problems(problems: int, generator: torch.Generator, largest: float = 12.0) -> Iterator[Problem]:
    """With conditions up to 10^largest, dimensions 1 to 8 by turns."""
    for i in range(problems):
        size, share = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        moments = conditioned_problem(1 + i % 8, 10 ** (largest * size), generator)
        radius = share * float(moments[0].norm())
        yield Problem(moments, radius, scaled_condition(moments[1] + moments[3]), exact_bounds(*moments, radius))


def check_mpmath(problems: int) -> tuple[list[Table], list[str]]:
    table = Table(
        "digits",
        "Against 40 digits",
        "Condition: of cov1 + cov2 in units of its diagonal. Above: largest excess over the exact bound; loss: what is "
        "missing of it, relative. It grows with the condition, because 16 ulps of every given moment are charged; "
        f"allowed: {LEAST:.0e} + {CHARGED:.0f} x condition x 2^-52. `hellinger` is charged nothing and errs to either "
        "side, its loss is absolute. Dimensions 1 to 8, mpmath.",
        ("bound", "condition", "problems", "above", "largest loss", "median loss"),
    )
    found = [(one.condition, one.losses()) for one in conditioned_problems(problems, torch.Generator().manual_seed(5))]
    failures = []
    for name in Exact._fields:
        for low in range(0, 12, 2):
            some = [
                (condition, *losses[name])
                for condition, losses in found
                if 10**low <= condition + 1e-9 and (condition < 10 ** (low + 2) or low == 10)
            ]
            if not some:
                continue
            worst = max(above for _, above, _ in some)
            losses = [loss for _, _, loss in some]
            numbers = f"{worst:.1e}", f"{max(losses):.1e}", f"{statistics.median(losses):.1e}"
            table.add(name, f"1e{low} to 1e{low + 2}", str(len(some)), *numbers)
            for condition, above, loss in some:
                if loss > allowed_loss(condition) or (above > 1e-12 and name != NO_BOUND):
                    failures.append(f"{name}: {above:.3g} above, {loss:.3g} lost at condition {condition:.3g}")
    return [table], failures


# ---- cost -----------------------------------------------------------------------------------------------------------

NAMES = ("mean", "l2", "max", "absmax", "rms", "sum", "positive_fraction")
OPTIONS: dict[str, dict[str, Any]] = {"certified": {"value_range": (0.0, 6.0)}}


def scalar_state(classes: int, channels: int) -> ClassMoments:
    """Of gamma-distributed features, as a layer after ReLU has them."""
    generator = torch.Generator().manual_seed(classes)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(classes, channels, generator=generator, dtype=torch.float64)

    n = 2000.0
    mean, deviation, skewness, excess = uniform(1, 2), uniform(0.2, 0.6), uniform(0.5, 1.5), uniform(0.5, 3)
    fourth = (3 + excess + skewness**2) * deviation**4
    return ClassMoments(torch.full((classes,), int(n)), mean, n * deviation**2, n * skewness * deviation**3, n * fourth)


def vector_state(d: int, classes: int, channels: int) -> VectorMoments:
    generator = torch.Generator().manual_seed(d)
    samples = 10 * d * classes
    labels = torch.arange(samples) % classes
    state = VectorMoments.empty(d, classes, channels)
    rows, columns = torch.tril_indices(d, d)
    x = torch.randn(d, samples // classes, classes, channels, generator=generator, dtype=torch.float64)
    x = x + 0.7 * torch.randn(d, 1, classes, channels, generator=generator, dtype=torch.float64)
    mean = x.mean(1)
    y = x - mean[:, None]
    scatter = torch.stack([(y[i] * y[j]).sum(0) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)])
    state.copy_(VectorMoments(torch.bincount(labels, minlength=classes), mean, scatter))
    return state


class Cell(NamedTuple):
    """A bound, a witness, and the dimension that it has."""

    bound: str
    witness: str
    d: int

    def __str__(self) -> str:
        return f"vector, d = {self.d}" if self.witness == "vector" else self.witness

    @property
    def fields(self) -> int:
        """Numbers of the state for one class and channel."""
        return self.d + self.d * (self.d + 1) // 2 if self.witness == "vector" else 4

    def state(self, classes: int, channels: int) -> State:
        return vector_state(self.d, classes, channels) if self.witness == "vector" else scalar_state(classes, channels)

    def options(self) -> dict[str, Any]:
        return {"bound": self.bound, "witness": self.witness, **OPTIONS.get(self.bound, {})}


def cells() -> Iterator[Cell]:
    """Wherever bound and witness fit."""
    for bound in arguments.BOUNDS:
        yield Cell(bound, "linear", 1)
        if bound not in arguments.OF_ONE_NUMBER:
            yield Cell(bound, "quadratic", 2)
            yield from (Cell(bound, "vector", d) for d in (2, 4, 8))


def timed(op: Callable[..., object], state: State, options: dict[str, Any], budget: float = 0.6) -> float:
    """Shortest of the calls that fit into so many seconds, at least five of them: others use the machine, too."""

    def run() -> object:
        return op(state, backend="cpp", **options)

    run()
    times = [seconds(run) for _ in range(5)]
    while sum(times) < budget:
        times.append(seconds(run))
    return 1e9 * min(times)


def check_cost(classes: int, channels: int) -> tuple[list[Table], list[str]]:
    table = Table(
        "cost",
        "What a comparison costs",
        f"{classes} classes, {channels:,} channels, backend `cpp`, wall time of all threads together, the shortest of "
        "several runs. Rest: `one_vs_rest` over all classes (pruning), for each of them, merging included. One class: "
        "`one_vs_rest` of a state of two classes, the class to forget and all others (unlearning), for each of "
        f"{channels * classes // 2:,} channels. "
        "Pairs: all pairs of classes. `exp` costs what `linear` does. The `pairwise_min` of `fisher`, `minimax` and "
        "`minimax_published` leaves out pairs that cannot be the least; the others go through all of them. Operations: "
        "of one comparison of two classes from their moments, counted by running the solver's header with a number "
        "that counts: additions and multiplications + divisions, square roots and exponentials. Bytes: what is read "
        "of the state for a comparison: one against the rest reads each class twice, for the classes before and after "
        "it, and writes 8. Every answer is checked against the reference.",
        (
            "bound",
            "witness",
            "operations",
            "bytes, rest",
            "bytes, pair",
            "rest, ns",
            "one class, ns",
            "pairwise_min, ns per pair",
            "pairwise_mean, ns per pair",
        ),
    )
    count = operations()
    failures = []
    for cell in cells():
        few, many, two = cell.state(12, 16), cell.state(classes, channels), cell.state(2, channels * classes // 2)
        options = cell.options()
        for op in (ops.one_vs_rest, ops.pairwise_mean, ops.one_vs_one):
            ours, exact = (op(few, backend=backend, **options) for backend in ("cpp", "reference"))
            apart = float((ours - exact).abs().max())
            if not apart < 1e-9:
                failures.append(f"{op.__name__}, {cell.bound}, {cell}: {apart:.3g} from the reference")
        pairs = classes * (classes - 1) / 2
        table.add(
            cell.bound,
            str(cell),
            count(cell, few),
            str(2 * 8 * cell.fields),
            f"{8 * cell.fields * (1 + 2 / (classes - 1)):.0f}",
            f"{timed(ops.one_vs_rest, many, options) / classes / channels:.1f}",
            f"{timed(ops.one_vs_rest, two, options) / two.channels:.1f}",
            f"{timed(ops.pairwise_min, many, options) / pairs / channels:.1f}",
            f"{timed(ops.pairwise_mean, many, options) / pairs / channels:.1f}",
        )
    return [table], failures


# The solvers are templates over the type of a number: one that counts what is done with it.
COUNTING = r"""
#include <cmath>
#include <cstdio>
namespace discedit {
static long simple = 0, dear = 0;
struct Counted {
  double value = 0;
  Counted() = default;
  Counted(double v) : value(v) {}
  friend Counted operator+(Counted a, Counted b) { ++simple; return a.value + b.value; }
  friend Counted operator-(Counted a, Counted b) { ++simple; return a.value - b.value; }
  friend Counted operator*(Counted a, Counted b) { ++simple; return a.value * b.value; }
  friend Counted operator/(Counted a, Counted b) { ++dear; return a.value / b.value; }
  friend bool operator<(Counted a, Counted b) { return a.value < b.value; }
  friend bool operator>(Counted a, Counted b) { return a.value > b.value; }
  friend bool operator<=(Counted a, Counted b) { return a.value <= b.value; }
  friend bool operator>=(Counted a, Counted b) { return a.value >= b.value; }
  friend bool operator==(Counted a, Counted b) { return a.value == b.value; }
  Counted& operator+=(Counted b) { return *this = *this + b; }
  Counted& operator-=(Counted b) { return *this = *this - b; }
  Counted& operator*=(Counted b) { return *this = *this * b; }
};
inline Counted select(bool where, Counted yes, Counted no) { return where ? yes : no; }
inline Counted absolute(Counted x) { return std::fabs(x.value); }
inline Counted square_root(Counted x) { ++dear; return std::sqrt(x.value); }
inline Counted exponential(Counted x) { ++dear; return std::exp(x.value); }
}
#include "common/family.hpp"
using namespace discedit;
using Law = MomentsOf<Counted>;
using Vector = VectorMomentsOf<Counted, 8>;
static Counted between(const Rule& rule, bool quadratic, const Law& a, const Law& b) {
  if (rule.member == Member::witness) return witness_between(false, a, b);
  if (rule.member == Member::witness_published) return witness_between(true, a, b);
  if (rule.member == Member::certified) return certified_between(rule, a, b);
  if (!quadratic) return member_between(rule, linear_witness(a, b), a.n, b.n, 1);
  return member_between(rule, quadratic_witness(a, b), a.n, b.n, 2);
}
static double read() { double x = 0; return std::scanf("%lf", &x) == 1 ? x : 0; }
int main() {
  // member, radius, log_term, low, high, dimension (0: scalar), quadratic, pairs; then the laws, two by two
  Rule rule{static_cast<Member>(static_cast<int>(read()))};
  rule.radius = read(); rule.log_term = read(); rule.low = read(); rule.high = read();
  const int d = static_cast<int>(read()), quadratic = static_cast<int>(read()), pairs = static_cast<int>(read());
  double sum = 0;
  for (int pair = 0; pair < pairs; ++pair) {
    if (d == 0) {
      Law laws[2];
      for (Law& law : laws) { law.n = read(); law.mean = read(); law.m2 = read(); law.m3 = read(); law.m4 = read(); }
      sum += between(rule, quadratic != 0, laws[0], laws[1]).value;
    } else {
      Vector laws[2];
      for (Vector& law : laws) {
        law.n = read();
        for (int i = 0; i < d; ++i) law.mean[i] = read();
        for (int i = 0; i < lower(d, 0); ++i) law.scatter[i] = read();
      }
      sum += member_between(rule, vector_witness(laws[0], laws[1], d), laws[0].n, laws[1].n, d).value;
    }
  }
  std::printf("%.17g %.17g %.17g\n", double(simple) / pairs, double(dear) / pairs, sum / pairs);
}
"""


def operations() -> Callable[[Cell, State], str]:
    """Counts the operations of a comparison; a dash where there is no compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return lambda _cell, _state: "-"
    folder = Path(tempfile.mkdtemp())
    source, program = folder / "count.cpp", str(folder / "count")
    source.write_text(COUNTING)
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{CSRC}", str(source), "-o", program], check=True)

    def count(cell: Cell, state: State) -> str:
        options, classes = OPTIONS.get(cell.bound, {}), state.num_classes
        pairs = state.channels * classes * (classes - 1) // 2
        asked = arguments.asked("bench_validity", cell.bound, options, cell.witness)
        rule = arguments.settled("bench_validity", asked, state, pairs)
        head = [arguments.BOUNDS.index(cell.bound), rule.radius, rule.log_term, rule.low, rule.high]
        head += [cell.d if cell.witness == "vector" else 0, cell.witness == "quadratic", pairs]
        rows = [part.reshape(-1, classes, state.channels) for part in state.tensors()[1:]]
        laws = torch.cat([state.count.double()[None, :, None].expand(1, classes, state.channels), *rows])
        one, two = torch.triu_indices(classes, classes, 1)
        numbers = torch.stack([laws[:, one], laws[:, two]]).permute(2, 3, 0, 1)  # pair, channel, side, field
        text = " ".join(repr(float(number)) for number in [*head, *numbers.flatten().tolist()])
        run = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
        simple, dear, mean = map(float, run.stdout.split())
        ours = float(ops.pairwise_mean(state, backend="cpp", **cell.options()).mean())
        assert abs(mean - ours) < 1e-9, (cell, mean, ours)  # what was counted is what runs
        return f"{simple:.0f} + {dear:.0f}"

    return count


# ---- page -----------------------------------------------------------------------------------------------------------

PARTS = ("laws", "cvxpy", "plane", "mpmath", "cost")
HEAD = """\
# The bounds, measured

Written by `python -m benchmarks.bench_validity --write`; do not edit. What the bounds are, and why they hold, is in
[docs/bounds.md](../docs/bounds.md).
"""


def write(tables: list[Table]) -> None:
    """Replaces the sections that were measured."""
    text = PAGE.read_text() if PAGE.exists() else HEAD
    for table in tables:
        begin, end = f"<!-- begin {table.section} -->", f"<!-- end {table.section} -->"
        section = f"{begin}\n{table.markdown().replace('### ', '## ', 1)}{end}"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(lambda _, new=section: new, text) if pattern.search(text) else f"{text}\n{section}\n"
    PAGE.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of laws for each dimension")
    parser.add_argument("--problems", type=int, default=2000, help="for CVXPY and the plane; a quarter for mpmath")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--classes", type=int, default=100, help="for the cost")
    parser.add_argument("--channels", type=int, default=512, help="for the cost")
    parser.add_argument("--write", action="store_true", help="write benchmarks/bounds.md")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(machine(), flush=True)
    agreement = agreement_table()
    checks: dict[str, Callable[[], tuple[list[Table], list[str]]]] = {
        "laws": lambda: check_laws(options.pairs),
        "cvxpy": lambda: ([], check_cvxpy(agreement, options.problems)),
        "plane": lambda: ([], check_plane(agreement, options.problems)),
        "mpmath": lambda: check_mpmath(options.problems // 4),
        "cost": lambda: check_cost(options.classes, options.channels),
    }
    tables: list[Table] = []
    failures: list[str] = []
    for part in options.parts:
        made, failed = checks[part]()
        tables += made
        failures += failed
    if agreement.rows:
        tables.append(agreement)
    for table in tables:
        print("\n" + table.markdown())
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if options.write and not failures:
        write(tables)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
