"""Repair in closed form: exact where it can be, better than nothing on a trained network, and part of the recipe."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from discedit import Moments, Recipe, collect_moments, prune, score, zoo
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.model.trace import ModelTrace
from discedit.moments import calibration, positions
from discedit.repair import least_squares

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
    options = {"ratio": 0.25, "example_inputs": batches[0], "layers": ["one"], "criterion": "max"}
    edit = prune(model, scores, data=batches, repair=repair, **options)
    assert edit.recipe.components == {"one": [2, 5]}
    x = data(6, batches=1, seed=9)[0]
    with torch.no_grad():
        torch.testing.assert_close(edit.model(x), model(x), rtol=1e-4, atol=1e-4)
    plain = prune(model, scores, repair="none", **options)
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
    options = {"ratio": 0.33, "example_inputs": batches[0], "layers": ["0"], "criterion": "max"}
    for repair in ("none", *REPAIRS):
        edit = prune(model, scores, data=batches, repair=repair, **options)
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
        edit = prune(model, scores, ratio=0.5, example_inputs=example, data=moments_of, repair=repair, criterion="max")
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
    assert accuracy["mean"] != accuracy["none"]  # better on average, as above, not for every network
    mine = zoo.DigitsNet().eval()
    mine.load_state_dict(model.state_dict())
    made = prune(mine, scores, ratio=0.5, example_inputs=example, data=moments_of, repair="mean")
    edit = made.recipe.apply(mine, inplace=True)
    assert edit.model is mine
    assert "unrepaired" not in edit.recipe.settings


def test_layers_that_cannot_be_repaired_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 8, 3)).eval()
    scores = scores_of({"0": 6}, {"0": [1]})
    edit = prune(model, scores, ratio=0.2, example_inputs=data(2, 12)[0], data=data(2, 12), repair="mean", layers=["0"])
    assert edit.recipe.settings["unrepaired"] == {"2": "it is a Conv1d; only Conv2d and Linear can be fitted"}
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
    with pytest.raises(ValueError, match="data must give at least one sample"):
        prune(model, scores, ratio=0.25, example_inputs=data(6)[0], data=[], repair=repair)


class Block(nn.Module):
    """y = x + bn(conv2(relu(conv1(x)))), the sum written in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.how = how

    def forward(self, x):
        out = self.bn(self.conv2(self.conv1(x).relu()))
        if self.how == "out += x":
            out += x
            return out
        if self.how == "x += out":
            x += out
            return x
        if self.how == "out.add_(x)":
            out.add_(x)
            return out
        if self.how == "relu":
            return x + functional.relu(out)
        if self.how == "relu_":
            return x + functional.relu(out, inplace=True)
        if self.how == "hidden":
            return torch.stack([x, out]).sum(0)
        return {"out + x": lambda: out + x, "x + out": lambda: x + out, "torch.add": lambda: torch.add(x, out)}[
            self.how
        ]()


class Residual(nn.Module):
    def __init__(self, how, blocks=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(how) for _ in range(blocks)))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).relu())


