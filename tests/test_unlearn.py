import copy
import functools
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import all_pairs, unlearn_with
from torch import nn
from torch.nn import functional

import discedit
from discedit import (
    AblateComponents,
    EraseDirections,
    ModHiFiU,
    Moments,
    Recipe,
    TopFraction,
    collect_moments,
    score,
    unlearn,
    zoo,
)
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.model.trace import ModelTrace
from discedit.moments.forget_retain import MEANS


def test_forgets_the_class_and_keeps_the_rest(trained, digit_scores):
    model, _, test = trained
    loader = zoo.batches(test)
    before = accuracy_per_class(model, loader, 10)
    for cls in (0, 3, 6):
        after = accuracy_per_class(unlearn_with(model, digit_scores, classes=[cls], fraction=0.15).model, loader, 10)
        kept = [k for k in range(10) if k != cls]
        assert after[cls] < 0.5
        assert after[kept].mean() > before[kept].mean() - 0.05


@pytest.mark.data
def test_forgets_on_real_images(cifar, cifar_scores):
    model, _, test = cifar
    loader = zoo.batches(test)
    before = accuracy_per_class(model, loader, 10)
    after = accuracy_per_class(unlearn_with(model, cifar_scores, classes=[1]).model, loader, 10)
    kept = [k for k in range(10) if k != 1]
    assert after[1] < 0.3 < 0.9 < before[1]
    assert after[kept].mean() > before[kept].mean() - 0.08


def test_takes_the_highest_of_all_layers_together(trained, digit_scores):
    model, _, _ = trained
    edit = unlearn_with(model, digit_scores, classes=[4], fraction=0.1, layers=list(digit_scores))
    chosen = {(layer, channel) for layer, channels in edit.recipe.components.items() for channel in channels}
    ranked = sorted(
        ((float(values[c, 4]), (layer, c)) for layer, values in digit_scores.items() for c in range(len(values))
         if digit_scores.direction[layer][c, 4] > 0),
        reverse=True,
    )  # fmt: skip
    assert chosen == {place for _, place in ranked[:22]}  # 10 % of 224 components


def test_default_layers_are_the_last_third(trained, digit_scores):
    edit = unlearn_with(trained[0], digit_scores, classes=[4])
    assert edit.recipe.settings["layers"] == ["conv3", "fc1"]


def test_zeroed_components_are_silent(trained, digit_scores):
    """What was zeroed gives exactly 0 behind its norm, for every input; nothing else changed."""
    model, train, _ = trained
    edit = unlearn_with(model, digit_scores, classes=[2, 5], fraction=0.1, sign="any", layers=["conv2", "fc1"])
    x = train.tensors[0][:50]
    outputs = {}
    edit.model.bn2.register_forward_hook(lambda *args: outputs.__setitem__("conv2", args[2]))
    edit.model.fc1.register_forward_hook(lambda *args: outputs.__setitem__("fc1", args[2]))
    with torch.no_grad():
        edit.model(x)
    for layer, channels in edit.recipe.components.items():
        assert not outputs[layer][:, channels].any()
    before, after = model.state_dict(), edit.model.state_dict()
    for name in before:
        owner, _, _ = name.rpartition(".")
        layer = {"bn2": "conv2"}.get(owner, owner)
        gone = edit.recipe.components.get(layer, [])
        if before[name].ndim and owner in ("conv2", "bn2", "fc1"):
            kept = [i for i in range(len(before[name])) if i not in gone]
            assert torch.equal(before[name][kept], after[name][kept])
        else:
            assert torch.equal(before[name], after[name])


def test_norm_without_weights_and_transposed_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(600, 3)
    )
    x = torch.randn(60, 2, 8, 8)
    model.train()(x)
    model.eval()
    scores = score(collect_moments(model, [(x, torch.arange(60) % 3)], 3))
    edit = unlearn_with(model, scores, classes=[0], fraction=0.5, sign="any")
    channels = edit.recipe.components["0"]
    with torch.no_grad():
        silent = edit.model[1](edit.model[0](x))
    assert len(channels) == 3
    assert not silent[:, channels].any()
    assert all(silent[:, c].any() for c in range(6) if c not in channels)


def test_the_callers_model_is_untouched_unless_inplace(trained, digit_scores):
    mine = copy.deepcopy(trained[0])
    edit = unlearn_with(mine, digit_scores, classes=[1])
    assert torch.equal(mine.fc1.weight, trained[0].fc1.weight)
    parameters = [id(p) for p in mine.parameters()]
    inplace = unlearn_with(mine, digit_scores, classes=[1], inplace=True)
    assert inplace.model is mine
    assert [id(p) for p in mine.parameters()] == parameters, "an optimizer must keep its parameters"
    for a, b in zip(mine.state_dict().values(), edit.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_several_classes_get_their_own_components(trained, digit_scores):
    both = unlearn_with(trained[0], digit_scores, classes=[2, 7]).recipe.components
    for cls in (2, 7):
        for layer, channels in unlearn_with(trained[0], digit_scores, classes=[cls]).recipe.components.items():
            assert set(channels) <= set(both[layer])


def test_classes_may_be_any_kind_of_index(trained, digit_scores):
    plain = unlearn_with(trained[0], digit_scores, classes=[2, 7]).recipe
    for classes in (np.array([2, 7]), torch.tensor([2, 7]), (2, 7, 2), range(2, 8, 5)):
        other = unlearn_with(trained[0], digit_scores, classes=classes).recipe
        assert other.components == plain.components
        assert other.settings == plain.settings


def test_summary(trained, digit_scores):
    text = unlearn_with(trained[0], digit_scores, classes=[1]).summary()
    assert "ablated" in text
    assert "of 64" in text
    assert "parameters: 60,714 -> 60,714" in text


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([10], r"classes must be indices in 0..9, got 10"),
        ([-1], r"classes must be indices in 0..9, got -1"),
        ([1.0], r"classes must be indices in 0..9, got 1.0"),
        ([True], r"classes must be indices in 0..9, got True"),
        ([], "classes must name at least one class, it is empty"),
        (3, "classes must be a list of class indices, or a predicate on them, got 3"),
        ("3", "classes must be a list of class indices, or a predicate on them, got .3."),
    ],
)
def test_bad_classes(trained, digit_scores, classes, message):
    with pytest.raises(ValueError, match=f"unlearn: {message}"):
        unlearn_with(trained[0], digit_scores, classes=classes)


def test_bad_input(trained, digit_scores):
    model = trained[0]
    for fraction in (0, 1, -0.1, float("nan"), "0.1"):
        with pytest.raises(ValueError, match=r"fraction must be a number in \(0, 1\), got"):
            unlearn_with(model, digit_scores, classes=[1], fraction=fraction)
    with pytest.raises(ValueError, match="sign must be one of 'up', 'any', got 'down'"):
        unlearn_with(model, digit_scores, classes=[1], sign="down")
    with pytest.raises(ValueError, match="layers must name layers that scores holds, 'fc9'"):
        unlearn_with(model, digit_scores, classes=[1], layers=["fc9"])
    with pytest.raises(ValueError, match="layers must name at least one layer that can be edited, it is empty"):
        unlearn_with(model, digit_scores, classes=[1], layers=[])


