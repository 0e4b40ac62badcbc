"""The main job once through on real images: score, prune, unlearn one class, and say what each did."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from torch import nn

from discedit import zoo
from discedit.cli.arguments import OUTPUT, Options, command, option
from discedit.cli.errors import InputError
from discedit.cli.job import accuracy_rows
from discedit.cli.run_folder import Console, Result
from discedit.common.tables import format_table
from discedit.editing.prune import prune
from discedit.editing.unlearn import unlearn
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.model.size import count_macs, count_parameters
from discedit.moments.collect import collect_moments
from discedit.scoring.scores import score

MODELS = {"digits": ("digitsnet",), "cifar10": ("resnet56", "resnet20")}


@command(
    option("--data", tuple(MODELS), "digits", "cifar10: the files that DISCEDIT_DATA names"),
    option("--model", tuple(name for names in MODELS.values() for name in names), help="default: the first of --data"),
    option("--ratio", float, 0.3, "share of each layer's components to prune"),
    option("--forget", click.IntRange(0, 9), 3, "class index to unlearn"),
    option("--out", click.Path(path_type=Path), "out/demo", "folder for the files"),
    *OUTPUT,
)
def demo_command(options: Options, console: Console) -> Result:
    """Score, prune and unlearn a class on real images, with a before/after table."""
    models = MODELS[options.data]
    name, forget = options.model or models[0], options.forget
    if name not in models:
        raise InputError(f"--model must be one of {list(models)} for --data {options.data}, got {name!r}")

    def step(text: str) -> None:
        console.say(f"[{time.perf_counter() - console.clock:5.1f} s] {text}")

    if options.data == "digits":
        train, test = zoo.digits()
        names = [str(digit) for digit in range(10)]
        step("training a small CNN on 1,200 handwritten digits (scikit-learn's)")
        model: nn.Module = zoo.train_digits_net(train)
    else:
        train, test = zoo.cifar10("train", limit=2500), zoo.cifar10("test")
        names = zoo.CIFAR10_CLASSES
        step(f"loading {name} trained on CIFAR-10")
        model = zoo.cifar_resnet(name)
    calibration, example = zoo.batches(train), train[0][0][None]

    step(f"collecting class-conditional moments: one forward pass over {len(train):,} training images")
    moments = collect_moments(model, calibration, num_classes=10)
    scores = score(moments)
    step(f"scored {sum(map(len, scores.values())):,} components of {len(scores)} layers for 10 classes")
    step(f"pruning: {options.ratio:.0%} of the components of each layer; later layers make up for what is gone")
    smaller = prune(model, scores, ratio=options.ratio, example_inputs=example, data=calibration)
    step(f"unlearning: erasing what discriminates class {names[forget]!r} from what the last layers read")
    forgetful = unlearn(model, scores, classes=[forget], data=calibration)

    moments.save(options.out / "moments.safetensors")
    scores.save(options.out / "scores.safetensors")
    smaller.recipe.save(options.out / "prune.json")
    forgetful.recipe.save(options.out / "unlearn.json")
    scores.plot(options.out / "scores.png", class_names=names)

    step(f"evaluating on {len(test):,} test images")
    results: dict[str, dict[str, Any]] = {}
    for title, one in (("original", model), ("pruned", smaller.model), ("unlearned", forgetful.model)):
        results[title] = {
            "accuracy": accuracy_per_class(one, zoo.batches(test), 10).tolist(),
            "parameters": count_parameters(one),
            "macs": count_macs(one, example),
        }
    step(f"done; written to {options.out}: scores.png, scores and moments (.safetensors), recipes prune.json and "
         f"unlearn.json")  # fmt: skip
    rows = accuracy_rows({title: found["accuracy"] for title, found in results.items()}, names, {"forgotten": [forget]})
    for title, key in (("parameters", "parameters"), ("multiply-accumulates", "macs")):
        rows.append([title, *(f"{found[key]:,}" for found in results.values())])
    erased = f"Erased from {' and '.join(forgetful.recipe.settings['layers'])}. That is no guarantee of privacy."
    record = {"command": "demo", "results": results, "out": str(options.out)}
    return record, f"\n{format_table(rows)}\n\n{erased}"
