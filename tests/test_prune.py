import copy
import math
import re
import warnings

import pytest
import torch
from helpers import prune_with
from torch import nn

from discedit import Recipe, collect_moments, iterative_prune, prune, score, zoo
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.model.size import count_macs, count_parameters

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_removes_the_lowest_of_each_layer(trained, digit_scores):
    model, _, _ = trained
    edit = prune(model, digit_scores, ratio=0.3, example_inputs=X, criterion="max")
    lowest = digit_scores.reduce("max")
    for layer, removed in edit.recipe.components.items():
        assert len(removed) == math.ceil(0.3 * len(lowest[layer]))
        kept = sorted(set(range(len(lowest[layer]))) - set(removed))
        assert lowest[layer][removed].max() <= lowest[layer][kept].min()
    assert list(edit.recipe.components) == ["conv1", "conv2", "conv3", "fc1"]
    smaller = edit.model
    assert type(smaller) is type(model)
    assert (smaller.conv1.out_channels, smaller.bn1.num_features, smaller.conv2.in_channels) == (22, 22, 22)
    assert (smaller.conv3.out_channels, smaller.fc1.in_features, smaller.fc1.out_features) == (44, 44, 44)
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
    made = prune(mine, digit_scores, ratio=0.3, example_inputs=X, data=zoo.batches(train))
    inplace = made.recipe.apply(mine, inplace=True)
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
    plain = prune(model, digit_scores, ratio=0.5, example_inputs=X, criterion="l2")
    options = {"data": loader, "repair": "batchnorm", "criterion": "l2"}
    repaired = prune(model, digit_scores, ratio=0.5, example_inputs=X, **options)
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


def test_at_least_the_share_goes_and_one_component_stays(trained, digit_scores):
    for ratio, gone in ((0.001, 1), (0.999, 31)):
        edit = prune(trained[0], digit_scores, ratio=ratio, example_inputs=X)
        assert len(edit.recipe.components["conv1"]) == gone


def test_bad_input(trained, digit_scores):
    model, _, _ = trained
    with pytest.raises(ValueError, match="layers must name layers that scores holds, 'conv9' is none of"):
        prune(model, digit_scores, ratio=0.3, example_inputs=X, layers=["conv9"])
    with pytest.raises(ValueError, match="repair='batchnorm' needs data to estimate statistics on, got data=None"):
        prune(model, digit_scores, ratio=0.3, example_inputs=X, repair="batchnorm")
    with pytest.raises(ValueError, match="repair must be one of"):
        prune(model, digit_scores, ratio=0.3, example_inputs=X, repair="gradient")
    with pytest.raises(ValueError, match="data must give at least one batch of two samples"):
        prune(model, digit_scores, ratio=0.3, example_inputs=X, data=[], repair="batchnorm", criterion="l1")
    with pytest.raises(ValueError, match="data must give at least one sample, it gave none"):
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
    why = r"\(a: it shares its channels with b; b: .* with a\)\. With components='all', channels"
    with pytest.raises(ValueError, match=rf"no layer can be pruned {why}"):
        prune(model, scores, ratio=0.5, example_inputs=x[:1])


def test_grouped_convolutions_lose_whole_groups():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 8, 1), nn.Flatten(), nn.Linear(128, 3)
    )
    x, y = torch.randn(30, 1, 8, 8), torch.arange(30) % 3
    scores = score(collect_moments(model, [(x, y)], 3))
    edit = prune(model, scores, ratio=0.5, example_inputs=x[:1])
    grouped = edit.model[1]
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (4, 6, 2)
    assert (edit.model[0].out_channels, edit.model[2].in_channels, edit.model[2].out_channels) == (4, 6, 4)
    alone = prune(model, scores, ratio=0.25, example_inputs=x[:1], layers=["1"])
    assert {layer: len(rows) for layer, rows in alone.recipe.components.items()} == {"1": 3}


WIDTHS = {"conv1": 32, "conv2": 64, "conv3": 64, "fc1": 64}
COUNT = {"parameters": count_parameters, "macs": lambda model: count_macs(model, X)}


