"""Unlearning one class: `discedit.unlearn` on every class, its options, published rivals, and what is left inside.

    python -m benchmarks.bench_unlearn --models resnet20 --parts ours few variants --threads 1 --write --plot
    python -m benchmarks.bench_unlearn --models resnet20 --parts rivals evaluate --threads 1 --write --plot   # hours
    python -m benchmarks.bench_unlearn --parts time --write --any-commit  # with nothing beside it

Moments, repairs and rivals get the first 2,500 training images; figures rest on the first 5,000 test images; rivals are
tuned on the last 5,000 test images, which no figure rests on (`benchmarks.held_out`, DISCEDIT_HELD_OUT), on one class
and with grids of one size. What is measured is kept in benchmarks/unlearn.json, one line per run, saved after each run
with machine and commit, and benchmarks/unlearn.md and benchmarks/unlearn-MODEL.png are made from it alone. What is
there at the same machine and commit is not measured again; with --any-commit, neither is what other commits measured.
Several processes may measure different models or parts side by side, but times mean little then. A run that fails is
reported, the others go on, and the program ends with status 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import _common, bench_prune, held_out
from benchmarks.options import with_method
from benchmarks.unlearning_rivals import METHODS, retrained, retrained_file, tuned
from discedit import Edit, Moments, Scores, collect_moments, evaluate, score, unlearn, zoo
from discedit.editing.ablation import editable_units
from discedit.editing.target_search import Problem
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.evaluation.relearning import Kept, batchnorm_recall
from discedit.graph.pruning_graph import Graph
from discedit.moments.calibration import batch_norms
from discedit.moments.forget_retain import ForgetRetainSplit
from discedit.presets import preset
from discedit.recipes.operations import Slots
from discedit.selection.candidates import why_not_editable
from discedit.selection.importance import fidelities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Batches = list[tuple[Tensor, Tensor]]
Entries = Mapping[str, Mapping[str, Any]]

HERE = Path(__file__).parent
RETRAINED = Path("out/retrained")
PARTS = ("ours", "few", "time", "variants", "rivals", "evaluate")
MISSING = "not measured"
FASHION_CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
# Of every model: forget accuracy after batch-norm recall, %; seconds of the edit; points that 64 images per class may
# cost, in forget accuracy and in the drop of the others.
RECALL_GOAL, SECONDS_GOAL, FEW_GOAL = 10.0, 1.0, 2.0


@dataclass(frozen=True)
class Loaded:
    """A model, its batches of training and of test images, and 64 training images of each class."""

    model: nn.Module
    train: Batches
    test: Batches
    few: Batches


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        title: what tables call the model.
        load: model and images.
        validate: held-out images, to tune rivals on.
        names: of the classes.
        order: the classes in the order in which rivals run on them; the first is the one to tune and to evaluate on.
        forget, drop: the goal: mean forget accuracy in %, points that the others lose.
        network: name in `unlearning_rivals.NETWORKS`, if it can be retrained.
    """

    title: str
    load: Callable[[], Loaded]
    validate: Callable[[], TensorDataset]
    names: Sequence[str]
    order: Sequence[int]
    forget: float
    drop: float
    network: str | None = None


def _load(name: str) -> Loaded:
    bench = bench_prune.Bench(name)
    return Loaded(bench.model, bench.train, bench.test, bench.few)


RESNET20 = Subject(
    "ResNet20",
    lambda: _load("resnet20"),
    held_out.cifar10_validation,
    zoo.CIFAR10_CLASSES,
    (3, 0, 8, 5, 1, 6, 2, 7, 4, 9),
    forget=5,
    drop=1,
    network="resnet20",
)
SUBJECTS = {
    "resnet20": RESNET20,
    "resnet56": replace(RESNET20, title="ResNet56", load=lambda: _load("resnet56"), forget=3, drop=0.5, network=None),
    "vit_fashion": Subject(
        "ViT on Fashion-MNIST",
        lambda: _load("vit"),
        held_out.fashion_validation,
        FASHION_CLASSES,
        (6, 1, 8, 0, 9, 4, 2, 3, 5, 7),
        forget=5,
        drop=1,
        network="vit_fashion",
    ),
}


@dataclass(frozen=True)
class Setting:
    """A way to call `discedit.unlearn`.

    Attributes:
        title: what tables call it.
        options: arguments; "last" is the share of the layers, from the end, that rows are to be chosen from, "readers"
            the number of layers, from the end, that directions are to be erased from, "weigh" what scores are to be
            multiplied by.
        data: whether it gets the training images as `data`.
        few: whether moments, and `data`, come from 64 images per class.
        preset: by this published algorithm.
    """

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    data: bool = False
    few: bool = False
    preset: str | None = None


