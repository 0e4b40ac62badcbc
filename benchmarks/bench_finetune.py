"""Pruning, then an epoch of training by the recipe of examples/finetune.py: ours and published methods on CIFAR-10.

    python -m benchmarks.bench_finetune --parts rates --networks resnet20 --write       # which learning rate
    python -m benchmarks.bench_finetune --parts epochs --original --seeds 0 1 --write   # hours of one core

Needs all training images and the last 5,000 test images in the folder that DISCEDIT_HELD_OUT names
(`benchmarks.held_out` makes them). Each network is pruned with the first 2,500 training images, and trained on all
50,000; accuracy is that on all 10,000 test images, by which nothing was chosen. The learning rate was chosen on the
last 5,000 training images, by training on the others. Kept in benchmarks/finetune.json, an entry per run with its
commit, from which benchmarks/finetune.md is written.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import benchmarks._vision  # noqa: F401  (before torch-pruning)
from benchmarks import held_out
from benchmarks._common import Log, markdown_table
from benchmarks.rivals import chip
from discedit import Edit, MaxParameters, importances, preset, prune, zoo
from discedit.model.size import count_macs, count_parameters
from examples import finetune

HERE = Path(__file__).parent
RESULTS = HERE / "finetune.json"
LEFT = {"resnet20": (0.834, 0.4), "resnet56": (0.78, 0.4)}
METHODS = ("ours", "discedit_sp", "tvsprune", "chip", "l1")
HOW = ("labels", "distillation")
RATES = (0.003, 0.01, 0.03, 0.1)
RATE = finetune.RECIPE["lr"]
HELD_BACK = 5000  # training images, to choose the rate on
CALIBRATION = 2500
NAMES = {
    "ours": "ours (divergence, least squares)",
    "discedit_sp": "DISCEDIT-SP",
    "tvsprune": "TVSPrune",
    "chip": "CHIP",
    "l1": "l1",
    "original": "not pruned",
}


def all_data() -> tuple[tuple[Tensor, Tensor], TensorDataset]:
    """Training images (uint8) with labels, and all test images as the networks take them."""
    parts = zoo.cifar10("test").tensors, held_out.cifar10_validation().tensors
    return held_out.load("cifar10", "train"), TensorDataset(*(torch.cat(pair) for pair in zip(*parts, strict=True)))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """In per cent of the samples."""
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zoo.batches(data))
    return 100 * hits / len(data)


class InBfloat16(nn.Module):
    """A network whose convolutions and matrix products run in bfloat16: half the time where the CPU has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.float()


