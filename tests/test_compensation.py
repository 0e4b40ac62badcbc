"""ModHiFi-P: components of the highest fidelity stay, and what is made of them makes up for the others."""

import copy

import pytest
import torch
from helpers import prune_with
from torch import nn

from discedit import importances, prune, score, zoo
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.fidelity import collect_second_moments, compensation, singleton_fidelity
from discedit.moments.collect import collect_moments


def network(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=not norm), nn.BatchNorm2d(12) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return list(torch.randn(64, 3, 8, 8).split(32))


MODHIFI = {"criterion": "fidelity", "repair": "compensation"}


def pruned(model, batches, **options):
    options = {"ratio": 0.5, **MODHIFI, "data": batches, **options}
    return prune_with(model, example_inputs=batches[0][:1], **options)


def test_the_method_needs_neither_scores_nor_labels(batches):
    model = network()
    edit = pruned(model, batches)
    assert {name: edit.recipe.settings[name] for name in MODHIFI} == MODHIFI
    assert list(edit.recipe.components) == ["0", "3"]  # not the head
    assert edit.model(batches[0]).shape == (32, 5)
    undone = edit.recipe.undo(edit.model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(undone.state_dict()[name], tensor)


def test_components_of_the_lowest_fidelity_go(batches):
    model = network()
    edit = pruned(model, batches, repair="none")
    whole = collect_second_moments(model, batches, positions=None)
    for layer, reader in (("0", "3"), ("3", "7")):
        values = singleton_fidelity(whole, reader, centred=True)
        gone = edit.recipe.components[layer]
        stay = sorted(set(range(len(values))) - set(gone))
        assert values[gone].max() < values[stay].min() + 0.05  # other positions are looked at
        assert set(gone) != set(range(len(gone)))


def test_the_criterion_is_the_singleton_fidelity(batches):
    model = network()
    labelled = [(x, torch.arange(len(x)) % 5) for x in batches]
    scores = score(collect_moments(model, labelled, 5))
    found = importances(model, scores, "fidelity", example_inputs=batches[0][:1], data=batches)
    whole = collect_second_moments(model, batches, positions=None)
    assert torch.allclose(found["3"], singleton_fidelity(whole, "7", centred=True), atol=1e-5)
    assert torch.allclose(found["0"], singleton_fidelity(whole, "3", centred=True), atol=0.03)


def test_factors_and_bias_are_those_that_make_up(batches):
    model = network(norm=False)
    edit = pruned(model, batches, ratio={"3": 0.5})
    gone = edit.recipe.components["3"]
    kept = sorted(set(range(8)) - set(gone))
    fitted = torch.cat(batches)[:56]  # an eighth is kept back for a check
    whole = collect_second_moments(model, [fitted], positions=None)
    factors = compensation(whole, "7", kept, centred=True, ridge=1e-4)
    weight = model[7].weight.double()[:, kept] * factors
    assert torch.allclose(edit.model[7].weight.double(), weight, atol=1e-5)
    with torch.no_grad():
        before, after = model(batches[0]), edit.model(batches[0])
        plain = pruned(model, batches, ratio={"3": 0.5}, repair="none").model(batches[0])
        shift = model(fitted).mean(0) - edit.model(fitted).mean(0)
    assert shift.abs().max() < 1e-5  # the bias carries the mean
    assert (after - before).square().sum() < 0.5 * (plain - before).square().sum()


def test_statistics_of_batch_norms_change_as_pruning_changes_them(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.Flatten(), nn.Linear(96, 4)).eval()  # fmt: skip
    with torch.no_grad():
        x = torch.cat([model[:3](batch) for batch in batches])
        model[3].running_mean.copy_(x.mean((0, 2, 3)) + 0.3)  # as if training had seen other images
        model[3].running_var.copy_(2 * x.var((0, 2, 3)))
        edit = pruned(model, batches, ratio={"0": 0.5})
        now = torch.cat([edit.model[:3](batch) for batch in batches])
    assert torch.allclose(edit.model[3].running_mean, now.mean((0, 2, 3)) + 0.3, atol=1e-4)
    assert torch.allclose(edit.model[3].running_var, 2 * now.var((0, 2, 3)), rtol=0.05)
    assert edit.model[3].num_batches_tracked == model[3].num_batches_tracked


def test_readers_that_cannot_be_fitted_are_named(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.ReLU(), nn.Flatten(),
                          nn.Linear(64, 4)).eval()  # fmt: skip
    edit = pruned(model, batches, ratio={"0": 0.5})
    assert "neither a bias nor a batch norm" in edit.recipe.settings["unrepaired"]["2"]


def test_errors(batches):
    model = network()
    for options, message in (
        ({"data": None}, "repair='compensation' needs data"),
        ({"criterion": "max"}, "criterion='max' needs scores, got scores=None"),
        ({"criterion": "combined"}, "criterion='combined' needs scores, got scores=None"),
        ({"data": None, "repair": "none"}, "criterion='fidelity' needs data"),
        ({"criterion": "l1", "data": [batches[0] * torch.nan]}, "data must give finite feature maps, what '3' reads"),
    ):
        with pytest.raises(ValueError, match=message):
            pruned(model, batches, **options)


@pytest.mark.parametrize("criterion", ["l1", "energy", "fidelity"])
def test_steps_without_scores(batches, criterion):
    edit = pruned(network(), batches, criterion=criterion, steps=2)
    assert {layer: len(gone) for layer, gone in edit.recipe.components.items()} == {"0": 6, "3": 4}
    assert edit.model[3].weight.shape == (4, 6, 3, 3)


@pytest.mark.slow
@pytest.mark.data
def test_on_a_real_network(cifar):
    model = zoo.cifar_resnet("resnet20")
    train, test = (list(zoo.batches(zoo.cifar10(part, limit=1000), 250)) for part in ("train", "test"))
    images = [x for x, _ in train]
    options = {"ratio": 0.3, "data": images, "example_inputs": images[0][:1], "criterion": "fidelity"}
    before = copy.deepcopy(model.state_dict())
    points = {
        repair: 100 * float(accuracy_per_class(prune(model, repair=repair, **options).model, test, 10).mean())
        for repair in ("none", "compensation")
    }
    assert points["compensation"] > points["none"] + 5
    assert points["compensation"] > 75  # of 91
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
