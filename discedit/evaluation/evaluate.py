"""`evaluate`: what an unlearned model still knows of the classes it should have forgotten. And accuracy by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from discedit.common import validation
from discedit.evaluation.membership import LEAST, Attack, Membership, membership
from discedit.evaluation.outputs import Outputs, Samples, accuracies, gather, is_among
from discedit.evaluation.probes import Probe, Similarity, cka, knn, linear_probe, means
from discedit.evaluation.relearning import Kept, Recall, Relearning, batchnorm_recall, forget_accuracy, relearning
from discedit.model.forward import device_of, outside_inference_mode
from discedit.model.sharded import unwrapped
from discedit.model.size import accuracy_per_class as accuracy_per_class
from discedit.moments.calibration import batch_norms

METRICS = ("accuracy", "membership", "linear_probe", "knn", "cka", "relearning", "batchnorm_recall", "aus")
NEEDS_TRAIN = ("membership", "linear_probe", "knn", "relearning", "batchnorm_recall")
NEEDS_FORGOTTEN = ("membership", "linear_probe", "knn", "relearning")  # training samples of them
NEEDS_ORIGINAL = ("relearning", "aus")
NEEDS_FEATURES = ("membership", "linear_probe", "knn", "cka")
NEEDS_SCIKIT = ("membership", "linear_probe", "knn")
KEPT_FORGET, KEPT_RETAIN = 512, 1024  # inputs kept of each loader, as many of each class, to run again
RELEARNING_TEST = 200  # of these, test samples that every step of relearning is judged by


@dataclass(frozen=True)
class Accuracy:
    """Of one model on one set of samples: means over the forgotten and over the other classes, and class by class.

    Against the original, where given: `drop`, what the mean over the other classes lost (below 0: gained), and the
    `worst_class` of these, which lost `worst_loss`. A class without samples is NaN and does not count.
    """

    forget: float
    retain: float
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
        seconds: with their "total".
    """

    classes: tuple[int, ...]
    num_classes: int
    samples: dict[str, dict[str, int]]
    accuracy: dict[str, dict[str, Accuracy]] | None = None
    membership: dict[str, Membership] | None = None
    linear_probe: dict[str, Probe] | None = None
    knn: dict[str, Probe] | None = None
    cka: dict[str, Similarity] | None = None
    relearning: dict[str, Relearning] | None = None
    batchnorm_recall: dict[str, Recall] | None = None
    aus: dict[str, float] | None = None
    seconds: dict[str, float] | None = None
    not_measured: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: dicts, lists, numbers, None (also for NaN)."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def table(self) -> str:
        """All figures as text, a column for each model."""
        return _table(self)

    def __str__(self) -> str:
        return self.table()