def statistics_of_use(model):
    """Batch norms with statistics and weights of their own, and in eval mode."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def residual(how, blocks=2):
    torch.manual_seed(1)
    return statistics_of_use(Residual(how, blocks))


def importances_of(model, lowest):
    """Of each named layer, with 0 for the components to be removed."""
    found = {}
    for layer, components in lowest.items():
        found[layer] = torch.ones(len(model.get_submodule(layer).weight))
        found[layer][components] = 0
    return found


def without(model, lowest, batches=None, **options):
    """The edit that removes these components."""
    importances = importances_of(model, lowest)
    options = {"threshold": 0.5, "example_inputs": batches[0][:2], "data": batches, **options}
    edit = prune(model, importances, **options)
    assert edit.recipe.components == lowest
    return edit


def error(edited, model, x):
    with torch.no_grad():
        return float((edited(x) - model(x)).square().mean().sqrt())


INNER = {"blocks.0.conv1": [1, 4, 6], "blocks.1.conv1": [0, 5]}
SUMS = ("out + x", "x + out", "out += x", "x += out", "out.add_(x)", "torch.add")


@pytest.fixture
def no_ridge(monkeypatch):
    """Where the other components say all that is gone, only the ridge keeps the repair from being exact."""
    monkeypatch.setattr(least_squares, "RIDGE", 1e-8)


@pytest.fixture(scope="module")
def images():
    return data(3, 8, 8, batches=3), data(3, 8, 8, batches=1, seed=9)[0]


def test_a_drifted_shortcut_is_made_up_for(images):
    """Where the sum cannot be seen, each block only gives what it gave before, however wrong its shortcut is."""
    batches, x = images
    lowest = {"blocks.0.conv1": [0, 1, 2, 3, 4, 6], "blocks.1.conv1": [0], "blocks.2.conv1": [2]}
    errors = {}
    for how in ("x + out", "hidden"):
        model = residual(how, blocks=3)
        for repair in ("none", "least_squares"):
            edited = without(model, lowest, batches, repair=repair).model
            errors[how, repair] = error(edited, model, x)
    assert errors["x + out", "least_squares"] < 0.9 * errors["hidden", "least_squares"]
    assert errors["hidden", "least_squares"] < 0.5 * errors["x + out", "none"]


@pytest.mark.parametrize("how", SUMS)
def test_every_way_to_write_a_sum_is_seen(how, images):
    batches, _ = images
    ours, plain = (without(residual(way), INNER, batches).model.state_dict() for way in (how, "x + out"))
    hidden = without(residual("hidden"), INNER, batches).model.state_dict()
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    name = "blocks.1.conv2.weight"
    assert float((plain[name] - hidden[name]).abs().max()) > 1e-3


def test_an_activation_in_place_before_the_sum_is_no_part_of_the_layer(images):
    """It gives back the very tensor that the batch norm gave."""
    batches, x = images
    model = residual("relu")
    inplace, plain = (without(residual(how), INNER, batches).model for how in ("relu_", "relu"))
    assert error(plain, model, x) < error(without(model, INNER, batches, repair="none").model, model, x)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(inplace.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


class ReadTwice(nn.Module):
    """The output that is added goes elsewhere, too."""

    def __init__(self, first):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.branch, self.head = nn.Conv2d(6, 6, 1), nn.Conv2d(12, 4, 1)
        self.first = first

    def forward(self, x):
        x = self.stem(x)
        out = self.conv2(self.conv1(x).relu())
        if self.first:
            branch = self.branch(out)
            return self.head(torch.cat([x + out, branch], 1))
        total = x + out
        return self.head(torch.cat([total, self.branch(out)], 1))


def duplicated(model, layer, copy_of, component):
    """With one component that says what another says."""
    module = model.get_submodule(layer)
    with torch.no_grad():
        module.weight[component] = module.weight[copy_of]
        module.bias[component] = module.bias[copy_of]
    return model


@pytest.mark.parametrize("first", [True, False], ids=["before the sum", "after it"])
def test_an_output_that_is_added_and_read_elsewhere(first, images, no_ridge):
    batches, x = images
    torch.manual_seed(0)
    model = duplicated(ReadTwice(first).eval(), "conv1", 0, 3)
    edit = without(model, {"conv1": [3]}, batches)
    assert error(without(model, {"conv1": [3]}, batches, repair="none").model, model, x) > 1e-2
    assert error(edit.model, model, x) < 1e-4


class Downsampled(nn.Module):
    """A block whose shortcut has a layer, which runs while the output that it is added to waits."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.conv2, self.down = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 1, stride=2)
        self.last, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.conv2(self.conv1(x).relu()) + self.down(x)).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


LATE = {
    "downsampled": (Downsampled, {"stem": [3], "conv1": [3], "last": [3]}),
    "read before the sum": (lambda: ReadTwice(True), {"conv1": [3]}),
    "read after it": (lambda: ReadTwice(False), {"conv1": [3]}),
}


