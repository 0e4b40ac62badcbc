"""The figures of docs/bounds.md: every bound against the exact total variation of laws that are known.

    python -m benchmarks.plot_bounds

Laws are given on a fine grid; their moments and their total variation are sums over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor

from benchmarks.bench_validity import Pairs, state_of
from discedit import ops

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
SAMPLES = 100  # of each class, for robust
# Okabe and Ito's colours, which stay apart for the colour-blind, with a line style each for print.
STYLES: dict[str, dict[str, Any]] = {
    "total variation": {"color": "black", "linewidth": 2.6},
    "minimax": {"color": "#0072B2", "linewidth": 2.2},
    "fisher": {"color": "#E69F00", "linewidth": 1.8, "linestyle": (0, (6, 1.5))},
    "robust": {"color": "#009E73", "linewidth": 1.8, "linestyle": (0, (4, 1.2, 1, 1.2))},
    "minimax_published": {"color": "#D55E00", "linewidth": 1.8, "linestyle": (0, (1, 1))},
    "hellinger": {"color": "#999999", "linewidth": 1.8, "linestyle": (0, (3, 2))},
    "witness": {"color": "#CC79A7", "linewidth": 2.2},
    "witness_published": {"color": "#CC79A7", "linewidth": 1.8, "linestyle": (0, (1, 1))},
    "minimax of exp(-|t|)": {"color": "#56B4E9", "linewidth": 2.0, "linestyle": (0, (7, 1.5, 1, 1.5))},
}
NAMES = {"hellinger": "hellinger (no bound)", "robust": f"robust ({SAMPLES} samples of a class)"}
GRID = torch.linspace(-60, 60, 12_001, dtype=torch.float64)


class Family(NamedTuple):
    """Pairs of laws along a parameter."""

    title: str
    axis: str
    parameters: Tensor
    pair: Callable[[Tensor], tuple[Tensor, Tensor]]  # densities on the grid, up to a factor
    log: bool = False


def normal(mean: Tensor | float = 0.0, deviation: Tensor | float = 1.0) -> Tensor:
    density: Tensor = torch.exp(-(((GRID - mean) / deviation) ** 2) / 2) / deviation
    return density


def laplace(mean: Tensor | float = 0.0) -> Tensor:
    return torch.exp(-(GRID - mean).abs()) * math.sqrt(math.pi / 2)


def at(point: float) -> Tensor:
    """All mass at one point of the grid."""
    return torch.nn.functional.one_hot((GRID - point).abs().argmin(), len(GRID)).double()


ROOT = math.sqrt(2)


def peak(mean: float) -> Tensor:
    return normal(mean, 0.05)


def between(low: float, high: float, points: int = 161) -> Tensor:
    return torch.linspace(low, high, points, dtype=torch.float64)


FAMILIES = [
    Family(
        "Normal laws, means apart",
        "difference of the means, in deviations",
        between(0, 6),
        lambda x: (normal(), normal(x)),
    ),
    Family(
        "Normal laws, variances apart",
        "ratio of the deviations",
        10 ** between(0, 1),
        lambda x: (normal(), normal(0.0, x)),
        log=True,
    ),
    Family(
        "Laplace laws, means apart",
        "difference of the means, in scales",
        between(0, 8),
        lambda x: (laplace(), laplace(x)),
    ),
    Family(
        "Active for a share of one class",
        "share of the class at 4 ± 0.5, others at 0 ± 1",
        between(0, 1),
        lambda x: (normal(), (1 - x) * normal() + x * normal(4.0, 0.5)),
    ),
    Family(
        "Two values each, one of them common",
        "share of the mass that is not common",
        between(0.002, 0.998),
        lambda x: ((1 - x) * at(0) + x * at(1), (1 - x) * at(0) + x * at(-2)),
    ),
    Family(
        "Equal means and variances",
        "share of peaks at ±1, or at 0 and ±1.41",
        between(0, 1),
        lambda x: (
            (1 - x) * normal() + x * (peak(-1) + peak(1)) / 2,
            (1 - x) * normal() + x * (peak(-ROOT) + 2 * peak(0) + peak(ROOT)) / 4,
        ),
    ),
]


def curves(family: Family, witness: str) -> dict[str, Tensor]:
    """Values along the family by name, the total variation among them."""
    p, q = (torch.stack(side) for side in zip(*map(family.pair, family.parameters), strict=True))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    pairs = Pairs(p, q, GRID[None, :, None].expand(len(p), -1, 1))
    state = state_of(pairs, SAMPLES)

    def value(bound: str, witness: str = witness) -> Tensor:
        return ops.one_vs_rest(state, bound=bound, witness=witness)[:, 0]

    found = {"total variation": (p - q).abs().sum(1) / 2}
    if witness == "quadratic":
        for bound in ("minimax", "fisher", "robust", "minimax_published", "hellinger"):
            found[bound] = value(bound)
        return found
    for bound in ("minimax", "fisher", "witness", "witness_published", "hellinger"):
        found[bound] = value(bound)
    state = state_of(Pairs(p, q, torch.exp(-pairs.values.abs())), SAMPLES)
    found["minimax of exp(-|t|)"] = value("minimax")
    return found


def figure(witness: str, title: str, name: str) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 7.4), sharey=True)
    for axis, family in zip(axes.flat, FAMILIES, strict=True):
        for label, values in curves(family, witness).items():
            exact = label == "total variation"
            axis.plot(
                family.parameters, values, label=NAMES.get(label, label), zorder=2 if exact else 3, **STYLES[label]
            )
        finish(axis, family.title, family.axis)
        if family.log:
            axis.set_xscale("log")
            axis.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
            axis.minorticks_off()
        axis.set_xlim(float(family.parameters[0]), float(family.parameters[-1]))
    for axis in axes[:, 0]:
        axis.set_ylabel("bound, total variation", fontsize=9)
    save(figure, axes, title, name)


def finish(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(below, fontsize=9)
    axis.set_ylim(-0.02, 1.02)
    axis.grid(color="#E5E5E5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def save(figure: Any, axes: Any, title: str, name: str) -> None:
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.suptitle(title, x=0.012, ha="left", fontsize=13)
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=10, handlelength=4)
    figure.tight_layout(rect=(0, 0.075, 1, 0.985), h_pad=1.8)
    figure.savefig(DOCS / name, dpi=140, metadata={"Software": None})
    plt.close(figure)


# ---- certified ------------------------------------------------------------------------------------------------------


def bernstein(variance: Tensor, n: Tensor, log_term: float) -> Tensor:
    """How far a mean may be from that of the sample (Maurer and Pontil 2009, Theorem 4)."""
    return (2 * variance * log_term / n).sqrt() + 7 * log_term / (3 * (n - 1))


def through_witness(f: Tensor, p: Tensor, q: Tensor, n: Tensor, log_term: float) -> Tensor:
    """What the same samples certify by way of means and raw second moments: `witness` at the worst of them."""
    gap, root = torch.zeros_like(n), torch.zeros_like(n)
    means = []
    for law in (p, q):
        mean, second, fourth = ((law * f**power).sum() for power in (1, 2, 4))
        means.append(mean)
        gap = gap - bernstein(second - mean**2, n, log_term)
        root = root + (second + bernstein(fourth - second**2, n, log_term)).clamp(max=1).sqrt()
    gap = (gap + (means[0] - means[1]).abs()).clamp(min=0)
    return (gap / root) ** 2


def certified_figure() -> None:
    """At the moments of the laws themselves, as a sample of that size has them on average."""
    f = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    n = (10 ** between(1, 6, 201)).round()
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.3), sharey=True)
    for axis, (title, a, b) in zip(
        axes,
        (
            ("Beta(2, 8) and Beta(8, 2)", (2, 8), (8, 2)),
            ("Beta(1, 20) and Beta(2, 6)", (1, 20), (2, 6)),
            ("Beta(20, 20) and Beta(25, 20)", (20, 20), (25, 20)),
        ),
        strict=True,
    ):
        p, q = (f ** (left - 1) * (1 - f) ** (right - 1) for left, right in (a, b))
        p, q = p / p.sum(), q / q.sum()
        one = state_of(Pairs(p[None], q[None], f[None, :, None]), 1)
        exact = float((p - q).abs().sum()) / 2
        limit = float(ops.one_vs_rest(one, witness="linear")[0, 0])
        axis.axhline(exact, **STYLES["total variation"], label="total variation")
        axis.axhline(limit, **STYLES["minimax"], label="minimax at the laws' own moments")
        for comparisons, style in ((1, "-"), (10_000, (0, (1, 1)))):
            values = []
            for size in n.tolist():
                parts = (part * size for part in one.tensors()[2:])
                state = ops.ClassMoments(one.count * int(size), one.mean, *parts)
                given = {"witness": "linear", "value_range": (0, 1), "comparisons": comparisons}
                values.append(float(ops.one_vs_rest(state, bound="certified", **given)[0, 0]))
            many = f"{comparisons:,} comparison{'s' if comparisons > 1 else ''}"
            axis.plot(n, values, color="#009E73", linewidth=2, linestyle=style, label=f"certified, {many}")
            log_term = math.log(6 * comparisons / 0.05)
            other = through_witness(f, p, q, n, log_term)
            axis.plot(n, other, color="#CC79A7", linewidth=2, linestyle=style, label=f"by way of witness, {many}")
        finish(axis, title, "samples of each class")
        axis.set_xscale("log")
        axis.set_xlim(10, 1e6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle("What a sample certifies, with probability 0.95", x=0.012, ha="left", fontsize=13)
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=10, handlelength=4)
    figure.tight_layout(rect=(0, 0.13, 1, 0.985))
    figure.savefig(DOCS / "certified.png", dpi=140, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    figure(
        "quadratic",
        "Bounds of the witness quadratic, (t, t²), against the exact total variation",
        "bounds-quadratic.png",
    )
    figure("linear", "Bounds of one number, t or exp(-|t|), against the exact total variation", "bounds-linear.png")
    certified_figure()


if __name__ == "__main__":
    main()
