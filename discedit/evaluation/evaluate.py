"""`evaluate`: what an unlearned model still knows of the classes it should have forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.common.tables import format_table
from discedit.evaluation.membership import LEAST, Membership, membership
from discedit.evaluation.outputs import OP, EvaluationData, ForgetRetain, gather, means
from discedit.evaluation.probes import cka, knn, linear_probe
from discedit.evaluation.relearning import Recall, Relearning, RelearnTime, recall_by_batch_norms
from discedit.model.forward import outside_inference_mode
from discedit.model.sharded import unwrapped
from discedit.model.size import accuracy_per_class as accuracy_per_class

KEPT_FORGET, KEPT_RETAIN = 512, 1024  # inputs kept of each loader, as many of each class, to run again
MOST_ROWS = 20  # classes that have rows in a table
UNFIT = "not applicable, the model has no batch norm with running statistics"


@dataclass(frozen=True)
class Accuracy(ForgetRetain):
    """Of one model on one set of samples: means over the forgotten and over the other classes, and class by class.

    Against the original, where given: `drop`, what the mean over the other classes lost (below 0: gained), and the
    `worst_class` of these, which lost `worst_loss`. A class without samples is NaN and does not count.
    """

    per_class: tuple[float, ...]
    drop: float | None = None
    worst_class: int | None = None
    worst_loss: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. Figures are by model: "edited", and where given "original" and "retrained".

    A metric that was not measured is None, and `not_measured` says why. Accuracies are in [0, 1].

    Attributes:
        samples: "test" and "train": samples of the forgotten and of the other classes.
        accuracy: by model, then "test" and "train".
        cka: "edited-original", "edited-retrained", "original-retrained".
    """

    classes: tuple[int, ...]
    num_classes: int
    samples: dict[str, dict[str, int]]
    accuracy: dict[str, dict[str, Accuracy]] | None = None
    membership: dict[str, Membership] | None = None
    linear_probe: dict[str, ForgetRetain] | None = None
    knn: dict[str, ForgetRetain] | None = None
    cka: dict[str, ForgetRetain] | None = None
    relearning: dict[str, RelearnTime] | None = None
    batchnorm_recall: dict[str, Recall] | None = None
    aus: dict[str, float] | None = None
    not_measured: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: dicts, lists, numbers, None (also for NaN)."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row per metric, model and figure. Needs pandas."""
        import pandas as pd

        return pd.DataFrame(self._figures(), columns=["metric", "model", "figure", "value"])

    def _figures(self) -> Iterator[tuple[str, str, str, Any]]:
        found = self.to_dict()
        for metric in METRICS:
            for model, figures in (found[metric] or {}).items():
                yield from ((metric, model, figure, value) for figure, value in _leaves(figures))

    def table(self) -> str:
        """The figures as text, a column for each model. Of many classes, those not forgotten have no rows."""
        rows: dict[str, dict[str, str]] = {}
        for metric, model, figure, value in self._figures():
            _, of_class, cls = figure.partition("per_class ")
            if not of_class or self.num_classes <= MOST_ROWS or int(cls) in self.classes:
                shown = "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
                rows.setdefault(f"{metric}  {figure}", {})[model] = shown
        forgotten = ", ".join(map(str, self.classes))
        counted = "; ".join(f"{part}: {n['forget']:,} + {n['retain']:,}" for part, n in self.samples.items())
        blocks = [f"forgotten: class {forgotten} of {self.num_classes}. Samples, forgotten + others: {counted}."]
        for of_pairs in (False, True):
            block = {title: cells for title, cells in rows.items() if title.startswith("cka") == of_pairs}
            models = list(dict.fromkeys(model for cells in block.values() for model in cells))
            lines = [[title, *(cells.get(model, "") for model in models)] for title, cells in block.items()]
            blocks += [format_table([["", *models], *lines])] if lines else []
        blocks += ["\n".join(f"not measured: {metric}: {why}." for metric, why in self.not_measured.items())]
        blocks += ["What is not found here may still be there: zeroing components is no guarantee of privacy."]
        return "\n\n".join(filter(None, blocks))

    def __str__(self) -> str:
        return self.table()


def accuracy(data: EvaluationData) -> dict[str, dict[str, Accuracy]]:
    """On all samples there are."""
    found: dict[str, dict[str, Accuracy]] = {name: {} for name in data.models}
    for part, outputs in data.outputs.items():
        before = outputs["original"].recall() if "original" in outputs else None
        for name, one in outputs.items():
            rates, own = one.recall(), means(one.recall(), data.classes)
            loss: tuple[Any, ...] = ()
            if before is not None and name != "original":
                lost = (before - rates)[data.others]
                if bool(lost.isfinite().any()):
                    place = int(lost.nan_to_num(-math.inf).argmax())
                    loss = (float(lost.nanmean()), data.others[place], float(lost[place]))
            found[name][part] = Accuracy(own.forget, own.retain, tuple(rates.tolist()), *loss)
    return found


