"""Structured pruning without training: every criterion, every repair, rivals, budgets, latency, time.

    python -m benchmarks.bench_prune --parts goals few latency budget time --write  # the figures of the README: minutes
    python -m benchmarks.bench_prune --parts read across heads table --write --plot    # what defaults rest on: hours

Calibration on the first 2,500 training images, accuracy on 5,000 test images (mean over classes), no fine-tuning. What
is measured is kept in benchmarks/prune.json, one entry per run with the commit that it was measured at, and
benchmarks/prune.md is written from it; what is there already at the same commit is not measured again. Several
processes may measure different models side by side, but no times then. A run that fails is reported, the others go on,
and the program ends with status 1.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import benchmarks._vision  # noqa: F401  (before transformers)
from benchmarks import held_out
from benchmarks._common import Log, markdown_table, paired_ratio, seconds
from benchmarks.latency import latency_ratio
from benchmarks.rivals import chip, torch_pruning_importance, tvsprune
from discedit import (
    DivergenceTable,
    Edit,
    LatencyTable,
    MaxLatency,
    MaxMacs,
    Random,
    Ratio,
    Scores,
    collect_moments,
    importances,
    prune,
    score,
    zoo,
)
from discedit.editing import attention_basis
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.model.size import count_macs

HERE = Path(__file__).parent
RESULTS = HERE / "prune.json"
MODELS = ("resnet20", "resnet56", "vit")
RATIOS = (0.1, 0.3, 0.5, 0.7)
IN_TURN = (0.3, 0.5, 0.1, 0.7)
REPAIRS = ("none", "mean", "batchnorm", "compensation", "least_squares")
OURS = ("max", "mean", "min", "pairwise_min", "l1", "l2", "random", "energy", "reconstruction", "combined", "fidelity")
RIVALS = ("chip", "tvsprune", "tp magnitude", "tp taylor", "tp hessian", "tp bn_scale")
# Published without fine-tuning: share of parameters removed -> points lost (TVSPrune and CHIP: tables of TVSPrune).
PUBLISHED = {"resnet56": 0.123, "resnet20": 0.071}
PER_CLASS = 64
PARTS = ("goals", "few", "latency", "budget", "time", "read", "across", "heads", "table")
OF_READERS = ("energy", "reconstruction", "combined", "fidelity")
OF_CLASSES = ("max", "mean", "min", "pairwise_min")
PLACES = ("norm", "consumer")
RANKED = (
    "l1",
    "l2",
    "max",
    "energy",
    "reconstruction",
    "tp magnitude",
    "tp lamp",
    "tp taylor",
)  # over all layers together


def _fashion(name: str, limit: int) -> TensorDataset:
    with np.load(zoo.data_folder() / name, allow_pickle=False) as archive:
        images, labels = archive["images"][:limit], archive["labels"][:limit]
    return TensorDataset(held_out.fashion_inputs(torch.from_numpy(images)), torch.from_numpy(labels.astype(np.int64)))


class Bench:
    """One model, its data, its scores, and the importances by each criterion."""

    def __init__(self, name: str, train_images: int = 2500, test_images: int = 5000) -> None:
        self.name = name
        if name == "vit":
            from transformers import ViTForImageClassification

            self.model: nn.Module = ViTForImageClassification.from_pretrained(zoo.data_folder() / "vit_fashion").eval()
            train = _fashion("fashion_train_10000.npz", train_images)
            test = _fashion("fashion_test_first5000.npz", test_images)
        else:
            self.model = zoo.cifar_resnet(name)
            train, test = zoo.cifar10("train", limit=train_images), zoo.cifar10("test", limit=test_images)
        self.train, self.test = list(zoo.batches(train)), list(zoo.batches(test, 100))
        labels = train.tensors[1]
        few = torch.cat([(labels == k).nonzero()[:PER_CLASS, 0] for k in range(10)]).sort().values
        self.few = list(zoo.batches(TensorDataset(*(tensor[few] for tensor in train.tensors))))
        self.example = self.train[0][0][:1]
        self.known: dict[str, dict[str, Tensor]] = {}

    @cache  # noqa: B019  (one object per model, which lives as long as the program)
    def scores(self, read: str = "consumer") -> Scores:
        return score(collect_moments(self.model, self.train, 10, read=read), pairs=True)

    @cache  # noqa: B019
    def before(self) -> float:
        return self.accuracy(self.model)

    def accuracy(self, model: nn.Module) -> float:
        return 100 * float(accuracy_per_class(model, self.test, 10).mean())

    def importance(self, criterion: str, seed: int = 0) -> dict[str, Tensor]:
        """By rows of each layer; the same for all ratios and repairs."""
        key = f"{criterion}{seed}"
        if key not in self.known:
            self.known[key] = self._importance(criterion, seed)
        return self.known[key]

    def _importance(self, criterion: str, seed: int) -> dict[str, Tensor]:
        if criterion in OURS:
            data = self.train if criterion in OF_READERS else None
            kind = Random(seed) if criterion == "random" else criterion
            return importances(self.model, self.scores(), kind, example_inputs=self.example, data=data)
        layers = list(self.importance("l1"))
        if criterion == "chip":
            readers = {layer: layer.replace("conv1", "conv2") for layer in layers}
            return chip(self.model, layers, self.train, readers=readers, images=256)
        if criterion == "tvsprune":
            return tvsprune(self.model, layers, self.train, num_classes=10)
        batches = self.train[:1] if criterion == "tp hessian" else self.train
        return torch_pruning_importance(criterion.removeprefix("tp "), self.model, layers, batches, self.example)

    def prune(self, *, few: bool = False, **options: Any) -> Edit:
        """`discedit.prune` with its defaults, but for what is named."""
        options.setdefault("scores", self.scores())
        options.setdefault("example_inputs", self.example)
        return prune(self.model, data=self.few if few else self.train, **options)


def outcome(bench: Bench, edit: Edit) -> dict[str, Any]:
    return {
        "drop": round(bench.before() - bench.accuracy(edit.model), 3),
        "parameters removed": round(1 - edit.parameters_after / edit.parameters_before, 4),
        "macs removed": round(1 - (edit.macs_after or 0) / (edit.macs_before or 1), 4),
    }


def goals(bench: Bench, log: Log, *, few: bool) -> None:
    """The defaults of `prune`, at the ratios and sizes of the README."""
    images = f"{PER_CLASS} per class" if few else "2,500"
    for ratio in (0.3, 0.5):
        log.measure(
            f"{bench.name}|ratio {ratio}|{images}", lambda r=ratio: outcome(bench, bench.prune(ratio=r, few=few))
        )
    if bench.name in PUBLISHED:
        share = PUBLISHED[bench.name]
        log.measure(
            f"{bench.name}|parameters -{100 * share:.1f} %|{images}",
            lambda: outcome(bench, bench.prune(parameters=1 - share, few=few)),
        )


def table(bench: Bench, log: Log, only: Sequence[str] = ()) -> None:
    """Every criterion x repair x ratio; random is the mean of three. Ratio by ratio, should time run out."""
    criteria = only or (OURS if bench.name == "vit" else (*OURS, *RIVALS))
    repairs = [repair for repair in REPAIRS if (repair, bench.name) != ("batchnorm", "vit")]
    for ratio, repair, criterion in product(IN_TURN, repairs, criteria):

        def run(criterion: str = criterion, ratio: float = ratio, repair: str = repair) -> dict[str, Any]:
            found = []
            for seed in range(3 if criterion == "random" else 1):
                given = bench.importance(criterion, seed)
                found.append(outcome(bench, bench.prune(scores=given, ratio=ratio, repair=repair)))
            return {name: round(sum(f[name] for f in found) / len(found), 4) for name in found[0]}

        log.measure(f"{bench.name}|{criterion}|{repair}|{ratio}", run)


def read(bench: Bench, log: Log) -> None:
    """Scores of components behind the norm and as their consumers see them."""
    for where, repair, criterion, ratio in product(PLACES, ("none", "least_squares"), OF_CLASSES, (0.3, 0.5)):
        options = {"scores": bench.scores(where), "criterion": criterion, "repair": repair, "ratio": ratio}
        log.measure(
            f"{bench.name}|read|{repair}|{criterion}|{where}|{ratio}",
            lambda options=options: outcome(bench, bench.prune(**options)),
        )


def across(bench: Bench, log: Log, only: Sequence[str] = ()) -> None:
    """All layers together, until so many multiply-accumulates are left: in equal shares, ranked, or where the output
    diverges least."""
    for criterion in only or RANKED:
        table: DivergenceTable | None = None

        def run(how: str, left: float, criterion: str = criterion) -> dict[str, Any]:
            nonlocal table
            given = {"scores": None} if how == "divergence" and table else {"scores": bench.importance(criterion)}
            edit = bench.prune(budget=MaxMacs(left, across=(how == "divergence" and table) or how), **given)
            table = edit.divergences or table
            return outcome(bench, edit)

        for how, left in product(("divergence", "rank", "none"), (0.7, 0.5)):
            log.measure(f"{bench.name}|across|{criterion}|{how}|{left}", partial(run, how, left))


INSIDE = {"qk": ["qk"], "vo": ["vo"], "both": ["qk", "vo"]}  # heads
WHOLE = ["neurons", "heads"]


def inside_heads(bench: Bench, log: Log) -> None:
    """Dimensions within heads, in the basis where few of them count or, of each head, the axes of the largest weights;
    and beside neurons and whole heads in one budget."""
    if bench.name != "vit":
        return
    for ratio, (name, kinds), basis in product((0.5, 0.75), INSIDE.items(), ("balanced", "axes")):

        def alone(ratio: float = ratio, kinds: list[str] = kinds, basis: str = basis) -> dict[str, Any]:
            with along_axes(bench.model) if basis == "axes" else nullcontext(bench.model) as model:
                options = {"example_inputs": bench.example, "data": bench.train, "components": kinds}
                return outcome(bench, prune(model, ratio=ratio, **options))

        log.measure(f"{bench.name}|heads|{name}|{basis}|ratio {ratio}", alone)
    for name, kinds in (("neurons, heads", WHOLE), ("neurons, heads, qk, vo", [*WHOLE, *INSIDE["both"]])):
        table: DivergenceTable | None = None

        def together(left: float, kinds: list[str] = kinds) -> dict[str, Any]:
            nonlocal table
            given = {"budget": MaxMacs(left, across=table)} if table else {"macs": left}
            edit = bench.prune(scores=None, components=kinds, **given)
            table = edit.divergences
            return outcome(bench, edit)

        for left in (0.7, 0.5, 0.3):
            log.measure(f"{bench.name}|heads|{name}|divergence|macs {left}", partial(together, left))


@contextmanager
def along_axes(model: nn.Module) -> Iterator[nn.Module]:
    """The model with the axes of each head in the order of the norms of their weights (of both sides, multiplied), in
    which `prune` takes them meanwhile."""
    sorted_model = copy.deepcopy(model)
    for module in sorted_model.modules():
        if {"q_proj", "k_proj", "v_proj", "o_proj"} <= {name for name, _ in module.named_children()}:
            with torch.no_grad():
                _sort_axes(module)

    def as_they_are(first: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eye = torch.eye(first.shape[-1], dtype=first.dtype).expand_as(first)
        return eye, eye, torch.arange(first.shape[-1], 0, -1, dtype=first.dtype).expand(first.shape[:2])

    with mock.patch.object(attention_basis, "balanced_pair", as_they_are):
        yield sorted_model


def _sort_axes(attention: Any) -> None:
    heads = attention.num_attention_heads
    for givers, last in ((("q_proj", "k_proj"), None), (("v_proj",), attention.o_proj)):
        layers = [getattr(attention, name) for name in givers]
        norms = [layer.weight.square().sum(1) for layer in layers] + ([last.weight.square().sum(0)] if last else [])
        size = torch.stack(norms).prod(0).view(heads, -1)
        order = size.argsort(1, descending=True) + size.shape[1] * torch.arange(heads)[:, None]
        for layer in layers:
            layer.weight.copy_(layer.weight[order.flatten()])
            layer.bias.copy_(layer.bias[order.flatten()])
        if last is not None:
            last.weight.copy_(last.weight[:, order.flatten()])


def latency(bench: Bench, log: Log) -> None:
    """Time of the smaller model over that of the whole one, in turns, beside the share of multiply-accumulates left."""
    x = bench.train[0][0][:64]
    for ratio, round_to in product((0.3, 0.5), (1, 8)):

        def run(ratio: float = ratio, round_to: int = round_to) -> dict[str, Any]:
            smaller = bench.prune(budget=Ratio(ratio, round_to=round_to), repair="none", criterion="l1").model
            median, spread, before, after = latency_ratio(bench.model, smaller, x, 25)
            left = count_macs(smaller, bench.example) / count_macs(bench.model, bench.example)
            return {
                "time": round(median, 3),
                "spread": round(spread, 3),
                "macs": round(left, 3),
                "ms": [round(1000 * before, 1), round(1000 * after, 1)],
            }

        log.measure(f"{bench.name}|latency|{ratio}|{round_to}", run)


def latency_budget(bench: Bench, log: Log) -> None:
    """A budget of latency, and the largest one of multiply-accumulates of which the table predicts no more."""
    x = bench.train[0][0][:32]
    divergences: DivergenceTable | None = None
    latencies: LatencyTable | None = None

    def measured(edit: Edit) -> dict[str, Any]:
        time, spread, *_ = latency_ratio(bench.model, edit.model, x, 41)
        share = predicted(edit) / latencies.whole if latencies else 1.0
        return outcome(bench, edit) | {
            "predicted": round(share, 3),
            "time": round(time, 3),
            "spread": round(spread, 3),
        }

    def predicted(edit: Edit) -> float:
        gone = {layer: len(channels) for layer, channels in edit.recipe.components.items()}
        return latencies.latency(gone) if latencies else math.inf

    def by_latency(share: float) -> dict[str, Any]:
        nonlocal divergences, latencies
        budget = MaxLatency(share, across=divergences or "divergence", table=latencies)
        edit = bench.prune(budget=budget, scores=None, example_inputs=x)
        divergences, latencies = edit.divergences, edit.latencies
        return measured(edit)

    def by_macs(allowed: float) -> dict[str, Any]:
        def spent(percent: int, repair: str) -> Edit:
            budget = MaxMacs(percent / 100, across=divergences or "divergence")
            return bench.prune(budget=budget, scores=None, repair=repair)

        # What the table predicts rises with what may be left.
        shares = range(2, 100, 2)
        above = bisect.bisect_right(shares, allowed, key=lambda percent: predicted(spent(percent, "none")))
        return measured(spent(shares[above - 1], "least_squares"))

    for share in (0.9, 0.8, 0.7):
        if found := log.measure(f"{bench.name}|budget|{share}|latency", partial(by_latency, share)):
            allowed = (found["predicted"] + 5e-4) * (latencies.whole if latencies else math.inf)
            log.measure(f"{bench.name}|budget|{share}|macs", partial(by_macs, allowed))


def duration(bench: Bench, log: Log) -> None:
    """Scoring, choosing, repairing and shrinking, over a forward pass on the same images, in turns."""

    def forward() -> None:
        with torch.no_grad():
            for x, _ in bench.train:
                bench.model(x)

    def everything() -> None:
        scores = score(collect_moments(bench.model, bench.train, 10))
        bench.prune(scores=scores, ratio=0.3)

    def run() -> dict[str, Any]:
        passes: list[float] = []
        median, spread = paired_ratio(everything, lambda: passes.append(seconds(forward)), 5)
        one = statistics.median(passes)
        return {
            "passes": round(median, 2),
            "spread": round(spread, 2),
            "seconds of a pass": round(one, 2),
            "seconds beyond two passes": round((median - 2) * one, 1),
        }

    log.measure(f"{bench.name}|time|0.3", run)


TIMES = ["passes", "spread", "seconds of a pass", "seconds beyond two passes"]


def rows_of_goals(log: Log) -> list[list[str]]:
    found = []
    for key, entry in log.entries.items():
        model, what, *rest = key.split("|")
        if len(rest) == 1 and (what.startswith("ratio ") or what.startswith("parameters ")):
            removed = [f"{100 * entry[f'{name} removed']:.1f} %" for name in ("parameters", "macs")]
            found.append([model, what, rest[0], *removed, f"{entry['drop']:.2f}"])
    return sorted(found)


def rows_of_table(log: Log) -> list[list[str]]:
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for key, entry in log.entries.items():
        model, criterion, *rest = key.split("|")
        if len(rest) == 2 and rest[0] in REPAIRS:
            cells.setdefault((model, rest[0], criterion), {})[rest[1]] = f"{entry['drop']:.1f}"
    order = {name: i for i, name in enumerate((*MODELS, *REPAIRS, *OURS, *RIVALS))}
    lines = sorted(cells.items(), key=lambda item: [order[part] for part in item[0]])
    return [[*names, *(row.get(str(ratio), "not measured") for ratio in RATIOS)] for names, row in lines]


def rows_of(log: Log, part: str, columns: list[str]) -> list[list[str]]:
    found = []
    for key, entry in sorted(log.entries.items()):
        model, what, *rest = key.split("|")
        if what == part:
            found.append([model, *rest, *(str(entry[column]) for column in columns)])
    return found


def section_of_heads(log: Log) -> tuple[str, str, list[str], list[list[str]]]:
    return (
        "Dimensions within heads",
        "Of queries and keys (`qk`) and of values (`vo`), least squares: half or three quarters of each layer's in "
        "the basis where few of them count (`balanced`), and with the same repair those of each head's axes that "
        "have the smallest weights (`axes`); and in one budget with neurons and heads.",
        ["model", "components", "how", "budget", "parameters removed", "macs removed", "points lost"],
        rows_of(log, "heads", ["parameters removed", "macs removed", "drop"]),
    )


def sections(log: Log) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Of benchmarks/prune.md: title, note, header and rows."""
    return [
        (
            "With the defaults of `prune`",
            "Points of accuracy lost. Published without fine-tuning: iterative TVSPrune 9.9 and CHIP 10.2 points at "
            "12.3 % of ResNet56's parameters, TVSPrune 9.4 at 7.1 % of ResNet20's. The repair looks at 1,024 images "
            "at most.",
            ["model", "budget", "images", "parameters removed", "macs removed", "points lost"],
            rows_of_goals(log),
        ),
        (
            "Latency on the CPU",
            "Time of the smaller model over that of the whole one on a batch of 64, in turns; the quartiles' distance; "
            "the share of multiply-accumulates left; milliseconds before and after.",
            ["model", "ratio", "round_to", "time", "spread", "macs", "ms"],
            rows_of(log, "latency", ["time", "spread", "macs", "ms"]),
        ),
        (
            "Budgets of latency",
            "`latency=` for a batch of 32 (divergence, least squares): what the table predicts, and what is measured "
            "in turns with the whole model; then the largest `macs=`, in steps of 0.02, of which it predicts no more.",
            ["model", "latency asked", "budget of", "predicted", "measured", "spread", "macs removed", "points lost"],
            rows_of(log, "budget", ["predicted", "time", "spread", "macs removed", "drop"]),
        ),
        (
            "Time to score, choose, repair and shrink",
            "In forward passes over the 2,500 calibration images, in turns with such passes.",
            ["model", "ratio", *TIMES],
            rows_of(log, "time", TIMES),
        ),
        (
            "Where components are read",
            "Criteria of the scores over classes, read behind the norm or as the consumer sees the components (after "
            "the activation). Read at the output, before the norm, the scores of the mean are those behind it.",
            ["model", "repair", "criterion", "read", "ratio", "points lost"],
            rows_of(log, "read", ["drop"]),
        ),
        (
            "Layers ranked together",
            "Until 0.7 and 0.5 of the multiply-accumulates are left, least squares: `rank` takes the same share of "
            "each layer, `none` the components that count least of all layers, `divergence` (the default) as many from "
            "each layer as make the output diverge least, by trials on 512 images.",
            ["model", "criterion", "across", "macs left", "parameters removed", "points lost"],
            rows_of(log, "across", ["parameters removed", "drop"]),
        ),
        section_of_heads(log),
        (
            "Every criterion and repair",
            "Points of accuracy lost when the same share of each layer goes. `tp`: importances of torch-pruning 1.6.1 "
            "(LAMP orders a layer as its magnitude does; the accumulation of its Hessian is corrected; on 256 images); "
            "CHIP on 256 images. `random`: mean of three. TVSPrune: its score, least over pairs. ModHiFi-P is "
            "`fidelity` with `compensation`. Since commit 371096a a ratio removes at least that share (5 of 16 filters "
            "at 0.3), before it at most (4 of 16): of ratios other than 0.5, the ViT's 0.1 and 0.3 are newer, its 0.7 "
            "and all of the ResNets' in this table are older. ![Plot](prune.png)",
            ["model", "repair", "criterion", *map(str, RATIOS)],
            rows_of_table(log),
        ),
    ]


