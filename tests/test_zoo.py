import pytest
import torch

from discedit import zoo
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.model.size import count_macs, count_parameters


@pytest.mark.data
def test_cifar_resnet_reaches_its_published_accuracy(cifar):
    """91.7 % on all test images; 1,000 of them put the mean within three points."""
    model, _, test = cifar
    assert float(accuracy_per_class(model, zoo.batches(test), 10).mean()) == pytest.approx(0.917, abs=0.03)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("resnet20", 269_722, 40.55e6), ("resnet56", 853_018, 125.49e6)]
)
def test_published_sizes(name, parameters, macs):
    """0.27 M and 0.85 M parameters, 41 M and 126 M multiply-accumulates (He et al. 2016)."""
    model = zoo.CifarResNet(zoo.RESNET_BLOCKS[name])
    assert count_parameters(model) == parameters
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == pytest.approx(macs, rel=1e-3)


def test_accuracy_counts_each_class():
    class Says(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(x, 3).float()

    said, true = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0])
    accuracy = accuracy_per_class(Says(), [(said[:2], true[:2]), (said[2:], true[2:])], 3)
    assert accuracy[:2].tolist() == [0.5, pytest.approx(2 / 3)]
    assert accuracy[2].isnan()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader must give at least one sample, it gave none"),
        ([(torch.tensor([0, 1]), [0, 3])], r"batch 0: .*labels must lie in 0..2 .* found 3 at position 1"),
        ([(torch.tensor([0, 1]), [0])], r"batch 0: model must give logits for 1 labels, got shape \(2, 3\)"),
        ([(torch.tensor([0, 1]), [0.0, 1.0])], "batch 0: .*labels must be integers"),
    ],
)
def test_accuracy_refuses_bad_input(loader, message):
    class Says(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(x, 3).float()

    with pytest.raises(ValueError, match=f"accuracy_per_class: {message}"):
        accuracy_per_class(Says(), loader, 3)


def test_bad_names():
    with pytest.raises(ValueError, match=r"name must be one of \['resnet20', 'resnet56'\], got 'resnet18'"):
        zoo.cifar_resnet("resnet18")
    with pytest.raises(ValueError, match="part must be 'train' or 'test', got 'val'"):
        zoo.cifar10("val")