@pytest.mark.parametrize("begin", range(6))
@pytest.mark.parametrize(("make", "gone"), LATE.values(), ids=LATE)
def test_samples_that_begin_late_find_the_first_layers_repaired(make, gone, begin, images, no_ridge, monkeypatch):
    """Wherever that is: from a layer on that runs before another is added, and between two fits of one as well."""
    batches, x = images
    torch.manual_seed(0)
    model = make().eval()
    for layer in gone:
        duplicated(model, layer, 0, 3)
    seen, add = {}, least_squares.Sums.add

    def counted(sums, positions, x, y):
        seen[positions.layer] = seen.get(positions.layer, 0) + 1
        add(sums, positions, x, y)

    def late(trace, layers, samples):
        return [set(trace.in_order(layers)[begin if part else 0 :]) for part in range(len(samples))]

    monkeypatch.setattr(calibration, "MAP", 1)
    monkeypatch.setattr(least_squares, "beginnings", late)
    monkeypatch.setattr(least_squares.Sums, "add", counted)
    edit = without(model, gone, batches)
    plain = error(without(model, gone, batches, repair="none").model, model, x)
    assert error(edit.model, model, x) < 0.01 * plain
    first, *_, last = seen.values()  # one that is read before it is added is fitted twice
    assert (first >= calibration.PARTS) is (begin == 0)
    assert (last >= calibration.PARTS) is (begin < len(seen))


def test_layers_that_read_small_maps_are_fitted_to_samples_that_large_ones_have_no_room_for(monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5)).eval()
    x = data(3, 8, 8)
    samples, largest = torch.cat(x)[: 20 * calibration.ROOMS], 6 * 8 * 8 * 4
    monkeypatch.setattr(calibration, "MEMORY", 20 * calibration.MAPS * largest)
    edit = without(model, {"3": [1, 6]}, x)
    with torch.no_grad():
        read, given = edit.model[:6](samples), model(samples) - model[6].bias
    sums = least_squares.Sums()
    sums.add(positions.Positions(model[6], None), read, given)
    kept = model[6].weight.detach().view(5, 8, 4)[:, [0, 2, 3, 4, 5, 7]].flatten(1).double()
    expected = least_squares.ridge_regression("prune", sums.fit(), kept, least_squares.RIDGE)
    torch.testing.assert_close(edit.model[6].weight.detach().double(), expected, rtol=1e-4, atol=1e-5)
    first = without(model, {"3": [1, 6]}, [samples[:20]])
    assert float((first.model[6].weight - edit.model[6].weight).detach().abs().max()) > 1e-2


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Preactivated(nn.Module):
    """What goes into the norm is also added as it is."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1, bias=False)
        self.norm, self.conv2, self.head = norm(6), nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.conv1(self.stem(x).relu())
        return self.head(x + self.conv2(self.norm(x).relu()))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, WithActivation])
def test_an_output_that_is_normed_and_added(norm, images, no_ridge):
    batches, x = images
    torch.manual_seed(0)
    model = duplicated(Preactivated(norm).eval(), "stem", 0, 3)
    with torch.no_grad():
        model.norm.weight.mul_(3)
        model.norm.bias.sub_(1)
    edit = without(model, {"stem": [3]}, batches)
    assert error(without(model, {"stem": [3]}, batches, repair="none").model, model, x) > 1e-2
    assert error(edit.model, model, x) < 1e-4
    assert "unrepaired" not in edit.recipe.settings


@pytest.mark.parametrize("how", ["x + out", "out += x", "hidden"])
def test_a_duplicate_in_a_block_is_repaired_exactly(how, images, no_ridge):
    batches, x = images
    model = residual(how)
    for block in ("blocks.0.conv1", "blocks.1.conv1"):
        duplicated(model, block, 0, 3)
    lowest = {"blocks.0.conv1": [3], "blocks.1.conv1": [3]}
    assert error(without(model, lowest, batches, repair="none").model, model, x) > 1e-2
    edited = without(model, lowest, batches).model
    with torch.no_grad():
        torch.testing.assert_close(edited(x), model(x), rtol=1e-4, atol=1e-4)


class Downsampling(nn.Module):
    """The shortcut convolution runs after the main branch, as in torchvision's residual networks."""

    def __init__(self, hidden=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1, bias=False)
        self.downsample = nn.Sequential(nn.Conv2d(6, 10, 1, stride=2, bias=False), nn.BatchNorm2d(10))
        self.hidden = hidden

    def forward(self, x):
        x = self.stem(x)
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        identity = self.downsample(x)
        if self.hidden:
            return torch.stack([out, identity]).sum(0)
        out += identity
        return out


