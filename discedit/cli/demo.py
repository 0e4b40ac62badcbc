"""The main job once through on real images: score, prune, unlearn one class, and say what each did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from discedit import zoo
from discedit.editing.prune import prune
from discedit.editing.unlearn import unlearn
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.model.size import count_macs, count_parameters
from discedit.moments.collect import collect_moments
from discedit.scoring.scores import score

MODELS = {"digits": ("digitsnet",), "cifar10": ("resnet56", "resnet20")}


@dataclass
class Column:
    """One model in the before/after table."""

    title: str
    accuracy: Tensor
    parameters: int
    macs: int


def run(
    data: str, model_name: str, *, ratio: float, forget: int, out: Path, say: Callable[[str], None]
) -> list[Column]:
    """Runs the demo, writes its files to `out` and returns the table's columns.

    Raises:
        ValueError: a class or ratio out of range.
        FileNotFoundError: the CIFAR-10 images or weights are not there; the message says how to get them.
    """
    if not 0 <= forget < 10:
        raise ValueError(f"the class to forget must lie in 0..9, got {forget}.")
    clock = time.perf_counter()

    def step(text: str) -> None:
        say(f"[{time.perf_counter() - clock:5.1f} s] {text}")

    if data == "digits":
        train, test = zoo.digits()
        names = [str(digit) for digit in range(10)]
        step("training a small CNN on 1,200 handwritten digits (scikit-learn's)")
        model: nn.Module = zoo.train_digits_net(train)
    else:
        train, test = zoo.cifar10("train", limit=2500), zoo.cifar10("test")
        names = zoo.CIFAR10_CLASSES
        step(f"loading {model_name} trained on CIFAR-10")
        model = zoo.cifar_resnet(model_name)
    calibration, evaluation = zoo.batches(train), zoo.batches(test)
    example = train[0][0][None]

    step(f"collecting class-conditional moments: one forward pass over {len(train):,} training images")
    moments = collect_moments(model, calibration, num_classes=10)
    scores = score(moments)
    step(f"scored {sum(map(len, scores.values())):,} components of {len(scores)} layers for 10 classes")
    step(f"pruning: {ratio:.0%} of the components of each layer; the layers after them make up for what is gone")
    smaller = prune(model, scores, ratio=ratio, example_inputs=example, data=calibration)
    step(f"unlearning: erasing what discriminates class {names[forget]!r} from what the last layers read")
    forgetful = unlearn(model, scores, classes=[forget], data=calibration)

    out.mkdir(parents=True, exist_ok=True)
    moments.save(out / "moments.safetensors")
    scores.save(out / "scores.safetensors")
    smaller.recipe.save(out / "prune.json")
    forgetful.recipe.save(out / "unlearn.json")
    scores.plot(out / "scores.png", class_names=names)

    step(f"evaluating on {len(test):,} test images")
    columns = []
    for title, candidate in (("original", model), ("pruned", smaller.model), ("unlearned", forgetful.model)):
        accuracy = accuracy_per_class(candidate, evaluation, 10)
        columns.append(Column(title, accuracy, count_parameters(candidate), count_macs(candidate, example)))
    say("")
    say(table(columns, names, forget))
    say("")
    say(f"Erased from {' and '.join(forgetful.recipe.settings['layers'])}. That is no guarantee of privacy.")
    say(f"Written to {out}: scores.png, scores and moments (.safetensors), recipes prune.json and unlearn.json.")
    step("done")
    return columns


def table(columns: list[Column], names: list[str], forget: int) -> str:
    """Test accuracy per class, over all and over the retained classes; parameters; multiply-accumulates."""
    label = max(len("multiply-accumulates"), *(len(name) + len(" (forget)") for name in names))
    kept = [k for k in range(len(names)) if k != forget]
    lines = [f"{'test accuracy, %':{label}}" + "".join(f"{column.title:>14}" for column in columns)]
    for k, name in enumerate(names):
        title = f"{name} (forget)" if k == forget else name
        lines.append(f"{title:{label}}" + "".join(f"{100 * column.accuracy[k]:14.1f}" for column in columns))
    lines.append(f"{'mean of classes':{label}}" + "".join(f"{100 * c.accuracy.mean():14.2f}" for c in columns))
    lines.append(f"{'mean of the others':{label}}" + "".join(f"{100 * c.accuracy[kept].mean():14.2f}" for c in columns))
    lines.append(f"{'parameters':{label}}" + "".join(f"{column.parameters:14,}" for column in columns))
    lines.append(f"{'multiply-accumulates':{label}}" + "".join(f"{column.macs:14,}" for column in columns))
    return "\n".join(lines)
