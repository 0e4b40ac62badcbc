"""Fixtures: real data where it is there, and a small trained network that is always there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import vision_ops  # noqa: F401  (before anything imports torchvision)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the Triton kernels then run on CPU tensors; read when imported

from discedit import collect_moments, score, zoo

INTERPRETED = ("test_pool.py", "test_class_moments.py")  # cases that the same tests also run on the other backends
EVERY = 1 if "DISCEDIT_ALL_TESTS" in os.environ else 3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton's interpreter takes a third of all the time: of the cases that other backends run as well, every third."""
    if "TRITON_INTERPRET" not in os.environ:
        return
    cases = [item for item in items if item.path.name in INTERPRETED and "triton" in item.name]
    left_out = {item for index, item in enumerate(cases) if index % EVERY}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> Iterator[None]:
    """Or as many as OMP_NUM_THREADS says: beside other work, one."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread(_two_threads: None) -> Iterator[None]:
    """For networks so small that more threads only wait for each other, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def trained():
    """DigitsNet trained on the spot, and its data: with two threads everywhere, because their number changes what is
    learned."""
    train, test = zoo.digits()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return zoo.train_digits_net(train, epochs=8), train, test
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digit_moments(trained):
    model, train, _ = trained
    return collect_moments(model, zoo.batches(train), 10)


@pytest.fixture(scope="session")
def digit_scores(digit_moments):
    return score(digit_moments)