def test_a_shortcut_convolution_makes_up_for_the_main_branch(images):
    batches, x = images
    errors = {}
    for hidden in (False, True):
        torch.manual_seed(1)
        model = statistics_of_use(Downsampling(hidden))
        edit = without(model, {"conv1": [0, 2, 5]}, batches)
        errors[hidden] = error(edit.model, model, x)
        plain = error(without(model, {"conv1": [0, 2, 5]}, batches, repair="none").model, model, x)
        weights = [net.downsample[0].weight.detach() for net in (edit.model, model)]
        moved = float((weights[0] - weights[1]).abs().max())
        # By itself the shortcut has nothing to make up for: what it reads is whole.
        assert moved < 1e-5 if hidden else moved > 1e-2
        assert errors[hidden] < plain
    assert errors[False] < 0.99 * errors[True]


def test_layers_before_the_first_removal_keep_their_weights(images):
    batches, _ = images
    model = residual("x + out")
    edit = without(model, {"blocks.1.conv1": [0, 5]}, batches)
    kept = [name for name in model.state_dict() if name.startswith(("stem", "blocks.0"))]
    assert len(kept) == 2 + 2 + 1 + 5
    for name in kept:
        assert torch.equal(edit.model.state_dict()[name], model.state_dict()[name])
    left = [1, 2, 3, 4, 6, 7]
    assert torch.equal(edit.model.blocks[1].conv1.weight, model.blocks[1].conv1.weight[left])
    assert not torch.equal(edit.model.blocks[1].conv2.weight, model.blocks[1].conv2.weight[:, left])
    assert not torch.equal(edit.model.head.weight, model.head.weight)


@pytest.mark.parametrize("how", ["out += x", "x + out"])
@pytest.mark.parametrize("repair", REPAIRS)
def test_the_recipe_of_a_block_repeats_and_undoes_it_bit_for_bit(how, repair, images, tmp_path):
    batches, _ = images
    model = residual(how)
    edit = without(model, INNER, batches, repair=repair)
    recipe = Recipe.load(edit.recipe.save(tmp_path / "recipe"))
    fresh = recipe.apply(residual(how))
    for name, tensor in edit.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor)
    for undone in (edit.recipe.undo(edit.model), fresh.recipe.undo(fresh.model)):
        for name, tensor in model.state_dict().items():
            assert torch.equal(undone.state_dict()[name], tensor)


def test_the_mean_repair_changes_biases_only(images):
    batches, x = images
    model = residual("x + out")
    plain, mean = (without(model, INNER, batches, repair=repair).model for repair in ("none", "mean"))
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(mean.state_dict()[name], tensor)}
    # The convolution inside the second block stays after the first removal, and so is repaired as well.
    inner = {"blocks.0.bn.running_mean", "blocks.1.bn.running_mean", "blocks.1.conv1.bias", "head.bias"}
    assert changed == inner
    with torch.no_grad():
        means = [(edited(x) - model(x)).mean((0, 2, 3)).abs().max() for edited in (mean, plain)]
    assert means[0] < 0.25 * means[1]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.again, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.one(x).relu()
        return self.head((self.again(x) * self.again(-x)).relu())


def test_a_layer_that_runs_twice_is_left_and_named():
    torch.manual_seed(0)
    model, batches = Twice().eval(), data(6)
    edit = without(model, {"one": [2, 5]}, batches)
    assert edit.recipe.settings["unrepaired"] == {"again": "it runs more than once per forward pass"}
    assert torch.equal(edit.model.again.weight, model.again.weight[:, [0, 1, 3, 4, 6, 7]])
    assert torch.equal(edit.model.again.bias, model.again.bias)
    assert not torch.equal(edit.model.head.weight, model.head.weight)


