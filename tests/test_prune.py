import copy
import math
import re

import pytest
import torch
from torch import nn

from discedit import collect_moments, prune, score, zoo
from discedit.evaluate import accuracy_per_class

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_removes_the_lowest_of_each_layer(trained, digit_scores):
    model, _, _ = trained
    edit = prune(model, digit_scores, ratio=0.3, example_inputs=X)
    lowest = digit_scores.reduce("max")
    for layer, removed in edit.recipe.components.items():
        assert len(removed) == math.floor(0.3 * len(lowest[layer]))
        kept = sorted(set(range(len(lowest[layer]))) - set(removed))
        assert lowest[layer][removed].max() <= lowest[layer][kept].min()
    assert list(edit.recipe.components) == ["conv1", "conv2", "conv3", "fc1"]
    smaller = edit.model
    assert type(smaller) is type(model)
    assert (smaller.conv1.out_channels, smaller.bn1.num_features, smaller.conv2.in_channels) == (23, 23, 23)
    assert (smaller.conv3.out_channels, smaller.fc1.in_features, smaller.fc1.out_features) == (45, 45, 45)
    assert smaller.fc2.out_features == 10


def test_equals_zeroing_exactly(trained, digit_scores):
    """Removing components is the same function as zeroing them (batch norm included)."""
    model, _, _ = trained
    edit = prune(model, digit_scores, ratio=0.4, example_inputs=X)
    zeroed = copy.deepcopy(model)
    norms = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
    with torch.no_grad():
        for layer, channels in edit.recipe.components.items():
            for name in (layer, norms.get(layer)):
                for parameter in zeroed.get_submodule(name).parameters() if name else ():
                    parameter[channels] = 0
        torch.testing.assert_close(edit.model(X), zeroed(X), rtol=1e-4, atol=1e-5)


def test_the_callers_model_is_untouched_unless_inplace(trained, digit_scores):
    model, train, _ = trained
    mine = copy.deepcopy(model).train()
    mine.conv1.weight.requires_grad_(False)
    edit = prune(mine, digit_scores, ratio=0.3, example_inputs=X, data=zoo.batches(train))
    assert same_state(mine, model)
    assert mine.training
    assert edit.model.training
    assert not edit.model.conv1.weight.requires_grad
    assert edit.model.conv2.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*mine.modules(), *edit.model.modules()))
    inplace = prune(mine, digit_scores, ratio=0.3, example_inputs=X, data=zoo.batches(train), inplace=True)
    assert inplace.model is mine
    assert same_state(mine, edit.model)
    inplace.recipe.undo(mine, inplace=True)
    assert same_state(mine, model)


def test_the_smaller_model_trains(trained, digit_scores):
    model, train, _ = trained
    smaller = prune(model, digit_scores, ratio=0.5, example_inputs=X).model.train()
    x, y = train.tensors
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(smaller(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_batch_norm_repair_is_a_plain_reestimate(trained, digit_scores):
    model, train, _ = trained
    loader = zoo.batches(train, 300)
    plain = prune(model, digit_scores, ratio=0.5, example_inputs=X)
    repaired = prune(model, digit_scores, ratio=0.5, example_inputs=X, data=loader)
    assert (plain.recipe.settings["repair"], repaired.recipe.settings["repair"]) == ("none", "batchnorm")
    expected = copy.deepcopy(plain.model)
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for x, _ in loader:
            expected(x)
    assert same_state(repaired.model, expected)
    assert repaired.model.bn1.momentum == 0.1
    assert not repaired.model.training


def test_repair_helps_on_real_images(trained, digit_scores):
    model, train, test = trained
    accuracy = {}
    for repair in ("none", "batchnorm"):
        edit = prune(model, digit_scores, ratio=0.6, example_inputs=X, data=zoo.batches(train), repair=repair)
        accuracy[repair] = float(accuracy_per_class(edit.model, zoo.batches(test), 10).mean())
    assert accuracy["batchnorm"] > accuracy["none"] + 0.05


def test_ratio_zero_changes_nothing(trained, digit_scores):
    model, _, _ = trained
    edit = prune(model, digit_scores, ratio=0, example_inputs=X)
    assert same_state(edit.model, model)
    assert not any(edit.recipe.components.values())
    assert edit.parameters_before == edit.parameters_after


def test_a_component_is_always_left(trained, digit_scores):
    edit = prune(trained[0], digit_scores, ratio=0.999, example_inputs=X)
    assert edit.model.conv1.out_channels == 1
    assert edit.model(X).shape == (2, 10)


def test_named_layers_only(trained, digit_scores):
    edit = prune(trained[0], digit_scores, ratio=0.5, example_inputs=X, layers=["conv2"])
    assert edit.model.conv1.out_channels == 32
    assert edit.model.conv2.out_channels == 32


def test_summary_counts(trained, digit_scores):
    model, _, _ = trained
    edit = prune(model, digit_scores, ratio=0.5, example_inputs=X)
    assert edit.parameters_after == sum(p.numel() for p in edit.model.parameters())
    # 3 x 3 convolutions on 8 x 8, 8 x 8 and 4 x 4 maps, two linear layers; two samples.
    macs = 2 * (9 * 64 * 1 * 16 + 9 * 64 * 16 * 32 + 9 * 16 * 32 * 32 + 32 * 32 + 32 * 10)
    assert edit.macs_after == macs
    text = edit.summary()
    assert re.search(r"^conv2 +32 of 64$", text, re.MULTILINE)
    assert f"parameters: {edit.parameters_before:,} -> {edit.parameters_after:,}" in text
    assert f"-> {macs:,}" in text


@pytest.mark.data
def test_residual_streams_are_left_whole(cifar, cifar_scores):
    model, _, _ = cifar
    x = torch.randn(1, 3, 32, 32)
    edit = prune(model, cifar_scores, ratio=0.3, example_inputs=x)
    inner = {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)}
    assert set(edit.recipe.components) == inner
    assert set(edit.skipped) == set(cifar_scores) - inner
    assert all("shares its channels with" in why for why in edit.skipped.values())
    with pytest.raises(ValueError, match=r"layer 'layer1.0.conv2' cannot be pruned: it shares its channels with"):
        prune(model, cifar_scores, ratio=0.3, example_inputs=x, layers=["layer1.0.conv2"])


@pytest.mark.data
def test_real_accuracy_survives_a_light_prune(cifar, cifar_scores):
    model, train, test = cifar
    edit = prune(model, cifar_scores, ratio=0.1, example_inputs=train[0][0][None], data=zoo.batches(train))
    before, after = (float(accuracy_per_class(m, zoo.batches(test), 10).mean()) for m in (model, edit.model))
    assert before > 0.89
    assert after > before - 0.15
    assert edit.parameters_after < 0.93 * edit.parameters_before


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), "0.3", True])
def test_bad_ratio(trained, digit_scores, ratio):
    with pytest.raises(ValueError, match=r"prune: ratio must be a number in \[0, 1\), got"):
        prune(trained[0], digit_scores, ratio=ratio, example_inputs=X)