@outside_inference_mode
def evaluate(
    model: nn.Module,
    *,
    classes: Sequence[int] | Callable[[int], bool],
    test: Iterable[Any],
    num_classes: int,
    train: Iterable[Any] | None = None,
    original: nn.Module | None = None,
    retrained: nn.Module | None = None,
    metrics: str | Iterable[str] = "all",
    features: str | None = None,
    learning_rate: float = 0.001,
    batch_size: int = 64,
    max_steps: int = 50,
    seconds: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure how well a model has forgotten classes, and what that cost.

    Nothing here proves that a class is forgotten, let alone privacy: an attack that fails says that this attack fails.
    docs/evaluation.md says for each metric what it shows and what it cannot. Figures of a model `retrained` without the
    classes are what to compare with.

    Args:
        model: the edited model. It and the other models are left as they were: mode, parameters, buffers, gradients,
            hooks; so is torch's random state. They run in eval mode.
        classes: the forgotten classes: indices, or a predicate on them.
        test: (inputs, labels) batches of samples that no model was trained on. Gone through once.
        num_classes: number of classes, which is the number of logits.
        train: batches of samples that the original was trained on, forgotten classes among them. Gone through once.
            Without it, what needs it is left out.
        original: the model before the edit.
        retrained: a model trained from scratch without the forgotten classes.
        metrics: "all", or one or several of "accuracy", "membership", "linear_probe", "knn", "cka", "relearning",
            "batchnorm_recall" and "aus". With "all", what cannot be measured is left out, and `not_measured` says why.
        features: name of the layer whose output are the features to look at, averaged over places or tokens; by
            default the input of the head, the last linear layer, whose output is the model's.
        learning_rate, batch_size, max_steps: of `relearning`: plain SGD; half of each batch are forgotten classes.
        seconds: times that you measured, by name; reported as they are, and their sum.
        seed: of all random choices. The same seed on the same machine gives the same figures.

    Returns:
        `Evaluation`; print it.

    Raises:
        ValueError: unknown classes, metrics or layers; samples that are missing; what a metric asked for by name needs
            and does not get; logits that do not fit or are not finite; no head to be found.
        ModuleNotFoundError: `membership`, `linear_probe` and `knn` need scikit-learn.

    Memory: logits and features of all samples, and of each loader about 1,536 inputs, to train with and to run again.

    >>> import discedit
    >>> from discedit import zoo
    >>> train, test = zoo.digits()
    >>> model = zoo.train_digits_net(train, epochs=4)
    >>> scores = discedit.score(discedit.collect_moments(model, zoo.batches(train), num_classes=10))
    >>> edited = discedit.unlearn(model, scores, classes=[3], fraction=0.15).model
    >>> report = discedit.evaluate(
    ...     edited, classes=[3], num_classes=10, test=zoo.batches(test), original=model, metrics=["accuracy", "aus"]
    ... )
    >>> before, after = (report.accuracy[name]["test"] for name in ("original", "edited"))
    >>> before.forget > 0.9 and after.forget < 0.5 and after.retain > 0.85
    True
    """
    op = "evaluate"
    count = validation.positive_integer(op, "num_classes", num_classes)
    forget = validation.classes(op, classes, count)
    if len(forget) == count:
        raise ValueError(f"{op}: classes must leave at least one class to retain, they are all {count}.")
    if features is not None and not isinstance(features, str):
        raise ValueError(f"{op}: features must be the name of a layer, got {features!r}.")
    wanted, named = _wanted(op, metrics)
    rate = validation.at_least_zero(op, "learning_rate", learning_rate)
    batch = validation.positive_integer(op, "batch_size", batch_size)
    most = validation.positive_integer(op, "max_steps", max_steps)
    times = _times(op, seconds)
    seed = _seed(op, seed)
    given = {"edited": model, "original": original, "retrained": retrained}
    for name, one in given.items():
        if one is not None:
            validation.module(op, one, "model" if name == "edited" else name)
    models = {name: unwrapped(one) for name, one in given.items() if one is not None}
    left_out = _Left(op, named)
    _leave_out_without_arguments(left_out, wanted, train is None, models)
    planned = [metric for metric in wanted if metric not in left_out.reasons]
    if any(metric in NEEDS_SCIKIT for metric in planned) and find_spec("sklearn") is None:
        raise ModuleNotFoundError(
            f"{op}: metrics {validation.quoted(NEEDS_SCIKIT)} need scikit-learn. Install it: "
            "pip install 'discedit[evaluate]'"
        )
    read = (features or True) if any(metric in NEEDS_FEATURES for metric in planned) else False

    again = any(metric in ("relearning", "batchnorm_recall") for metric in planned)
    kept = {part: Samples(_quota(forget, count) if again else {}) for part in ("test", "train")}
    outputs: dict[str, dict[str, Outputs]] = {}
    samples: dict[str, dict[str, int]] = {}
    for part, loader in (("test", test), ("train", train)):
        if loader is None:
            continue
        outputs[part] = gather(op, part, loader, models, count, features=read, samples=kept[part], seed=seed)
        labels = outputs[part]["edited"].labels
        own = int(is_among(labels, forget).sum())
        samples[part] = {"forget": own, "retain": len(labels) - own}
    _check_samples(op, left_out, planned, outputs, forget, count)
    planned = [metric for metric in planned if metric not in left_out.reasons]

    found: dict[str, Any] = {}
    accuracy = {name: {part: outputs[part][name] for part in outputs} for name in models}
    scores = _accuracies(accuracy, forget, count)
    if "accuracy" in planned:
        found["accuracy"] = scores
    if "aus" in planned:
        before = scores["original"]["test"].retain
        found["aus"] = {
            name: adaptive_unlearning_score(before - one["test"].retain, one["test"].forget)
            for name, one in scores.items()
        }
    if "membership" in planned:
        found["membership"] = {
            name: membership(outputs["train"][name], outputs["test"][name], forget, seed) for name in models
        }
    for metric, probe in (("linear_probe", linear_probe), ("knn", knn)):
        if metric in planned:
            found[metric] = {name: probe(outputs["train"][name], outputs["test"][name], forget) for name in models}
    if "cka" in planned:
        pairs = [("edited", "original"), ("edited", "retrained"), ("original", "retrained")]
        found["cka"] = {
            f"{one}-{other}": cka(outputs["test"][one], outputs["test"][other], forget)
            for one, other in pairs
            if one in models and other in models
        }
    if "relearning" in planned:
        found["relearning"] = _relearn(models, kept, forget, rate, batch, most, seed)
    if "batchnorm_recall" in planned:
        found["batchnorm_recall"] = _recall(left_out, models, kept, forget, seed)
    return Evaluation(
        classes=tuple(forget),
        num_classes=count,
        samples=samples,
        seconds=times,
        not_measured=left_out.reasons,
        settings={
            "features": features,
            "learning_rate": rate,
            "batch_size": batch,
            "max_steps": most,
            "seed": seed,
        },
        **found,
    )


def adaptive_unlearning_score(drop: float, forget: float) -> float:
    """AUS for class removal: (1 - drop of the retain test accuracy) / (1 + forget test accuracy).

    1 for a model that forgot all and lost nothing. What it cannot show: whether anything is left inside the model; a
    mask on the output reaches 1. Accuracies are means over classes here, over samples in the publication: the same
    where classes have equally many samples.

    Source: Cotogni et al., DUCK: Distance-based Unlearning via Centroid Kinematics, 2023.
    """
    return (1 - drop) / (1 + forget)


class _Left:
    """Metrics that are left out, with the reason; an error for one that was asked for by name."""

    def __init__(self, op: str, named: bool) -> None:
        self.reasons: dict[str, str] = {}
        self._op, self._named = op, named

    def out(self, metric: str, argument: str, reason: str) -> None:
        if self._named:
            raise ValueError(f"{self._op}: metrics={metric!r} needs {argument}, {reason}.")
        self.reasons.setdefault(metric, f"needs {argument}, {reason}")


def _wanted(op: str, metrics: Any) -> tuple[list[str], bool]:
    """The metrics in the order of METRICS, and whether they were named."""
    if isinstance(metrics, str) and metrics == "all":
        return list(METRICS), False
    names = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(names, Iterable):
        raise ValueError(f"{op}: metrics must be 'all', a name or several names, got {metrics!r}.")
    names = [validation.choice(op, "metrics", name, METRICS) for name in names]
    if not names:
        raise ValueError(f"{op}: metrics must name at least one metric, it is empty.")
    return [metric for metric in METRICS if metric in names], True


def _leave_out_without_arguments(
    left_out: _Left, wanted: list[str], no_train: bool, models: Mapping[str, nn.Module]
) -> None:
    for metric in wanted:
        if metric in NEEDS_TRAIN and no_train:
            left_out.out(metric, "train", "it was not given")
        if metric in NEEDS_ORIGINAL and "original" not in models:
            left_out.out(metric, "original", "it was not given")
        if metric == "cka" and len(models) == 1:
            left_out.out(metric, "original or retrained", "neither was given")


def _check_samples(
    op: str,
    left_out: _Left,
    planned: list[str],
    outputs: Mapping[str, Mapping[str, Outputs]],
    forget: list[int],
    num_classes: int,
) -> None:
    counts = {part: torch.bincount(one["edited"].labels, minlength=num_classes) for part, one in outputs.items()}
    others = _others(forget, num_classes)
    for cls in forget:
        if not counts["test"][cls]:
            raise ValueError(f"{op}: test must have samples of the classes to forget, it has none of class {cls}.")
    if not counts["test"][others].any():
        raise ValueError(f"{op}: test must have samples of the classes to retain, it has none.")
    if "train" not in counts:
        return
    for metric in planned:
        if metric in NEEDS_TRAIN and int(counts["train"][others].sum()) < 2:
            left_out.out(metric, "samples of classes to retain in train", "there are less than 2")
        for cls in forget:
            if metric == "membership":
                for part in ("train", "test"):
                    if int(counts[part][cls]) < LEAST:
                        needs = f"at least {LEAST} samples of class {cls} in {part}"
                        left_out.out(metric, needs, f"there are {int(counts[part][cls])}")
            elif metric in NEEDS_FORGOTTEN and not counts["train"][cls]:
                left_out.out(metric, f"samples of class {cls} in train", "there are none")


def _others(forget: list[int], num_classes: int) -> list[int]:
    return [cls for cls in range(num_classes) if cls not in forget]


def _quota(forget: list[int], num_classes: int) -> dict[int, int]:
    """How many inputs of each class are kept."""
    others = _others(forget, num_classes)
    own, rest = math.ceil(KEPT_FORGET / len(forget)), math.ceil(KEPT_RETAIN / len(others))
    return dict.fromkeys(forget, own) | dict.fromkeys(others, rest)


def _times(op: str, seconds: Any) -> dict[str, float] | None:
    if seconds is None:
        return None
    if not isinstance(seconds, Mapping) or "total" in seconds:
        raise ValueError(f"{op}: seconds must map names other than 'total' to numbers, got {seconds!r}.")
    times = {str(name): validation.at_least_zero(op, f"seconds[{name!r}]", value) for name, value in seconds.items()}
    return times | {"total": math.fsum(times.values())}


def _seed(op: str, value: Any) -> int:
    seed = validation.index(value)
    if seed is None or not 0 <= seed < 2**32:
        raise ValueError(f"{op}: seed must be an integer in 0..2**32 - 1, got {value!r}.")
    return seed


def _accuracies(
    outputs: Mapping[str, Mapping[str, Outputs]], forget: list[int], num_classes: int
) -> dict[str, dict[str, Accuracy]]:
    others = _others(forget, num_classes)
    found: dict[str, dict[str, Accuracy]] = {}
    for name, parts in outputs.items():
        found[name] = {}
        for part, one in parts.items():
            rates = accuracies(one, num_classes)
            own, rest = means(rates, forget)
            drop, worst, loss = None, None, None
            if name != "original" and "original" in outputs:
                lost = accuracies(outputs["original"][part], num_classes) - rates
                if bool(lost[others].isfinite().any()):
                    drop = float(lost[others].nanmean())
                    place = int(lost[others].nan_to_num(-math.inf).argmax())
                    worst, loss = others[place], float(lost[others[place]])
            found[name][part] = Accuracy(own, rest, tuple(rates.tolist()), drop, worst, loss)
    return found


def _relearn(
    models: Mapping[str, nn.Module],
    kept: Mapping[str, Samples],
    forget: list[int],
    rate: float,
    batch: int,
    most: int,
    seed: int,
) -> dict[str, Relearning]:
    found, target = {}, math.nan
    for name in sorted(models, key=lambda name: name != "original"):  # whose accuracy sets the target
        train, test = (Kept.of(kept[part], device_of(models[name])) for part in ("train", "test"))
        test = test.among(forget).first(RELEARNING_TEST)
        if name == "original":
            target = forget_accuracy(models[name], test, forget) / 2
        found[name] = relearning(
            models[name],
            train,
            test,
            forget,
            target=target,
            learning_rate=rate,
            batch_size=batch,
            most=most,
            seed=seed,
        )
    return {name: found[name] for name in models}


def _recall(
    left_out: _Left, models: Mapping[str, nn.Module], kept: Mapping[str, Samples], forget: list[int], seed: int
) -> dict[str, Recall] | None:
    """Of each model that has batch norms; None, with the reason noted, if the edited one has none."""
    if not batch_norms(models["edited"]):
        left_out.reasons["batchnorm_recall"] = "not applicable, the model has no batch norm with running statistics"
        return None
    found = {}
    for name, model in models.items():
        if batch_norms(model):
            train, test = (Kept.of(kept[part], device_of(model)) for part in ("train", "test"))
            found[name] = batchnorm_recall(model, train, test, forget, seed)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(report: Evaluation) -> str:
    names = list((report.accuracy or report.membership or report.linear_probe or report.knn or {}).keys())
    for figures in (report.relearning, report.batchnorm_recall, report.aus):
        names += [name for name in figures or {} if name not in names]
    rows: list[tuple[str, list[str]]] = []

    def row(title: str, cells: Mapping[str, str]) -> None:
        rows.append((title, [cells.get(name, "") for name in names]))

    def percent(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"

    for part in report.samples if report.accuracy else ():
        of = {name: parts[part] for name, parts in (report.accuracy or {}).items()}
        row(f"{part} accuracy, %", {})
        row("  forgotten classes", {name: percent(one.forget) for name, one in of.items()})
        row("  other classes", {name: percent(one.retain) for name, one in of.items()})
        if any(one.drop is not None for one in of.values()):
            row("  other classes, points lost", {name: percent(one.drop) for name, one in of.items()})
            row(
                "  worst of them, points lost",
                {
                    name: "-" if one.worst_class is None else f"{percent(one.worst_loss)} (class {one.worst_class})"
                    for name, one in of.items()
                },
            )
    if report.accuracy:
        row("test accuracy by class, %", {})
        for cls in range(report.num_classes):
            title = f"  class {cls}" + (" (forgotten)" if cls in report.classes else "")
            of_class = {name: parts["test"].per_class[cls] for name, parts in report.accuracy.items()}
            if report.num_classes <= 20 or cls in report.classes:
                row(title, {name: percent(value) for name, value in of_class.items()})
        if report.num_classes > 20:
            row("  (all others: to_dict())", {})
    if report.aus:
        row("adaptive unlearning score", {name: f"{value:.3f}" for name, value in report.aus.items()})
    if report.membership:
        any_attack = next(iter(report.membership.values())).loss
        row(f"membership, AUC ({any_attack.members} members, {any_attack.non_members} not)", {})
        attacks = (("loss", "loss"), ("entropy", "modified entropy"), ("quantile", "quantile regression"),
                   ("learned", "learned, cross-validated"))  # fmt: skip
        for key, title in attacks:
            of_attack: dict[str, Attack] = {name: getattr(one, key) for name, one in report.membership.items()}
            row(f"  {title}", {name: f"{one.auc:.3f} +- {one.standard_error:.3f}" for name, one in of_attack.items()})
        row(f"membership, % found at 1 % false positives ({any_attack.false_positives} samples)", {})
        for key, title in attacks:
            row(f"  {title}", {name: percent(getattr(one, key).tpr) for name, one in report.membership.items()})
    for title, probes in (("linear probe", report.linear_probe), ("20 nearest neighbours", report.knn)):
        if probes:
            row(f"{title}, recall, %", {})
            row("  forgotten classes", {name: percent(one.forget) for name, one in probes.items()})
            row("  other classes", {name: percent(one.retain) for name, one in probes.items()})
    if report.relearning:
        row(
            "relearning, steps to half the accuracy",
            {
                name: str(one.steps) if one.steps is not None else f"more than {one.most}"
                for name, one in report.relearning.items()
            },
        )
        row("  forget accuracy then, %", {name: percent(one.accuracy) for name, one in report.relearning.items()})
    if report.batchnorm_recall:
        row("with batch norms of the other classes, %", {})
        row("  forgotten classes", {name: percent(one.forget) for name, one in report.batchnorm_recall.items()})
        row("  other classes", {name: percent(one.retain) for name, one in report.batchnorm_recall.items()})

    forgotten = ", ".join(map(str, report.classes))
    counted = "; ".join(f"{part}: {n['forget']:,} + {n['retain']:,}" for part, n in report.samples.items())
    lines = [f"forgotten: class {forgotten} of {report.num_classes}. Samples, forgotten + others: {counted}."]
    if rows:
        width = max(len(title) for title, _ in rows) + 2
        cell = max(12, *(len(text) for _, cells in rows for text in cells)) + 2
        lines += ["", (" " * width + "".join(f"{name:>{cell}}" for name in names)).rstrip()]
        lines += [(f"{title:{width}}" + "".join(f"{text:>{cell}}" for text in cells)).rstrip() for title, cells in rows]
    if report.cka:
        lines += ["", f"{'linear CKA of features':34}{'forgotten':>12}{'others':>12}"]
        lines += [f"  {pair:32}{one.forget:12.3f}{one.retain:12.3f}" for pair, one in report.cka.items()]
    if report.seconds:
        lines += ["", "seconds: " + ", ".join(f"{name} {value:.3g}" for name, value in report.seconds.items())]
    if report.not_measured:
        lines.append("")
        lines += [f"not measured: {metric}: {reason}." for metric, reason in report.not_measured.items()]
    lines += ["", "What is not found here may still be there: zeroing components is no guarantee of privacy."]
    return "\n".join(lines)