class Bare(nn.Module):
    """Uses a layer's weights without running it."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.bare, self.head = nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.one(self.stem(x).relu()).relu()
        return self.head(functional.linear(x, self.bare.weight, self.bare.bias).relu())


def test_weights_that_are_used_without_their_layer_are_repaired():
    """It is called where the model hands its weight to a function."""
    torch.manual_seed(0)
    model, batches = Bare().eval(), data(6)
    importances = importances_of(model, {"stem": [1], "one": [2, 5]})
    edit = prune(model, importances, threshold=0.5, example_inputs=batches[0][:2], data=batches)
    assert edit.recipe.components["stem"] == [1]
    assert edit.recipe.components["one"] == [2, 5]
    assert "unrepaired" not in edit.recipe.settings
    left = model.bare.weight[:, [0, 1, 3, 4, 6, 7]]
    assert edit.model.bare.weight.shape == left.shape
    assert not torch.equal(edit.model.bare.weight, left)
    assert not torch.equal(edit.model.head.weight, model.head.weight)


def test_data_that_can_be_read_only_once():
    torch.manual_seed(0)
    model, batches = Perceptron().eval(), data(6)
    scores = scores_of({"one": 8, "two": 7}, {"one": [], "two": []})
    options = {"ratio": 0.25, "example_inputs": batches[0][:2], "criterion": "reconstruction"}
    listed = prune(model, scores, data=batches, **options)
    once = prune(model, scores, data=(batch for batch in batches), **options)
    assert listed.recipe.settings["repair"] == once.recipe.settings["repair"] == "least_squares"
    assert listed.recipe.components == once.recipe.components
    for name, tensor in listed.model.state_dict().items():
        assert torch.equal(once.model.state_dict()[name], tensor)


class OfTwo(nn.Module):
    """Two inputs by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(16, 3)

    def forward(self, *, a, b):
        return self.head(torch.cat([self.one(a).relu(), self.two(b).relu()], 1))


def test_inputs_by_name(no_ridge):
    model = duplicated(duplicated(OfTwo().eval(), "one", 0, 3), "two", 1, 2)
    batches = [{"a": a, "b": b, "labels": torch.zeros(40)} for a, b in zip(data(6), data(4, seed=1), strict=True)]
    inputs = [{name: batch[name] for name in ("a", "b")} for batch in batches]
    lowest = {"one": [3], "two": [2]}
    x = {"a": data(6, batches=1, seed=7)[0], "b": data(4, batches=1, seed=8)[0]}
    edits = [
        prune(model, importances_of(model, lowest), threshold=0.5, example_inputs=inputs[0], data=given).model
        for given in (batches, inputs)
    ]
    with torch.no_grad():
        for edited in edits:
            torch.testing.assert_close(edited(**x), model(**x), rtol=1e-4, atol=1e-4)
    assert torch.equal(edits[0].head.weight, edits[1].head.weight)


def test_nothing_else_of_the_model_changes(images):
    batches, _ = images
    model = residual("out += x").train()
    model.blocks[0].eval()
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    edited = without(model, INNER, batches).model
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor)
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    for ours, theirs in zip(edited.modules(), model.modules(), strict=True):
        assert ours.training == theirs.training
        for module in (ours, theirs):
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    for (name, ours), theirs in zip(edited.named_parameters(), model.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad == (name != "stem.weight")
        assert ours.is_leaf
        assert ours.dtype == torch.float32
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight"}


@pytest.mark.parametrize("how", ["x + out", "out += x"])
def test_parts_give_what_one_batch_gives(how, images, monkeypatch):
    """Every position is looked at, so that both fit the same rows."""
    batches, x = images
    monkeypatch.setattr(positions, "LEAST_PER_UNKNOWN", 10**9)
    found = {}
    for parts in (1, 5):
        monkeypatch.setattr(calibration, "PARTS", parts)
        monkeypatch.setattr(calibration, "MAP", 1)
        assert len(calibration.calibrated("prune", ModelTrace(residual(how)), batches)[0]) == parts
        found[parts] = without(residual(how), INNER, batches).model
    for name, tensor in found[1].state_dict().items():
        torch.testing.assert_close(found[5].state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert error(found[5], residual(how), x) < 0.5 * error(
        without(residual(how), INNER, batches, repair="none").model, residual(how), x
    )


def test_of_two_outputs_that_are_added_the_later_one_is_known():
    """It is what a fit is for, also where a tensor gets an output once more."""
    tracker = least_squares.ActivationTracker(ModelTrace(nn.Identity()), {})
    first, later = torch.ones(1), torch.zeros(1)
    tracker._record("before", False, later, later)
    tracker._record("first", False, first, first)
    tracker._record("later", False, later, later)
    assert [output.layer for _, output in tracker.outputs.items()] == ["first", "later"]
    assert tracker.outputs.of(later).layer == "later"
    later.add_(1)
    assert tracker.outputs.of(later) is None


# ---- what does not help is taken back -------------------------------------------------------------------------------

EVERY_REPAIR = (*REPAIRS, "compensation")


def two_inputs(samples, sign, seed=0):
    """The first input is the second one, or its opposite."""
    x = 3 + torch.randn(samples, 1, generator=torch.Generator().manual_seed(seed))
    return torch.cat([sign * x, x], 1)


def of_two_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0.5], [0, -1]]))
    return model


