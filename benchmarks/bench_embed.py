"""torch-pruning's pruner with our importance against the same pruner with its own; its example scripts with ours.

    python -m benchmarks.bench_embed --write           # 25 minutes of one core, on a busy machine
    python -m benchmarks.bench_embed --examples DIR    # scripts for torch-pruning, such as its tests and examples

`BasePruner` with the same settings for all: the inner channels of every block of the CIFAR ResNets, the same share of
each layer. Scores and gradients from the first 2,500 training images (the Hessian from 256), accuracy on 5,000 test
images (mean over classes), no training: as pruned, and with batch norms re-estimated on the 2,500 images. What is
measured is kept in benchmarks/embed.json, and benchmarks/embed.md is written from it.

The scripts run in processes of their own, without network, with every importance class replaced by ours on random
scores (benchmarks/embed_example.py). One that fails runs once more as it is, to tell whose fault it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch_pruning import importance
from torch_pruning.pruner import BasePruner

from benchmarks._common import Log, markdown_table
from benchmarks.bench_prune import Bench
from benchmarks.rivals import differentiate
from discedit.integrations.torch_pruning import DiscEditImportance

HERE = Path(__file__).parent
RESULTS, EXAMPLES = HERE / "embed.json", HERE / "embed_examples.json"
MODELS = ("resnet20", "resnet56")
RATIOS = (0.1, 0.3, 0.5)
IN_TURN = (0.3, 0.5, 0.1)
REPAIRS = ("none", "batchnorm")
OF_DATA = ("energy", "reconstruction")  # the first is what is recommended
OURS = (*OF_DATA, "max", "mean", "min")
THEIRS: dict[str, Callable[[], Any]] = {
    "magnitude l1": lambda: importance.MagnitudeImportance(p=1),
    "magnitude l2": lambda: importance.MagnitudeImportance(p=2),
    "lamp": importance.LAMPImportance,
    "bn_scale": importance.BNScaleImportance,
    "taylor": importance.TaylorImportance,
    "hessian": importance.HessianImportance,
    "random": importance.RandomImportance,
}


def within_blocks(model: nn.Module) -> list[str]:
    """All but the last convolution of each block of a ResNet."""
    blocks = [(name, block) for name, block in model.named_modules() if name]
    return [f"{name}.conv{i}" for name, block in blocks for i in (1, 2) if hasattr(block, f"conv{i + 1}")]


class Known(Protocol):
    """A network with its data: calibration batches of images and labels, and accuracy in percent."""

    model: nn.Module
    train: Sequence[Any]
    example: Any

    def before(self) -> float: ...
    def accuracy(self, model: nn.Module) -> float: ...
    def scores(self) -> Any: ...


def pruned(bench: Known, criterion: str, ratio: float) -> nn.Module:
    """A copy of the model after one step of BasePruner."""
    model = copy.deepcopy(bench.model)
    inner = within_blocks(model)
    others = [m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and name not in inner]
    chosen: Any
    if criterion in OF_DATA:
        chosen = DiscEditImportance.from_data(model, bench.train, criterion=criterion)
    elif criterion in OURS:
        chosen = DiscEditImportance(model, bench.scores(), reduction=criterion)
    else:
        chosen = THEIRS[criterion]()
    if criterion in ("taylor", "hessian"):
        squared = criterion == "hessian"
        differentiate(model, bench.train[:1] if squared else bench.train, squared=squared)
    pruner = BasePruner(model, bench.example, chosen, pruning_ratio=ratio, ignored_layers=others)
    torch.manual_seed(0)
    pruner.step()
    for name in inner:  # the comparison is of the choice alone
        width, left = bench.model.get_submodule(name).out_channels, model.get_submodule(name).out_channels
        assert left == int(width * (1 - ratio)), (criterion, name, left)
    return model.eval()


def outcome(bench: Known, model: nn.Module) -> dict[str, Any]:
    """Points of accuracy lost, by repair."""
    lost = {"none": bench.before() - bench.accuracy(model)}
    update_bn(bench.train, model)
    lost["batchnorm"] = bench.before() - bench.accuracy(model)
    return {repair: round(points, 3) for repair, points in lost.items()}


def compare(models: list[str], log: Log) -> None:
    for name in models:
        bench = Bench(name)
        print(f"{name}: {bench.before():.2f} % before", flush=True)
        for ratio in IN_TURN:
            known: list[tuple[nn.Module, dict[str, Any]]] = []

            def run(criterion: str, ratio: float = ratio, bench: Bench = bench, known: Any = known) -> dict[str, Any]:
                model = pruned(bench, criterion, ratio)
                for other, lost in known:  # the same choice, as of LAMP and the magnitude
                    if all(map(torch.equal, model.parameters(), other.parameters())):
                        return dict(lost)
                known.append((copy.deepcopy(model), outcome(bench, model)))
                return dict(known[-1][1])

            for criterion in (*OURS, *THEIRS):
                log.measure(f"{name}|{criterion}|{ratio}", partial(run, criterion))


def run_examples(folder: Path, seconds: int, only: list[str]) -> dict[str, dict[str, str]]:
    """Script, with its arguments -> how it ended with our importance and, if it failed, as it is."""
    scripts = [path for path in sorted(folder.rglob("*.py")) if "importance" in path.read_text(errors="replace")]
    found = {}
    for name in only or [str(path.relative_to(folder)) for path in scripts]:
        script, *arguments = name.split()
        path = (folder / script).resolve()
        found[name] = {"ours": run_example(path, seconds, "ours", arguments)}
        if found[name]["ours"].startswith("failed"):
            found[name]["as it is"] = run_example(path, seconds, "theirs", arguments)
        print(name, found[name], flush=True)
    return found


def run_example(path: Path, seconds: int, which: str, arguments: Sequence[str] = ()) -> str:
    command = [sys.executable, "-m", "benchmarks.embed_example", which, str(path), *arguments]
    known_folders = os.environ.get("PYTHONPATH", "").split(
        os.pathsep
    )  # such as the transformers a script was written for
    folders = os.pathsep.join((str(HERE.parent), str(HERE.parent / "tests"), *known_folders))  # tests: for vision_ops
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": folders, "MPLBACKEND": "agg"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds} s"
    lines = [line for line in run.stdout.splitlines() if line.startswith("embed_example: ")]
    return lines[-1].removeprefix("embed_example: ") if lines else f"failed: process ended with {run.returncode}"


def rows_of_points(log: Log) -> list[list[str]]:
    rows = []
    for model, criterion in product(MODELS, (*OURS, *THEIRS)):
        found = [log.entries.get(f"{model}|{criterion}|{ratio}", {}) for ratio in RATIOS]
        if any(found):
            cells = [f"{entry[repair]:.1f}" if entry else "not measured" for repair, entry in product(REPAIRS, found)]
            who = f"**ours, {criterion}**" if criterion in OURS else criterion
            rows.append([model, who, *cells])
    return rows


def rows_of_places(log: Log) -> list[list[str]]:
    """For every model, repair and ratio the best of ours and of theirs, and how many of theirs lose less than what is
    recommended of ours."""
    rows = []
    for model, repair, ratio in product(MODELS, REPAIRS, RATIOS):
        found = {
            criterion: log.entries[key][repair]
            for criterion in (*OURS, *THEIRS)
            if (key := f"{model}|{criterion}|{ratio}") in log.entries
        }
        known = [[criterion for criterion in group if criterion in found] for group in (OURS, THEIRS)]
        if not known[0] or len(known[1]) < len(THEIRS):
            continue
        cells = [f"{name}: {found[name]:.1f}" for name in (min(group, key=found.__getitem__) for group in known)]
        if OF_DATA[0] in found:
            better = sum(found[criterion] < found[OF_DATA[0]] for criterion in THEIRS)
            cells.append(f"{better} of {len(THEIRS)}")
        else:
            cells.append("not measured")
        rows.append([model, repair, str(ratio), *cells])
    return rows


def markdown(log: Log) -> str:
    """benchmarks/embed.md, from what was measured."""
    machines = sorted({entry["machine"] for entry in log.entries.values()})
    columns = [f"{repair}, {ratio}" for repair, ratio in product(("no repair", "batch norms"), RATIOS)]
    text = (
        "# Our importance in torch-pruning's pruner\n\n"
        "Written by `python -m benchmarks.bench_embed --write`; do not edit.\n\n"
        "Points of accuracy lost on 5,000 test images (mean over classes) after one step of torch-pruning 1.6.1's "
        "`BasePruner`, which takes the same share of the inner channels of each block. Scores and gradients from 2,500 "
        "training images (the Hessian from 256, its accumulation corrected as in benchmarks/rivals.py); defaults of "
        "all importances. `energy` and `reconstruction` are `DiscEditImportance.from_data`, on the first 1,024 of "
        "these images without their labels; `max`, `mean` and `min` are reductions of scores over classes. `random`: "
        "one draw. LAMP orders a layer as the squared magnitude does. Batch norms: re-estimated on the 2,500 "
        "images. A ResNet-50 on ImageNet: imagenet.md.\n\n"
        f"{markdown_table(['model', 'importance', *columns], rows_of_points(log))}\n\n"
        "## Where ours lose\n\n"
        "The best of ours, as far as they are measured, and of theirs, and how many of theirs lose fewer points than "
        "what is recommended of ours (`energy`). The pruner does not repair weights: `discedit.prune` does (prune.md), "
        "and `repair_pruned` afterwards.\n\n"
        + markdown_table(
            ["model", "repair", "ratio", "best of ours", "best of theirs", "better than ours, energy"],
            rows_of_places(log),
        )
        + "\n\n## Scripts written for torch-pruning\n\n"
        "With every importance class replaced by ours, on random scores; no network, so weights that a script would "
        "download are drawn at random. `calls`: how often ours was asked. A script that fails with ours ran once more "
        "as it is. (test_importance_reduction.py checks `group_reduction=None` of torch-pruning's own, which ours does "
        "not have.) Those listed are the scripts of the source distribution of torch-pruning 1.6.1 that name an "
        "importance and, under examples/, those of its repository that prune without a data set or a GPU: "
        "prune_hf_vit.py and prune_hf_swin.py with transformers 4.51, for which they were written; "
        "torchvision_pruning.py on 17 of its networks, from AlexNet to ViT-B/16 (by its own count it pruned all 17); "
        "prune_timm_models.py with one ratio. prune_hf_swin.py: torch-pruning takes the patches that Swin merges for "
        "halves of the channels; its L2 norm happens to choose a whole half, which it then leaves, while ours does "
        "not (nor, by hand, its RandomImportance), and the model no longer runs. "
        "measure_latency.py needs a GPU. Left out of these: other networks, functions that read a data set, and names "
        "that torch-pruning 1.6.1 no longer has.\n\n"
    )
    known = json.loads(EXAMPLES.read_text()) if EXAMPLES.is_file() else {}
    rows = [[name, entry["ours"], entry.get("as it is", "")] for name, entry in sorted(known.items())]
    text += markdown_table(["script", "with ours", "as it is"], rows)
    return text + "\n\nMeasured on " + "; ".join(machines) + ".\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--any-commit", action="store_true", help="do not measure again what an earlier commit did")
    parser.add_argument("--write", action="store_true", help="write benchmarks/embed.md")
    parser.add_argument("--examples", type=Path, help="run the scripts in this folder instead")
    parser.add_argument("--only", nargs="+", default=[], help="of the scripts, by path in the folder, with arguments")
    parser.add_argument("--seconds", type=int, default=300, help="for each script")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    log = Log(RESULTS, any_commit=options.any_commit)
    if options.examples is not None:
        if not options.examples.is_dir():
            parser.error(f"--examples must name a folder, got {options.examples}")
        known = json.loads(EXAMPLES.read_text()) if EXAMPLES.is_file() else {}
        known.update(run_examples(options.examples, options.seconds, options.only))
        EXAMPLES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    else:
        compare(options.models, log)
    if options.write:
        (HERE / "embed.md").write_text(markdown(log))
    log.end("bench_embed")


if __name__ == "__main__":
    main()
