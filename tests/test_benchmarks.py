"""The benchmarks still run, on as little data as shows it."""

import pytest

from benchmarks import bench_cifar


@pytest.mark.data
def test_bench_cifar_writes_its_tables(cifar):
    text = bench_cifar.report(["resnet20"], train=300, test=200, repeats=2)
    for heading in ("Cost of scoring", "Accuracy after pruning", "Unlearning each class", "mean over the ten classes"):
        assert heading in text
    assert text.count("| resnet20 |") == 1 + 2 + 10 + 10 + 5
