"""Repair in closed form: exact where it can be, better than nothing on a trained network, and part of the recipe."""

import itertools

import pytest
import torch
from torch import nn

from discedit import Moments, Recipe, _repair, collect_moments, prune, score, zoo
from discedit.evaluate import accuracy_per_class

REPAIRS = ("mean", "least_squares")


def scores_of(widths, lowest, norms=None):
    """Scores in which the given components of each layer are the lowest."""
    moments = Moments(2)
    labels = torch.arange(20) % 2
    for layer, width in widths.items():
        x = torch.randn(20, width, generator=torch.Generator().manual_seed(0)) + 50.0 * labels[:, None]
        x[:, lowest[layer]] = torch.randn(20, len(lowest[layer]), generator=torch.Generator().manual_seed(1))
        moments.update(layer, x, labels)
    moments.norms = norms or {}
    return score(moments)


def data(*shape, batches=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, *shape, generator=generator) for _ in range(batches)]


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu())


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_constant_component_is_carried_by_the_bias(repair):
    model = Perceptron().eval()
    with torch.no_grad():
        model.one.weight[[2, 5]] = 0
        model.one.bias[[2, 5]] = torch.tensor([3.0, -1.0])
    scores = scores_of({"one": 8}, {"one": [2, 5]})
    batches = data(6)
    edit = prune(model, scores, ratio=0.25, example_inputs=batches[0], data=batches, repair=repair, layers=["one"])
    assert edit.recipe.components == {"one": [2, 5]}
    x = data(6, batches=1, seed=9)[0]
    with torch.no_grad():
        torch.testing.assert_close(edit.model(x), model(x), rtol=1e-4, atol=1e-4)
    plain = prune(model, scores, ratio=0.25, example_inputs=batches[0], repair="none", layers=["one"])
    with torch.no_grad():
        assert float((plain.model(x) - model(x)).abs().max()) > 0.1


@pytest.mark.parametrize("normed", [False, True], ids=["bias", "batch norm"])
def test_least_squares_finds_what_the_other_components_say(normed):
    """Channel 3 is channel 0 again, and channel 4 the sum of 1 and 2: nothing is lost, but for the ridge."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=not normed)]
    if normed:
        layers.append(nn.BatchNorm2d(5))
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(5 * 25, 4)).eval()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[0], model[0].bias[0]
        model[0].weight[4] = model[0].weight[1] + model[0].weight[2]
        model[0].bias[4] = model[0].bias[1] + model[0].bias[2]
        if normed:
            model[2].running_mean.normal_()
            model[2].running_var.uniform_(0.5, 2)
    scores = scores_of({"0": 6}, {"0": [3, 4]}, {"1": "2"} if normed else None)
    batches = data(3, 11, 11)
    errors = {}
    x = data(3, 11, 11, batches=1, seed=9)[0]
    for repair in ("none", *REPAIRS):
        edit = prune(model, scores, ratio=0.34, example_inputs=batches[0], data=batches, repair=repair, layers=["0"])
        assert edit.recipe.components == {"0": [3, 4]}
        with torch.no_grad():
            errors[repair] = float((edit.model(x) - model(x)).square().mean().sqrt() / model(x).std())
    assert errors["least_squares"] < 0.01 < 0.1 < errors["none"]
    assert errors["mean"] < errors["none"]


def test_repair_is_part_of_the_recipe(trained, tmp_path):
    model, train, test = trained
    moments_of = zoo.batches(train)
    scores = score(collect_moments(model, moments_of, 10))
    example = train.tensors[0][:2]
    accuracy = {}
    for repair in ("none", *REPAIRS):
        edit = prune(model, scores, ratio=0.5, example_inputs=example, data=moments_of, repair=repair)
        accuracy[repair] = float(accuracy_per_class(edit.model, zoo.batches(test), 10).mean())
        assert edit.recipe.settings["repair"] == repair
        recipe = Recipe.load(edit.recipe.save(tmp_path / repair))
        again = recipe.apply(model)
        undone = edit.recipe.undo(edit.model)
        for name, tensor in edit.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor)
        for name, tensor in model.state_dict().items():
            assert torch.equal(undone.state_dict()[name], tensor)
    assert accuracy["least_squares"] > accuracy["none"] + 0.02
    assert accuracy["mean"] > accuracy["none"]
    mine = zoo.DigitsNet().eval()
    mine.load_state_dict(model.state_dict())
    edit = prune(mine, scores, ratio=0.5, example_inputs=example, data=moments_of, repair="mean", inplace=True)
    assert edit.model is mine
    assert "unrepaired" not in edit.recipe.settings


def test_layers_that_cannot_be_repaired_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 8, 3)).eval()
    scores = scores_of({"0": 6}, {"0": [1]})
    edit = prune(model, scores, ratio=0.2, example_inputs=data(2, 12)[0], data=data(2, 12), repair="mean", layers=["0"])
    assert edit.recipe.settings["unrepaired"] == {"2": "it is a Conv1d; only Conv2d and Linear can be repaired"}
    bare = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)).eval()
    edit = prune(bare, scores, ratio=0.2, example_inputs=data(5)[0], data=data(5), repair="least_squares", layers=["0"])
    assert "neither a bias nor a batch norm" in edit.recipe.settings["unrepaired"]["2"]


@pytest.mark.parametrize("repair", REPAIRS)
def test_repair_needs_data(repair):
    model = Perceptron().eval()
    scores = scores_of({"one": 8}, {"one": [2, 5]})
    with pytest.raises(
        ValueError, match=f"prune: repair='{repair}' needs data to estimate statistics on, got data=None"
    ):
        prune(model, scores, ratio=0.25, example_inputs=data(6)[0], repair=repair)
    with pytest.raises(ValueError, match="data must give at least one sample to repair on"):
        prune(model, scores, ratio=0.25, example_inputs=data(6)[0], data=[], repair=repair)


LAYERS = [
    nn.Linear(5, 3),
    *(
        nn.Conv2d(4, 3, kernel, stride=stride, padding=padding, dilation=dilation)
        for kernel, stride, padding, dilation in itertools.product((1, 3, (2, 4)), (1, 2), (0, (1, 2)), (1, 2))
    ),
    nn.Conv2d(4, 3, (5, 3), padding="same", dilation=(1, 2)),
    nn.Conv2d(4, 3, 3, padding="valid"),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_are_what_the_layer_multiplies(layer):
    x = torch.randn(7, 5, 11, 5) if isinstance(layer, nn.Linear) else torch.randn(7, 4, 12, 13)
    rows = _repair._Rows(layer, 7)
    rows.each = 10**6  # every position, in some order
    ours = rows.of(x, 3) @ _repair._matrix(layer).T + layer.bias
    with torch.no_grad():
        whole = layer(x) if isinstance(layer, nn.Linear) else layer(x).permute(0, 2, 3, 1)
    whole = whole.reshape(7, -1, 3)
    order = torch.randperm(whole.shape[1], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.view(7, -1, 3), whole[:, order], rtol=1e-4, atol=1e-5)
