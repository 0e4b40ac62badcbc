"""How many channels give most of what a layer gives, and what collecting second moments costs.

    python -m benchmarks.bench_fidelity --parts curves --write --plot    # minutes
    python -m benchmarks.bench_fidelity --parts cost --write             # with nothing beside it: minutes
    python -m benchmarks.bench_fidelity --parts weighted --models resnet20 resnet56 --write   # half an hour

Kashyap et al. (ModHiFi, NeurIPS 2025) observe that fewer than 20 % of a layer's input channels reach a fidelity of 0.8.
Curves: real images and networks (`discedit.zoo`, DISCEDIT_DATA); 1,000 training images, moments around zero as there.
What is measured is kept in benchmarks/fidelity.json with machine and commit; fidelity.md and fidelity.png come from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import Log, markdown_table, seconds
from benchmarks.bench_prune import Bench, outcome
from benchmarks.networks import build
from discedit.fidelity import (
    SecondMoments,
    collect_second_moments,
    greedy,
    singleton_fidelity,
    subset_fidelity,
    top_k,
)
from discedit.model.forward import call, frozen_eval
from discedit.moments.second_moments import KINDS

HERE = Path(__file__).parent
RESULTS = HERE / "fidelity.json"
MODELS = ("resnet20", "resnet56", "vit")
IMAGES, ENOUGH, FEW = 1000, 0.8, 0.2
ROUNDS = 9
WEIGHTED = tuple(product(("mean", "max"), ("energy", "fidelity")))
UNWEIGHTED = ("l1", "l2", "energy", "reconstruction", "combined")
NAMED = ", ".join(UNWEIGHTED)
WAYS = tuple(product(("none", "compensation", "least_squares"), (0.3, 0.5)))
COSTS = (("ResNet-50", 224, 8), ("ResNet56", 32, 128))  # size of the images, batch


def curves(name: str) -> dict[str, Any]:
    """Of each layer the fidelity of the first channels by greedy choice, and how many it takes to reach ENOUGH."""
    bench = Bench(name, train_images=IMAGES, test_images=100)
    moments = collect_second_moments(bench.model, bench.train)
    found: dict[str, Any] = {"images": moments.samples, "layers": {}}
    for layer in moments:
        channels = moments[layer].channels
        _, reached = greedy(moments, layer, channels)
        order = top_k(singleton_fidelity(moments, layer), channels)
        found["layers"][layer] = {
            "channels": channels,
            "greedy": [round(float(value), 4) for value in reached],
            "greedy count": int((reached < ENOUGH).sum()) + 1,
            "top-k count": first(channels, partial(enough, moments, layer, order)),
        }
    return found


def enough(moments: SecondMoments, layer: str, order: list[int], count: int) -> bool:
    return float(subset_fidelity(moments, layer, order[:count])) >= ENOUGH


def first(most: int, holds: Callable[[int], bool]) -> int:
    """The smallest number up to `most` from which on it holds."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class InTurns:
    """Batches, before each of which the bare model runs on it; how long that and what is done with it take."""

    def __init__(self, bare: nn.Module, x: Tensor, number: int) -> None:
        self.bare, self.x, self.number = bare, x, number
        self.times: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[Tensor]:
        with frozen_eval(self.bare):
            for _ in range(self.number):
                bare = seconds(lambda: call(self.bare, self.x))
                start = time.perf_counter()
                yield self.x
                self.times.append((time.perf_counter() - start, bare))


def cost(name: str, kind: str, size: int, batch: int) -> dict[str, Any]:
    """Time of `collect_second_moments` for a batch over that of the bare model; the first batch is left out."""
    model = build(name)
    turns = InTurns(copy.deepcopy(model), torch.randn(batch, 3, size, size), ROUNDS + 1)
    collect_second_moments(model, turns, kind=kind, progress=False)
    ratios = [ours / bare for ours, bare in turns.times[1:]]
    spread = quantiles(ratios, n=4)
    return {
        "batch": batch,
        "bare, s": round(median(bare for _, bare in turns.times[1:]), 3),
        "ratio": round(median(ratios), 3),
        "spread": round(spread[2] - spread[0], 3),
    }