def states_agree(model, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("repair", EVERY_REPAIR)
def test_a_repair_that_gives_more_error_on_other_samples_is_taken_back(repair, tmp_path):
    """What stays says all of the component that goes, on the samples of the fit; on others it says the opposite."""
    model = of_two_inputs()
    first = [two_inputs(512, 1), two_inputs(512, 1, seed=1)]
    options = {"threshold": 0.5, "example_inputs": first[0][:2], "repair": repair}
    importance = importances_of(model, {"0": [0]})
    edit = prune(model, importance, data=[*first, two_inputs(100, -1, seed=2)], **options)
    why = edit.recipe.settings["unrepaired"]["1"]
    assert why.endswith("times the squared error of none on 100 samples that were not used to make it")
    assert float(why.split()[3]) > 1.25
    plain = prune(model, importance, **{**options, "repair": "none"})
    assert torch.equal(edit.model[1].weight, plain.model[1].weight)
    assert torch.equal(edit.model[1].bias, plain.model[1].bias)
    assert not [operation for operation in edit.recipe.operations if operation.target in ("1.weight", "1.bias")][1:]
    recipe = Recipe.load(edit.recipe.save(tmp_path / "recipe"))
    assert states_agree(recipe.apply(model).model, edit.model)
    assert states_agree(edit.recipe.undo(edit.model), model)
    kept = prune(model, importance, data=[*first, two_inputs(100, 1, seed=2)], **options)
    assert "unrepaired" not in kept.recipe.settings
    assert not torch.equal(kept.model[1].bias, plain.model[1].bias)


@pytest.mark.parametrize("more", [0, 60])
def test_samples_of_the_fit_stay_the_same_where_there_are_others(more):
    first, behind = torch.arange(1024.0)[:, None], torch.arange(1024.0, 1024 + more)[:, None]
    model = nn.Linear(1, 1)
    data = [first[:1000], torch.cat([first[1000:], behind])]
    parts, _, further = calibration.calibrated("prune", ModelTrace(model), data, further=True)
    assert torch.equal(torch.cat(parts), first)
    fitted, held_out = calibration.kept_back("prune", parts, further)
    if more:
        assert torch.equal(torch.cat(fitted), first)
        assert torch.equal(held_out.inputs, behind)
    else:
        assert torch.equal(torch.cat(fitted), first[:896])
        assert torch.equal(held_out.inputs, first[896:])
    assert held_out.samples == (more or 128)


def test_a_single_sample_serves_both():
    model, x = of_two_inputs(), two_inputs(1, 1)
    edit = prune(model, importances_of(model, {"0": [0]}), threshold=0.5, example_inputs=x, data=[x])
    assert "unrepaired" not in edit.recipe.settings
    assert least_squares._named(calibration.kept_back("prune", [x], None)[1]) == "1 sample"


def test_samples_of_the_check_that_are_not_finite():
    model = of_two_inputs()
    data = [two_inputs(1024, 1), two_inputs(50, 1) * torch.nan]
    with pytest.raises(ValueError, match="prune: data must give finite feature maps, what '1' gives of 50 samples"):
        prune(model, importances_of(model, {"0": [0]}), threshold=0.5, example_inputs=data[0][:2], data=data)


@pytest.mark.parametrize("how", SUMS)
def test_what_aims_at_a_sum_is_judged_by_it(how, images, monkeypatch):
    """A layer whose fit went wrong is put back, also where its output is added in place, and others are not."""
    batches, x = images
    model = residual(how)
    shift = least_squares.Repairs.shift

    def spoiled(self, name, *rest):
        shift(self, name, *rest)
        if name == "blocks.0.conv2":
            self.set(name, f"{name}.weight", 3 * self.tensor(f"{name}.weight"))

    plain = without(model, INNER, batches, repair="none").model
    monkeypatch.setattr(least_squares.Repairs, "shift", spoiled)
    edit = without(model, INNER, batches)
    assert next(iter(edit.recipe.settings["unrepaired"])) == "blocks.0.conv2"
    assert torch.equal(edit.model.blocks[0].conv2.weight, plain.blocks[0].conv2.weight)
    assert torch.equal(edit.model.blocks[0].bn.running_mean, plain.blocks[0].bn.running_mean)
    assert not torch.equal(edit.model.head.weight, plain.head.weight) or "head" in edit.recipe.settings["unrepaired"]
    assert error(edit.model, model, x) <= error(plain, model, x)
    assert states_agree(edit.recipe.undo(edit.model), model)


@pytest.mark.parametrize("first", [True, False], ids=["before the sum", "after it"])
def test_a_shared_output_that_is_put_back(first, images, monkeypatch):
    batches, _ = images
    torch.manual_seed(0)
    model = ReadTwice(first).eval()
    shift = least_squares.Repairs.shift

    def spoiled(self, name, *rest):
        shift(self, name, *rest)
        if name == "conv2":
            self.set(name, "conv2.weight", 3 * self.tensor("conv2.weight"))

    monkeypatch.setattr(least_squares.Repairs, "shift", spoiled)
    edit = without(model, {"conv1": [3]}, batches)
    assert "conv2" in edit.recipe.settings["unrepaired"]
    assert torch.equal(edit.model.conv2.bias, model.conv2.bias)


def test_layers_that_do_not_help_together_give_a_warning(monkeypatch):
    model = of_two_inputs()
    monkeypatch.setattr(sys.modules["discedit.editing.prune"], "take_back", lambda *_, **__: None)
    data = [two_inputs(1024, 1), two_inputs(100, -1)]
    with pytest.warns(UserWarning, match="prune: the repair brings the network's outputs no closer .* on 100 samples"):
        prune(model, importances_of(model, {"0": [0]}), threshold=0.5, example_inputs=data[0][:2], data=data)


def test_what_rounding_alone_explains_is_no_error():
    """A bias cancels nearly all of what the products add up to."""
    model = Perceptron().eval()
    with torch.no_grad():
        model.one.weight[3], model.one.bias[3] = 0.0, 1.0
        model.one.bias[[2, 5]], model.one.weight[[2, 5]] = 0.0, 0.0  # whose removal changes nothing
        model.two.weight[:, 3], model.two.bias[:] = 3e4, -3e4
    scores = scores_of({"one": 8}, {"one": [2, 5]})
    batches = data(6)
    options = {"ratio": 0.25, "example_inputs": batches[0], "layers": ["one"], "criterion": "max"}
    edit = prune(model, scores, data=batches, repair="least_squares", **options)
    assert "unrepaired" not in edit.recipe.settings


@pytest.mark.parametrize("repair", ["least_squares", "mean", "compensation"])
def test_a_depthwise_convolution_with_one_channel_left_is_still_one(repair):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    x = torch.randn(64, 3, 6, 6)
    edit = prune(net, example_inputs=x[:2], data=[x], ratio={"0": 0.99}, repair=repair)
    assert edit.model[3].weight.shape == (1, 1, 3, 3)
    kept = next(i for i in range(8) if i not in edit.recipe.components["0"])
    assert torch.equal(edit.model[3].weight[0], net[3].weight[kept])
