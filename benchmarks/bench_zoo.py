"""Sixty networks of torchvision, timm, transformers and our own: what the library makes of each, a row per network.

    python -m benchmarks.bench_zoo --write             # half an hour of one core
    python -m benchmarks.bench_zoo --only NAME ...     # these rows anew
    python -m benchmarks.bench_zoo --list              # the names

Weights are random (benchmarks/zoo_networks.py), so nothing is downloaded and no accuracy is measured. Each network runs
in a process of its own (benchmarks/zoo_measure.py); one that hangs, dies or raises costs what it did not get to. What
is measured is kept in benchmarks/zoo.json, and benchmarks/zoo.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import Log
from benchmarks.zoo_networks import MARK, NARROWED, NEITHER, NETWORKS

HERE = Path(__file__).parent
RESULTS = HERE / "zoo.json"
BAND = (25, 35)  # percent of the parameters, about the share of the components that goes
Row = dict[str, Any]


def run_network(name: str, seconds: int, with_onnx: bool) -> Row:
    """All that the network's process got to, and how it ended unless well."""
    command = [sys.executable, "-m", "benchmarks.zoo_measure", name, *([] if with_onnx else ["--no-onnx"])]
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = ""
    try:
        run = subprocess.run(command, cwd=HERE.parent, env=known, capture_output=True, timeout=seconds)
        output = run.stdout
        if run.returncode:
            last = run.stderr.decode(errors="replace").strip().splitlines()[-1:]
            ended = f"process ended with {run.returncode}: {''.join(last)[:300]}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"stopped after {seconds} s"
    row: Row = {}
    for line in output.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            row |= json.loads(line.removeprefix(MARK))
    return row | ({"failure": ended} if ended else {})


def cell(row: Row, key: str, form: str = "{}") -> str:
    """A figure of a row; "failed" where there is none, which "What failed" explains."""
    return form.format(row[key]) if key in row else "failed"


def both(row: Row, key: str, show: Callable[[Row, str], str]) -> str:
    """The default's and that of all kinds, once if they say the same."""
    found = [show(row, prefix + key) for prefix in ("", "all ")]
    return found[0] if found[0] == found[1] else " / ".join(found)


def equality(row: Row, key: str) -> str:
    prefix = key.removesuffix("equal")
    return f"{row[prefix + 'difference']:.0e}" if f"{prefix}difference" in row else cell(row, key)


def theirs(row: Row) -> tuple[str, str, str]:
    """torch-pruning's share and seconds, and ours with all kinds over theirs."""
    if "tp removed" not in row:
        return "failed", "", ""
    runs = "" if row["tp runs"] else ", does not run"
    return f"{row['tp removed']:.1f} %{runs}", f"{row['tp seconds']:.1f}", f"{slower(row):.0f}" if slower(row) else ""


def slower(row: Row) -> float | None:
    """Seconds of prune with all kinds over torch-pruning's."""
    return row["all seconds"] / row["tp seconds"] if "all seconds" in row and row.get("tp seconds") else None


