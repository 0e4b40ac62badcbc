"""DISCEDIT on the CIFAR-10 ResNets: cost of scoring, forgetting of each class. Pruning: `bench_prune`.

    python -m benchmarks.bench_cifar            # prints the tables
    python -m benchmarks.bench_cifar --write    # and writes benchmarks/cifar.md

Moments come from the first 2,500 training images, accuracy from 5,000 test images. No fine-tuning anywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import machine, paired_ratio
from benchmarks.options import with_method
from discedit import Moments, collect_moments, score, unlearn, zoo
from discedit.evaluation.evaluate import accuracy_per_class

UNLEARN: list[tuple[str, dict[str, Any]]] = [
    ("default (up, 6 % of the last third)", {}),
    ("up, 3 % of the last third", {"fraction": 0.03}),
    ("up, 10 % of the last third", {"fraction": 0.1}),
    ("any sign, 6 % of the last third", {"sign": "any"}),
    ("up, 6 % of all layers", {"layers": "all"}),
    ("default, components read behind their norms", {"read": "norm"}),
]


class Bench:
    """One model, its data, its moments."""

    def __init__(self, name: str, train: int, test: int) -> None:
        self.name = name
        self.model = zoo.cifar_resnet(name)
        self.train = list(zoo.batches(zoo.cifar10("train", limit=train)))
        self.test = list(zoo.batches(zoo.cifar10("test", limit=test), 100))
        self.example = self.train[0][0][:1]
        self.moments: Moments = collect_moments(self.model, self.train, 10)
        self.scores = score(self.moments)
        self.before = self.accuracy(self.model)
        published = {"resnet20": 0.9173, "resnet56": 0.9339}[name]
        if test >= 5000 and abs(float(self.before.mean()) - published) > 0.01:
            raise AssertionError(f"{name}: {float(self.before.mean()):.4f} on the test images, published {published}")

    def accuracy(self, model: nn.Module) -> Tensor:
        return accuracy_per_class(model, self.test, 10)


def scoring_rows(bench: Bench, repeats: int) -> list[list[str]]:
    """Moment pass and scoring over the bare forward pass, in turns."""

    def forward() -> None:
        with torch.no_grad():
            for x, _ in bench.train:
                bench.model(x)

    moments, spread = paired_ratio(lambda: collect_moments(bench.model, bench.train, 10), forward, repeats)
    solve, solve_spread = paired_ratio(lambda: score(bench.moments), forward, repeats)
    components = sum(len(values) for values in bench.scores.values())
    return [
        [bench.name, f"{components:,}", f"{moments:.2f} ± {spread / 2:.2f}", f"{solve:.4f} ± {solve_spread / 2:.4f}"]
    ]


def unlearning_rows(bench: Bench) -> tuple[list[list[str]], list[list[str]]]:
    """Per class for the default edit, and the mean over classes for its variants."""
    per_class, variants = [], []
    for title, options in UNLEARN:
        scores = bench.scores
        if options.get("layers") == "all":
            options = {"layers": list(scores)}
        elif "read" in options:
            scores = score(collect_moments(bench.model, bench.train, 10, **options))
        forget, retain = [], []
        for cls in range(10):
            given = with_method({k: v for k, v in options.items() if k != "read"})
            edit = unlearn(bench.model, scores, classes=[cls], **given)
            accuracy = bench.accuracy(edit.model)
            kept = [k for k in range(10) if k != cls]
            forget.append(100 * float(accuracy[cls]))
            retain.append(100 * float(accuracy[kept].mean()))
            if not options:
                worst = min(kept, key=lambda k: float(accuracy[k] - bench.before[k]))
                drop = 100 * float(bench.before[worst] - accuracy[worst])
                per_class.append(
                    [
                        bench.name,
                        zoo.CIFAR10_CLASSES[cls],
                        f"{100 * float(bench.before[cls]):.1f}",
                        f"{forget[-1]:.1f}",
                        f"{100 * float(bench.before[kept].mean()):.2f}",
                        f"{retain[-1]:.2f}",
                        f"{zoo.CIFAR10_CLASSES[worst]} ({drop:.1f})",
                    ]
                )
        base = 100 * float(bench.before.mean())
        mean_forget, mean_retain = sum(forget) / 10, sum(retain) / 10
        variants.append([bench.name, title, f"{mean_forget:.1f}", f"{max(forget):.1f}", f"{base - mean_retain:.2f}"])
        print("  ".join(variants[-1]), flush=True)
    return per_class, variants


def markdown(header: Iterable[str], rows: list[list[str]]) -> str:
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def report(models: Iterable[str], train: int, test: int, repeats: int) -> str:
    scoring: list[list[str]] = []
    per_class: list[list[str]] = []
    variants: list[list[str]] = []
    measured_on = machine()  # now: the commit that is being measured, whatever is committed meanwhile
    for name in models:
        bench = Bench(name, train, test)
        print(f"{name}: {100 * float(bench.before.mean()):.2f} % before", flush=True)
        scoring += scoring_rows(bench, repeats)
        classes, means = unlearning_rows(bench)
        per_class += classes
        variants += means
    return f"""# DISCEDIT on the CIFAR-10 ResNets

Written by `python -m benchmarks.bench_cifar --write`; do not edit. {measured_on}.

Moments from the first {
        train:,} training images, bound `minimax`, witness `quadratic`; accuracy is the mean over classes
on {test:,} test images. No fine-tuning, no gradients.

## Cost of scoring

Time over that of the bare forward pass over the same images, runs in turns, median ± half the interquartile range.

{markdown(["model", "components", "moment pass", "scores from moments"], scoring)}

## Unlearning each class, default settings, %

{
        markdown(
            [
                "model",
                "class to forget",
                "forget before",
                "forget after",
                "others before",
                "others after",
                "worst hit (points lost)",
            ],
            per_class,
        )
    }

## Unlearning, mean over the ten classes

{markdown(["model", "selection", "forget accuracy, %", "worst class, %", "drop of the others, points"], variants)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(zoo.RESNET_BLOCKS), default=list(zoo.RESNET_BLOCKS))
    parser.add_argument("--train", type=int, default=2500, help="training images for the moments")
    parser.add_argument("--test", type=int, default=5000, help="test images for the accuracy")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each kind")
    parser.add_argument("--write", action="store_true", help="write benchmarks/cifar.md")
    options = parser.parse_args()
    text = report(options.models, options.train, options.test, options.repeats)
    print(text)
    if options.write:
        Path(__file__).with_name("cifar.md").write_text(text)


if __name__ == "__main__":
    main()