def markdown(log: Log) -> str:
    """benchmarks/prune.md, from what was measured."""
    machines = sorted({entry["machine"] for entry in log.entries.values()})
    text = (
        "# Structured pruning without training\n\nWritten by `python -m benchmarks.bench_prune --write`; do not edit. "
        "What single classes lose is in [classes.md](classes.md).\n"
    )
    for title, note, header, rows in sections(log):
        text += f"\n## {title}\n\n{note}\n\n{markdown_table(header, rows)}\n"
    return text + "\nMeasured on: " + "; ".join(machines) + ".\n"


def plot(log: Log) -> None:
    """benchmarks/prune.png: points lost by ratio, a panel per model and repair, each on a scale of its own."""
    from matplotlib.figure import Figure

    rows = rows_of_table(log)
    models = [name for name in MODELS if any(row[0] == name for row in rows)]
    if not models:
        raise ValueError("bench_prune: nothing of the part 'table' has been measured yet.")
    figure = Figure(figsize=(3.6 * len(REPAIRS), 3.4 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(REPAIRS), sharex=True, squeeze=False)
    styles = {name: "-" if name in OURS else "--" for name in (*OURS, *RIVALS)}
    colours = {name: f"C{i % 10}" for i, name in enumerate((*OURS[:10], *RIVALS))} | dict.fromkeys(OURS[10:], "black")
    for line, model in zip(grid, models, strict=True):
        for axes, repair in zip(line, REPAIRS, strict=True):
            for _, _, criterion, *cells in (row for row in rows if row[:2] == [model, repair]):
                points = [(r, float(c)) for r, c in zip(RATIOS, cells, strict=True) if c != "not measured"]
                axes.plot(*zip(*points, strict=True), styles[criterion], color=colours[criterion], label=criterion)
            why = "" if axes.lines else " (none to repair)" if repair == "batchnorm" else " (not measured)"
            axes.set_title(f"{model}, repair {repair}{why}", fontsize=9)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("points of accuracy lost")
    for axes in grid[-1]:
        axes.set_xlabel("share of each layer removed")
    handles, names = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda pair: len(pair[0]))
    figure.legend(handles, names, loc="outside right center", fontsize=8)
    figure.savefig(HERE / "prune.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet20", "resnet56"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument(
        "--criteria", nargs="+", choices=(*OURS, *RIVALS), default=[], help="of the parts table and across, these alone"
    )
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--any-commit", action="store_true", help="do not measure again what an earlier commit did")
    parser.add_argument("--write", action="store_true", help="write benchmarks/prune.md")
    parser.add_argument("--plot", action="store_true", help="write benchmarks/prune.png")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    log = Log(RESULTS, any_commit=options.any_commit)
    for name in options.models if options.parts else ():
        bench = Bench(name)
        print(f"{name}: {bench.before():.2f} % before", flush=True)
        for part in options.parts:
            if part in ("goals", "few"):
                goals(bench, log, few=part == "few")
            else:
                run = {
                    "table": partial(table, only=options.criteria),
                    "read": read,
                    "across": partial(across, only=options.criteria),
                    "heads": inside_heads,
                    "latency": latency,
                    "budget": latency_budget,
                    "time": duration,
                }
                run[part](bench, log)
    if options.write:
        (HERE / "prune.md").write_text(markdown(log))
    if options.plot:
        plot(log)
    log.end("bench_prune")


if __name__ == "__main__":
    main()