def test_a_ratio_that_removes_nothing_says_so(trained, digit_scores):
    with pytest.raises(ValueError, match=r"ratio must be at least 0.0156 to remove a component .* \(64 components\)"):
        prune(trained[0], digit_scores, ratio=0.01, example_inputs=X)


def test_bad_input(trained, digit_scores):
    model, _, _ = trained
    with pytest.raises(ValueError, match="layers must name layers that scores holds, 'conv9' is none of"):
        prune(model, digit_scores, ratio=0.3, example_inputs=X, layers=["conv9"])
    with pytest.raises(ValueError, match="repair='batchnorm' needs data to estimate statistics on, got data=None"):
        prune(model, digit_scores, ratio=0.3, example_inputs=X, repair="batchnorm")
    with pytest.raises(ValueError, match="repair must be one of"):
        prune(model, digit_scores, ratio=0.3, example_inputs=X, repair="gradient")
    with pytest.raises(ValueError, match="data must give at least one batch of two samples"):
        prune(model, digit_scores, ratio=0.3, example_inputs=X, data=[])
    with pytest.raises(ValueError, match="scores must come from this model: it has no layer 'conv1'"):
        prune(nn.Sequential(nn.Linear(4, 4)), digit_scores, ratio=0.3, example_inputs=X)
    other = zoo.DigitsNet()
    other.conv2 = nn.Conv2d(32, 63, 3)
    with pytest.raises(ValueError, match="layer 'conv2' has 63 components, its scores 64"):
        prune(other, digit_scores, ratio=0.3, example_inputs=X)


def test_nothing_to_prune_is_an_error():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            return self.head(x + self.b(x))

    torch.manual_seed(0)
    model, x, y = Residual(), torch.randn(40, 4), torch.arange(40) % 2
    scores = score(collect_moments(model, [(x, y)], 2))
    with pytest.raises(ValueError, match=r"no layer can be pruned \(a: it shares its channels with b; b: .* with a\)"):
        prune(model, scores, ratio=0.5, example_inputs=x[:1])


def test_grouped_convolutions_are_skipped_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 3)
    )
    x, y = torch.randn(30, 1, 8, 8), torch.arange(30) % 3
    scores = score(collect_moments(model, [(x, y)], 3))
    edit = prune(model, scores, ratio=0.5, example_inputs=x[:1], layers=["2"])
    assert edit.model[2].out_channels == 4
    assert edit.model[4].in_features == 64
    with pytest.raises(ValueError, match="layer '1' cannot be pruned: it is a convolution in 2 groups"):
        prune(model, scores, ratio=0.5, example_inputs=x[:1], layers=["1"])
