"""Fixtures: real data where it is there, and a small trained network that is always there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each worker of pytest-xdist has one core; read when torch is imported

import pytest
import torch
import vision_ops  # noqa: F401  (before anything imports torchvision)
from filelock import FileLock
from safetensors.torch import load_model, save_model

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the Triton kernels then run on CPU tensors; read when imported

from discedit import collect_moments, score, zoo


@pytest.fixture(autouse=True)
def _threads():
    """A test may change how many threads torch takes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: the folder that `make` fills, in one worker of pytest-xdist, for all of them."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def cifar():
    """ResNet20 with its weights, 1,000 training and 1,000 test images."""
    folder = zoo.data_folder()
    if not (folder / "resnet20_cifar10.safetensors").is_file():
        pytest.skip(f"needs the CIFAR-10 data: no resnet20_cifar10.safetensors in {folder} (DISCEDIT_DATA)")
    return zoo.cifar_resnet("resnet20"), zoo.cifar10("train", limit=1000), zoo.cifar10("test", limit=1000)


@pytest.fixture(scope="session")
def cifar_scores(cifar):
    model, train, _ = cifar
    return score(collect_moments(model, zoo.batches(train), 10))


@pytest.fixture(scope="session")
def trained(made_once):
    """DigitsNet trained on the spot, and its data: with two threads everywhere, because their number changes what is
    learned."""
    train, test = zoo.digits()

    def make(folder: Path) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        save_model(zoo.train_digits_net(train, epochs=8), folder / "model.safetensors")
        torch.set_num_threads(before)

    model = zoo.DigitsNet().eval()
    load_model(model, made_once("digits_net", make) / "model.safetensors")
    return model, train, test


@pytest.fixture(scope="session")
def digit_moments(trained):
    model, train, _ = trained
    return collect_moments(model, zoo.batches(train), 10)


@pytest.fixture(scope="session")
def digit_scores(digit_moments):
    return score(digit_moments)
