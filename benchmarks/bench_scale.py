"""Many processes and passes that are killed: do they give what one undisturbed process gives, and how fast?

    python -m benchmarks.bench_scale --write                  # with nothing beside it: minutes on two cores
    python -m benchmarks.bench_scale --parts kills --kills 50

Real images and networks (`discedit.zoo`, DISCEDIT_DATA), one thread in each process, gloo. What is measured is kept in
benchmarks/scale.json with machine and commit; benchmarks/scale.md is made from it alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import _common
from discedit import Moments, collect_moments, score, zoo
from discedit.moments.distributed import ShardSampler

HERE = Path(__file__).parent
MODELS = {"resnet20": "ResNet20", "resnet56": "ResNet56"}
PARTS = ("same", "speed", "kills")
SIZES = (2, 4)
BATCH = 100
ROUNDS = 7


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "discedit"])
    return context


def _rank(run: Callable[..., None], rank: int, size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    run(rank, Path(folder), *arguments)
    dist.destroy_process_group()


def together(run: Callable[..., None], size: int, folder: Path, *arguments: Any) -> None:
    """Runs a function in processes of one group; all must end well."""
    context = _context()
    processes = [context.Process(target=_rank, args=(run, rank, size, str(folder), arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"processes ended with {codes}.")


def _loader(data: Dataset[Any], *, whole: bool = False) -> DataLoader[Any]:
    return DataLoader(data, BATCH, sampler=None if whole else ShardSampler(data, block=BATCH))  # type: ignore[arg-type]


def _share(rank: int, folder: Path, name: str, images: int) -> None:
    loader = _loader(zoo.cifar10("train", limit=images))
    moments = collect_moments(zoo.cifar_resnet(name), loader, 10, group="world", progress=False)
    moments.save(folder / f"{rank}.safetensors")


def _differences(found: Moments, whole: Moments) -> tuple[float, float]:
    """Largest difference of moments, as a share of the layer's largest, and of scores."""
    of_moments = max(
        float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300))
        for layer in whole
        for mine, theirs in zip(found[layer].tensors()[1:], whole[layer].tensors()[1:], strict=True)
    )
    ours, theirs = score(found), score(whole)
    return of_moments, max(float((ours[layer] - theirs[layer]).abs().max()) for layer in theirs)


def same(name: str, images: int) -> dict[str, Any]:
    """One, two and four processes on the same images."""
    found: dict[str, Any] = {"images": images}
    with tempfile.TemporaryDirectory() as base:
        results = {}
        for size in (1, *SIZES):
            folder = Path(base, str(size))
            folder.mkdir()
            together(_share, size, folder, name, images)
            ranks = [Moments.load(folder / f"{rank}.safetensors") for rank in range(size)]
            found[f"{size} ranks equal"] = all(_differences(rank, ranks[0]) == (0.0, 0.0) for rank in ranks)
            results[size] = ranks[0]
        for size in SIZES:
            moments, scores = _differences(results[size], results[1])
            found |= {f"{size} moments": moments, f"{size} scores": scores}
    return found


def _bare(model: nn.Module, loader: DataLoader[Any]) -> None:
    with torch.no_grad():
        for x, _ in loader:
            model(x)


def _rounds(rank: int, folder: Path, name: str, images: int) -> None:
    """In turns: process 0 alone over everything, then all, each over its share; bare passes, then ours."""
    data, model = zoo.cifar10("train", limit=images), zoo.cifar_resnet(name)
    runs: dict[str, Callable[[bool], object]] = {
        "bare": lambda whole: _bare(model, _loader(data, whole=whole)),
        "ours": lambda whole: collect_moments(
            model, _loader(data, whole=whole), 10, progress=False, group=None if whole else "world"
        ),
    }
    taken: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):  # the first warms up
        for what, run in runs.items():
            dist.barrier()
            alone = _common.seconds(lambda run=run: run(True)) if rank == 0 else 0.0  # type: ignore[misc]
            dist.barrier()
            start = time.perf_counter()
            run(False)
            dist.barrier()
            if turn:
                taken.setdefault(f"{what}, one", []).append(alone)
                taken.setdefault(f"{what}, two", []).append(time.perf_counter() - start)
    if rank == 0:
        (folder / "seconds").write_text(json.dumps(taken))


def speed(name: str, images: int) -> dict[str, Any]:
    """Two processes against one, a thread each; and the same of bare forward passes: what the machine allows."""
    with tempfile.TemporaryDirectory() as base:
        together(_rounds, 2, Path(base), name, images)
        taken = json.loads(Path(base, "seconds").read_text())
    found: dict[str, Any] = {"images": images}
    for what in ("bare", "ours"):
        one, two = taken[f"{what}, one"], taken[f"{what}, two"]
        efficiency = [a / (2 * b) for a, b in zip(one, two, strict=True)]
        quartiles = statistics.quantiles(efficiency, n=4)
        found |= {
            f"{what}, one, s": round(statistics.median(one), 3),
            f"{what}, two, s": round(statistics.median(two), 3),
            f"{what}, efficiency": round(statistics.median(efficiency), 3),
            f"{what}, spread": round(quartiles[2] - quartiles[0], 3),
        }
    return found


def _checkpointed(name: str, images: int, folder: str, out: str, began: Any) -> None:
    torch.set_num_threads(1)
    data, model = zoo.cifar10("train", limit=images), zoo.cifar_resnet(name)
    began.set()
    moments = collect_moments(model, DataLoader(data, 25), 10, progress=False, checkpoint=folder, checkpoint_every=0.0)
    moments.save(out)