class Bench:
    """One network, its images, and what each method makes of it."""

    def __init__(self, name: str, training: tuple[Tensor, Tensor], test: TensorDataset) -> None:
        self.model = zoo.cifar_resnet(name).to(memory_format=torch.channels_last)
        self.images, self.labels = training
        self.test = test
        few = TensorDataset(zoo.cifar10_inputs(self.images[:CALIBRATION]), self.labels[:CALIBRATION])
        self.calibration = list(zoo.batches(few))
        self.example = few.tensors[0][:1]

    @cache  # noqa: B019  (one object per network, which lives as long as the program)
    def pruned(self, method: str, left: float) -> nn.Module:
        """With this share of the parameters left, or the next smaller one that the method can reach."""
        if method == "original":
            return self.model
        if method == "ours":
            edit = prune(self.model, example_inputs=self.example, data=self.calibration, parameters=left)
        elif method == "tvsprune":
            edit = self._tvsprune(left)
        else:  # the same share of each layer
            budget = MaxParameters(left, across="rank")
            given = self._importance(method)
            edit = prune(self.model, given, example_inputs=self.example, budget=budget, repair="none")
        return edit.model.to(memory_format=torch.channels_last)

    def _importance(self, method: str) -> dict[str, Tensor]:
        weights = importances(self.model, None, "l1", example_inputs=self.example)
        if method == "l1":
            return weights
        if method == "chip":
            readers = {layer: layer.replace("conv1", "conv2") for layer in weights}
            return chip(self.model, weights, self.calibration, readers=readers)
        return preset(method).score(self.model, self.calibration, 10).reduce(preset(method).reduction)

    def _tvsprune(self, left: float) -> Edit:
        """What scores below a share of its layer's mean goes, as published; the share is the least that is enough."""
        algorithm = preset("tvsprune")
        scores = algorithm.score(self.model, self.calibration, 10)
        low, high = 0.0, 0.999
        edit = replace(algorithm, amount=high).prune(self.model, scores, example_inputs=self.example)
        while high - low > 1e-3:
            amount = (low + high) / 2
            found = replace(algorithm, amount=amount).prune(self.model, scores, example_inputs=self.example)
            if found.parameters_after <= left * count_parameters(self.model):
                high, edit = amount, found
            else:
                low = amount
        return edit

    def before(self, method: str, left: float) -> dict[str, Any]:
        start = time.perf_counter()
        model = self.pruned(method, left)
        seconds = time.perf_counter() - start
        return {
            "accuracy": round(accuracy(model, self.test), 2),
            "parameters left": round(count_parameters(model) / count_parameters(self.model), 4),
            "macs left": round(count_macs(model, self.example) / count_macs(self.model, self.example), 4),
            "seconds": round(seconds, 1),
        }

    def epoch(
        self,
        method: str,
        left: float,
        how: str,
        seed: int,
        *,
        rate: float = RATE,
        held_back: int = 0,
        number: str = "bfloat16",
    ) -> dict[str, Any]:
        """Accuracy in float32 after an epoch: on the test images, or on so many training images that are held back."""
        model = copy.deepcopy(self.pruned(method, left))
        end = len(self.images) - held_back
        kind = InBfloat16 if number == "bfloat16" else nn.Sequential
        trained, teacher = kind(model), kind(self.model) if how == "distillation" else None
        torch.manual_seed(seed)
        start = time.perf_counter()
        finetune.train(
            trained,
            torch.optim.SGD(model.parameters(), **finetune.RECIPE | {"lr": rate}),
            self.images[:end],
            self.labels[:end],
            zoo.cifar10_augmented,
            teacher,
        )
        seconds = time.perf_counter() - start
        test = self.test
        if held_back:
            test = TensorDataset(zoo.cifar10_inputs(self.images[end:]), self.labels[end:])
        return {"accuracy": round(accuracy(model, test), 2), "seconds": round(seconds)}


def rates(bench: Bench, log: Log, name: str, held_back: int = HELD_BACK) -> None:
    """By labels after l1: not ours, so that it is no advantage of ours."""
    for left, rate in product(reversed(LEFT[name]), RATES):
        log.measure(
            f"rate|{name}|{left}|l1|labels|{rate}",
            lambda s=left, r=rate: bench.epoch("l1", s, "labels", 0, rate=r, held_back=held_back),
        )


def epochs(bench: Bench, log: Log, name: str, options: argparse.Namespace) -> None:
    """What the options name, seed by seed, should time run out."""
    shares = [left for left in LEFT[name] if not options.left or left in options.left]
    cases = list(product(shares, options.methods)) + ([(1.0, "original")] if options.original else [])
    for seed, (left, method) in product(options.seeds, cases):
        log.measure(f"{name}|{left}|{method}|before", lambda m=method, s=left: bench.before(m, s))
        for how in options.how:
            log.measure(
                f"{name}|{left}|{method}|{how}|{seed}",
                lambda m=method, s=left, h=how, seed=seed: bench.epoch(m, s, h, seed),
            )


def rows_of_epochs(log: Log) -> list[list[str]]:
    found = []
    for name in LEFT:
        for left, method in [(1.0, "original"), *product(LEFT[name], METHODS)]:
            key = f"{name}|{left}|{method}"
            if (before := log.entries.get(f"{key}|before")) is None:
                found.append([name, NAMES[method], f"{100 * left:.1f} %", *["not measured"] * (2 + len(HOW))])
                continue
            sizes = [f"{100 * before[f'{what} left']:.1f} %" for what in ("parameters", "macs")]
            after = []
            for how in HOW:
                runs = [entry for run, entry in sorted(log.entries.items()) if run.startswith(f"{key}|{how}|")]
                after.append(" / ".join(f"{entry['accuracy']:.2f}" for entry in runs) or "not measured")
            found.append([name, NAMES[method], *sizes, f"{before['accuracy']:.2f}", *after])
    return found


