"""Masks of torch.nn.utils.prune from our scores, against a choice by hand and against physical removal."""

import copy
import doctest
import io

import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn.utils import prune

from discedit import zoo
from discedit.integrations import prune as integration
from discedit.integrations.prune import DiscEditStructured, discedit_structured, prune_model
from discedit.integrations.torch_pruning import DiscEditImportance

SCORES = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4])  # from the lowest: 1, 5, 3, 7, 0, 4, 6, 2


def conv(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3, dtype=dtype)


def masked(module, name="weight", dim=0):
    """Channels that are zero in the parameter, the mask, and nothing else."""
    mask, parameter = getattr(module, f"{name}_mask"), getattr(module, name)
    assert torch.equal(parameter, getattr(module, f"{name}_orig") * mask)
    assert parameter.dtype == mask.dtype == getattr(module, f"{name}_orig").dtype
    rows = mask.movedim(dim, 0).flatten(1)
    assert torch.equal(rows.amax(1), rows.amin(1))
    return (rows.amax(1) == 0).nonzero()[:, 0].tolist()


def test_docstring_example():
    result = doctest.testmod(integration)
    assert (result.failed, result.attempted) == (0, 4)


@pytest.mark.parametrize(
    ("amount", "expected"), [(0.25, [1, 5]), (0.3, [1, 5]), (3, [1, 3, 5]), (0, []), (1.0, [*range(8)])]
)
def test_the_lowest_are_masked(amount, expected):
    module = conv()
    before = module.weight.detach().clone()
    assert discedit_structured(module, "weight", amount, SCORES) is module
    assert masked(module) == expected
    left = [i for i in range(8) if i not in expected]
    assert torch.equal(module.weight[left], before[left])


def test_classes_are_reduced_and_empty_ones_left_out():
    scores = torch.stack([SCORES, 1 - SCORES, torch.full((8,), torch.nan)], 1)
    for reduction, expected in (("min", [1, 2]), ("max", [0, 7])):
        module = conv()
        discedit_structured(module, "weight", 2, scores, reduction=reduction)
        assert masked(module) == expected


@pytest.mark.parametrize("dim", [1, -3])
def test_inputs_and_ties(dim):
    module = nn.Conv2d(8, 3, 3)
    discedit_structured(module, "weight", 3, torch.zeros(8), dim)
    assert masked(module, dim=1) == [0, 1, 2]


def test_scores_closer_than_the_parameters_type_can_tell():
    module = conv(torch.bfloat16)
    scores = 1 - SCORES.double() * 1e-9
    for expected in ([2, 6], [2, 4, 6, 0]):
        discedit_structured(module, "weight", 2, scores)
        assert masked(module) == sorted(expected)
    assert module(torch.randn(1, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_stacks_with_other_methods():
    """Ours take from the channels that others have left, and others from what ours have."""
    module = conv()
    prune.random_structured(module, "weight", 2, dim=0)
    first = masked(module)
    discedit_structured(module, "weight", 0.5, SCORES)
    order = [i for i in (1, 5, 3, 7, 0, 4, 6, 2) if i not in first]
    assert masked(module) == sorted([*first, *order[:3]])
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
    assert len(hooks) == 1
    assert [type(method) for method in hooks[0]] == [prune.RandomStructured, DiscEditStructured]
    prune.l1_unstructured(module, "weight", 10)
    assert int((module.weight_mask == 0).sum()) == 5 * 27 + 10
    with pytest.raises(ValueError, match="amount must be at most the 3 channels that are left, got 4"):
        discedit_structured(module, "weight", 4, SCORES)
    assert int((module.weight_mask == 0).sum()) == 5 * 27 + 10


def test_is_trained_saved_and_removed():
    module, other = conv(), conv()
    discedit_structured(module, "weight", 3, SCORES)
    module(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert bool((module.weight_orig.grad[[1, 3, 5]] == 0).all())
    assert bool((module.weight_orig.grad[[0, 2, 4, 6, 7]] != 0).all())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert set(module.state_dict()) == {"bias", "weight_orig", "weight_mask"}
    prune.identity(other, "weight")
    other.load_state_dict(torch.load(file))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(other(x), module(x))
    weight = module.weight.detach().clone()
    prune.remove(module, "weight")
    assert not prune.is_pruned(module)
    assert isinstance(module.weight, nn.Parameter)
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bias", 1, SCORES), "name must be a parameter of at least two axes, got 'bias'"),
        (("gain", 1, SCORES), "name must be a parameter of at least two axes, got 'gain'"),
        (("weight", 1, SCORES, 4), r"dim must be an axis of 'weight', \(8, 3, 3, 3\), got 4"),
        (("weight", 1, SCORES, 1), r"one for each of the 3 channels on axis 1 of 'weight', got shape \(8,\)"),
        (("weight", 9, SCORES), "amount must be at most the 8 channels that are left, got 9"),
        (("weight", 1.5, SCORES), "amount must be a share in 0..1 or a number of channels, got 1.5"),
        (("weight", -1, SCORES), "amount must be .* got -1"),
        (("weight", True, SCORES), "amount must be .* got True"),
        (
            ("weight", 1, SCORES / 0),
            "scores must be finite but for classes that are NaN everywhere, got inf for channel 0",
        ),
    ],
)
def test_errors_leave_the_module_as_it_was(arguments, message):
    module = conv()
    with pytest.raises(ValueError, match=message):
        discedit_structured(module, *arguments)
    assert set(module.state_dict()) == {"weight", "bias"}
    assert not prune.is_pruned(module)


# A whole model.


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 4))