def table(log: Log) -> str:
    header = [
        "network",
        "parameters",
        "layers scored",
        "default",
        "s",
        "all",
        "s",
        "torch-pruning",
        "s",
        "all over that",
    ]
    header += ["differs from hiding by", "trains", "ONNX", "unlearns, without / with data"]
    rows = [header, ["---"] * len(header)]
    for name in NETWORKS:
        row = log.entries.get(name)
        if row is None:
            rows.append([name, "not measured", *[""] * (len(header) - 2)])
            continue
        shares = [cell(row, key, form) for key, form in (("removed", "{:.1f} %"), ("seconds", "{:.1f}"))]
        shares += [cell(row, f"all {key}", form) for key, form in (("removed", "{:.1f} %"), ("seconds", "{:.1f}"))]
        unlearns = " / ".join(cell(row, key) for key in ("unlearned", "unlearned with data"))
        checks = [both(row, "equal", equality), both(row, "trains", cell), row.get("onnx", "not measured"), unlearns]
        first = [name, cell(row, "parameters", "{:,}"), f"{cell(row, 'scored')} of {cell(row, 'layers')}"]
        rows.append([*first, *shares, *theirs(row), *checks])
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def summary(rows: dict[str, Row]) -> list[str]:
    """What the table comes to."""
    pruned, everything = ([row for row in rows.values() if key in row] for key in ("removed", "all removed"))
    in_band = [row for row in pruned if BAND[0] <= row["removed"] <= BAND[1]]
    rivals = [row for row in rows.values() if row.get("tp runs")]
    ahead = [row for row in rivals if row.get("all removed", -1) >= row["tp removed"]]

    def having(key: str, *values: str) -> int:
        return sum(row.get(key) in values for row in rows.values())

    def holds(key: str, *values: str) -> str:
        both = ((having(prefix + key, *values), len(made)) for prefix, made in (("", pruned), ("all ", everything)))
        return " and ".join(f"{number} of {count}" for number, count in both)

    lines = [
        f"of {len(NETWORKS)} networks {sum('collected' in row for row in rows.values())} collected, "
        f"{sum('scored' in row for row in rows.values())} scored, {len(pruned)} pruned by default, {len(everything)} "
        f"with all kinds of components, {having('unlearned', 'yes')} unlearned without data, "
        f"{having('unlearned with data', 'yes')} with",
        f"equal to hiding in eval mode: {holds('equal', 'yes')} (by default and with all kinds); by the library's own "
        f"check, because a norm is narrowed: {having('equal', NARROWED)} and {having('all equal', NARROWED)}",
        f"run in train mode, or the whole network does not either: {holds('trains', 'yes', NEITHER)}",
        f"equal in ONNX: {having('onnx', 'yes')} of {sum('onnx' in row for row in rows.values())} asked; "
        f"the whole network cannot be exported either: "
        f"{having('onnx', NEITHER)}",
        f"lose {BAND[0]} to {BAND[1]} % of their parameters by default: {len(in_band)}",
        f"with all kinds at least torch-pruning's share: {len(ahead)} of {len(rivals)} where torch-pruning's result "
        f"runs",
    ]
    for title, key in (("by default", "seconds"), ("with all kinds", "all seconds")):
        if timed := {name: row[key] for name, row in rows.items() if key in row}:
            slowest = max(timed, key=timed.__getitem__)
            lines.append(f"slowest {title}: {slowest}, {timed[slowest]:.1f} s")
    if ratios := [ratio for row in rows.values() if (ratio := slower(row))]:
        lines.append(f"seconds with all kinds over torch-pruning's, in the median: {statistics.median(ratios):.1f}")
    return lines


def behind(row: Row) -> str:
    """Why torch-pruning removes more."""
    reasons = [f"{why} ({layers} layers, {number:,} parameters)" for why, layers, number in row.get("all skipped", ())]
    shares = f"{cell(row, 'all removed', '{:.1f} %')} against {row['tp removed']:.1f} %"
    if reasons:
        return f"{shares}: left whole: {'; '.join(reasons)}"
    over = row["tp over"]
    return (
        f"{shares}: left whole: nothing; of {over['layers']} layers it takes more outputs than the ratio asks for, up "
        f"to {over['most']:.0f} %: from within groups and heads, which go whole here, or where channels are joined"
    )


def why_outside(row: Row) -> str:
    """What holds a network's share down, or up."""
    if "removed" not in row:
        return "see below, what failed"
    if row["removed"] > BAND[1]:
        return (
            f"both sides of layers shrink, where no skip connection holds one: {row['cut on both sides']:.0f} % of the "
            "parameters are in such layers"
        )
    reasons = [f"{why} ({layers} layers, {number:,} parameters)" for why, layers, number in row["skipped"]]
    return f"{row['not cut']:.0f} % of the parameters are cut on neither side; left whole: " + (
        "; ".join(reasons) or "nothing"
    )