@pytest.fixture(scope="module")
def net():
    """DigitsNet as it comes, and importances that are all different."""
    torch.manual_seed(0)
    model = zoo.DigitsNet().eval()
    order = torch.randperm(sum(WIDTHS.values()), generator=torch.Generator().manual_seed(1)).double() + 1
    return model, dict(zip(WIDTHS, order.split([*WIDTHS.values()]), strict=True))


def cut(net, importances=None, **options):
    model, plain = net
    return prune_with(model, plain if importances is None else importances, example_inputs=X, **options)


def left(edit):
    """Components that are left in each layer, counted on the model."""
    model = edit.model
    return {
        "conv1": model.conv1.out_channels,
        "conv2": model.conv2.out_channels,
        "conv3": model.conv3.out_channels,
        "fc1": model.fc1.out_features,
    }


def lost(edit):
    return {layer: WIDTHS[layer] - width for layer, width in left(edit).items()}


def lowest(importances, counts):
    """The least important components of each layer."""
    return {layer: sorted(values.argsort()[: counts[layer]].tolist()) for layer, values in importances.items()}


@pytest.mark.parametrize("share", [0.3, 0.85, None])
@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_a_target_is_met_and_no_more_goes_than_it_takes(net, budget, share):
    model, importances = net
    whole = COUNT[budget](model)
    target = whole // 2 if share is None else share
    most = target if share is None else share * whole
    edit = cut(net, across="none", **{budget: target})
    counted = COUNT[budget](edit.model)
    assert counted <= most
    described = edit.recipe.settings["budget"]
    assert described["reached"] == counted
    assert described["asked"] == pytest.approx(most, abs=1)
    assert described["met"] is True
    assert edit.recipe.settings[budget] == target
    assert edit.recipe.settings["across"] == "none"
    # What went are the first of all layers together; with the last of these back, the target is missed.
    last = max(float(importances[layer][gone].max()) for layer, gone in edit.recipe.components.items())
    assert edit.recipe.components == {
        layer: (values <= last).nonzero()[:, 0].tolist() for layer, values in importances.items()
    }
    assert COUNT[budget](cut(net, threshold=last).model) > most
    with torch.no_grad():
        assert edit.model(X).shape == (2, 10)


@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_a_target_that_cannot_be_met(net, budget):
    with pytest.warns(UserWarning, match=rf"prune: {budget}: 1 asked, [\d,]+ reached: every layer is at its") as caught:
        edit = cut(net, floor=6, **{budget: 1})
    assert [w.filename for w in caught] == [prune_with.__code__.co_filename]
    assert left(edit) == dict.fromkeys(WIDTHS, 6)
    counted = COUNT[budget](edit.model)
    assert edit.recipe.settings["budget"] == {"asked": 1, "reached": counted, "met": False}
    assert f"{counted:,} reached" in str(caught[0].message)


@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_a_target_above_the_present_size(net, budget):
    with pytest.warns(UserWarning, match=rf"prune: {budget}: 1,000,000,000 asked, .* present: nothing has to go"):
        edit = cut(net, **{budget: 10**9})
    assert left(edit) == WIDTHS
    assert same_state(edit.model, net[0])
    assert edit.recipe.settings["budget"]["met"] is True


def test_below_a_threshold(net):
    edit = cut(net, threshold=100)
    expected = {layer: (values < 100).nonzero()[:, 0].tolist() for layer, values in net[1].items()}
    assert edit.recipe.components == expected
    assert "across" not in edit.recipe.settings
    with pytest.warns(UserWarning, match="prune: threshold: 0 components asked, 0 removed"):
        assert left(cut(net, threshold=1)) == WIDTHS
    with pytest.warns(UserWarning, match="prune: threshold: 224 components asked, 216 removed"):
        assert left(cut(net, threshold=10**6, floor=2)) == dict.fromkeys(WIDTHS, 2)


