"""Pruning and single classes: networks for some classes alone, classes that are protected, what each class loses.

    python -m benchmarks.bench_classes --parts specialised protect damage --write  # an hour or two on two cores

Calibration on the first 2,500 training images, accuracy on 5,000 test images, no fine-tuning. What is measured is kept
in benchmarks/classes.json, one entry per run with the commit that it was measured at, and benchmarks/classes.md is
written from it; what is there already at the same commit is not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._common import Log, markdown_table
from benchmarks.bench_prune import MODELS, Bench
from discedit import (
    ClassDamage,
    DivergenceTable,
    Edit,
    MaxMacs,
    class_damage,
    collect_moments,
    prune,
    score,
    specialise,
)

HERE = Path(__file__).parent
RESULTS = HERE / "classes.json"
PARTS = ("specialised", "protect", "damage")
GROUPS = ((0, 3, 8), (3, 5), (0, 2, 4, 6, 8))
LEFT = (0.5, 0.3, 0.2)
OF_CLASSES = ("combined", "max")  # criteria that need scores
CRITERIA = ("combined", "reconstruction", "energy", "l2", "max")
PROTECTIONS: tuple[dict[int, float], ...] = ({}, {3: 2.0}, {3: 4.0}, {3: 2.0, 5: 2.0})
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "equal shares (rank), l1, least squares": {"across": "rank", "criterion": "l1"},
    "equal shares (rank), l1, no repair": {"across": "rank", "criterion": "l1", "repair": "none"},
    "DISCEDIT-SP (min), no repair": {"across": "rank", "criterion": "min", "repair": "none"},
}


def among(bench: Bench, model: nn.Module, classes: tuple[int, ...], *, narrowed: bool) -> float:
    """Accuracy in percent, on test images of some classes, with their logits alone: mean over these classes."""
    own = torch.tensor(classes)
    right, total = torch.zeros(len(classes)), torch.zeros(len(classes))
    with torch.no_grad():
        for x, y in bench.test:
            which, label = (y[:, None] == own).nonzero(as_tuple=True)
            output = model(x[which])
            logits = output if isinstance(output, torch.Tensor) else output.logits
            answers = (logits if narrowed else logits[:, own]).argmax(1)
            right += torch.bincount(label[answers == label], minlength=len(classes))
            total += torch.bincount(label, minlength=len(classes))
    return 100 * float((right / total).mean())


def left_of(edit: Edit) -> float:
    return round((edit.macs_after or 0) / (edit.macs_before or 1), 4)


def specialised(bench: Bench, log: Log, groups: tuple[tuple[int, ...], ...]) -> None:
    """By every criterion, with budgets by divergence; and pruned for all classes, tested on these."""
    for classes in groups:
        name = ",".join(map(str, classes))
        log.measure(
            f"specialised|{bench.name}|{name}|whole network|1.0",
            lambda classes=classes: {
                "accuracy": round(among(bench, bench.model, classes, narrowed=False), 2),
                "left": 1,
            },
        )
        for criterion in ("for all classes", *CRITERIA):
            table: DivergenceTable | None = None

            def run(left: float, criterion: str = criterion, classes: tuple[int, ...] = classes) -> dict[str, Any]:
                nonlocal table
                alone = criterion != "for all classes"
                given: dict[str, Any] = {"example_inputs": bench.example, "data": bench.train}
                given["budget"] = MaxMacs(left, across="divergence" if table is None else table)
                if alone and table is None:
                    given["criterion"] = criterion
                    if criterion in OF_CLASSES:
                        moments = collect_moments(bench.model, bench.train, 10)
                        given["scores"] = score(moments.of_classes(classes))
                edit = specialise(bench.model, classes=classes, **given) if alone else prune(bench.model, **given)
                table = edit.divergences
                found = among(bench, edit.model, classes, narrowed=alone)
                return {"accuracy": round(found, 2), "left": left_of(edit)}

            for left in LEFT:
                log.measure(f"specialised|{bench.name}|{name}|{criterion}|{left}", lambda left=left, run=run: run(left))


def outcome(damage: ClassDamage) -> dict[str, Any]:
    """In percent of samples; losses are shares of a class's samples."""
    loss = 100 * damage.loss
    return {
        "mean": round(float(loss.mean()), 2),
        "worst": f"{float(loss.max()):.2f} (class {damage.worst_class})",
        "spread": round(100 * damage.spread, 2),
        "flips": round(100 * damage.flips, 2),
        "losses": [round(float(one), 2) for one in loss],
    }