OURS = {
    "default": Setting("default, without data"),
    "default with data": Setting("default, with data", data=True),
    "head": Setting("directions of the head alone, with data", {"readers": 1}, data=True),
    "rows": Setting('components="rows", with data', {"components": "rows"}, data=True),
    "discedit_u": Setting("preset discedit_u", preset="discedit_u"),
}
FEW = {
    "default": Setting("default, without data, 64 images per class", few=True),
    "default with data": Setting("default, with data, 64 images per class", data=True, few=True),
}
DEFAULTS = tuple(FEW)
_FRACTIONS = (0.03, 0.05, 0.06, 0.08, 0.1, 0.15)
_OF_ROWS: dict[str, dict[str, Any]] = {  # without data and with
    **{f"fraction={share}": {"fraction": share} for share in _FRACTIONS},
    'sign="any"': {"sign": "any"},
    'by="specific"': {"by": "specific"},
    "top=3 (of each layer)": {"top": 3},
    "factor=0.5": {"factor": 0.5},
    "factor=-1 (negated)": {"factor": -1.0},
    "all layers": {"last": 1.0},
    "last half of the layers": {"last": 1 / 2},
    "last sixth of the layers": {"last": 1 / 6},
}
_REPAIRED: dict[str, dict[str, Any]] = {
    'repair="mean"': {"repair": "mean"},
    'repair="least_squares"': {"repair": "least_squares"},
    **{
        f'repair="least_squares", fraction={share}': {"repair": "least_squares", "fraction": share}
        for share in (0.06, 0.1, 0.12)
    },
    'repair="least_squares", around="zero", fraction=0.1': {
        "repair": "least_squares",
        "around": "zero",
        "fraction": 0.1,
    },
    'repair="least_squares", protection=0': {"repair": "least_squares", "protection": 0.0},
}
_OF_DIRECTIONS: dict[str, dict[str, Any]] = {
    **{f"directions of the last {count} layers": {"readers": count} for count in (1, 2, 3, 4, 6, 8, 12, 16)},
    **{f"directions, factor={factor}": {"components": "directions", "factor": factor} for factor in (0.2, -0.2, -0.5)},
}
_OF_FIDELITY: dict[str, dict[str, Any]] = {
    'method="modhifi"': {"method": "modhifi"},
    'by="contrast"': {"by": "contrast"},
    **{
        f"score x {by}, sign={sign!r}": {"weigh": by, "sign": sign}
        for by, sign in product(("fidelity", "contrast"), ("up", "any"))
    },
}
VARIANTS = {
    **{f"{title}, with data": Setting(title, options, data=True) for title, options in _OF_DIRECTIONS.items()},
    **{
        f"{title}, {'with' if data else 'without'} data": Setting(title, {"components": "rows", **options}, data=data)
        for data, (title, options) in product((False, True), _OF_ROWS.items())
    },
    **{f"{title}, with data": Setting(title, options, data=True) for title, options in _OF_FIDELITY.items()},
    "remove=True, without data": Setting("remove=True", {"remove": True}),
    **{f"{title}, with data": Setting(title, options, data=True) for title, options in _REPAIRED.items()},
}
SETTINGS = {"ours": OURS, "few": FEW, "variants": VARIANTS}
RANDOM = {name for name, method in METHODS.items() if "rate" in method.grid[0]} | {"random_components"}
TITLES = {
    "logit_mask": "logit mask (control)",
    "random_components": "components by chance (control)",
    "discedit_u": "DISCEDIT-U, tuned",
    "finetune": "fine-tuning",
    "gradient_ascent": "gradient ascent",
    "neg_grad_plus": "NegGrad+",
    "random_labels": "random labels",
    "l1_sparse": "l1-sparse",
    "salun": "SalUn",
    "ssd": "SSD",
}


REFERENCES = ("original", "retrained without the class")


class Log(_common.Log):
    """benchmarks/unlearn.json, by key "model|part|what|class|seed"."""

    def __init__(self, *, any_commit: bool = False) -> None:
        super().__init__(HERE / "unlearn.json", any_commit=any_commit)


def in_batches(x: Tensor, labels: Tensor, size: int) -> Batches:
    return [(x[start : start + size], labels[start : start + size]) for start in range(0, len(x), size)]