def test_a_threshold_of_reconstruction_is_a_share_of_variance():
    """By least squares on all rows, with the components gone and with any one more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 6)).eval()
    x, y = torch.randn(300, 5), torch.arange(300) % 2
    scores = score(collect_moments(model, [(x, y)], 2))
    threshold = 0.05
    options = {"criterion": "reconstruction", "example_inputs": x[:2], "data": [x], "layers": ["0"]}
    edit = prune(model, scores, threshold=threshold, **options)
    with torch.no_grad():
        rows, target, repaired = model[:2](x).double(), model(x).double(), edit.model(x).double()
    rows, whole = rows - rows.mean(0), target.var(0).sum()

    def share(gone):
        kept = [index for index in range(12) if index not in gone]
        wanted = target - target.mean(0)
        residual = wanted - rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], wanted).solution
        return float(residual.var(0).sum() / whole)

    gone = edit.recipe.components["0"]
    assert 0 < len(gone) < 11
    assert share(gone) < threshold
    assert min(share([*gone, other]) for other in range(12) if other not in gone) > 0.99 * threshold
    assert float((repaired - target).var(0).sum() / whole) == pytest.approx(share(gone), rel=0.02)


def test_a_share_of_all_components(net):
    importances = net[1]
    edit = cut(net, global_ratio=0.4, across="none")
    first = torch.cat([*importances.values()]).sort().values[: math.ceil(0.4 * 224)]
    expected = {layer: (values <= first[-1]).nonzero()[:, 0].tolist() for layer, values in importances.items()}
    assert edit.recipe.components == expected
    assert edit.recipe.settings["budget"] == {"asked": 90, "reached": 90, "met": True}
    ranked = cut(net, global_ratio=0.4)
    assert sum(lost(ranked).values()) == 90
    assert ranked.recipe.settings["across"] == "rank"
    for layer, count in lost(ranked).items():
        assert abs(count - 0.4 * WIDTHS[layer]) <= 1
    assert ranked.recipe.components == lowest(importances, lost(ranked))


@pytest.mark.parametrize("across", ["mean", "max", "rank", "none"])
def test_the_scale_of_a_layer(net, across):
    """Counts where importances are compared as they are."""
    scaled = {layer: values * 10 ** (-index) for index, (layer, values) in enumerate(net[1].items())}
    plain, ours = (cut(net, importances, global_ratio=0.4, across=across) for importances in (net[1], scaled))
    assert (plain.recipe.components == ours.recipe.components) is (across != "none")


def test_shares_and_floors_of_single_layers(net):
    importances = net[1]
    edit = cut(net, ratio={"conv2": 0.5, "fc1": 0.26})
    assert lost(edit) == {"conv1": 0, "conv2": 32, "conv3": 0, "fc1": 17}
    assert edit.recipe.components == lowest(importances, lost(edit))
    assert edit.recipe.settings["ratio"] == {"conv2": 0.5, "fc1": 0.26}
    edit = cut(net, ratio=0.5, floor={"conv1": 30, "conv3": 40})
    assert left(edit) == {"conv1": 30, "conv2": 32, "conv3": 40, "fc1": 32}
    assert edit.recipe.components == lowest(importances, lost(edit))


def test_widths_are_multiples(net):
    edit = cut(net, ratio=0.3, round_to=8)
    assert left(edit) == {"conv1": 24, "conv2": 48, "conv3": 48, "fc1": 48}
    edit = cut(net, macs=0.4, across="none", round_to=8)
    assert count_macs(edit.model, X) <= 0.4 * count_macs(net[0], X)
    assert all(width % 8 == 0 for width in left(edit).values())
    assert edit.recipe.components == lowest(net[1], lost(edit))


def test_ignored_layers_stay_whole_and_the_others_meet_the_target(net):
    edit = cut(net, parameters=0.6, ignore=iter(["conv2"]))
    assert left(edit)["conv2"] == 64
    assert "conv2" not in edit.recipe.components
    assert count_parameters(edit.model) <= 0.6 * count_parameters(net[0])
    assert edit.recipe.settings["budget"]["met"] is True
    assert edit.skipped == {}


class Sized(nn.Module):
    """Counts the channels of one layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(1, 12, 3), nn.Conv2d(12, 10, 3), nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.two(self.one(x).relu()).relu()
        x = self.three(x * x.shape[1]).relu()
        return self.head(x.mean((2, 3)))