def rows_of_rates(log: Log) -> list[list[str]]:
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for key, entry in log.entries.items():
        what, *case, rate = key.split("|")
        if what == "rate":
            cells.setdefault(tuple(case), {})[rate] = f"{entry['accuracy']:.2f}"
    return [
        [name, left, NAMES[method], how, *(row.get(str(rate), "not measured") for rate in RATES)]
        for (name, left, method, how), row in sorted(cells.items())
    ]


def markdown(log: Log) -> str:
    """benchmarks/finetune.md, from what was measured."""
    seconds = [entry["seconds"] for key, entry in log.entries.items() if key.split("|")[-2] in HOW]
    took = f" An epoch took {min(seconds)} to {max(seconds)} s, with others on the machine." if seconds else ""
    parts = [
        (
            "After an epoch",
            "Accuracy in %, on all 10,000 test images (none is among the training images); one standard error is 0.3. "
            "Two numbers are two seeds (order and augmentation). The budget is of parameters: methods that spend it in "
            "other layers keep more or fewer multiply-accumulates (`macs left`). Ours is the default of `prune`. The "
            "others are as published, without a repair, since training is theirs: the same share of each layer for "
            "DISCEDIT-SP, CHIP (on 640 images) and l1; for TVSPrune what scores below a share of its layer's mean, the "
            "share that meets the budget (its loop is not run). `labels`: cross entropy. `distillation`: by the "
            "answers of the original, without labels. `not pruned`: what the epoch does to the network itself." + took,
            ["network", "method", "parameters left", "macs left", "before", *HOW],
            rows_of_epochs(log),
        ),
        (
            "The learning rate",
            "Accuracy on the last 5,000 training images, which the original has seen in its training, after an epoch "
            f"over the other 45,000. Chosen for all methods: {RATE}. None was chosen for distillation.",
            ["network", "parameters left", "method", "how", *map(str, RATES)],
            rows_of_rates(log),
        ),
    ]
    text = (
        "# Pruning, then an epoch of training\n\nWritten by `python -m benchmarks.bench_finetune --write`; do not edit."
        "\n\nThe recipe is examples/finetune.py, the same for all methods: one epoch over the 50,000 training images "
        "of CIFAR-10 by SGD with momentum 0.9, weight decay 1e-4 and batches of 128; a learning rate that falls from "
        f"{RATE} to zero as a cosine; images moved by up to four pixels and mirrored; in distillation "
        "cross entropy at temperature 4. Training in bfloat16 (autocast), for speed.\n"
    )
    for title, note, header, rows in parts:
        text += f"\n## {title}\n\n{note}\n\n{markdown_table(header, rows)}\n"
    return text + "\nMeasured on: " + "; ".join(sorted({e["machine"] for e in log.entries.values()})) + ".\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("rates", "epochs"), default=[])
    parser.add_argument("--networks", nargs="+", choices=LEFT, default=list(LEFT))
    parser.add_argument("--left", nargs="+", type=float, help="shares of the parameters, by default all of a network")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--original", action="store_true", help="the network that is not pruned, too")
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--any-commit", action="store_true", help="do not measure again what an earlier commit did")
    parser.add_argument("--write", action="store_true", help="write benchmarks/finetune.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS, any_commit=options.any_commit)
    training, test = all_data() if options.parts else (None, None)
    for name in options.networks if training and test else ():
        bench = Bench(name, training, test)
        if "rates" in options.parts:
            rates(bench, log, name)
        if "epochs" in options.parts:
            epochs(bench, log, name, options)
    if options.write:
        (HERE / "finetune.md").write_text(markdown(log))
    log.end("bench_finetune")


if __name__ == "__main__":
    main()