def kills(name: str, images: int, number: int) -> dict[str, Any]:
    """Each run is killed with SIGKILL at a random moment of its pass, and goes on to the end."""
    context, generator = _context(), random.Random(0)
    states: list[int] = []
    identical = killed = late = 0
    with tempfile.TemporaryDirectory() as base:

        def begin(run: str) -> tuple[Any, float]:
            began = context.Event()
            process = context.Process(
                target=_checkpointed, args=(name, images, f"{base}/{run}", f"{base}/{run}.safetensors", began)
            )
            process.start()
            began.wait()
            return process, time.perf_counter()

        process, start = begin("whole")
        process.join()
        seconds = time.perf_counter() - start
        whole = Path(base, "whole.safetensors").read_bytes()
        while killed < number:
            shutil.rmtree(Path(base, "run"), ignore_errors=True)
            out = Path(base, "run.safetensors")
            out.unlink(missing_ok=True)
            process, start = begin("run")
            process.join(generator.uniform(0, seconds))
            if process.exitcode is not None:
                late += 1  # it was done before its moment came: another one
                continue
            process.kill()
            process.join()
            killed += 1
            states.append(len(list(Path(base, "run").glob("process-*"))))
            process, start = begin("run")
            process.join()
            identical += process.exitcode == 0 and out.read_bytes() == whole
    return {
        "images": images,
        "killed": killed,
        "identical": identical,
        "without a state yet": states.count(0),
        "done before": late,
        "pass, s": round(seconds, 2),
    }


def table(entries: dict[str, dict[str, Any]]) -> str:
    """benchmarks/scale.md."""
    lines = [
        "# Many processes, and passes that are killed",
        "",
        "Written by `python -m benchmarks.bench_scale --write` from scale.json; do not edit.",
        "",
        "CIFAR-10 training images, batches of 100, one thread in each process, gloo.",
        "",
        "## The same by one, two and four processes",
        "",
        "Every process gets blocks of one batch (`ShardSampler(block=...)`). Moments: largest difference from one "
        "process's, as a share of the largest of its layer and kind. Scores: largest difference. Ranks: whether all "
        "processes of a group ended with the same bits.",
        "",
        "| model | images | processes | moments | scores | ranks the same |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, title in MODELS.items():
        entry = entries.get(f"{model}|same")
        lines += [
            f"| {title} | not measured | {size} | | | |"
            if entry is None
            else f"| {title} | {entry['images']:,} | {size} | {entry[f'{size} moments']:.1e} | "
            f"{entry[f'{size} scores']:.1e} | {'yes' if entry[f'{size} ranks equal'] else 'NO'} |"
            for size in SIZES
        ]
    lines += [
        "",
        "## Two processes against one",
        "",
        f"Efficiency: time of one process over all images / (2 x time of two, half of them each), medians of {ROUNDS} "
        "rounds in turns, with half the distance of the quartiles; goal: at least 0.9. Bare: forward passes, what "
        "the machine allows. Ours: `collect_moments`, merging included.",
        "",
        "| model | images | ours: one, s | two, s | efficiency | bare: one, s | two, s | efficiency | ours / bare |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, title in MODELS.items():
        entry = entries.get(f"{model}|speed")
        if entry is None:
            lines.append(f"| {title} | not measured | | | | | | | |")
            continue
        cells = [
            f"{entry[f'{what}, one, s']} | {entry[f'{what}, two, s']} | {entry[f'{what}, efficiency']} "
            f"(+-{entry[f'{what}, spread'] / 2:.2f})"
            for what in ("ours", "bare")
        ]
        share = entry["ours, efficiency"] / entry["bare, efficiency"]
        lines.append(f"| {title} | {entry['images']:,} | {' | '.join(cells)} | {share:.2f} |")
    entry = entries.get("resnet20|kills")
    lines += ["", "## Killed", ""]
    if entry is None:
        lines.append("Not measured.")
    else:
        lines.append(
            f"ResNet20, {entry['images']:,} images in batches of 25, a state on disk after each batch "
            f"(`checkpoint_every=0`). {entry['killed']} runs were killed with SIGKILL at random moments of their pass "
            f"({entry['pass, s']} s), {entry['without a state yet']} of them before their first state, and went on: "
            f"{entry['identical']} of {entry['killed']} ended with the same file, bit for bit, as a run that nothing "
            f"disturbed."
        )
    machines = sorted({entry["machine"] for entry in entries.values()})
    return "\n".join([*lines, "", f"Measured on: {'; '.join(machines)}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--any-commit", action="store_true", help="keep what other commits or machines measured")
    parser.add_argument("--write", action="store_true", help="write benchmarks/scale.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = _common.Log(HERE / "scale.json", any_commit=options.any_commit)
    for name in options.models:
        if "same" in options.parts:
            log.measure(f"{name}|same", lambda name=name: same(name, options.images))  # type: ignore[misc]
        if "speed" in options.parts:
            log.measure(f"{name}|speed", lambda name=name: speed(name, options.images))  # type: ignore[misc]
    if "kills" in options.parts and "resnet20" in options.models:
        log.measure("resnet20|kills", lambda: kills("resnet20", min(500, options.images), options.kills))
    if options.write:
        (HERE / "scale.md").write_text(table(log.entries))
    log.end("bench_scale")


if __name__ == "__main__":
    sys.exit(main())