def test_a_model_layer_by_layer():
    model = small()
    scores = {"0": SCORES, "3": torch.tensor([0.4, 0.3, 0.2, 0.1])}
    untouched = copy.deepcopy(model)
    silent = prune_model(model, scores, {"0": 0.25, "3": 1}, layers=["0"])
    assert {layer: own.tolist() for layer, own in silent.items()} == {"0": [1, 5]}
    assert masked(model[0], dim=1) == [1, 5]
    assert (model[0].bias == 0).nonzero()[:, 0].tolist() == [1, 5]
    assert not prune.is_pruned(model[3])
    prune.custom_from_mask(model[3], "weight", torch.tensor([1.0, 1, 0, 1])[:, None].expand(4, 72))
    silent = prune_model(model, scores, {"0": 0.5, "3": 1})
    assert {layer: own.tolist() for layer, own in silent.items()} == {"0": [0, 1, 3, 5, 7], "3": [2, 3]}
    x = torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        untouched[0].weight[:, [0, 1, 3, 5, 7]] = 0
        untouched[0].bias[[0, 1, 3, 5, 7]] = 0
        untouched[3].weight[[2, 3]] = 0
        untouched[3].bias[[2, 3]] = 0
    assert torch.equal(model(x), untouched(x))


@pytest.mark.data
def test_masked_channels_are_as_good_as_removed(cifar, cifar_scores):
    """The same choice by torch-pruning: the logits are the same, so weights, biases and norms are all silent."""
    model, smaller = zoo.cifar_resnet("resnet20"), zoo.cifar_resnet("resnet20")
    x = cifar[2].tensors[0][:64]
    inner = [layer for layer in cifar_scores if layer.endswith(".conv1")]
    silent = prune_model(model, cifar_scores, 0.25, layers=inner)
    reduced = cifar_scores.reduce()
    for layer in inner:
        lowest = reduced[layer].argsort()[: len(reduced[layer]) // 4].sort().values
        assert torch.equal(silent[layer], lowest)
    others = [m for n, m in smaller.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n not in inner]
    importance = DiscEditImportance(smaller, cifar_scores)
    torch_pruning.pruner.BasePruner(smaller, x[:1], importance, pruning_ratio=0.25, ignored_layers=others).step()
    assert smaller.layer3[0].conv1.out_channels == 48
    with torch.no_grad():
        expected = smaller(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        for module in model.modules():
            for name in ("weight", "bias"):
                if hasattr(module, f"{name}_mask"):
                    prune.remove(module, name)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == zoo.cifar_resnet("resnet20").state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["1"]}, "layers must have scores and an amount, '1' has no scores"),
        ({"amount": {"0": 0.5}, "layers": ["0", "3"]}, "'3' has no amount"),
        ({"amount": {"0": 0.5, "7": 0.5}}, "'7' has no scores"),
        ({"scores": {"0": SCORES, "3": SCORES}}, "'3' has 4 channels, it has 8 scores"),
        ({"scores": {"0": SCORES, "1": SCORES}}, "'1' is no convolution or linear layer of the model"),
        ({"amount": {"0": 2, "3": 5}}, "amount must be at most the 4 channels that '3' has left, got 5"),
        ({"amount": 2.0}, "amount must be a share in 0..1 or a number of channels, got 2.0"),
        ({"norms": {"3": "norm"}}, "norms must name modules of the model, got 'norm' for '3'"),
        ({"reduction": "median"}, "reduction must be one of"),
    ],
)
def test_errors_mask_nothing(change, message):
    model = small()
    arguments = {"scores": {"0": SCORES, "3": SCORES[:4]}, "amount": 0.5, **change}
    with pytest.raises(ValueError, match="prune_model: .*" + message):
        prune_model(model, arguments.pop("scores"), arguments.pop("amount"), **arguments)
    assert not prune.is_pruned(model)


def test_a_computed_weight_masks_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3))
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match="prune_model: layers must have weights that are parameters, that of '1' is"):
        prune_model(model, {"0": torch.rand(4), "1": torch.rand(6)}, 0.5)
    assert not prune.is_pruned(model)
    with pytest.raises(ValueError, match="discedit_structured: name must be a parameter of at least two axes"):
        discedit_structured(model[1], "weight", 0.5, torch.rand(6))


def test_a_norm_of_another_width_masks_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(4))
    scores = {"0": torch.rand(8), "2": torch.rand(8)}
    with pytest.raises(ValueError, match="norms must be as wide as their layers, '3' has 4 channels, '2' has 8"):
        prune_model(model, scores, 0.5, norms={"0": "1", "2": "3"})
    assert not prune.is_pruned(model)
    silent = prune_model(model, scores, 0.5, norms={"0": "1"})
    for mask in (model[0].weight_mask, model[0].bias_mask, model[1].weight_mask, model[1].bias_mask):
        assert (mask.reshape(8, -1).amax(1) == 0).nonzero()[:, 0].tolist() == silent["0"].tolist()
