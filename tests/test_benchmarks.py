"""The benchmarks still run, on as little data as shows it."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import bench_cifar, bench_finetune, bench_prune
from benchmarks._common import Log
from discedit import zoo


@pytest.mark.slow
@pytest.mark.data
def test_bench_cifar_writes_its_tables(cifar):
    text = bench_cifar.report(["resnet20"], train=300, test=200, repeats=2)
    for heading in ("Cost of scoring", "Unlearning each class", "mean over the ten classes"):
        assert heading in text
    assert text.count("| resnet20 |") == 1 + 10 + 6


@pytest.mark.slow
@pytest.mark.data
def test_bench_prune_measures_once_and_writes_what_it_measured(cifar, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_prune, "HERE", tmp_path)
    for ratios in ("RATIOS", "IN_TURN"):
        monkeypatch.setattr(bench_prune, ratios, (0.3, 0.6))
    monkeypatch.setattr(bench_prune, "RANKED", ("tp lamp",))
    monkeypatch.setattr(bench_prune, "OF_CLASSES", ("max",))
    monkeypatch.setattr(bench_prune, "REPAIRS", ("least_squares",))
    monkeypatch.setattr(bench_prune, "OURS", ("l1", "combined"))
    monkeypatch.setattr(bench_prune, "RIVALS", ("tp taylor",))
    bench = bench_prune.Bench("resnet20", 300, 200)
    log = bench_prune.Log(tmp_path / "prune.json")
    bench_prune.table(bench, log)
    bench_prune.goals(bench, log, few=False)
    bench_prune.read(bench, log)
    bench_prune.across(bench, log)
    assert len(log.entries) == 3 * 2 + 3 + 2 * 2 * 2 + 2 * 3
    assert log.entries["resnet20|l1|least_squares|0.3"]["drop"] < log.entries["resnet20|l1|least_squares|0.6"]["drop"]
    assert log.entries["resnet20|parameters -7.1 %|2,500"]["parameters removed"] >= 0.071
    again = bench_prune.Log(tmp_path / "prune.json")
    again.measure("resnet20|l1|least_squares|0.3", lambda: pytest.fail("measured again"))
    text = bench_prune.markdown(again)
    drop = log.entries["resnet20|combined|least_squares|0.6"]["drop"]
    assert f"{drop:.1f} |" in next(line for line in text.splitlines() if "| combined |" in line)
    assert text.count("Not measured.") == 4  # latency, budgets of it, time, and dimensions within heads
    assert text.count("| resnet20 | least_squares | max | consumer |") == 2
    assert all(text.count(f"| resnet20 | tp lamp | {how} |") == 2 for how in ("divergence", "rank", "none"))
    bench_prune.plot(again)
    assert (tmp_path / "prune.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.data
def test_bench_finetune_trains_what_each_method_left(cifar, monkeypatch, tmp_path):
    with np.load(zoo.data_folder() / "cifar10_train_batch1.npz") as archive:
        images, labels = (torch.from_numpy(archive[part][:192]) for part in ("images", "labels"))
    test = TensorDataset(*(part[:100] for part in cifar[2].tensors))
    monkeypatch.setattr(bench_finetune, "LEFT", {"resnet20": (0.7,)})
    monkeypatch.setattr(bench_finetune, "RATES", (0.001,))
    bench = bench_finetune.Bench("resnet20", (images, labels.long()), test)
    log = Log(tmp_path / "finetune.json")
    bench_finetune.rates(bench, log, "resnet20", held_back=64)
    settings = {"left": None, "methods": bench_finetune.METHODS, "original": True, "how": ["labels"], "seeds": [0]}
    bench_finetune.epochs(bench, log, "resnet20", Namespace(**settings))
    assert not log.failed
    assert len(log.entries) == 1 + 2 * 6
    left = {method: log.entries[f"resnet20|0.7|{method}|before"] for method in bench_finetune.METHODS}
    assert all(0.6 < entry["parameters left"] <= 0.7 for entry in left.values())
    assert left["ours"]["accuracy"] > left["l1"]["accuracy"]
    for how in bench_finetune.HOW:  # both kinds of numbers give the same
        half, whole = (bench.epoch("l1", 0.7, how, 0, number=number) for number in ("bfloat16", "float32"))
        assert abs(half["accuracy"] - whole["accuracy"]) <= 6
        assert whole["accuracy"] > left["l1"]["accuracy"]
    text = bench_finetune.markdown(log)
    assert text.count("| resnet20 |") == 6 + 1
    assert text.count("| not measured |") == 6  # distillation


def test_augmented_images_are_crops_of_the_padded_ones_or_mirrored():
    images = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(64, 40, 40, 3, dtype=torch.uint8)
    padded[:, 4:36, 4:36] = images
    torch.manual_seed(0)
    seen = set()
    for given, image in zip(zoo.cifar10_augmented(images), padded, strict=True):
        crops = image.unfold(0, 32, 1).unfold(1, 32, 1).permute(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3)
        inputs = torch.cat([zoo.cifar10_inputs(crops), zoo.cifar10_inputs(crops.flip(2))])
        [found] = (inputs == given).flatten(1).all(1).nonzero()
        seen.add(int(found))
    assert min(seen) < 81 <= max(seen)
    assert len(seen) > 40


@pytest.mark.parametrize("name", ["prune.json", "unlearn.json"])
def test_a_log_keeps_what_was_measured_before(tmp_path, name):
    text = (Path(bench_prune.__file__).parent / name).read_text()
    path = tmp_path / name
    path.write_text(text)
    log = Log(path, any_commit=True)
    assert log.measure(next(iter(log.entries)), lambda: pytest.fail("measured again")) in json.loads(text).values()
    log.measure("new", lambda: {"value": 1})
    known = json.loads(path.read_text())
    assert len(path.read_text().splitlines()) == len(known) + 2  # a line each
    assert known.pop("new") == {"value": 1, "machine": log.machine}
    assert known == json.loads(text)
    assert log.measure("broken", lambda: {"value": 1 // 0}) is None
    with pytest.raises(SystemExit, match="bench: 1 runs failed: broken"):
        log.end("bench")
