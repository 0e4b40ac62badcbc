import copy

import numpy as np
import pytest
import torch
from torch import nn

from discedit import Moments, collect_moments, score, unlearn, zoo
from discedit.evaluate import accuracy_per_class


def test_forgets_the_class_and_keeps_the_rest(trained, digit_scores):
    model, _, test = trained
    loader = zoo.batches(test)
    before = accuracy_per_class(model, loader, 10)
    for cls in (0, 3, 6):
        after = accuracy_per_class(unlearn(model, digit_scores, classes=[cls], fraction=0.15).model, loader, 10)
        kept = [k for k in range(10) if k != cls]
        assert after[cls] < 0.5
        assert after[kept].mean() > before[kept].mean() - 0.05


@pytest.mark.data
def test_forgets_on_real_images(cifar, cifar_scores):
    model, _, test = cifar
    loader = zoo.batches(test)
    before = accuracy_per_class(model, loader, 10)
    after = accuracy_per_class(unlearn(model, cifar_scores, classes=[1]).model, loader, 10)
    kept = [k for k in range(10) if k != 1]
    assert after[1] < 0.3 < 0.9 < before[1]
    assert after[kept].mean() > before[kept].mean() - 0.08


def test_takes_the_highest_of_all_layers_together(trained, digit_scores):
    model, _, _ = trained
    edit = unlearn(model, digit_scores, classes=[4], fraction=0.1, layers=list(digit_scores))
    chosen = {(layer, channel) for layer, channels in edit.recipe.components.items() for channel in channels}
    ranked = sorted(
        ((float(values[c, 4]), (layer, c)) for layer, values in digit_scores.items() for c in range(len(values))
         if digit_scores.direction[layer][c, 4] > 0),
        reverse=True,
    )  # fmt: skip
    assert chosen == {place for _, place in ranked[:22]}  # 10 % of 224 components


def test_default_layers_are_the_last_third(trained, digit_scores):
    edit = unlearn(trained[0], digit_scores, classes=[4])
    assert edit.recipe.settings["layers"] == ["conv3", "fc1"]


def test_zeroed_components_are_silent(trained, digit_scores):
    """What was zeroed gives exactly 0 behind its norm, for every input; nothing else changed."""
    model, train, _ = trained
    edit = unlearn(model, digit_scores, classes=[2, 5], fraction=0.1, sign="any", layers=["conv2", "fc1"])
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
    edit = unlearn(model, scores, classes=[0], fraction=0.5, sign="any")
    channels = edit.recipe.components["0"]
    with torch.no_grad():
        silent = edit.model[1](edit.model[0](x))
    assert len(channels) == 3
    assert not silent[:, channels].any()
    assert all(silent[:, c].any() for c in range(6) if c not in channels)


def test_the_callers_model_is_untouched_unless_inplace(trained, digit_scores):
    mine = copy.deepcopy(trained[0])
    edit = unlearn(mine, digit_scores, classes=[1])
    assert torch.equal(mine.fc1.weight, trained[0].fc1.weight)
    parameters = [id(p) for p in mine.parameters()]
    inplace = unlearn(mine, digit_scores, classes=[1], inplace=True)
    assert inplace.model is mine
    assert [id(p) for p in mine.parameters()] == parameters, "an optimizer must keep its parameters"
    for a, b in zip(mine.state_dict().values(), edit.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_several_classes_get_their_own_components(trained, digit_scores):
    both = unlearn(trained[0], digit_scores, classes=[2, 7]).recipe.components
    for cls in (2, 7):
        for layer, channels in unlearn(trained[0], digit_scores, classes=[cls]).recipe.components.items():
            assert set(channels) <= set(both[layer])


def test_classes_may_be_any_kind_of_index(trained, digit_scores):
    plain = unlearn(trained[0], digit_scores, classes=[2, 7]).recipe
    for classes in (np.array([2, 7]), torch.tensor([2, 7]), (2, 7, 2), range(2, 8, 5)):
        other = unlearn(trained[0], digit_scores, classes=classes).recipe
        assert other.components == plain.components
        assert other.settings == plain.settings


def test_summary(trained, digit_scores):
    text = unlearn(trained[0], digit_scores, classes=[1]).summary()
    assert "zeroed" in text
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
        unlearn(trained[0], digit_scores, classes=classes)


def test_bad_input(trained, digit_scores):
    model = trained[0]
    for fraction in (0, 1, -0.1, float("nan"), "0.1"):
        with pytest.raises(ValueError, match=r"fraction must be a number in \(0, 1\), got"):
            unlearn(model, digit_scores, classes=[1], fraction=fraction)
    with pytest.raises(ValueError, match="sign must be one of 'up', 'any', got 'down'"):
        unlearn(model, digit_scores, classes=[1], sign="down")
    with pytest.raises(ValueError, match="layers must name layers that scores holds, 'fc9'"):
        unlearn(model, digit_scores, classes=[1], layers=["fc9"])
    with pytest.raises(ValueError, match="layers must name at least one layer that can be edited, it is empty"):
        unlearn(model, digit_scores, classes=[1], layers=[])


def test_a_class_without_samples_cannot_be_forgotten(trained):
    model, train, _ = trained
    x, y = train.tensors
    with pytest.warns(UserWarning, match=r"classes without samples: \[4\]"):
        scores = score(collect_moments(model, [(x[y != 4], y[y != 4])], 10))
    with pytest.raises(ValueError, match="class 4 has no sample in scores"):
        unlearn(model, scores, classes=[4])
    unlearn(model, scores, classes=[3])


def test_nothing_to_zero_is_an_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    moments = Moments(2)
    moments.update("0", torch.ones(10, 3), torch.arange(10) % 2)
    with pytest.raises(
        ValueError, match="no component of the chosen layers more active .* tells class 0 from the rest"
    ):
        unlearn(model, score(moments), classes=[0])