def markdown(log: Log) -> str:
    """benchmarks/zoo.md, from what was measured."""
    rows = {name: log.entries[name] for name in NETWORKS if name in log.entries}
    packages = ", ".join(f"{name} {version(name)}" for name in ("torchvision", "timm", "transformers", "torch-pruning"))
    machines = sorted({row["machine"] for row in rows.values()})
    outside = {name: row for name, row in rows.items() if not BAND[0] <= row.get("removed", -1) <= BAND[1]}
    fewer = {
        name: row for name, row in rows.items() if row.get("tp runs") and row.get("all removed", -1) < row["tp removed"]
    }
    failed = [
        f"- {name}, {key.removesuffix(' error')}: {row[key]}"
        for name, row in rows.items()
        for key in row
        if key == "failure" or (key.endswith(" error") and not key.startswith("tp"))
    ]
    rival = [f"- {name}: {row['tp error']}" for name, row in rows.items() if "tp error" in row]
    sections = [
        "# Sixty networks",
        "Written by `python -m benchmarks.bench_zoo --write`; do not edit.",
        "Random weights (nothing that starts as a constant, such as a layer scale or the weight of a norm, stays one; "
        "batch norms have the statistics of random images, disturbed), ten classes, images of 64 pixels where a "
        "network takes them. Scores from 24 random images. `prune(model, scores, example_inputs=x, ratio=0.3, "
        'criterion="l1")`, without repair: by default, and with all kinds of components. torch-pruning: `BasePruner` '
        "with `GroupMagnitudeImportance(p=1)` and `pruning_ratio=0.3`, the head ignored, told of heads as its examples "
        "do. Shares are of all parameters; seconds are of one run on one thread, after another network was pruned.",
        "Where two figures are in a cell, they are of the default and of all kinds. *Differs from hiding by*: largest "
        "difference of logits over the largest logit, in float64, between the pruned network and the whole one with "
        "zeros in the columns that its layers lost; where a norm other than a layer norm loses channels, the library's "
        "own check has to do. *Trains*: a batch of four in train mode, forward and backward. *ONNX*: the exported "
        "default gives in onnxruntime what it gives in torch, up to 1e-3. *Unlearns*: `unlearn(model, scores, "
        "classes=[3])` without and with `data` changes the logits.",
        "\n".join(f"- {line}" for line in summary(rows)),
        table(log),
        f"## Outside {BAND[0]} to {BAND[1]} % by default",
        "\n".join(f"- {name}, {cell(row, 'removed', '{:.1f} %')}: {why_outside(row)}" for name, row in outside.items()),
        "## Less than torch-pruning with all kinds",
        "\n".join(f"- {name}, {behind(row)}" for name, row in fewer.items()) or "None.",
        "## What failed",
        "\n".join(failed) or "Nothing.",
        "torch-pruning, or what it left:",
        "\n".join(rival) or "Nothing.",
        f"Measured with {packages} on " + "; ".join(machines) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), metavar="NAME", help="measure these anew")
    parser.add_argument("--list", action="store_true", help="print the names of the networks")
    parser.add_argument("--no-onnx", action="store_true", help="leave out the export")
    parser.add_argument("--seconds", type=int, default=400, help="for each network")
    parser.add_argument("--any-commit", action="store_true", help="do not measure again what an earlier commit did")
    parser.add_argument("--write", action="store_true", help="write benchmarks/zoo.md")
    options = parser.parse_args()
    if options.list:
        print("\n".join(NETWORKS))
        return
    torch.set_num_threads(1)
    log = Log(RESULTS, any_commit=options.any_commit)
    for name in options.only or NETWORKS:
        if options.only:
            log.entries.pop(name, None)
        log.measure(name, partial(run_network, name, options.seconds, not options.no_onnx))
    if options.write:
        (HERE / "zoo.md").write_text(markdown(log))
    log.end("bench_zoo")


if __name__ == "__main__":
    main()