def adaptive_unlearning_score(drop: float, forget: float) -> float:
    """AUS for class removal: (1 - drop of the retain test accuracy) / (1 + forget test accuracy).

    1 for a model that forgot all and lost nothing. Accuracies are means over classes here, over samples in the
    publication: the same where classes have equally many samples.

    Source: Cotogni et al., DUCK: Distance-based Unlearning via Centroid Kinematics, 2023.
    """
    return (1 - drop) / (1 + forget)


def aus(data: EvaluationData) -> dict[str, float]:
    found = {name: parts["test"] for name, parts in accuracy(data).items()}
    before = found["original"].retain
    return {name: adaptive_unlearning_score(before - one.retain, one.forget) for name, one in found.items()}


class Metric(NamedTuple):
    """One question about all models.

    `requires`: "train", "original", "reference" (the original or a retrained model), "features", "samples" (to run
    again), "scikit-learn". `least`: samples that test and training data must have of each forgotten class.
    """

    measure: Callable[[EvaluationData], dict[str, Any]]
    requires: tuple[str, ...] = ()
    least: int = 0


METRICS = {
    "accuracy": Metric(accuracy),
    "membership": Metric(membership, ("train", "features", "scikit-learn"), LEAST),
    "linear_probe": Metric(linear_probe, ("train", "features", "scikit-learn"), 1),
    "knn": Metric(knn, ("train", "features", "scikit-learn"), 1),
    "cka": Metric(cka, ("reference", "features")),
    "relearning": Metric(Relearning(), ("train", "original", "samples"), 1),
    "batchnorm_recall": Metric(recall_by_batch_norms, ("train", "samples")),
    "aus": Metric(aus, ("original",)),
}
ALL = ("all", *METRICS)


def _chosen(metrics: Any) -> tuple[dict[str, Metric], bool]:
    """The metrics asked for, and whether by name: then each must be measured."""
    given = [metrics] if isinstance(metrics, (str, Relearning)) else metrics
    if not isinstance(given, Iterable):
        raise ValueError(f"{OP}: metrics must be 'all', a name or several names, got {metrics!r}.")
    tuned, names = METRICS["relearning"], set()
    for one in given:
        if isinstance(one, Relearning):
            tuned = tuned._replace(measure=one)
        names.add("relearning" if isinstance(one, Relearning) else validation.choice(OP, "metrics", one, ALL))
    if not names:
        raise ValueError(f"{OP}: metrics must name at least one metric, it is empty.")
    every = "all" in names
    found = {name: metric for name, metric in METRICS.items() if every or name in names}
    return found | ({"relearning": tuned} if "relearning" in found else {}), not every