class Bench:
    """One model and what several runs need of it. Loaded when first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.subject = SUBJECTS[name]
        self.num_classes = len(self.subject.names)

    @cached_property
    def loaded(self) -> Loaded:
        return self.subject.load()

    @cached_property
    def before(self) -> Tensor:
        return self.accuracy(self.loaded.model)

    def accuracy(self, model: nn.Module) -> Tensor:
        """By class, in %."""
        return 100 * accuracy_per_class(model, self.loaded.test, self.num_classes)

    @cached_property
    def samples(self) -> tuple[Kept, Kept]:
        """All training and test images."""
        train, test = (
            Kept(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
            for batches in (self.loaded.train, self.loaded.test)
        )
        return train, test

    @cached_property
    def validate(self) -> Batches:
        x, labels = self.subject.validate().tensors
        return in_batches(x, labels, 100)

    @cache  # noqa: B019  (one object per model, which lives as long as the program)
    def moments(self, few: bool, preset_name: str | None) -> tuple[Moments, float]:
        """And the seconds of their pass."""
        options: dict[str, Any] = {}
        if preset_name is not None:
            chosen = preset(preset_name)
            options = {name: getattr(chosen, name) for name in ("statistic", "witness", "scale", "read")}
        start = time.perf_counter()
        batches = self.loaded.few if few else self.loaded.train
        moments = collect_moments(self.loaded.model, batches, self.num_classes, **options)
        return moments, time.perf_counter() - start

    def split(self, cls: int) -> tuple[Batches, Batches]:
        """Training images that are to be retained, and those to be forgotten."""
        x, labels = self.samples[0].inputs, self.samples[0].labels
        kept, gone = (in_batches(x[chosen], labels[chosen], 256) for chosen in (labels != cls, labels == cls))
        return kept, gone

    def unlearn(self, setting: Setting, cls: int) -> tuple[Edit, dict[str, float]]:
        """The edit; seconds of scoring and editing, and of the moments' pass before."""
        model = self.loaded.model
        moments, passed = self.moments(setting.few, setting.preset)
        options = dict(setting.options)
        if setting.data:
            options["data"] = self.loaded.few if setting.few else self.loaded.train
        if options.get("remove"):
            options["example_inputs"] = self.loaded.train[0][0][:1]
        start = time.perf_counter()
        if setting.preset is not None:
            chosen = preset(setting.preset)
            scores = score(moments, bound=chosen.bound, witness=chosen.witness)
            edit = chosen.unlearn(model, scores, classes=[cls], **options)
        else:
            scores = score(moments)
            if "weigh" in options:
                scores = self.weighted(scores, cls, options.pop("weigh"))
                options["layers"] = list(scores)
            if "last" in options:
                fixed = why_not_editable(Slots(model), scores)
                order = [layer for layer in scores if layer not in fixed]
                options["layers"] = order[len(order) - math.ceil(options.pop("last") * len(order)) :]
            if "readers" in options:
                order = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
                options |= {"components": "directions", "layers": order[-options.pop("readers") :]}
            edit = unlearn(model, scores, classes=[cls], **with_method(options))
        return edit, {"edit seconds": round(time.perf_counter() - start, 4), "moments seconds": round(passed, 3)}

    def weighted(self, scores: Scores, cls: int, by: str) -> Scores:
        """Of the layers that rows are chosen from by default, times fidelity on the class: or, by "contrast", that less
        the fidelity on the others, where it is above 0."""
        model = self.loaded.model
        samples = ForgetRetainSplit("unlearn", model, self.loaded.train, [cls], self.num_classes)
        graph = Graph("unlearn", model, self.loaded.train[0][0][:1])
        problem = Problem(model, scores, [cls], [], None, samples, None, {})
        units = editable_units(problem, graph, ("filters", "neurons"), 0.0, "zero")
        counts = {layer: len(parts) for layer, parts in units.items()}
        factors, _ = fidelities(model, graph, counts, samples.parts("forget"), samples.trace)
        if by == "contrast":
            others, _ = fidelities(model, graph, counts, samples.parts("retain"), samples.trace)
            factors = {layer: (own - others[layer]).clamp(min=0.0) for layer, own in factors.items()}
        weighted = {}
        for layer, own in factors.items():
            weighted[layer] = torch.zeros_like(scores[layer])
            for rows, value in zip(units[layer], own, strict=True):
                weighted[layer][list(rows)] = scores[layer][list(rows)] * float(value)
        return Scores(
            weighted,
            {layer: scores.direction[layer] for layer in weighted},
            scores.counts,
            bound=scores.bound,
            witness=scores.witness,
            statistic=scores.statistic,
            norms=scores.norms,
        )

    def rival(self, log: Log, method: str, cls: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """The model by a rival as tuned, and the seconds that it took, preparations included."""
        setting = tuned_setting(self, log, method)
        retain, forget = self.split(cls)
        fixed = {"edit": self.unlearn(OURS["default"], cls)[0]} if method == "random_components" else {}
        start = time.perf_counter()
        edited = METHODS[method].run(self.loaded.model, retain, forget, **fixed, **setting, seed=seed)
        return edited, {"edit seconds": round(time.perf_counter() - start, 3), "setting": setting}

    def figures(self, model: nn.Module, cls: int, *, recall: bool) -> dict[str, Any]:
        """Accuracies on the test images; also with batch-norm statistics of the retained training images alone."""
        after = self.accuracy(model)
        lost = self.before - after
        kept = [other for other in range(self.num_classes) if other != cls]
        worst = max(kept, key=lambda other: float(lost[other]))
        found = {
            "forget": round(float(after[cls]), 3),
            "retain": round(float(after[kept].mean()), 3),
            "drop": round(float(lost[kept].mean()), 3),
            "worst class": worst,
            "worst drop": round(float(lost[worst]), 3),
            "accuracy": [round(value, 2) for value in after.tolist()],
        }
        if recall and batch_norms(model):
            again = batchnorm_recall(model, *self.samples, [cls], 0)
            found |= {"recall forget": round(100 * again.forget, 3), "recall retain": round(100 * again.retain, 3)}
        elif recall:  # nothing to take anew
            found |= {"recall forget": None, "recall retain": None}
        return found


def edits(bench: Bench, log: Log, part: str, classes: Sequence[int], only: Sequence[str]) -> None:
    """The settings of a part (all, or those named) on each class; for the part "ours" also the model as it was."""
    if part == "ours" and (not only or "original" in only):
        for cls in classes:
            log.measure(
                f"{bench.name}|original|original|{cls}|0",
                lambda cls=cls: bench.figures(bench.loaded.model, cls, recall=True),  # type: ignore[misc]
            )
    settings = {name: setting for name, setting in SETTINGS[part].items() if not only or name in only}
    for (name, setting), cls in product(settings.items(), classes):

        def run(setting: Setting = setting, cls: int = cls) -> dict[str, Any]:
            edit, seconds = bench.unlearn(setting, cls)
            directions = edit.recipe.settings.get("directions", {})
            components = sum(map(len, [*edit.recipe.components.values(), *directions.values()]))
            found = bench.figures(edit.model, cls, recall=part != "variants")
            return {**found, "components": components, **seconds}

        log.measure(f"{bench.name}|{part}|{name}|{cls}|0", run)


def timings(bench: Bench, log: Log, classes: Sequence[int]) -> None:
    """Seconds of the defaults alone, each after one that does not count."""
    for name, cls in product(DEFAULTS, classes):

        def run(name: str = name, cls: int = cls) -> dict[str, Any]:
            bench.unlearn(OURS[name], cls)
            return bench.unlearn(OURS[name], cls)[1]

        log.measure(f"{bench.name}|time|{name}|{cls}|0", run)


def tuned_setting(bench: Bench, log: Log, method: str) -> dict[str, Any]:
    """The best of the method's grid on the class to tune on, by held-out images."""
    grid = METHODS[method].grid
    if len(grid) == 1:
        return dict(grid[0])
    cls = bench.subject.order[0]

    def run() -> dict[str, Any]:
        retain, forget = bench.split(cls)
        found = tuned(method, bench.loaded.model, retain, forget, bench.validate, [cls])
        tried = [{**entry, "seconds": round(entry["seconds"], 2)} for entry in found.tried]
        seconds = round(found.prepared + sum(entry["seconds"] for entry in found.tried), 1)
        return {"setting": found.setting, "class": cls, "seconds": seconds, "tried": tried}

    entry = log.measure(f"{bench.name}|tuned|{method}", run)
    if entry is None:
        raise RuntimeError(f"bench_unlearn: {method} could not be tuned on {bench.name}.")
    setting: dict[str, Any] = entry["setting"]
    return setting


def rivals(bench: Bench, log: Log, number: int, seeds: Sequence[int], only: Sequence[str]) -> None:
    """Each tuned method on so many classes; what is random with each seed. All methods first, then more classes."""
    for seed, cls, method in product(seeds, bench.subject.order[:number], METHODS):
        if (seed != seeds[0] and method not in RANDOM) or (only and method not in only):
            continue

        def run(method: str = method, cls: int = cls, seed: int = seed) -> dict[str, Any]:
            edited, facts = bench.rival(log, method, cls, seed)
            return {**bench.figures(edited, cls, recall=True), **facts}

        log.measure(f"{bench.name}|rivals|{method}|{cls}|{seed}", run)


def evaluations(bench: Bench, log: Log, cls: int, seed: int, only: Sequence[str]) -> None:
    """`discedit.evaluate` on one class for the original, the retrained model, ours and each rival."""
    network = bench.subject.network
    reference = network is not None and retrained_file(network, [cls], RETRAINED).is_file()
    names = ["original", *(["retrained"] if reference else []), *(f"ours {name}" for name in OURS), *METHODS]
    for name in names:
        if only and name not in only:
            continue

        def run(name: str = name) -> dict[str, Any]:
            original = bench.loaded.model
            again = retrained(str(network), [cls], RETRAINED) if reference else None
            if name in ("original", "retrained"):
                edited = original if name == "original" else again
            elif name in METHODS:
                edited = bench.rival(log, name, cls, seed)[0]
            else:
                edited = bench.unlearn(OURS[name.removeprefix("ours ")], cls)[0].model
            assert edited is not None
            return evaluated(bench, edited, cls, again)

        log.measure(f"{bench.name}|evaluate|{name}|{cls}|{seed}", run)


def evaluated(bench: Bench, edited: nn.Module, cls: int, again: nn.Module | None) -> dict[str, Any]:
    """All metrics of one model; figures that the others have in common are not kept."""
    common: dict[str, Any] = {
        "classes": [cls],
        "num_classes": bench.num_classes,
        "test": bench.loaded.test,
        "original": bench.loaded.model,
    }
    report = evaluate(edited, train=bench.loaded.train, **common).to_dict()
    similar = report["cka"] or {}
    if again is not None:  # apart, since all metrics of the retrained model once are enough
        similar |= evaluate(edited, retrained=again, metrics="cka", **common).to_dict()["cka"]
    own = {metric: values["edited"] for metric, values in report.items() if metric in OF_MODELS and values is not None}
    return {**own, "cka": similar, "not measured": report["not_measured"]}


OF_MODELS = ("accuracy", "membership", "linear_probe", "knn", "relearning", "batchnorm_recall", "aus")


# What follows reads entries alone.


@dataclass(frozen=True)
class Row:
    """All runs of one way to forget: (class, seed) -> entry."""

    title: str
    runs: Mapping[tuple[int, int], Mapping[str, Any]]

    def of(self, classes: Iterable[int]) -> Row:
        wanted = set(classes)
        return Row(self.title, {key: run for key, run in self.runs.items() if key[0] in wanted})

    @property
    def classes(self) -> list[int]:
        return sorted({cls for cls, _ in self.runs})

    def values(self, name: str) -> list[float]:
        """The mean over seeds of each class; empty where a class has none."""
        found = []
        for cls in self.classes:
            own = [run.get(name) for key, run in self.runs.items() if key[0] == cls]
            if any(value is None for value in own):
                return []
            found.append(statistics.fmean(float(value) for value in own if value is not None))
        return found

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def worst(self, name: str) -> float | None:
        return max(float(run[name]) for run in self.runs.values()) if self.values(name) else None

    def applies(self, name: str) -> bool:
        """False where a run says that there is no such figure."""
        return not any(name in run and run[name] is None for run in self.runs.values())


def row_of(entries: Entries, model: str, part: str, name: str, title: str) -> Row:
    runs = {}
    for key, entry in entries.items():
        head, _, tail = key.partition(f"|{part}|{name}|")
        if head == model and tail:
            cls, seed = tail.split("|")
            runs[int(cls), int(seed)] = entry
    return Row(title, dict(sorted(runs.items())))


def number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return MISSING
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def pair(row: Row, name: str, digits: int = 1) -> str:
    """Mean and worst over classes."""
    if not row.applies(name):
        return "n/a"
    mean, worst = row.mean(name), row.worst(name)
    return MISSING if mean is None else f"{number(mean, digits)} ({number(worst, digits)})"


def single(row: Row, name: str, digits: int = 1) -> str:
    return number(row.mean(name), digits) if row.applies(name) else "n/a"


def median(row: Row, name: str, digits: int = 2) -> str:
    values = row.values(name)
    return number(statistics.median(values), digits) if values else "-" if row.runs else MISSING


def listed(numbers: Sequence[int], of: int) -> str:
    return "all" if len(numbers) == of else ", ".join(map(str, numbers)) if numbers else "-"


MAIN = [
    "method",
    "forget, %",
    "others lose, points",
    "worst-hit class loses",
    "recall: forget, %",
    "recall: retain, %",
    "components",
    "edit, s",
    "moments, s",
    "classes",
    "seeds",
]


def cells(row: Row, subject: Subject) -> list[str]:
    seeds = sorted({seed for _, seed in row.runs})
    components = row.mean("components")
    return [
        row.title,
        pair(row, "forget"),
        pair(row, "drop", 2),
        number(row.worst("worst drop")),
        pair(row, "recall forget"),
        single(row, "recall retain"),
        "-" if components is None and row.runs else number(components, 0),
        median(row, "edit seconds"),
        median(row, "moments seconds"),
        listed(row.classes, len(subject.names)),
        str(len(seeds)) if seeds else "-",
    ]


def bold(setting: Setting) -> str:
    """The title; ours in bold, published algorithms not."""
    return setting.title if setting.preset else f"**{setting.title}**"


def rows_of_ours(entries: Entries, model: str) -> list[Row]:
    return [
        row_of(entries, model, "original", "original", "original, no edit"),
        *(row_of(entries, model, "ours", name, bold(setting)) for name, setting in OURS.items()),
        *(row_of(entries, model, "few", name, setting.title) for name, setting in FEW.items()),
    ]


def rows_of_rivals(entries: Entries, model: str) -> list[Row]:
    return [row_of(entries, model, "rivals", name, TITLES.get(name, name)) for name in METHODS]


def shared_classes(entries: Entries, model: str) -> list[int]:
    """Those that any rival ran on."""
    return sorted({cls for row in rows_of_rivals(entries, model) for cls in row.classes})


def rows_against(entries: Entries, model: str) -> list[list[str]]:
    """Rivals, and ours on the same classes."""
    subject, classes = SUBJECTS[model], shared_classes(entries, model)
    ours = [row.of(classes) for row in rows_of_ours(entries, model)[1 : 1 + len(OURS)]]
    return [cells(row, subject) for row in (*ours, *rows_of_rivals(entries, model))]


def rows_by_class(entries: Entries, model: str) -> list[list[str]]:
    subject = SUBJECTS[model]
    found = []
    for name, setting in OURS.items():
        row = row_of(entries, model, "ours", name, setting.title)
        for cls, title in enumerate(subject.names if row.runs else ()):
            run = row.runs.get((cls, 0), {})
            worst = f"{number(run['worst drop'])} ({subject.names[run['worst class']]})" if run else MISSING
            one = row.of([cls])
            found.append(
                [
                    setting.title,
                    f"{cls} {title}",
                    single(one, "forget"),
                    single(one, "drop", 2),
                    worst,
                    single(one, "recall forget"),
                    single(one, "recall retain"),
                    single(one, "components", 0),
                    single(one, "edit seconds", 2),
                ]
            )
    return found


def rows_of_variants(entries: Entries, model: str) -> list[list[str]]:
    subject = SUBJECTS[model]
    found = []
    default = {data: f"default{' with data' if data else ''}" for data in (False, True)}
    for data in (False, True):
        rows = [row_of(entries, model, "ours", default[data], "default")]
        rows += [
            row_of(entries, model, "variants", name, setting.title)
            for name, setting in VARIANTS.items()
            if setting.data == data
        ]
        for row in rows:
            forget, drop, worst, _, _, components, edit, _, classes, _ = cells(row, subject)[1:]
            found.append([row.title, "yes" if data else "no", forget, drop, worst, components, edit, classes])
    return found


def rows_of_tuning(entries: Entries, model: str) -> list[list[str]]:
    found = []
    for method in METHODS:
        if len(METHODS[method].grid) == 1:
            continue
        entry = entries.get(f"{model}|tuned|{method}")
        if entry is None:
            found.append([TITLES.get(method, method), *[MISSING] * 4])
            continue
        best = next(one for one in entry["tried"] if one["setting"] == entry["setting"])
        setting = ", ".join(f"{name} {value:.3g}" for name, value in entry["setting"].items())
        figures = [number(100 * best[name], digits) for name, digits in (("forget", 1), ("drop", 2))]
        found.append([TITLES.get(method, method), setting, *figures, f"{entry['seconds']:.0f}"])
    return found


def evaluated_rows(entries: Entries, model: str) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Title -> (class, entry), in the order of the tables; classes other than the first measured are left out."""
    titles = dict(zip(("original", "retrained"), REFERENCES, strict=True))
    titles |= {f"ours {name}": bold(setting) for name, setting in OURS.items()}
    titles |= {name: TITLES.get(name, name) for name in METHODS}
    rows = {title: row_of(entries, model, "evaluate", name, title) for name, title in titles.items()}
    measured = [cls for cls in SUBJECTS[model].order if any(cls in row.classes for row in rows.values())]
    if not measured:
        return {}
    found = {}
    for title, row in rows.items():
        own = row.of(measured[:1])
        found[title] = measured[0], next(iter(own.runs.values()), {})
    return found


EVALUATED = [
    "method",
    "forget, %",
    "retain, %",
    "AUS",
    "probe, %",
    "20-NN, %",
    "relearning, steps",
    "recall, %",
    "loss",
    "entropy",
    "quantile",
    "learned",
    "CKA to original",
    "CKA to retrained",
]


def rows_of_evaluation(entries: Entries, model: str) -> list[list[str]]:
    found = []
    for title, (_, entry) in evaluated_rows(entries, model).items():
        if not entry:
            found.append([title, *[MISSING] * (len(EVALUATED) - 1)])
            continue
        why: Mapping[str, str] = entry["not measured"]

        def cell(metric: str, *path: str, percent: bool = True, digits: int = 1) -> str:
            value: Any = entry.get(metric)  # noqa: B023  (called before the next round)
            if value is None:
                return "n/a" if "not applicable" in why.get(metric, "") else MISSING  # noqa: B023
            for part in path:
                value = value[part]
            return number(100 * value if percent and value is not None else value, digits)

        relearning = entry.get("relearning")
        steps = MISSING if relearning is None else str(relearning["steps"])
        if relearning is not None and relearning["steps"] is None:
            steps = f"more than {relearning['most']}"
        attacks = [
            cell("membership", name, "auc", percent=False, digits=2)
            for name in ("loss", "entropy", "quantile", "learned")
        ]
        similar = [
            number(entry["cka"][f"edited-{other}"]["forget"], 3) if f"edited-{other}" in entry["cka"] else MISSING
            for other in ("original", "retrained")
        ]
        found.append(
            [
                title,
                cell("accuracy", "test", "forget"),
                cell("accuracy", "test", "retain"),
                cell("aus", percent=False, digits=3),
                cell("linear_probe", "forget"),
                cell("knn", "forget"),
                steps,
                cell("batchnorm_recall", "forget"),
                *attacks,
                *similar,
            ]
        )
    return found


def rows_of_goals(entries: Entries, models: Iterable[str]) -> list[list[str]]:
    """Each goal of each model, what the two defaults reach, and whether that is enough: means over the classes."""
    found = []
    for model, name in product(models, DEFAULTS):
        subject = SUBJECTS[model]
        full = row_of(entries, model, "ours", name, "")
        few = row_of(entries, model, "few", name, "").of(full.classes)
        forget, drop = full.mean("forget"), full.mean("drop")
        head = [subject.title, OURS[name].title]

        def add(goal: str, shown: str, values: Sequence[float | None], most: Sequence[float]) -> None:
            met = MISSING
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                met = "met" if all(v <= m for v, m in zip(known, most, strict=True)) else "missed"
            found.append([*head, goal, shown if met != MISSING else MISSING, met])  # noqa: B023

        add(
            f"forget accuracy at most {subject.forget:g} %, others lose at most {subject.drop:g} "
            + ("point" if subject.drop == 1 else "points"),
            f"{number(forget)} %, {number(drop, 2)} points",
            (forget, drop),
            (subject.forget, subject.drop),
        )
        more = [
            None if one is None or other is None else one - other
            for one, other in ((few.mean("forget"), full.of(few.classes).mean("forget")),
                               (few.mean("drop"), full.of(few.classes).mean("drop")))
        ]  # fmt: skip
        add(
            f"with 64 images per class at most {FEW_GOAL:g} points worse, in both",
            f"{signed(more[0])} and {signed(more[1])} points",
            more,
            (FEW_GOAL, FEW_GOAL),
        )
        recall = full.mean("recall forget")
        add(
            f"forget accuracy after batch-norm recall at most {RECALL_GOAL:g} %",
            f"{number(recall)} %",
            (recall,),
            (RECALL_GOAL,),
        )
        if not full.applies("recall forget"):
            found[-1][3:] = ["no batch norm", "n/a"]
        seconds = (row_of(entries, model, "time", name, "") if timed(entries, model) else full).values("edit seconds")
        middle = statistics.median(seconds) if seconds else None
        add(f"edit in less than {SECONDS_GOAL:g} s", f"{number(middle, 2)} s", (middle,), (SECONDS_GOAL,))
    return found


def timed(entries: Entries, model: str) -> bool:
    return any(key.startswith(f"{model}|time|") for key in entries)


def signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.2f}"


INTRODUCTION = """# Unlearning one class

Written by `python -m benchmarks.bench_unlearn --write` from unlearn.json; do not edit.

One class is forgotten at a time. Moments, `data` and what rivals train on are the first 2,500 training images; with
"64 images per class", the first 64 of each class among them. Accuracies are those on the first 5,000 test images, in %;
"others" are all classes but the forgotten one, each with the same weight. A cell such as 2.1 (6.4) is the mean over the
classes that the row names, and the worst of its runs. "Worst-hit class loses" is the most points that any other class
lost in any run. Below 0: gained.

Recall is the accuracy after the batch norms took their statistics anew from the retained part of the 2,500 images; a
class that comes back this way was only hidden. "n/a": the model has no batch norm.

"Edit" is the time from moments to the edited model: scoring, choosing, and where there is `data`, what is learned from
it; "moments" is that of the pass before it, one for all classes. Medians over classes; torch with {threads}, other runs
beside it. {apart}
For rivals, "edit" is the whole method with its preparations, without tuning. "Components" is their mean number; of
directions, there is one for each layer. None of this is a guarantee of privacy: see docs/evaluation.md for what each
figure can show.

Ours are the defaults of `discedit.unlearn`, the same for all models and classes; nothing of them was tuned for a class.
Published rivals (benchmarks/unlearning_rivals.py) are our own implementations. Of a grid of six settings each, the one
with the highest adaptive unlearning score on the last 5,000 test images (no figure rests on those) was chosen, for one
class; this setting then runs on all classes of its row, and where chance plays a part, with as many seeds as the row
says. Budget: the gradients of one epoch over the 2,500 images.
"""


def section(entries: Entries, model: str) -> str:
    subject = SUBJECTS[model]
    classes = shared_classes(entries, model)
    chosen = f"classes {', '.join(map(str, classes))}" if classes else "no class yet"
    tuning = subject.order[0]
    evaluation = rows_of_evaluation(entries, model)
    about = next((cls for cls, _ in evaluated_rows(entries, model).values()), None)
    parts = [
        (
            "ours",
            "Ours, and the model as it was",
            "",
            MAIN,
            [cells(row, subject) for row in rows_of_ours(entries, model)],
        ),
        (
            "rivals",
            "Against published methods",
            f"Rivals ran on {chosen}; ours here on the same classes. ![Plot](unlearn-{model}.png)",
            MAIN,
            rows_against(entries, model),
        ),
        (
            "evaluate",
            "What is left inside",
            "`discedit.evaluate`"
            + ("" if about is None else f" for class {about} ({subject.names[about]})")
            + ", on the same images; all figures are of the forgotten class but for the accuracy of the others "
            "(retain). Probe and 20-NN: recall of the class by a new classifier on the model's features. Relearning: "
            "steps of SGD until half of the original accuracy. Recall: on at most 512 test images of the class. Loss, "
            "entropy, quantile, learned: AUC of membership attacks, 0.5 where they fail. Compare with the retrained "
            "model, which never saw the class.",
            EVALUATED,
            evaluation,
        ),
        (
            "variants",
            "Options of `unlearn`",
            "Each option by itself, the others at their defaults. Rows with data: as many as bring 5 %, or a share.",
            ["option", "data", "forget, %", "others lose, points", "worst-hit class loses", "components", "edit, s",
             "classes"],
            rows_of_variants(entries, model),
        ),
        (
            "ours",
            "Class by class",
            "",
            ["setting", "class", "forget, %", "others lose, points", "worst-hit class loses", "recall: forget, %",
             "recall: retain, %", "components", "edit, s"],
            rows_by_class(entries, model),
        ),
        (
            "tuned",
            "Tuning of the rivals",
            f"On class {tuning} ({subject.names[tuning]}); accuracies on the held-out images; seconds for the grid.",
            ["method", "chosen", "forget, %", "others lose, points", "seconds"],
            rows_of_tuning(entries, model),
        ),
    ]  # fmt: skip
    text = f"\n## {subject.title}\n"
    for key, title, note, header, rows in parts:
        # Said once for the whole table, where nothing of it was measured.
        there = any(name.startswith(f"{model}|{key}|") for name in entries)
        body = _common.markdown_table(header, rows) if there else "Not measured."
        text += f"\n### {title}\n" + (f"\n{note}\n" if note else "") + f"\n{body}\n"
    return text


def markdown(entries: Entries) -> str:
    """benchmarks/unlearn.md, from what was measured."""
    models = [name for name in SUBJECTS if any(key.startswith(f"{name}|") for key in entries)]
    machines = sorted({str(entry["machine"]) for entry in entries.values()})
    apart = threads_of(entry for key, entry in entries.items() if "|time|" in key)
    text = INTRODUCTION.format(
        threads=threads_of(entry for key, entry in entries.items() if "|time|" not in key) or "no run yet",
        apart=f"The goals' time was measured apart, with nothing beside it and {apart}." if apart else "",
    )
    header = ["model", "setting", "goal", "measured", ""]
    text += "\n## Goals\n\nMeans over the classes of each row; the time is the median.\n\n"
    text += (_common.markdown_table(header, rows_of_goals(entries, models)) if models else "Not measured.") + "\n"
    for model in models:
        text += section(entries, model)
    return text + "\nMeasured on: " + ("; ".join(machines) or "nothing yet") + ".\n"


def threads_of(entries: Iterable[Mapping[str, Any]]) -> str:
    parts = {part.strip() for entry in entries for part in str(entry["machine"]).split(",")}
    found = sorted(part for part in parts if part.endswith(" threads"))
    return " and ".join("1 thread" if part == "1 threads" else part for part in found)


BLUE, LIGHT, GREY, DARK, GREEN = "#1f5fbf", "#8db4e8", "#8a8f98", "#3b3f46", "#2f9e62"


def plot(entries: Entries, model: str) -> Path:
    """benchmarks/unlearn-MODEL.png: forgetting against cost, and what is left inside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subject = SUBJECTS[model]
    classes = shared_classes(entries, model)
    ours = rows_of_ours(entries, model)[1:]
    rows = [row.of(classes) if classes else row for row in ours[: len(OURS)]] + rows_of_rivals(entries, model)
    points = [(row, kind_of(row.title)) for row in rows if row.mean("forget") is not None]
    if not points:
        raise ValueError(f"bench_unlearn: nothing of ours or of the rivals has been measured on {model} yet.")
    known = evaluated_rows(entries, model)
    figure = Figure(figsize=(13.5 if known else 8.6, 6.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if known:
        axes, left, right = figure.subplots(1, 3, width_ratios=(5.2, 1.7, 1.7))
        recovery(left, right, {title: entry for title, (_, entry) in known.items()})
        cls = next(iter(known.values()))[0]
        left.set_title(f"What is left inside, class {cls} ({subject.names[cls]})", fontsize=10, loc="left", color=DARK)
    else:
        axes = figure.subplots()
    trade_off(axes, points, subject, classes)
    handles, titles = axes.get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower left", ncols=len(titles), fontsize=9, frameon=False)
    figure.suptitle(f"Forgetting one class: {subject.title}", x=0.01, ha="left", fontsize=14, weight="bold")
    path = HERE / f"unlearn-{model}.png"
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed for this layout
    place_labels(axes, [(row.title.strip("*"), kind, *position(row)) for row, kind in points])
    figure.savefig(path, dpi=130)
    return path


def kind_of(title: str) -> str:
    if title.startswith("**"):
        return "ours"
    return "control" if "control" in title or title in REFERENCES else "rival"


def position(row: Row) -> tuple[float, float]:
    forget, drop = row.mean("forget"), row.mean("drop")
    assert forget is not None
    assert drop is not None
    return forget, drop


STYLES: dict[str, dict[str, Any]] = {
    "ours": {"marker": "o", "s": 95, "color": BLUE, "edgecolor": "white", "linewidth": 1.2, "zorder": 5},
    "rival": {"marker": "s", "s": 48, "color": GREY, "edgecolor": "white", "linewidth": 0.8, "zorder": 4},
    "control": {"marker": "^", "s": 58, "color": "white", "edgecolor": DARK, "linewidth": 1.2, "zorder": 4},
}
KINDS = {"ours": "discedit", "rival": "published", "control": "control"}


def trade_off(axes: Axes, points: Sequence[tuple[Row, str]], subject: Subject, classes: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xscale("symlog", linthresh=5, linscale=1.0)
    axes.set_yscale("symlog", linthresh=1, linscale=0.8)
    drops = [position(row)[1] for row, _ in points]
    low, high = min(-0.6, *(drop - 0.3 for drop in drops)), max(12.0, *(1.6 * drop for drop in drops))
    axes.set_xlim(-0.6, 118)
    axes.set_ylim(low, high)
    box = Rectangle((-0.6, low), subject.forget + 0.6, subject.drop - low, facecolor=GREEN, alpha=0.13, zorder=0)
    axes.add_patch(box)
    axes.plot([subject.forget] * 2 + [-0.6], [low, subject.drop, subject.drop], color=GREEN, lw=1.2, zorder=1)
    corner: dict[str, Any] = {
        "textcoords": "offset points",
        "va": "top",
        "fontsize": 9,
        "weight": "bold",
        "color": GREEN,
    }
    axes.annotate("goal", (-0.6, subject.drop), (6, -4), **corner)
    axes.axhline(0, color=DARK, lw=0.6, zorder=1)
    for row, kind in points:
        x, y = position(row)
        if kind == "ours":
            axes.scatter(row.values("forget"), row.values("drop"), s=11, color=LIGHT, alpha=0.9, lw=0, zorder=2)
        axes.scatter([x], [y], **STYLES[kind])
    for kind, title in KINDS.items():
        if any(other == kind for _, other in points):
            axes.scatter([], [], label=title, **STYLES[kind])
    if any(kind == "ours" for _, kind in points):
        axes.scatter([], [], s=11, color=LIGHT, lw=0, label="discedit, single classes")
    ticks([0, 1, 2, 5, 10, 20, 50, 100], axes.xaxis)
    ticks([-5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50], axes.yaxis)
    where = f"classes {', '.join(map(str, classes))}" if classes else "all classes measured"
    axes.set_xlabel("accuracy on the forgotten class, %")
    axes.set_ylabel("points that the other classes lose")
    axes.set_title(f"Lower left is better. Mean over {where}", fontsize=10, loc="left", color=DARK)
    axes.grid(alpha=0.25, lw=0.6)
    plain(axes)


def ticks(places: Sequence[float], axis: Any) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_major_formatter(FixedFormatter([f"{place:g}" for place in places]))
    axis.set_minor_locator(NullLocator())


def plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, length=3)


def recovery(left: Axes, right: Axes, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Recall by a linear probe, and steps of relearning: a line for each model."""
    titles = list(known)[::-1]
    for axes, metric in ((left, "linear_probe"), (right, "relearning")):
        for place, title in enumerate(titles):
            found, style = known[title].get(metric), kind_of(title)
            own = style == "ours"
            colour = BLUE if own else GREY
            if found is None:
                axes.annotate(
                    MISSING, (0, place), (4, 0), textcoords="offset points", fontsize=7.5, va="center", color=GREY
                )
                continue
            value = 100 * found["forget"] if metric == "linear_probe" else found["steps"]
            beyond = value is None
            value = found["most"] if beyond else value
            axes.plot([0, value], [place, place], color=colour, lw=2.2 if own else 1.2, alpha=0.55, zorder=2)
            look = {**STYLES[style], "s": 55 if own else 34}
            if beyond:
                look["marker"] = ">"
            axes.scatter([value], [place], clip_on=False, **look)
            shown = f"> {value}" if beyond else f"{value:.0f}"
            axes.annotate(
                shown, (value, place), (7, 0), textcoords="offset points", fontsize=7.5, va="center", color=DARK
            )
            if title == REFERENCES[1] and not beyond:
                axes.axvline(value, color=DARK, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axes.set_ylim(-0.7, len(titles) - 0.3)
        axes.set_xlim(0, 112 if metric == "linear_probe" else 1.2 * most_steps(known))
        axes.grid(axis="x", alpha=0.25, lw=0.6)
        plain(axes)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
    right.set_yticks(range(len(titles)), [""] * len(titles))
    left.set_yticks(range(len(titles)), [title.strip("*") for title in titles], fontsize=8.5)
    for label, title in zip(left.get_yticklabels(), titles, strict=True):
        if title.startswith("**"):
            label.set_color(BLUE)
            label.set_fontweight("bold")
    left.set_xlabel("linear probe:\nrecall of the class, %")
    right.set_xlabel("relearning: steps to\nhalf the accuracy")


def most_steps(known: Mapping[str, Mapping[str, Any]]) -> int:
    return max((entry["relearning"]["most"] for entry in known.values() if entry.get("relearning")), default=50)


def place_labels(axes: Axes, points: Sequence[tuple[str, str, float, float]]) -> None:
    """A label beside each point that covers no other label and no point; with a line where it had to go far."""
    from matplotlib.patheffects import withStroke

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    scale = axes.figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    taken = [text.get_window_extent(renderer) for text in axes.texts]
    boxes = [(box.x0, box.y0, box.x1, box.y1) for box in taken]
    centres = [axes.transData.transform((x, y)) for _, _, x, y in points]
    reach = 7 * scale
    boxes += [(x - reach, y - reach, x + reach, y + reach) for x, y in centres]
    rank = {"ours": 0, "rival": 1, "control": 2}
    for index in sorted(range(len(points)), key=lambda i: rank[points[i][1]]):
        title, kind, x, y = points[index]
        look: dict[str, Any] = {"fontsize": 8.5, "color": BLUE if kind == "ours" else DARK}
        look["weight"] = "bold" if kind == "ours" else "normal"
        look["path_effects"] = [withStroke(linewidth=2.5, foreground="white", alpha=0.85)]
        label = axes.annotate(title, (x, y), (0, 0), textcoords="offset points", va="center", zorder=6, **look)
        size = label.get_window_extent(renderer)
        cx, cy = centres[index]
        # Without room: beside the point all the same.
        best: tuple[float, float, float, Literal["left", "center", "right"]] = 9.0, 0.0, 9.0, "left"
        for distance, angle in product(range(9, 130, 6), range(0, 360, 20)):
            dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            side: Literal["left", "center", "right"] = "left" if dx > 2 else "right" if dx < -2 else "center"
            x0 = cx + dx * scale - {"left": 0, "right": size.width, "center": size.width / 2}[side]
            y0 = cy + dy * scale - size.height / 2
            box = (x0 - 2, y0 - 1, x0 + size.width + 2, y0 + size.height + 1)
            if box[0] < inside.x0 or box[2] > inside.x1 or box[1] < inside.y0 or box[3] > inside.y1:
                continue
            if not any(overlap(box, other) for other in boxes):
                best = dx, dy, distance, side
                boxes.append(box)
                break
        label.set_position(best[:2])
        label.set_horizontalalignment(best[3])
        if best[2] > 14:
            axes.annotate(
                "", (x, y), best[:2], textcoords="offset points", zorder=3,
                arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--classes", nargs="+", type=int, help="for ours, few and variants; by default all")
    parser.add_argument("--only", nargs="+", default=[], help='settings, methods, "original"; of the part evaluate '
                        'also "retrained" and "ours SETTING"; by default all')  # fmt: skip
    parser.add_argument("--rival-classes", type=int, default=3, help="number of classes that rivals run on (3)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of rivals that chance plays a part in")
    parser.add_argument("--evaluate-class", type=int, help="by default the one that rivals are tuned on")
    parser.add_argument("--any-commit", action="store_true", help="keep what other commits or machines measured")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--write", action="store_true", help="write benchmarks/unlearn.md")
    parser.add_argument("--plot", action="store_true", help="write benchmarks/unlearn-MODEL.png")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    log = Log(any_commit=options.any_commit)
    for name in options.models if options.parts else ():
        bench = Bench(name)
        for part in options.parts:
            if part == "rivals":
                rivals(bench, log, options.rival_classes, options.seeds, options.only)
            elif part == "time":
                timings(bench, log, options.classes or range(bench.num_classes))
            elif part == "evaluate":
                first = bench.subject.order[0]
                cls = first if options.evaluate_class is None else options.evaluate_class
                evaluations(bench, log, cls, options.seeds[0], options.only)
            else:
                edits(bench, log, part, options.classes or range(bench.num_classes), options.only)
    if options.write:
        (HERE / "unlearn.md").write_text(markdown(log.entries))
    if options.plot:
        for name in options.models:
            if any(key.startswith((f"{name}|ours|", f"{name}|rivals|")) for key in log.entries):
                print(f"wrote {plot(log.entries, name)}")
    log.end("bench_unlearn")


if __name__ == "__main__":
    main()