def test_layers_that_fail_the_check_are_made_up_for_by_the_others():
    torch.manual_seed(0)
    model = Sized().eval()
    importances = {"one": torch.arange(12.0) + 100, "two": torch.arange(10.0), "three": torch.arange(8.0) + 200}
    options = {"example_inputs": X, "across": "none"}
    edit = prune_with(model, importances, parameters=0.5, **options)
    assert edit.skipped.keys() == {"two"}
    assert "removing its channels is not the same as hiding them" in edit.skipped["two"]
    assert edit.model.two.out_channels == 10
    assert count_parameters(edit.model) <= 0.5 * count_parameters(model)
    gone = edit.recipe.components
    assert gone["one"] == list(range(len(gone["one"])))  # and no more of the next than is needed
    one_more = prune_with(model, {"one": importances["one"]}, threshold=99.0 + len(gone["one"]), **options)
    assert gone["three"] == []
    assert count_parameters(one_more.model) > 0.5 * count_parameters(model)
    with pytest.raises(ValueError, match="layer 'two' cannot be pruned: removing its channels is not the same"):
        prune_with(model, importances, ratio=0.5, layers=["two"], **options)


def test_importances_of_ones_own(net):
    edit = cut(net, {"conv2": net[1]["conv2"], "fc1": net[1]["fc1"]}, ratio=0.5)
    assert edit.recipe.settings["criterion"] == "given"
    assert lost(edit) == {"conv1": 0, "conv2": 32, "conv3": 0, "fc1": 32}
    assert {layer: edit.recipe.components[layer] for layer in ("conv2", "fc1")} == {
        layer: gone for layer, gone in lowest(net[1], lost(edit)).items() if gone
    }
    with pytest.raises(ValueError, match="criterion must be left out where scores are importances .* got 'l1'"):
        cut(net, ratio=0.5, criterion="l1")
    with pytest.raises(ValueError, match="layer 'conv2' has 64 components, its scores 3"):
        cut(net, {"conv2": torch.ones(3)}, ratio=0.5)
    with pytest.raises(ValueError, match="importances must not be NaN, layer 'conv2' has 1 of 64, .* component 0"):
        cut(net, {"conv2": torch.tensor([torch.nan] + 63 * [0.0])}, ratio=0.5)
    with pytest.raises(ValueError, match=r"layer 'conv2' has shape \(64, 10\)"):
        cut(net, {"conv2": torch.ones(64, 10)}, ratio=0.5)


@pytest.mark.parametrize("wrong", [[0.0] * 64, None, 0.5], ids=["list", "None", "number"])
def test_importances_that_are_no_tensors(net, wrong):
    with pytest.raises((TypeError, ValueError), match=r"^prune: "):
        cut(net, {"conv2": wrong}, ratio=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "exactly one of ratio, global_ratio, threshold, parameters, macs, latency or budget must be given",
        ),
        ({"ratio": 0.5, "macs": 0.5}, "exactly one of .* must be given, got ratio=0.5, macs=0.5"),
        ({"ratio": {"conv9": 0.5}}, "ratio must name layers that scores holds, 'conv9' is none of"),
        ({"ratio": {"conv1": 1.5}}, r"ratio\['conv1'\] must be a number in \[0, 1\), got 1.5"),
        ({"ratio": 0.5, "floor": {"conv9": 2}}, "floor must name layers that scores holds, 'conv9' is none of"),
        ({"ratio": 0.5, "floor": 0}, "floor must be .* got 0"),
        ({"ratio": 0.5, "floor": {"conv1": 0}}, r"floor\['conv1'\] must be .* got 0"),
        ({"ratio": 0.5, "ignore": ["conv9"]}, "ignore must name layers that scores holds, 'conv9' is none of"),
        ({"ratio": 0.5, "layers": ["conv9"]}, "layers must name layers that scores holds, 'conv9' is none of"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be .* got 0"),
        ({"ratio": 0.5, "steps": 0}, "steps must be .* got 0"),
        ({"ratio": 0.5, "rescore": len}, "rescore needs steps above 1, got steps=1"),
        (
            {"global_ratio": 0.5, "across": "sum"},
            "across must be one of 'auto', 'divergence', 'none', 'mean', 'max', 'rank', got 'sum'",
        ),
        ({"ratio": 0.5, "components": "rows"}, "components must be one of .* got 'rows'"),
        ({"ratio": 0.5, "components": ()}, "components must name at least one of"),
        ({"global_ratio": 1.0}, r"global_ratio must be a number in \[0, 1\), got 1.0"),
        ({"threshold": float("nan")}, "threshold must be a number, got nan"),
        ({"parameters": 1.5}, r"parameters must be an integer number of parameters or a share in \(0, 1\), got 1.5"),
        ({"macs": -1}, r"macs must be an integer number .* got -1"),
        ({"ratio": 0.5, "steps": 2, "layers": ["conv1"], "ignore": ["conv1"]}, "no layer can be pruned"),
    ],
    ids=str,
)
def test_bad_options(net, options, message):
    with pytest.raises(ValueError, match=f"prune: {message}"):
        cut(net, **options)