@outside_inference_mode()
def evaluate(
    model: nn.Module,
    *,
    classes: Sequence[int] | Callable[[int], bool],
    test: Iterable[Any],
    num_classes: int,
    train: Iterable[Any] | None = None,
    original: nn.Module | None = None,
    retrained: nn.Module | None = None,
    metrics: str | Relearning | Iterable[str | Relearning] = "all",
    features: str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure how well a model has forgotten classes, and what that cost.

    Nothing here proves that a class is forgotten, let alone privacy: docs/evaluation.md says for each metric what it
    shows and what it cannot.

    Args:
        model: the edited model. All models are left as they were, as is torch's random state. They run in eval mode.
        classes: the forgotten classes: indices, or a predicate on them.
        test: (inputs, labels) batches of samples that no model was trained on. Gone through once.
        num_classes: number of classes, which is the number of logits.
        train: batches of samples that the original was trained on, forgotten classes among them. Gone through once.
        original: the model before the edit.
        retrained: a model trained from scratch without the forgotten classes: what to compare with.
        metrics: one or several of "accuracy", "membership", "linear_probe", "knn", "cka", "relearning" (or a
            `Relearning` with other options), "batchnorm_recall" and "aus"; or, also among others, "all": those that can
            be measured.
        features: name of the layer whose output are the features to look at, averaged over places or tokens; by
            default the input of the head, the last linear layer, whose output is the model's.
        seed: of all random choices. The same seed on the same machine gives the same figures.

    Raises:
        ValueError: what does not fit or is missing, logits that are not finite, or no head to be found.
        ModuleNotFoundError: `membership`, `linear_probe` and `knn` need scikit-learn.

    >>> from discedit import zoo
    >>> train, test = zoo.digits()
    >>> model = zoo.train_digits_net(train, epochs=4)
    >>> found = evaluate(model, classes=[3], num_classes=10, test=zoo.batches(test), metrics="accuracy")
    >>> found.accuracy["edited"]["test"].forget > 0.9
    True
    """
    count = validation.positive_integer(OP, "num_classes", num_classes)
    forget = validation.classes(OP, classes, count)
    others = [cls for cls in range(count) if cls not in forget]
    if not others:
        raise ValueError(f"{OP}: classes must leave at least one class to retain, they are all {count}.")
    if features is not None and not isinstance(features, str):
        raise ValueError(f"{OP}: features must be the name of a layer, got {features!r}.")
    if (number := validation.index(seed)) is None or not 0 <= number < 2**32:
        raise ValueError(f"{OP}: seed must be an integer in 0..2**32 - 1, got {seed!r}.")
    chosen, by_name = _chosen(metrics)
    given = {"edited": model} | {k: v for k, v in (("original", original), ("retrained", retrained)) if v is not None}
    for name, one in given.items():
        validation.module(OP, one, "model" if name == "edited" else name)
    models = {name: unwrapped(one) for name, one in given.items()}
    not_measured = _leave_out(chosen, by_name, lambda metric: _missing_argument(metric, train, models))
    required = {what for metric in chosen.values() for what in metric.requires}
    if "scikit-learn" in required and find_spec("sklearn") is None:
        needy = [name for name, metric in METRICS.items() if "scikit-learn" in metric.requires]
        raise ModuleNotFoundError(
            f"{OP}: metrics {validation.quoted(needy)} need scikit-learn. Install it: pip install 'discedit[evaluate]'"
        )
    keep = {}
    if "samples" in required:
        keep = dict.fromkeys(forget, -(-KEPT_FORGET // len(forget)))
        keep |= dict.fromkeys(others, -(-KEPT_RETAIN // len(others)))
    read = "features" in required and (features or True)
    outputs, kept, counts = {}, {}, {}
    # Each loader is gone through once, for all models: what metrics run again is kept.
    for part, loader in (("test", test), ("train", train)):
        if loader is not None:
            outputs[part], kept[part] = gather(part, loader, models, count, features=read, keep=keep, seed=number)
            counts[part] = torch.bincount(outputs[part]["edited"].labels, minlength=count)
    _check_test(counts["test"], forget, others)
    not_measured |= _leave_out(chosen, by_name, lambda metric: _missing_samples(metric, counts, forget, others))
    data = EvaluationData(models, forget, others, outputs, kept, number)
    found = {name: metric.measure(data) for name, metric in chosen.items()}
    relearning = chosen["relearning"].measure if "relearning" in chosen else None
    tuned = asdict(relearning) if isinstance(relearning, Relearning) else None
    return Evaluation(
        classes=tuple(forget),
        num_classes=count,
        samples={part: {"forget": int(n[forget].sum()), "retain": int(n[others].sum())} for part, n in counts.items()},
        not_measured=not_measured | {name: UNFIT for name, figures in found.items() if not figures},
        settings={"features": features, "seed": number, "relearning": tuned},
        **{name: figures for name, figures in found.items() if figures},
    )


def _leave_out(metrics: dict[str, Metric], by_name: bool, missing: Callable[[Metric], str]) -> dict[str, str]:
    """Takes out metrics that lack something, and says what; an error where they were asked for by name."""
    lacking = {name: what for name, metric in metrics.items() if (what := missing(metric))}
    for name, what in lacking.items():
        if by_name:
            raise ValueError(f"{OP}: metrics={name!r} needs {what}.")
        del metrics[name]
    return {name: f"needs {what}" for name, what in lacking.items()}


def _missing_argument(metric: Metric, train: Any, models: Mapping[str, nn.Module]) -> str:
    if "train" in metric.requires and train is None:
        return "train, it was not given"
    if "original" in metric.requires and "original" not in models:
        return "original, it was not given"
    return "original or retrained, neither was given" if "reference" in metric.requires and len(models) == 1 else ""


def _check_test(count: Tensor, forget: list[int], others: list[int]) -> None:
    none = [f"class {cls}" for cls in forget if not count[cls]] + ([] if count[others].any() else ["those to retain"])
    if none:
        raise ValueError(f"{OP}: test must have samples of the classes to forget and to retain, none of {none[0]}.")


def _missing_samples(metric: Metric, counts: Mapping[str, Tensor], forget: list[int], others: list[int]) -> str:
    if "train" in metric.requires and int(counts["train"][others].sum()) < 2:
        return "samples of classes to retain in train, there are less than 2"
    for cls in forget:
        for part, count in counts.items():
            if int(count[cls]) < metric.least:
                return f"at least {metric.least} samples of class {cls} in {part}, there are {int(count[cls])}"
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    # JSON has neither NaN nor infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _leaves(value: Any, title: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers in a nest, each with the names that lead to it."""
    if not isinstance(value, (dict, list)):
        yield title, value
        return
    for name, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(one, f"{title} {name}".strip())