def protect(bench: Bench, log: Log) -> None:
    """At half of the multiply-accumulates, the same number of components from each layer."""
    table: DivergenceTable | None = None
    for protection in PROTECTIONS:

        def run(protection: dict[int, float] = protection) -> dict[str, Any]:
            nonlocal table
            budget = MaxMacs(0.5, across="divergence" if table is None else table)
            edit = prune(
                bench.model, example_inputs=bench.example, data=bench.train, budget=budget, protect=protection or None
            )
            table = edit.divergences if table is None else table
            return outcome(class_damage(bench.model, edit.model, bench.test)) | {"left": left_of(edit)}

        shown = ", ".join(f"{cls}: {weight:g}" for cls, weight in protection.items()) or "none"
        log.measure(f"protect|{bench.name}|0.5|{shown}", run)


def damage(bench: Bench, log: Log) -> None:
    """What classes lose, by ways to prune."""
    for way, settings in WAYS.items():
        for left in (0.7, 0.5):

            def run(settings: dict[str, Any] = settings, left: float = left) -> dict[str, Any]:
                options = dict(settings)
                budget = MaxMacs(left, across=options.pop("across", "auto"))
                edit = bench.prune(budget=budget, **options)
                return outcome(class_damage(bench.model, edit.model, bench.test)) | {"left": left_of(edit)}

            log.measure(f"damage|{bench.name}|{left}|{way}", run)


def rows_of_specialised(log: Log) -> list[list[str]]:
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for key, entry in log.entries.items():
        part, *names, left = key.split("|")
        if part == "specialised":
            cells.setdefault(tuple(names), {})[left] = f"{entry['accuracy']:.1f}"
    whole = {names[:2]: row["1.0"] for names, row in cells.items() if names[2] == "whole network"}
    return [
        [*names, whole.get(names[:2], ""), *(row.get(str(left), "not measured") for left in LEFT)]
        for names, row in cells.items()
        if names[2] != "whole network"
    ]


def rows_of(log: Log, part: str) -> list[list[str]]:
    columns = ("left", "mean", "worst", "spread", "flips")
    shown = sorted({cls for protection in PROTECTIONS for cls in protection}) if part == "protect" else []
    return [
        [
            *key.split("|")[1:],
            *(str(entry[column]) for column in columns),
            *(str(entry["losses"][cls]) for cls in shown),
        ]
        for key, entry in log.entries.items()
        if key.startswith(f"{part}|")
    ]


def markdown(log: Log) -> str:
    """benchmarks/classes.md, from what was measured."""
    machines = sorted({entry["machine"] for entry in log.entries.values()})
    losses = ["macs left", "mean", "worst class", "spread", "answers that change"]
    parts = [
        (
            "Networks for some classes alone",
            "Accuracy among these classes, in percent, with 0.5, 0.3 and 0.2 of the multiply-accumulates left: "
            "`specialise` by each criterion (combined and max with scores of these classes alone), budgets by "
            "divergence, least squares; and `prune` for all classes, of whose logits those of these classes count.",
            ["model", "classes", "criterion", "whole network", *map(str, LEFT)],
            rows_of_specialised(log),
        ),
        (
            "Protected classes",
            "At half of the multiply-accumulates, samples of some classes counting twice or four times; as many "
            "go from each layer as without. Points lost: mean over classes, in the class that loses most, and their "
            "standard deviation over classes; share of all test images whose answer changes.",
            ["model", "macs", "protect", *losses, "class 3", "class 5"],
            rows_of(log, "protect"),
        ),
        (
            "What each class loses",
            "The same figures by ways to prune.",
            ["model", "macs", "way", *losses],
            rows_of(log, "damage"),
        ),
    ]
    text = "# Pruning and single classes\n\nWritten by `python -m benchmarks.bench_classes --write`; do not edit.\n"
    for title, note, header, rows in parts:
        text += f"\n## {title}\n\n{note}\n\n{markdown_table(header, rows)}\n"
    return text + "\nMeasured on: " + "; ".join(machines) + ".\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet20", "resnet56"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument(
        "--groups", type=int, default=len(GROUPS), help="of classes, of the part specialised: the first"
    )
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--any-commit", action="store_true", help="do not measure again what an earlier commit did")
    parser.add_argument("--write", action="store_true", help="write benchmarks/classes.md")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    log = Log(RESULTS, any_commit=options.any_commit)
    for name in options.models if options.parts else ():
        bench = Bench(name)
        for part in options.parts:
            if part == "specialised":
                specialised(bench, log, GROUPS[: options.groups])
            else:
                {"protect": protect, "damage": damage}[part](bench, log)
    if options.write:
        (HERE / "classes.md").write_text(markdown(log))
    log.end("bench_classes")


if __name__ == "__main__":
    main()