def test_a_class_without_samples_cannot_be_forgotten(trained):
    model, train, _ = trained
    x, y = train.tensors
    with pytest.warns(UserWarning, match=r"classes without samples: \[4\]"):
        scores = score(collect_moments(model, [(x[y != 4], y[y != 4])], 10))
    with pytest.raises(ValueError, match="class 4 has no sample in scores"):
        unlearn_with(model, scores, classes=[4])
    unlearn_with(model, scores, classes=[3])


def test_nothing_to_zero_is_an_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    moments = Moments(2)
    moments.update("0", torch.ones(10, 3), torch.arange(10) % 2)
    with pytest.raises(
        ValueError, match="no component of the chosen layers more active .* tells class 0 from the rest"
    ):
        unlearn_with(model, score(moments), classes=[0])


def output_of(model, place, x):
    """What a module gives, in eval mode; channels first."""
    seen = []
    handle = model.get_submodule(place).register_forward_hook(lambda *args: seen.append(args[2].detach().clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


class ChannelsFirst(nn.LayerNorm):
    """The layer norm of ConvNext: over the channels of (samples, channels, height, width)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# What is edited, what stands behind it, what gives the classifier its input. Maps are as wide as they have channels.
FRONTS = {
    "convolution and batch norm": lambda: (nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
    "convolution with bias and batch norm": lambda: (nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)),
    "convolution": lambda: (nn.Conv2d(1, 6, 3, padding=1), None),
    "transposed convolution": lambda: (nn.ConvTranspose2d(1, 6, 3, padding=1), None),
    "convolution and layer norm": lambda: (nn.Conv2d(1, 6, 3, padding=1), ChannelsFirst(6)),
    "linear": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(36, 6)), None),
    "linear, several positions": lambda: (nn.Linear(6, 6), None),
    "linear and batch norm": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(36, 6, bias=False)), nn.BatchNorm1d(6)),
    "convolution and batch norm without weights": lambda: (
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False),
    ),
}  # fmt: skip


@functools.cache
def small(name):
    """(network, scores, edited layer, place behind its norm, labelled images, others), in float64."""
    torch.manual_seed(0)
    layer, norm = FRONTS[name]()
    parts = [layer, *([] if norm is None else [norm]), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)]
    model = nn.Sequential(*parts).double()
    labels = torch.arange(420) % 3
    x = torch.randn(420, 1, 6, 6).double() + labels[:, None, None, None] * torch.linspace(-1, 1, 36).view(6, 6)
    model.train()(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.train()(x)
    model.eval()
    edited = next(n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)))
    if name == "linear, several positions":  # not scored as maps: hand-made
        moments = Moments(3)
        moments.update(edited, output_of(model, edited, x).flatten(1, 2).mean(1), labels)
    else:
        moments = collect_moments(model, [(x, labels)], 3)
    fresh = torch.randn(30, 1, 6, 6, generator=torch.Generator().manual_seed(5)).double()
    return model, score(moments), edited, edited if norm is None else "1", (x, labels), fresh


def batched(x, labels, size=100):
    return [(x[i : i + size], labels[i : i + size]) for i in range(0, len(x), size)]


WITH_BIAS = [name for name in FRONTS if not name.endswith("without weights")]
CASES = all_pairs(WITH_BIAS, (0, 0.5, -1), ("zero", "mean"))
CASES += [("convolution and batch norm without weights", factor, "zero") for factor in (0, 0.5, -1)]


@pytest.mark.parametrize(("name", "factor", "around"), CASES)
def test_factor_around_a_mean(name, factor, around):
    """m + factor (y - m) behind the norm; m over the first 256 samples that stay, whatever the batches are."""
    model, scores, layer, place, (x, labels), fresh = small(name)
    data = batched(x, labels)
    edit = unlearn_with(
        model, scores, classes=[2], factor=factor, around=around, data=data, layers=[layer], top=2, sign="any"
    )
    rows = edit.recipe.components[layer]
    assert len(rows) == 2
    axis = -1 if name.startswith("linear") else 1
    y, found = (output_of(net, place, fresh).movedim(axis, -1) for net in (model, edit.model))
    assert MEANS == 256
    retained = output_of(model, place, x[labels != 2][:MEANS]).movedim(axis, -1)
    assert int((labels != 2).sum()) > MEANS
    m = retained.flatten(0, -2).mean(0) if around == "mean" else torch.zeros(6).double()
    due = m[rows] + factor * (y[..., rows] - m[rows])
    torch.testing.assert_close(found[..., rows], due, rtol=1e-9, atol=1e-11)
    others = [row for row in range(6) if row not in rows]
    if name != "convolution and layer norm" or factor:  # zeros in the layer change what its norm makes of the rest
        torch.testing.assert_close(found[..., others], y[..., others], rtol=0, atol=0)
    assert edit.recipe.settings["scale"] == factor
    assert edit.recipe.settings["around"] == around
    restored = edit.recipe.undo(edit.model)
    assert all(
        torch.equal(a, b) for a, b in zip(restored.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", FRONTS)
def test_around_auto(name):
    model, scores, layer, _, data, _ = small(name)
    options = {"classes": [2], "layers": [layer], "top": 1, "sign": "any"}

    def around(**more):
        return unlearn_with(model, scores, **options, **more).recipe

    assert around().settings["around"] == "zero"
    can = name in WITH_BIAS
    found = around(data=[data])
    assert found.settings["around"] == ("mean" if can else "zero")
    assert ("add" in {operation.kind for operation in found.operations}) == can
    assert around(data=[data], around="zero").settings["around"] == "zero"


def test_around_auto_needs_a_bias_in_every_layer(trained, digit_scores):
    model, train, _ = trained
    data = zoo.batches(train)
    options = {"classes": [1], "top": 1, "data": data}
    assert unlearn_with(model, digit_scores, **options).recipe.settings["around"] == "mean"
    one = copy.deepcopy(model)
    one.fc1.bias = None
    edit = unlearn_with(one, digit_scores, **options)
    assert edit.recipe.settings["layers"] == ["conv3", "fc1"]
    assert edit.recipe.settings["around"] == "zero"
    assert unlearn_with(one, digit_scores, **options, layers=["conv3"]).recipe.settings["around"] == "mean"
    with pytest.raises(
        ValueError, match="unlearn: around='mean' needs a bias that can carry the mean, that of layer 'fc1' is None"
    ):
        unlearn_with(one, digit_scores, **options, around="mean")
    model, scores, layer, *_, (x, labels), _ = small("convolution and batch norm without weights")
    with pytest.raises(ValueError, match="around='mean' needs a bias .* layer '0' with its norm '1' is None"):
        unlearn_with(model, scores, classes=[2], layers=[layer], data=[(x, labels)], around="mean", sign="any")


def test_the_default_size_depends_on_what_is_given(trained, digit_scores):
    model, train, _ = trained
    data = zoo.batches(train)
    for options, fraction in (
        ({}, 0.06),
        ({"data": data, "repair": "mean"}, 0.06),
        ({"data": data, "repair": "least_squares"}, 0.08),
    ):
        edit = unlearn_with(model, digit_scores, classes=[1], **options)
        assert edit.recipe.settings["fraction"] == fraction
        assert sum(map(len, edit.recipe.components.values())) == int(fraction * 128)
    options = {"classes": [1], "data": data, "around": "zero"}
    by_default, asked = (
        unlearn_with(model, digit_scores, **options, **more) for more in ({}, {"forget_accuracy": 0.05})
    )
    assert by_default.recipe.settings == asked.recipe.settings
    assert by_default.recipe.components == asked.recipe.components
    assert by_default.recipe.settings["targets"]["forget_accuracy"]["asked"] == 0.05


def test_zero_where_no_mean_meets_a_target(trained, digit_scores):
    model, train, _ = trained
    options = {"classes": [3], "data": zoo.batches(train), "components": "rows", "forget_accuracy": 0.05}
    auto, zero = (unlearn_with(model, digit_scores, around=around, **options) for around in ("auto", "zero"))
    assert auto.recipe.settings == zero.recipe.settings
    assert auto.recipe.settings["targets"]["forget_accuracy"]["met"]
    assert auto.recipe.components == zero.recipe.components
    with pytest.warns(UserWarning, match="none meets the targets") as seen:
        mean = unlearn_with(model, digit_scores, around="mean", **options)
    assert mean.recipe.settings["around"] == "mean"
    assert [warning.filename for warning in seen] == [unlearn_with.__code__.co_filename]


def loss(model, x, y):
    with torch.no_grad():
        return float(functional.cross_entropy(model(x), y))


@pytest.fixture(scope="module")
def repaired(trained, digit_scores):
    """Class 3, in the middle of the network, by repair and protection; and the test images, that class and others."""
    model, train, test = trained
    options = {"classes": [3], "fraction": 0.12, "layers": ["conv2", "conv3"], "data": zoo.batches(train)}
    edits = {kind: unlearn_with(model, digit_scores, repair=kind, **options) for kind in ("none", "mean")}
    for protection in (0, 1, 1e6):
        edits[protection] = unlearn_with(model, digit_scores, repair="least_squares", protection=protection, **options)
    x, y = test.tensors
    return edits, x[y == 3], (x[y != 3], y[y != 3])


def test_repair_keeps_what_is_silenced_silent(repaired, trained):
    """Every edited row gives its mean for whatever image, also of a layer that is repaired; the head stays."""
    edits, x, _ = repaired
    components = edits["none"].recipe.components
    assert components.keys() == {"conv2", "conv3"}
    for kind in ("mean", 0, 1, 1e6):
        edit = edits[kind]
        assert edit.recipe.components == components
        written = {operation.target for operation in edit.recipe.operations if operation.kind == "set"}
        assert {name.rpartition(".")[0] for name in written} == (
            {"bn3", "fc1"} if kind == "mean" else {"conv3", "bn3", "fc1"}
        )
        assert torch.equal(edit.model.fc2.weight, trained[0].fc2.weight)
        assert torch.equal(edit.model.fc2.bias, trained[0].fc2.bias)
        for layer, norm in (("conv2", "bn2"), ("conv3", "bn3")):
            rows = components[layer]
            given = output_of(edit.model, norm, x)[:, rows]
            bias = edits["none"].model.get_submodule(norm).bias[rows].detach()
            torch.testing.assert_close(given, bias[None, :, None, None].expand_as(given), rtol=0, atol=0)
        assert not edit.model.conv3.weight[components["conv3"]].any()


@pytest.mark.parametrize("kind", ["mean", "least_squares"])
def test_a_repaired_layer_keeps_the_biases_of_what_is_silenced(kind, trained, digit_scores):
    model, train, test = trained
    options = {"classes": [3], "layers": ["conv3", "fc1"], "top": 8, "data": zoo.batches(train)}
    plain, edit = (unlearn_with(model, digit_scores, repair=repair, **options) for repair in ("none", kind))
    rows = edit.recipe.components["fc1"]
    given = output_of(edit.model, "fc1", test.tensors[0])
    assert torch.equal(given[:, rows], plain.model.fc1.bias[rows].detach().expand(len(given), -1))
    others = [row for row in range(64) if row not in rows]
    assert not torch.equal(edit.model.fc1.bias[others], plain.model.fc1.bias[others])


def test_repair_and_protection(repaired):
    edits, forget, retain = repaired
    losses = {kind: loss(edit.model, *retain) for kind, edit in edits.items()}
    assert losses[1] < losses["mean"] < losses["none"]
    assert losses[0] < losses["none"]

    def recognised(kind):
        with torch.no_grad():
            return float((edits[kind].model(forget).argmax(1) == 3).float().mean())

    assert recognised(0) > recognised(1) + 0.2
    assert recognised(0) > recognised(1e6) + 0.2
    assert abs(recognised(1) - recognised(1e6)) < 0.2
    features = {kind: functional.relu(output_of(edit.model, "fc1", forget)) for kind, edit in edits.items()}
    # The weights are left as they are, which leaves the biases: the repair "mean".
    assert (features[1e6] - features["mean"]).norm() < 1e-3 * (features[0] - features["mean"]).norm()
    to_unrepaired = {kind: float((features[kind] - features["none"]).norm()) for kind in (0, 1, 1e6)}
    assert to_unrepaired[1e6] <= to_unrepaired[1] < 0.8 * to_unrepaired[0]


def test_repair_settings(repaired):
    edits, _, _ = repaired
    assert [edits[kind].recipe.settings["repair"] for kind in ("none", "mean", 0)] == ["none", "mean", "least_squares"]
    assert [edits[kind].recipe.settings.get("protection") for kind in ("none", "mean", 0, 1)] == [None, None, 0.0, 1.0]


def test_repair_names_what_it_cannot_repair(trained, digit_scores):
    model = copy.deepcopy(trained[0])
    model.fc1.bias = None
    edit = unlearn_with(
        model, digit_scores, classes=[3], layers=["conv3"], top=2, data=zoo.batches(trained[1]), repair="least_squares"
    )
    assert edit.recipe.settings["unrepaired"] == {
        "fc1": "it has neither a bias nor a batch norm behind it that could take one"
    }


def accuracies(model, data, forget):
    found = accuracy_per_class(model, data, 10)
    return float(found[forget].mean()), float(found[[k for k in range(10) if k not in forget]].mean())


TARGET = {"layers": ["conv3", "fc1"], "around": "zero"}
SIZES = 128


def looked_at(data, forget):
    """The first samples of each class to forget, 128 together."""
    x, y = data.tensors
    left = [(y == cls).nonzero()[: -(-128 // len(forget)), 0] for cls in forget]
    return [(x[index], y[index]) for index in left]


@pytest.mark.parametrize("forget", [[3], [1, 6]])
def test_target_of_forgetting_is_met_by_the_smallest_edit(forget, trained, digit_scores):
    model, train, _ = trained
    data = zoo.batches(train)
    edit = unlearn_with(model, digit_scores, classes=forget, data=data, forget_accuracy=0.5, **TARGET)
    settings = edit.recipe.settings
    count = settings["count"]
    few = looked_at(train, forget)
    reached = float(accuracy_per_class(edit.model, few, 10)[forget].mean())
    assert settings["targets"] == {"forget_accuracy": {"asked": 0.5, "reached": pytest.approx(reached), "met": True}}
    assert reached <= 0.5
    if len(forget) == 1:
        assert sum(map(len, edit.recipe.components.values())) == count
    assert 1 < count < 0.2 * SIZES
    assert settings["tried"][str(count)] == round(reached, 4)
    same, fewer = (
        unlearn_with(model, digit_scores, classes=forget, data=data, fraction=(number + 0.5) / SIZES, **TARGET)
        for number in (count, count - 1)
    )
    assert same.recipe.components == edit.recipe.components
    assert float(accuracy_per_class(fewer.model, few, 10)[forget].mean()) > 0.5
    assert not {"fraction", "top"} & settings.keys()


def test_target_of_what_the_others_lose(trained, digit_scores):
    """Alone, it asks for the largest edit: one that is hardly larger loses more."""
    model, train, _ = trained
    data = zoo.batches(train)
    options = {"classes": [0], "data": data, **TARGET}
    _, before = accuracies(model, data, [0])

    def drop(edit):
        return before - accuracies(edit.model, data, [0])[1]

    everything = unlearn_with(model, digit_scores, retain_drop=1, **options)
    settings = everything.recipe.settings
    up = sum(int((digit_scores.direction[layer][:, 0] > 0).sum()) for layer in TARGET["layers"])
    assert settings["count"] == max(map(int, settings["tried"])) == min(up, SIZES // 2)
    assert drop(everything) > 0
    asked = drop(everything) / 2
    edit = unlearn_with(model, digit_scores, retain_drop=asked, **options)
    settings = edit.recipe.settings
    assert settings["targets"] == {"retain_drop": {"asked": asked, "reached": pytest.approx(drop(edit)), "met": True}}
    assert drop(edit) <= asked
    count = settings["count"]
    beyond = min(int(number) for number in settings["tried"] if int(number) > count)
    assert beyond - count <= max(1, 0.04 * beyond)
    assert drop(unlearn_with(model, digit_scores, fraction=(beyond + 0.5) / SIZES, **options)) > asked


def test_both_targets(trained, digit_scores):
    """The edit of the one; of the other it is said whether it is met."""
    model, train, _ = trained
    data = zoo.batches(train)
    options = {"classes": [3], "data": data, "layers": ["conv1"], "around": "zero", "forget_accuracy": 0.3}
    alone = unlearn_with(model, digit_scores, **options)
    both = unlearn_with(model, digit_scores, retain_drop=1, **options)
    assert both.recipe.components == alone.recipe.components
    targets = both.recipe.settings["targets"]
    assert {name: target["met"] for name, target in targets.items()} == {"forget_accuracy": True, "retain_drop": True}
    drop = targets["retain_drop"]["reached"]
    assert drop == pytest.approx(accuracies(model, data, [3])[1] - accuracies(both.model, data, [3])[1])
    assert drop > 0
    with pytest.warns(
        UserWarning,
        match=rf"unlearn: of \d+ edits .* none meets the targets: retain_drop is {drop:.4f}, which misses the target "
        rf"0 by {drop:.4f}\.",
    ):
        missed = unlearn_with(model, digit_scores, retain_drop=0, **options)
    assert missed.recipe.components == alone.recipe.components
    assert missed.recipe.settings["targets"]["retain_drop"] == {"asked": 0.0, "reached": drop, "met": False}


def test_a_target_that_cannot_be_reached(trained, digit_scores):
    """Of one layer not more than half of its components go, and around the mean that is not enough."""
    model, train, _ = trained
    with pytest.warns(UserWarning, match="none meets the targets") as seen:
        edit = unlearn_with(
            model, digit_scores, classes=[3], data=zoo.batches(train), forget_accuracy=0, layers=["fc1"], around="mean"
        )
    (warning,) = seen
    assert warning.filename == unlearn_with.__code__.co_filename
    settings = edit.recipe.settings
    target = settings["targets"]["forget_accuracy"]
    reached = target["reached"]
    few = looked_at(train, [3])
    assert target == {"asked": 0.0, "reached": reached, "met": False}
    assert reached == float(accuracy_per_class(edit.model, few, 10)[3]) > 0
    tried = {int(count): accuracy for count, accuracy in settings["tried"].items()}
    assert max(tried) <= 32
    assert str(warning.message) == (
        f"unlearn: of {len(tried)} edits of up to {max(tried)} components per class none meets the targets: "
        f"forget_accuracy is {reached:.4f}, which misses the target 0 by {reached:.4f}."
    )
    assert round(reached, 4) == min(tried.values()) == tried[settings["count"]]


def test_a_target_with_a_single_component():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    x, labels = torch.randn(40, 2), torch.arange(40) % 2
    x += 2 * labels[:, None]
    scores = score(collect_moments(model, [(x, labels)], 2, layers=["0"]))
    options = {"sign": "any", "data": [(x, labels)], "repair": "least_squares", "retain_drop": 1, "layers": ["0"]}
    with pytest.warns(UserWarning, match="only the head is behind '0'"):
        edit = unlearn_with(model, scores, classes=[1], **options)
    assert edit.recipe.components == {"0": [0]}


def test_targets_with_repair(trained, digit_scores):
    model, train, _ = trained
    data = zoo.batches(train)
    edit = unlearn_with(
        model, digit_scores, classes=[3], data=data, forget_accuracy=0.6, repair="least_squares", **TARGET
    )
    assert edit.recipe.settings["targets"]["forget_accuracy"]["met"]
    assert accuracies(edit.model, data, [3])[0] <= 0.6


def state_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_removing_what_is_zeroed(trained, digit_scores, tmp_path):
    model, train, test = trained
    x = test.tensors[0]
    before = copy.deepcopy(model)
    options = {"classes": [2, 5], "fraction": 0.15, "sign": "any", "layers": ["conv2", "conv3", "fc1"]}
    zeroed = unlearn_with(model, digit_scores, **options)
    assert len(zeroed.recipe.components) == 3
    removed = unlearn_with(model, digit_scores, remove=True, example_inputs=x[:2], **options)
    with torch.no_grad():
        torch.testing.assert_close(removed.model(x), zeroed.model(x), rtol=1e-4, atol=1e-4)
    assert removed.recipe.components == zeroed.recipe.components
    assert removed.recipe.settings["removed"] == {n: len(rows) for n, rows in zeroed.recipe.components.items()}
    assert removed.skipped == {}
    assert removed.widths == zeroed.widths
    assert removed.recipe.settings["around"] == "zero"
    assert removed.parameters_before == zeroed.parameters_after == sum(p.numel() for p in model.parameters())
    assert removed.parameters_after == sum(p.numel() for p in removed.model.parameters()) < removed.parameters_before
    for layer, rows in zeroed.recipe.components.items():
        assert len(removed.model.get_submodule(layer).weight) == 64 - len(rows)
    assert state_equal(removed.recipe.undo(removed.model), before)
    assert state_equal(model, before)
    torch.manual_seed(3)
    fresh = zoo.DigitsNet().eval()
    loaded = Recipe.load(removed.recipe.save(tmp_path / "removed")).apply(fresh)
    assert str(loaded.model) == str(removed.model)
    assert state_equal(loaded.recipe.undo(loaded.model), fresh)
    mine = copy.deepcopy(model)
    inplace = unlearn_with(mine, digit_scores, remove=True, example_inputs=x[:2], inplace=True, **options)
    assert inplace.model is mine
    assert str(mine) == str(removed.model)
    assert state_equal(mine, removed.model)
    assert inplace.widths == removed.widths
    inplace.recipe.undo(mine, inplace=True)
    assert state_equal(mine, before)
    data = zoo.batches(train)
    repaired = unlearn_with(
        model, digit_scores, remove=True, example_inputs=x[:2], data=data, repair="least_squares", **options
    )
    whole = unlearn_with(model, digit_scores, around="zero", data=data, repair="least_squares", **options)
    with torch.no_grad():
        torch.testing.assert_close(repaired.model(x), whole.model(x), rtol=1e-3, atol=1e-3)
    assert state_equal(repaired.recipe.undo(repaired.model), before)


class Residual(nn.Module):
    """Only `inner` can lose filters: `first` and `out` are added."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.inner, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 1)
        self.activation, self.head = activation, nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        return self.head((x + self.out(self.activation(self.inner(x)))).mean((2, 3)))


def test_what_cannot_be_removed_stays_zeroed_or_is_refused():
    torch.manual_seed(0)
    x, labels = torch.randn(60, 1, 5, 5), torch.arange(60) % 2
    x += labels[:, None, None, None]
    model = Residual(nn.ReLU()).eval()
    scores = score(collect_moments(model, [(x, labels)], 2))
    options = {"classes": [1], "top": 2, "sign": "any", "remove": True, "example_inputs": x[:2]}
    edit = unlearn_with(model, scores, layers=["inner", "out"], **options)
    assert edit.recipe.settings["removed"] == {"inner": 2}
    assert edit.skipped.keys() == {"out"}
    assert edit.skipped["out"].startswith("zeroed, not removed: it shares its channels with first")
    assert edit.model.inner.out_channels == 3
    assert edit.model.out.out_channels == 4
    # Zeroed all the same, with the rows of the model before.
    assert not output_of(edit.model, "out", x)[:, edit.recipe.components["out"]].any()
    assert state_equal(edit.recipe.undo(edit.model), model)
    for layers, more in ((["out"], {}), (["inner"], {"top": 5})):
        with pytest.raises(
            ValueError,
            match=rf"unlearn: remove must find a zeroed component that can be removed \({layers[0]}: "
            r"(it shares its channels with first|all its components are zeroed, and one must stay)",
        ):
            unlearn_with(model, scores, layers=layers, **{**options, **more})
    sigmoid = Residual(nn.Sigmoid()).eval()
    before = copy.deepcopy(sigmoid)
    scores = score(collect_moments(sigmoid, [(x, labels)], 2))
    with pytest.raises(ValueError, match="unlearn: remove must not change what the zeroed model gives; .* not 0 at 0"):
        unlearn_with(sigmoid, scores, layers=["inner"], inplace=True, **options)
    assert state_equal(sigmoid, before)


KINDS = {
    "zeroed": {},
    "attenuated": {"factor": 0.5},
    "negated": {"factor": -1},
    "mean": {"data": True, "top": 3},
    "negated around the mean": {"data": True, "factor": -1, "around": "mean", "top": 3},
    "biases": {"data": True, "repair": "mean"},
    "least squares": {"data": True, "repair": "least_squares", "layers": ["conv2", "fc1"]},
    "target": {"data": True, "around": "zero", "forget_accuracy": 0.7},
    "modhifi": {"data": True, "method": "modhifi"},
    "contrast": {"data": True, "by": "contrast"},
    "directions": {"data": True},
    "directions, mirrored": {"data": True, "components": "directions", "layers": ["fc2"], "factor": -0.5},
    "directions, target": {"data": True, "retain_drop": 0.5},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_edit_as_a_recipe(name, trained, digit_scores, tmp_path):
    model, train, _ = trained
    options = dict(KINDS[name])
    if options.get("data"):
        options["data"] = zoo.batches(train)
    before = copy.deepcopy(model)
    edit = unlearn_with(model, digit_scores, classes=[3], **options)
    assert state_equal(model, before)
    assert not state_equal(edit.model, before)
    assert state_equal(edit.recipe.undo(edit.model), before)
    loaded = Recipe.load(edit.recipe.save(tmp_path / "edit"))
    assert loaded.settings == edit.recipe.settings
    again = loaded.apply(copy.deepcopy(model))
    assert state_equal(again.model, edit.model)
    torch.manual_seed(1)
    fresh = zoo.DigitsNet().eval()
    other = loaded.apply(fresh)
    assert not state_equal(other.model, fresh)
    assert state_equal(other.recipe.undo(other.model), fresh)
    parameters = [id(parameter) for parameter in before.parameters()]
    inplace = unlearn_with(before, digit_scores, classes=[3], inplace=True, **options)
    assert inplace.model is before
    assert [id(parameter) for parameter in before.parameters()] == parameters
    assert state_equal(before, edit.model)
    assert inplace.widths == edit.widths
    inplace.recipe.undo(before, inplace=True)
    assert state_equal(before, model)


NEEDS_DATA = r"needs data, labelled batches of all classes, got data=None"
BAD = {
    "method=Ablate(TopFraction(0))": r"fraction must be a number in \(0, 1\), got 0\.",
    "method=Ablate(TopFractionOfEach(1))": r"fraction_of_each must be a number in \(0, 1\), got 1\.",
    "method=Ablate(MaxDamage(1))": r"damage must be a number in \(0, 1\), got 1\.",
    "method=Ablate(MaxDamage(float('nan')))": r"damage must be a number in \(0, 1\), got nan\.",
    "method=Ablate(MaxDamage(True))": r"damage must be a number in \(0, 1\), got True\.",
    "method=Ablate(TopK(0))": r"top must be an integer of at least 1, got 0\.",
    "method=Ablate(TopK(1.5))": r"top must be an integer of at least 1, got 1.5\.",
    "method=Ablate(AboveDeviations(float('inf')))": r"deviations must be a finite number, got inf\.",
    "method=Ablate(AboveDeviations('2'))": r"deviations must be a finite number, got '2'\.",
    "method=Ablate(0.1)": r"limit must be a Limit such as TopFraction, TopK, AboveDeviations or MaxDamage, got 0.1\.",
    "forget_accuracy=-0.1, data=DATA": r"forget_accuracy must be a number in \[0, 1\], got -0.1\.",
    "forget_accuracy=0.1, retain_drop=1.5, data=DATA": r"retain_drop must be a number in \[0, 1\], got 1.5\.",
    "method=Ablate(MaxDamage(0.1)), retain_drop=0.2, data=DATA": r"a limit and targets cannot be given together, got "
    r"MaxDamage\(value=0.1\) and retain_drop=0.2\.",
    "method=Ablate(by='rank')": r"by must be one of 'score', 'specific', 'fidelity', 'contrast', got 'rank'\.",
    "method=Ablate(sign='down')": r"sign must be one of 'up', 'any', got 'down'\.",
    "method=Ablate(components='filters')": r"components must be one of 'rows', 'heads', got 'filters'\.",
    "method=Ablate(around='median')": r"around must be one of 'auto', 'zero', 'mean', got 'median'\.",
    "method=Ablate(repair='sgd')": r"repair must be one of 'none', 'mean', 'least_squares', got 'sgd'\.",
    "method=Ablate(scale=1)": r"scale must not be 1, which changes nothing, got 1\.",
    "method=Erase(scale=1.0), data=DATA": r"scale must not be 1, which changes nothing, got 1.0\.",
    "method=Erase(scale='0'), data=DATA": r"scale must be a finite number, got '0'\.",
    "method=Ablate(scale=float('nan'))": r"scale must be a finite number, got nan\.",
    "method='salun'": r"method must be one of 'auto', 'erase_directions', .*, got 'salun'\.",
    "method='modhifi'": rf"by='fidelity' {NEEDS_DATA}\.",
    "method=Ablate(by='contrast')": rf"by='contrast' {NEEDS_DATA}\.",
    "method=ModHiFi(by='specific'), data=DATA": r"by must be one of 'fidelity', 'contrast', got 'specific'\.",
    "method=ModHiFi(sign='any'), data=DATA": r"sign must not be given with by='fidelity', which has none, got 'any'\.",
    "method=ModHiFi(scale=0.5, remove=True), data=DATA, example_inputs=X": r"remove needs .*, got scale=0.5, "
    r"around='zero'\.",
    "method='modhifi', data=[(X * float('nan'), Y)]": r"data must give finite feature maps, what reads "
    r"'conv3' gets NaN or inf\.",
    "method='modhifi', data=[(X, Y)], classes=[1, 5]": r"data must hold samples of every class to forget, it holds "
    r"none of class 5\.",
    "method=Ablate(repair=LeastSquares(-1)), data=DATA": r"protection must be a finite number of at least 0, got -1\.",
    "method=Ablate(repair=LeastSquares(float('inf')))": r"protection must be a finite number of at least 0, got inf\.",
    "forget_accuracy=0.1": r"targets need data, labelled batches of all classes, got data=None\.",
    "method=Ablate(repair='mean')": rf"repair='mean' {NEEDS_DATA}\.",
    "method=Ablate(around='mean')": rf"around='mean' {NEEDS_DATA}\.",
    "method=Ablate(remove=True, scale=0.5), example_inputs=X": r"remove needs scale=0 and around='zero', got "
    r"scale=0.5, around='auto'\.",
    "method=Ablate(remove=True, around='mean'), data=DATA": r"remove needs .*, got scale=0.0, around='mean'\.",
    "method=Ablate(remove=True)": r"remove=True needs example_inputs, got None\.",
    "method=Ablate(components='heads')": r"components='heads' needs example_inputs, got None\.",
    "method='erase_directions'": rf"EraseDirections {NEEDS_DATA}; AblateComponents needs none\.",
    "classes=range(10), method=Ablate(by='specific')": r"classes must leave at least one class with samples, got ",
    "classes=range(10), method=Ablate(MaxDamage(0.1))": r"classes must leave at least one class with samples, got ",
    "classes=range(10), data=DATA": r"classes must leave at least one class with samples, got \[0, 1, 2",
    "classes=lambda k: k > 9": r"classes must hold for at least one label in 0..9, holds for none\.",
    "classes=lambda k: 1": r"classes as a predicate must give True or False, gave 1 for 0\.",
    "data=[]": r"data must hold samples of the classes \[1\], it holds none\.",
    "data=[(X, Y + 2)]": r"data must hold samples of the classes \[1\], it holds none\.",
    "data=[(X, Y * 0 + 1)]": r"data must hold samples of classes other than \[1\], it holds none\.",
    "data=[(X, Y), (X, Y + 9)]": r"batch 1: .*labels must lie in 0..9 .* found 10 at position 1",
    "data=[(X, Y[:3])]": r"data must give one label per sample, batch 0 has 4 samples and 3 labels\.",
    "data=[X]": r"data must give \(inputs, labels\) pairs, .*, batch 0 is a Tensor\.",
}


@pytest.mark.parametrize("call", BAD)
def test_every_bad_argument_is_named_with_its_value(call, trained, digit_scores):
    model, train, _ = trained
    x, labels = train.tensors[0][:4], torch.arange(4)
    names = {
        "DATA": [train.tensors],
        "X": x,
        "Y": labels,
        "Ablate": AblateComponents,
        "Erase": EraseDirections,
        "ModHiFi": ModHiFiU,
    }
    before = copy.deepcopy(model)
    with pytest.raises((ValueError, TypeError), match=f"^unlearn: {BAD[call]}"):
        unlearn(model, digit_scores, **{"classes": [1], **eval(f"dict({call})", {**vars(discedit), **names})})
    assert state_equal(model, before)


def test_scores_of_another_model(trained, digit_scores):
    with pytest.raises(ValueError, match="unlearn: scores must come from this model: it has no layer 'conv1'"):
        unlearn_with(nn.Linear(2, 2), digit_scores, classes=[1])
    wide = copy.deepcopy(trained[0])
    wide.fc1 = nn.Linear(64, 65)
    with pytest.raises(ValueError, match="layer 'fc1' has 65 components, its scores 64"):
        unlearn_with(wide, digit_scores, classes=[1])
    tied = copy.deepcopy(trained[0])
    tied.other = nn.Linear(64, 64)
    tied.other.weight = tied.fc1.weight
    with pytest.raises(ValueError, match="unlearn: layer 'fc1' cannot be edited: its parameters are shared"):
        unlearn_with(tied, digit_scores, classes=[1], layers=["conv3", "fc1"])
    grouped = nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2))
    moments = Moments(2)
    moments.update("0", torch.arange(40.0).view(10, 4), torch.arange(10) // 5)
    with pytest.raises(ValueError, match="unlearn: layer '0' is a transposed convolution in groups"):
        unlearn_with(grouped, score(moments), classes=[1])
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randn(40, 1, 5, 5) + torch.arange(40)[:, None, None, None] % 2
    plain(x)
    with torch.no_grad():
        scores = score(collect_moments(plain, [(x, torch.arange(40) % 2)], 2))
    with pytest.raises(ValueError, match="unlearn: layer '0' cannot be ablated: '1' behind it mixes channels"):
        unlearn_with(plain, scores, classes=[1], sign="any", layers=["0"])


@pytest.mark.filterwarnings("ignore:score")
def test_one_class_alone_cannot_be_told_apart():
    model = nn.Sequential(nn.Linear(2, 3))
    moments = Moments(2)
    moments.update("0", torch.randn(10, 3), torch.zeros(10, dtype=torch.int64))
    scores = score(moments)
    with pytest.raises(ValueError, match="unlearn: scores must hold samples of at least two classes"):
        unlearn_with(model, scores, classes=[0])


class Idle(nn.Module):
    """With a layer that never runs, of which scores can be made by hand all the same."""

    def __init__(self):
        super().__init__()
        self.first, self.idle, self.second, self.head = (
            nn.Linear(*shape) for shape in ((4, 8), (4, 8), (8, 6), (6, 3))
        )

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


def test_scores_of_a_layer_that_does_not_run():
    torch.manual_seed(0)
    model, x, labels = Idle().eval(), torch.randn(60, 4), torch.arange(60) % 3
    x[labels == 1] += 2
    moments = Moments(3)
    moments.update("idle", model.idle(x).detach(), labels)

    def edit(**options):
        method = AblateComponents(TopFraction(0.3), **options)
        return unlearn(model, score(moments), classes=[1], data=[(x, labels)], method=method, layers=["idle"])

    with pytest.warns(UserWarning, match=r"repair='mean' finds nothing to repair: none of \['idle'\] runs on data"):
        edit(around="zero", repair="mean")
    with pytest.raises(ValueError, match="'idle' cannot be edited: it does not run on data, so that it has no mean"):
        edit(around="mean")
    assert edit().recipe.settings["around"] == "zero"


def test_auto_asks_once_what_can_be_erased(trained, digit_scores, monkeypatch):
    asked = Counter()
    why_not = ModelTrace.why_not_erased
    monkeypatch.setattr(ModelTrace, "why_not_erased", lambda trace, name: asked.update([name]) or why_not(trace, name))
    unlearn(trained[0], digit_scores, classes=[3], data=zoo.batches(zoo.digits()[0]))
    assert set(asked.values()) == {1}


def test_a_repair_with_nothing_to_repair_says_so(trained, digit_scores):
    model, loader = trained[0], zoo.batches(zoo.digits()[0])
    with pytest.warns(UserWarning, match="finds nothing to repair: only the head is behind 'fc1'"):
        unlearn_with(
            model, digit_scores, classes=[2], layers=["fc1"], fraction=0.1, repair="least_squares", data=list(loader)
        )


# Neurons of `known`: two that tell class 0 best and that nothing reads, two of each class in turn, one for all.
UNREAD, SHARED = [0, 1], 8


def of_known(cls):
    return [2 + 2 * cls, 3 + 2 * cls]


@functools.cache
def known():
    """A network whose classes go through known neurons, its scores, its samples: the last feature is noise alone.

    The neurons of a class give the same for all of its samples: in their variance there is nothing.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    own = functional.one_hot(labels, 3).float()
    x = own + 0.3 * (1 - own) * torch.rand(300, 3, generator=generator)
    x = torch.cat([x, 2 * torch.rand(300, 1, generator=generator) - 1], 1)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        reads, gives = model[0].weight, model[2].weight
        reads[UNREAD, 0] = 5.0
        model[0].bias[UNREAD] = -3.0
        for cls in range(3):
            reads[of_known(cls), cls] = torch.tensor([1.0, 1.5])
            gives[:, of_known(cls)] = -1.0
            gives[cls, of_known(cls)] = 1.0
        reads[SHARED, 3] = model[0].bias[SHARED] = 1.0
        gives[:, SHARED] = 0.1
    return model, score(collect_moments(model, [(x, labels)], 3, layers=["0"])), (x, labels)


def by_hand(model, x):
    """Fidelity around zero of each neuron, from samples alone."""
    with torch.no_grad():
        parts = model[1](model[0](x)).double()[:, None, :] * model[2].weight.double()  # samples, outputs, neurons
    whole = parts.sum(2, keepdim=True)
    both, own, energy = ((a * b).mean(0) for a, b in ((whole, parts), (parts, parts), (whole, whole)))
    return torch.where(own > 0, both**2 / (own * energy), 0.0).mean(0)


def test_modhifi_takes_what_its_class_goes_through():
    model, scores, (x, labels) = known()
    options = {"layers": ["0"], "data": [(x, labels)]}
    before = accuracy_per_class(model, [(x, labels)], 3)
    assert torch.equal(before, torch.ones(3, dtype=before.dtype))
    for cls in range(3):
        due = by_hand(model, x[labels == cls]).argsort(descending=True)[:2].tolist()
        assert sorted(due) == of_known(cls)
        edit = unlearn_with(model, scores, classes=[cls], method="modhifi", top=2, **options)
        assert edit.recipe.components == {"0": of_known(cls)}
        after = accuracy_per_class(edit.model, [(x, labels)], 3)
        assert after.tolist() == [float(k != cls) for k in range(3)]
    settings = edit.recipe.settings
    assert {name: settings[name] for name in ("method", "by", "around", "scale", "repair", "components")} == {
        "method": "modhifi", "by": "fidelity", "around": "zero", "scale": 0.0, "repair": "none", "components": "rows",
    }  # fmt: skip
    assert not output_of(edit.model, "0", x)[:, of_known(2)].any()
    # Scores take neurons that do not matter.
    by_score = unlearn_with(model, scores, classes=[0], top=2, around="zero", **options)
    assert by_score.recipe.components == {"0": UNREAD}
    assert float(accuracy_per_class(by_score.model, [(x, labels)], 3)[0]) == 1
    assert by_score.recipe.settings["method"] == "ablate_components"
    assert by_score.recipe.settings["by"] == "score"


def test_contrast_leaves_what_all_classes_share():
    model, scores, (x, labels) = known()
    with torch.no_grad():
        loud = copy.deepcopy(model)
        loud[2].weight[:, SHARED] = 4.0
    options = {"layers": ["0"], "data": [(x, labels)], "top": 1}
    assert by_hand(loud, x[labels == 1]).argmax() == SHARED
    assert unlearn_with(loud, scores, classes=[1], by="fidelity", **options).recipe.components == {"0": [SHARED]}
    contrast = by_hand(loud, x[labels == 1]) - by_hand(loud, x[labels != 1])
    for method in (None, "modhifi"):
        edit = unlearn_with(loud, scores, classes=[1], by="contrast", method=method, **{**options, "top": 2})
        assert edit.recipe.components == {"0": of_known(1)}
        assert sorted(contrast.argsort(descending=True)[:2].tolist()) == of_known(1)
        assert edit.recipe.settings["by"] == "contrast"
        assert edit.recipe.settings["around"] == {None: "mean", "modhifi": "zero"}[method]
    # What is no higher for the class than for the others never goes.
    everything = unlearn_with(loud, scores, classes=[1], by="contrast", **{**options, "top": 9})
    assert everything.recipe.components == {"0": (contrast > 0).nonzero()[:, 0].tolist()}
    assert len(everything.recipe.components["0"]) < 9


def test_modhifi_ranks_for_each_class_and_what_is_given_wins():
    model, scores, (x, labels) = known()
    options = {
        "method": "modhifi",
        "layers": ["0"],
        "data": [(x[i : i + 70], labels[i : i + 70]) for i in range(0, 300, 70)],
    }
    both = unlearn_with(model, scores, classes=[0, 2], top=2, **options)
    assert both.recipe.components == {"0": of_known(0) + of_known(2)}
    edit = unlearn_with(model, scores, classes=[1], top=2, factor=-0.5, around="mean", **options)
    y, found = (output_of(net, "0", x)[:, of_known(1)] for net in (model, edit.model))
    m = output_of(model, "0", x[labels != 1])[:, of_known(1)].mean(0)
    torch.testing.assert_close(found, m - 0.5 * (y - m), rtol=1e-4, atol=1e-5)
    # By default the target of rows; at most half of the neurons are tried.
    searched = unlearn_with(model, scores, classes=[1], **options)
    assert searched.recipe.settings["targets"]["forget_accuracy"] == {"asked": 0.05, "reached": 0.0, "met": True}
    assert set(searched.recipe.components["0"]) <= set(of_known(1))
    smaller = unlearn_with(model, scores, classes=[1], top=2, remove=True, example_inputs=x[:2], **options)
    assert smaller.model[0].out_features == 7
    for inputs in (x, x[labels == 1]):
        with torch.no_grad():
            zeroed = unlearn_with(model, scores, classes=[1], top=2, **options).model(inputs)
            torch.testing.assert_close(smaller.model(inputs), zeroed)


def test_layers_that_nothing_reads_as_rows():
    torch.manual_seed(0)
    x, labels = torch.randn(60, 1, 6, 6), torch.arange(60) % 2
    x += labels[:, None, None, None]
    parts = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 2)]
    model = nn.Sequential(*parts).eval()
    scores = score(collect_moments(model, [(x, labels)], 2))
    options = {"classes": [1], "method": "modhifi", "data": [(x, labels)], "top": 1}
    reason = "it is read by 2: it is a ConvTranspose2d; only Conv2d and Linear can be fitted"
    with pytest.raises(ValueError, match=rf"^unlearn: layers must name .* by='fidelity' can rank \(0: {reason}\)\.$"):
        unlearn_with(model, scores, layers=["0"], **options)
    with pytest.raises(ValueError, match=rf"^unlearn: layer '0' cannot be ranked by='fidelity': {reason}\.$"):
        unlearn_with(model, scores, layers=["0", "2"], **options)
    edit = unlearn_with(model, scores, layers=["2"], **options)  # each of its filters is read on 36 features
    assert edit.recipe.settings["layers"] == ["2"]
    with torch.no_grad():
        maps = model[:4](x[labels == 1]).double()
        weight = model[5].weight.double().view(2, 5, 36)
        given = torch.einsum("ncp,ocp->nco", maps.flatten(2), weight)
    whole = given.sum(1, keepdim=True)
    due = ((whole * given).mean(0) ** 2 / ((given**2).mean(0) * (whole**2).mean(0))).mean(1)
    assert edit.recipe.components == {"2": [int(due.argmax())]}
    residual = Residual(nn.ReLU()).eval()
    scores = score(collect_moments(residual, [(x, labels)], 2))
    assert unlearn_with(residual, scores, **options).recipe.settings["layers"] == ["inner"]
    with pytest.raises(ValueError, match="unlearn: layer 'out' cannot be edited: it shares its channels with first"):
        unlearn_with(residual, scores, layers=["out"], **options)


def test_modhifi_negates_before_layer_norms():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    ).eval()
    labels = torch.arange(60) % 3
    x = torch.randn(3, 3, 16, 16)[labels] + torch.randn(60, 3, 16, 16)
    data = [{"pixel_values": x, "labels": labels}]
    scores = score(collect_moments(model, data, 3))
    options = {"classes": [1], "method": "modhifi", "data": data, "top": 2}
    edit = unlearn_with(model, scores, **options)
    assert edit.recipe.settings["scale"] == -1.0
    (layer,) = edit.recipe.components
    assert layer == "vit.layers.2.mlp.fc1"
    rows = edit.recipe.components[layer]
    torch.testing.assert_close(output_of(edit.model, layer, x)[..., rows], -output_of(model, layer, x)[..., rows])
    assert state_equal(edit.recipe.undo(edit.model), model)
    zeroed = unlearn_with(model, scores, factor=0.0, **options)
    assert zeroed.recipe.components == edit.recipe.components
    assert not output_of(zeroed.model, layer, x)[..., rows].any()
    heads = unlearn_with(model, scores, components="heads", **{**options, "top": 1})
    ((layer, rows),) = heads.recipe.components.items()
    assert ".2.attention" in layer
    assert len(rows) == 8
    assert rows[0] % 8 == 0
    assert rows == list(range(rows[0], rows[0] + 8))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("by", ["fidelity", "contrast"])
def test_modhifi_forgets_on_real_images(by, cifar, cifar_scores):
    model, train, _ = cifar
    data = zoo.batches(train)
    edit = unlearn_with(model, cifar_scores, classes=[1], method="modhifi", by=by, data=data)
    assert edit.recipe.settings["layers"] == [f"layer3.{i}.conv1" for i in range(3)]
    before, after = (accuracies(net, data, [1]) for net in (model, edit.model))
    assert before[0] > 0.9
    assert after[0] <= 0.05
    assert after[1] > before[1] - {"fidelity": 0.1, "contrast": 0.05}[by]
    assert state_equal(edit.recipe.undo(edit.model), model)