@pytest.mark.parametrize("criterion", ["max", "mean", "min"])
def test_criteria_of_scores_need_no_data(criterion, trained, digit_scores):
    """Also "mean", which a repair that needs data is called, too."""
    edit = prune(trained[0], digit_scores, ratio=0.5, criterion=criterion, layers=["fc1"], example_inputs=X)
    lowest = digit_scores.reduce(criterion)["fc1"].argsort(stable=True)[:32]
    assert edit.recipe.components["fc1"] == sorted(lowest.tolist())


def test_all_kinds_beside_outputs(net):
    every, outputs = (cut(net, ratio=0.3, components="all", keep_outputs=keep) for keep in (True, False))
    assert outputs.recipe.settings["components"] == [*every.recipe.settings["components"], "outputs"]
    assert outputs.recipe.components == every.recipe.components  # this network gives its logits alone


def test_an_unknown_criterion(trained, digit_scores):
    with pytest.raises(ValueError, match="prune: criterion must be one of .* got 'taylor'"):
        prune(trained[0], digit_scores, ratio=0.5, criterion="taylor", example_inputs=X)


@pytest.mark.parametrize(
    "budget",
    [
        {"ratio": 0.5},
        {"ratio": {"conv2": 0.7, "fc1": 0.3}},
        {"global_ratio": 0.37, "across": "none"},
        {"threshold": 90},
    ],
    ids=str,
)
def test_steps_remove_what_one_step_does(net, budget):
    """Where nothing is scored anew; and one recipe says it all."""
    model = net[0]
    once, stepwise = cut(net, **budget), cut(net, steps=3, **budget)
    assert {layer: gone for layer, gone in stepwise.recipe.components.items() if gone} == {
        layer: gone for layer, gone in once.recipe.components.items() if gone
    }
    assert left(once) == left(stepwise)
    assert same_state(once.model, stepwise.model)
    name = next(iter(budget))
    assert stepwise.recipe.settings[name] == budget[name]
    assert stepwise.recipe.settings["steps"] == 3
    assert (stepwise.macs_before, stepwise.macs_after) == (once.macs_before, once.macs_after)
    assert same_state(stepwise.recipe.undo(stepwise.model), model)


@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_steps_meet_a_target(net, budget):
    once, stepwise = (cut(net, across="none", steps=steps, **{budget: 0.4}) for steps in (1, 3))
    most = 0.4 * COUNT[budget](net[0])
    assert COUNT[budget](stepwise.model) <= most
    assert stepwise.recipe.components == once.recipe.components


def test_the_recipe_of_steps_says_how_close_they_came(net):
    edit = cut(net, parameters=0.4, steps=3)
    whole = count_parameters(net[0])
    described = {"asked": math.floor(0.4 * whole), "reached": count_parameters(edit.model), "met": True}
    assert edit.recipe.settings["budget"] == described
    with pytest.warns(UserWarning, match="prune: parameters: 1 asked, .* reached: every layer is at its floor"):
        edit = cut(net, parameters=1, steps=3, floor=4)
    assert left(edit) == dict.fromkeys(WIDTHS, 4)
    assert edit.recipe.settings["budget"] == {"asked": 1, "reached": count_parameters(edit.model), "met": False}