def weighted(bench: Bench, separation: str, energy: str, repair: str, ratio: float) -> dict[str, Any]:
    """Pruning by how well a channel tells classes apart times how much of what its readers give it carries."""
    one, other = bench.importance(separation), bench.importance(energy)
    given = {layer: values * other[layer] for layer, values in one.items() if layer in other}
    return outcome(bench, bench.prune(scores=given, repair=repair, ratio=ratio))


def cells_of_weighted(log: Log) -> dict[tuple[str, str], list[list[float | None]]]:
    """Model and criteria -> for each of WAYS the points lost by the product and, from prune.json, by its factors."""
    known = json.loads((HERE / "prune.json").read_text())
    cells = {}
    for model, (separation, energy) in product(MODELS, WEIGHTED):
        both = f"{separation} x {energy}"
        if any(f"{model}|weighted|{both}|{repair}|{ratio}" in log.entries for repair, ratio in WAYS):
            cells[model, both] = [
                [
                    log.entries.get(f"{model}|weighted|{both}|{repair}|{ratio}", {}).get("drop"),
                    *(known.get(f"{model}|{name}|{repair}|{ratio}", {}).get("drop") for name in (separation, energy)),
                ]
                for repair, ratio in WAYS
            ]
    return cells


def rows_of_weighted(log: Log) -> list[list[str]]:
    return [
        [*names, *(" / ".join("-" if value is None else f"{value:.1f}" for value in cell) for cell in cells)]
        for names, cells in cells_of_weighted(log).items()
    ]


def wins_of_weighted(log: Log) -> str:
    """In how many cells the product is better than both of its factors, and than each of UNWEIGHTED."""
    known = json.loads((HERE / "prune.json").read_text())
    all_cells = over_factors = over_others = 0
    for (model, _), row in cells_of_weighted(log).items():
        for (repair, ratio), (both, *factors) in zip(WAYS, row, strict=True):
            others = [known.get(f"{model}|{name}|{repair}|{ratio}", {}).get("drop") for name in UNWEIGHTED]
            if None not in (both, *factors, *others):
                all_cells += 1
                over_factors += both < min(factors)
                over_others += both < min(others)
    return f"better than both factors in {over_factors} of {all_cells} cells, than each of {NAMED} in {over_others}"


def rows_of_curves(log: Log) -> list[list[str]]:
    rows = []
    for name in MODELS:
        layers = log.entries.get(f"{name}|curves", {}).get("layers", {})
        for choice in ("greedy", "top-k") if layers else ():
            shares = sorted(entry[f"{choice} count"] / entry["channels"] for entry in layers.values())
            few = sum(share < FEW for share in shares)
            cells = [f"{100 * share:.0f}" for share in (shares[0], median(shares), shares[-1])]
            rows.append([name, choice, str(len(layers)), f"{few} of {len(layers)}", *cells])
    return rows


def rows_of_layers(log: Log) -> list[list[str]]:
    rows = []
    for name in MODELS:
        for layer, entry in log.entries.get(f"{name}|curves", {}).get("layers", {}).items():
            shares = [f"{100 * entry[f'{choice} count'] / entry['channels']:.0f}" for choice in ("greedy", "top-k")]
            rows.append([name, layer, str(entry["channels"]), *shares])
    return rows


def rows_of_cost(log: Log) -> list[list[str]]:
    found = [(key.split("|"), entry) for key, entry in log.entries.items() if "|cost|" in key]
    return [
        [name, kind, str(entry["batch"]), f"{entry['bare, s']:.2f}", f"{entry['ratio']:.2f}", f"{entry['spread']:.2f}"]
        for (name, _, kind), entry in sorted(found)
    ]