def test_a_last_step_may_have_nothing_left_to_remove(net):
    once, stepwise = (cut(net, ratio=0.02, steps=steps) for steps in (1, 3))
    assert left(once) == {"conv1": 31, "conv2": 62, "conv3": 62, "fc1": 62}
    assert left(stepwise) == left(once)


@pytest.mark.parametrize("name", ["ratio", "global_ratio", "parameters", "macs", "threshold"])
def test_steps_tell_a_bad_budget_as_one_step_does(net, name):
    for value in ("0.3", True, -0.5, 1.5) if name != "threshold" else ("0.3", True):
        found = []
        for steps in (1, 2):
            with pytest.raises(ValueError, match=f"prune: {name} must be") as caught:
                cut(net, steps=steps, **{name: value})
            found.append(str(caught.value))
        assert found[0] == found[1]


def test_steps_score_anew(net):
    sizes, inner = [], []

    def rescore(model):
        sizes.append(count_parameters(model))
        inner.append({layer: model.get_submodule(layer).weight.detach().flatten(1).norm(dim=1) for layer in WIDTHS})
        return inner[-1]

    edit = cut(net, ratio=0.5, steps=3, rescore=rescore)
    assert len(sizes) == 2
    assert count_parameters(net[0]) > sizes[0] > sizes[1] > count_parameters(edit.model)
    assert left(edit) == {layer: width // 2 for layer, width in WIDTHS.items()}
    assert edit.recipe.settings["rescored"] is True
    # The first third by the importances given, the rest by those of what was left then.
    for layer, values in net[1].items():
        first = values.argsort()[: math.ceil(WIDTHS[layer] / 6)].tolist()
        assert set(first) <= set(edit.recipe.components[layer])
    assert edit.recipe.components != lowest(net[1], lost(edit))
    kept = [index for index in range(64) if index not in edit.recipe.components["fc1"]]
    second = sorted(set(range(64)) - set(net[1]["fc1"].argsort()[:11].tolist()))
    weakest = {second[index] for index in inner[0]["fc1"].argsort()[:11].tolist()}
    assert not weakest & set(kept)


@pytest.mark.parametrize("kinds", [("scores", "importances"), ("importances", "scores")], ids=str)
def test_steps_score_anew_in_another_way(kinds):
    """First by scores and then by importances of one's own, or the other way round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 6)).eval()
    x, y = torch.randn(40, 5), torch.arange(40) % 2

    def judge(kind, model):
        if kind == "scores":
            return score(collect_moments(model, [(x, y)], 2))
        return {"0": model[0].weight.detach().norm(dim=1)}

    first = judge(kinds[0], model)
    options = {"ratio": 0.5, "example_inputs": x[:2], "layers": ["0"], "steps": 2}
    edit = prune_with(model, first, rescore=lambda smaller: judge(kinds[1], smaller), **options)
    assert edit.model[0].out_features == 6


def test_steps_with_scores_and_repair(trained, digit_scores, tmp_path):
    """Scores of what is left, a repair after each step, and a recipe that repeats and undoes it all."""
    model, train, _ = trained
    batches = [train.tensors[0][:200]]
    once = prune(model, digit_scores, ratio=0.5, criterion="max", example_inputs=X)
    edit = iterative_prune(model, digit_scores, ratio=0.5, criterion="max", example_inputs=X, data=batches, steps=2)
    assert edit.recipe.components == once.recipe.components
    assert edit.recipe.settings["repair"] == "least_squares"
    assert not same_state(edit.model, once.model)
    recipe = Recipe.load(edit.recipe.save(tmp_path / "recipe"))
    fresh = recipe.apply(copy.deepcopy(model))
    assert same_state(fresh.model, edit.model)
    assert same_state(fresh.recipe.undo(fresh.model), model)
    assert same_state(edit.recipe.undo(edit.model), model)


def test_no_warning_where_all_went_as_asked(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for budget in ({"ratio": 0.5}, {"global_ratio": 0.5}, {"threshold": 50}, {"parameters": 0.5}, {"macs": 0.5}):
            cut(net, **budget)