def markdown(log: Log) -> str:
    """benchmarks/fidelity.md, from what was measured."""
    machines = sorted({entry["machine"] for entry in log.entries.values()})
    parts = [
        (
            "How many channels give most of what a layer gives",
            f"Share of a layer's input channels, in percent, that reach a fidelity of {ENOUGH} (mean over outputs, "
            f"moments around zero, {IMAGES:,} training images, 49 positions of a map): chosen one by one (greedy), or "
            f"those of highest singleton fidelity (top-k). ModHiFi observes fewer than {100 * FEW:.0f} %. "
            "In the plot a line is a layer, from the first (light) to the last. ![Plot](fidelity.png)",
            ["model", "choice", "layers", f"layers below {100 * FEW:.0f} %", "least", "median", "most"],
            rows_of_curves(log),
        ),
        (
            "Discrimination weighted by energy",
            "Points of accuracy lost by pruning, by the product of two criteria / by the first alone / by the second "
            "alone (benchmarks/prune.md), for each repair and ratio: does what tells classes apart and what carries "
            f"energy do better together? It is {wins_of_weighted(log)}. prune.md has the default. A ratio of "
            "0.3 removed at most that share when this was measured (4 of 16 filters, now 5).",
            ["model", "criteria", *(f"{repair}, {ratio}" for repair, ratio in WAYS)],
            rows_of_weighted(log),
        ),
        (
            "What the pass costs",
            "Time of `collect_second_moments` (default positions) for a batch over that of the bare model on the same "
            f"batch just before, median and quartile spread of {ROUNDS} batches after the first; random weights and "
            'images. Goal: at most 1.5 for ResNet-50 at 224 and the kind "singleton".',
            ["model", "kind", "batch", "bare, s", "ratio", "spread"],
            rows_of_cost(log),
        ),
        (
            "Layer by layer",
            f"Share of the channels, in percent, for a fidelity of {ENOUGH}.",
            ["model", "layer", "channels", "greedy", "top-k"],
            rows_of_layers(log),
        ),
    ]
    text = "# Fidelity\n\nWritten by `python -m benchmarks.bench_fidelity --write`; do not edit.\n"
    for title, note, header, rows in parts:
        text += f"\n## {title}\n\n{note}\n\n{markdown_table(header, rows)}\n"
    return text + "\nMeasured on: " + "; ".join(machines) + ".\n"


def plot(log: Log) -> None:
    """benchmarks/fidelity.png: fidelity by the share of the channels, a line per layer, from first (light) to last."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    models = [name for name in MODELS if f"{name}|curves" in log.entries]
    figure = Figure(figsize=(4.2 * len(models), 3.6), layout="constrained")
    shades = colormaps["viridis_r"]
    for axes, name in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        layers = log.entries[f"{name}|curves"]["layers"]
        for i, entry in enumerate(layers.values()):
            shares = [k / entry["channels"] for k in range(entry["channels"] + 1)]
            axes.plot(shares, [0.0, *entry["greedy"]], color=shades(i / max(1, len(layers) - 1)), linewidth=0.9)
        axes.axhline(ENOUGH, color="grey", linestyle=":")
        axes.axvline(FEW, color="grey", linestyle=":")
        axes.set(title=name, xlabel="share of a layer's input channels", xlim=(0, 1), ylim=(0, 1.02))
    figure.axes[0].set_ylabel("fidelity (greedy)")
    figure.savefig(HERE / "fidelity.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("curves", "cost", "weighted"), default=[])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="of curves, of what is weighted"
    )
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--any-commit", action="store_true", help="do not measure again what an earlier commit did")
    parser.add_argument("--write", action="store_true", help="write benchmarks/fidelity.md")
    parser.add_argument("--plot", action="store_true", help="write benchmarks/fidelity.png")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    log = Log(RESULTS, any_commit=options.any_commit)
    if "curves" in options.parts:
        for name in options.models:
            log.measure(f"{name}|curves", partial(curves, name))
    if "weighted" in options.parts:
        for name in options.models:
            bench = Bench(name)
            for (separation, energy), (repair, ratio) in product(WEIGHTED, WAYS):
                log.measure(
                    f"{name}|weighted|{separation} x {energy}|{repair}|{ratio}",
                    partial(weighted, bench, separation, energy, repair, ratio),
                )
    if "cost" in options.parts:
        for (name, size, batch), kind in product(COSTS, KINDS):
            log.measure(f"{name}|cost|{kind}", partial(cost, name, kind, size, batch))
    if options.write:
        (HERE / "fidelity.md").write_text(markdown(log))
    if options.plot:
        plot(log)
    log.end("bench_fidelity")


if __name__ == "__main__":
    main()
