"""Fidelity: identities, what one pass collects, and how it merges, is saved and goes on."""

import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from discedit import zoo
from discedit.fidelity import (
    SecondMoments,
    collect_second_moments,
    compensation,
    greedy,
    singleton_fidelity,
    subset_fidelity,
    top_k,
)
from discedit.moments import positions


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=(1, 0), dilation=(1, 2)), nn.ReLU(),
        nn.Conv2d(6, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    ).eval().double()  # fmt: skip


def images(number=40):
    torch.manual_seed(1)
    return torch.randn(number, 3, 9, 11).double() + 0.5, torch.arange(number) % 4


def loader(number=40, size=16):
    return DataLoader(TensorDataset(*images(number)), batch_size=size)


def contributions(layer, x):
    """A_ci of a layer, by running it on one channel at a time: (outputs, channels, samples x positions)."""
    parts = []
    for channel in range(x.shape[1] if isinstance(layer, nn.Conv2d) else x.shape[-1]):
        alone = torch.zeros_like(x)
        if isinstance(layer, nn.Conv2d):
            alone[:, channel] = x[:, channel]
            out = functional.conv2d(alone, layer.weight, None, layer.stride, layer.padding, layer.dilation)
            parts.append(out.transpose(0, 1).flatten(1))
        else:
            alone[..., channel] = x[..., channel]
            parts.append(functional.linear(alone, layer.weight).flatten(0, -2).T)
    return torch.stack(parts, 1).detach()


def inputs_of(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


LAYERS = ("0", "3", "5", "9")


@pytest.fixture(scope="module")
def whole():
    return collect_second_moments(network(), loader(), positions=None)


@pytest.fixture(scope="module")
def single():
    return collect_second_moments(network(), loader(), positions=None, kind="singleton")


def direct(name, subset, centred=False):
    """Fidelity and factors by least squares on the contributions themselves."""
    model = network()
    a = contributions(model.get_submodule(name), inputs_of(model, name, images()[0]))
    if centred:
        a = a - a.mean(2, keepdim=True)
    y = a.sum(1)
    factors = torch.stack([torch.linalg.lstsq(a[c, subset].T, y[c, :, None]).solution[:, 0] for c in range(len(y))])
    left = y - (factors[:, :, None] * a[:, subset]).sum(1)
    return 1 - left.square().sum(1) / y.square().sum(1), factors


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_factors_and_fidelities_are_those_of_least_squares(whole, name, centred):
    channels = whole[name].channels
    subset = sorted(random.Random(name).sample(range(channels), max(1, channels // 2)))
    fidelity, factors = direct(name, subset, centred)
    found = subset_fidelity(whole, name, subset, centred=centred, per_output=True)
    assert torch.allclose(found, fidelity, rtol=0, atol=1e-8)
    assert torch.allclose(compensation(whole, name, subset, centred=centred), factors, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_singletons_are_correlations_of_contribution_and_output(whole, single, name):
    model = network()
    a = contributions(model.get_submodule(name), inputs_of(model, name, images()[0]))
    y = a.sum(1, keepdim=True)
    expected = ((a * y).sum(2).square() / (a.square().sum(2) * y.square().sum(2))).nan_to_num(0.0)  # dead channels
    for moments in (whole, single):
        found = singleton_fidelity(moments, name, per_output=True)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert torch.allclose(singleton_fidelity(moments, name), expected.mean(0), rtol=0, atol=1e-12)
    alone = subset_fidelity(whole, name, [1], per_output=True)
    assert torch.allclose(alone, expected[:, 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_fidelity_is_one_for_all_none_for_none_and_grows_along_chains(whole, name):
    channels = whole[name].channels
    everything = subset_fidelity(whole, name, range(channels), per_output=True)
    assert torch.allclose(everything, torch.ones_like(everything), rtol=0, atol=1e-9)
    assert torch.equal(subset_fidelity(whole, name, [], per_output=True), torch.zeros_like(everything))
    assert compensation(whole, name, range(channels)).sub(1).abs().max() < 1e-9
    for seed in range(3):
        order = random.Random(seed).sample(range(channels), channels)
        chain = torch.stack([subset_fidelity(whole, name, order[:k], per_output=True) for k in range(channels + 1)])
        assert (chain.diff(dim=0) >= -1e-9).all()


def test_top_k_is_best_where_contributions_are_uncorrelated():
    torch.manual_seed(0)
    linear = nn.Linear(6, 3, bias=False).double()
    x, _ = torch.linalg.qr(torch.randn(64, 6).double())  # orthogonal columns
    moments = collect_second_moments(linear, [x * torch.arange(1.0, 7.0)], positions=None)
    values = singleton_fidelity(moments, "")
    together = [subset_fidelity(moments, "", [i, j, k]) for i in range(6) for j in range(i) for k in range(j)]
    best = subset_fidelity(moments, "", top_k(values, 3))
    assert math.isclose(best, max(together), abs_tol=1e-9)
    assert math.isclose(best, values[top_k(values, 3)].sum(), abs_tol=1e-9)


def test_greedy_says_what_its_choice_reaches(whole):
    channels = whole["3"].channels
    order, reached = greedy(whole, "3", channels)
    assert sorted(order) == list(range(channels))
    for k in (1, 3, channels):
        assert math.isclose(reached[k - 1], subset_fidelity(whole, "3", order[:k]), abs_tol=1e-8)
    first = singleton_fidelity(whole, "3")
    assert order[0] == int(first.argmax())
    assert greedy(whole, "3", 0)[0] == []


def test_several_readers_count_by_their_outputs():
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 2).double(), nn.Linear(5, 6).double()

        def forward(self, x):
            return self.a(x).sum(1) + self.b(x).sum(1)

    moments = collect_second_moments(Two(), [torch.randn(30, 5).double()])
    each = [singleton_fidelity(moments, name, per_output=True) for name in "ab"]
    assert torch.allclose(singleton_fidelity(moments, ["a", "b"]), torch.cat(each).mean(0))
    pair = [subset_fidelity(moments, name, [0, 3], per_output=True) for name in "ab"]
    assert torch.allclose(subset_fidelity(moments, ["a", "b"], [0, 3]), torch.cat(pair).mean())
    order, reached = greedy(moments, ["a", "b"], 5)
    assert math.isclose(reached[2], subset_fidelity(moments, ["a", "b"], order[:3]), abs_tol=1e-8)


def test_silent_channels_and_outputs_are_nothing():
    linear = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        linear.weight[1] = 0  # an output that gives nothing
    x = torch.randn(50, 4).double()
    x[:, 2] = 0  # a channel that says nothing
    x[:, 3] = x[:, 0]  # and one twice
    moments = collect_second_moments(linear, [x])
    values = singleton_fidelity(moments, "", per_output=True)
    assert values.isfinite().all()
    assert not values[1].any()
    assert not values[:, 2].any()
    assert torch.allclose(singleton_fidelity(moments, ""), values[[0, 2]].mean(0))
    assert math.isclose(subset_fidelity(moments, "", range(4)), 1, abs_tol=1e-9)
    assert compensation(moments, "", [0, 1, 2])[:, 2].eq(1).all()
    order, reached = greedy(moments, "", 4)
    assert len(set(order)) == 4
    assert math.isclose(reached[-1], 1, abs_tol=1e-9)


def same(first, second, tolerance=0.0):
    assert list(first) == list(second)
    assert first.settings == second.settings
    assert first.samples == second.samples
    for layer in first:
        for (name, mine), other in zip(first[layer].named().items(), second[layer].named().values(), strict=True):
            scale = 1 + float(mine.abs().max())
            assert float((mine - other).abs().max()) <= tolerance * scale, (layer, name)


@pytest.mark.parametrize("kind", ["full", "singleton"])
@pytest.mark.parametrize("number", [None, 4])
def test_a_stream_gives_what_one_batch_gives(kind, number, tmp_path):
    options = {"kind": kind, "positions": number}
    together = collect_second_moments(network(), loader(size=40), **options)
    same(collect_second_moments(network(), loader(size=7), **options), together, 1e-12)
    parts = [collect_second_moments(network(), [images()[0][k::3]], **options) for k in range(3)]
    same(parts[2].merge(parts[0]).merge(parts[1]), together, 1e-12)
    together.save(tmp_path / "m.safetensors")
    same(SecondMoments.load(tmp_path / "m.safetensors"), together)


@pytest.mark.parametrize("kind", ["full", "singleton"])
@pytest.mark.parametrize("number", [None, 4])
def test_a_batch_may_be_taken_in_parts(kind, number, monkeypatch):
    options = {"kind": kind, "positions": number}
    whole = collect_second_moments(network(), loader(size=40), **options)
    monkeypatch.setattr(positions, "CHUNK", 1)
    same(collect_second_moments(network(), loader(size=40), **options), whole, 1e-12)


def test_what_is_merged_stays_what_it_was():
    first, second = (collect_second_moments(network(), [images()[0][k::2]]) for k in range(2))
    before = {name: tensor.clone() for name, tensor in second["3"].named().items()}
    total = SecondMoments("full", positions=49).merge(second).merge(first)
    total.update("3", first["3"])
    assert all(torch.equal(before[name], tensor) for name, tensor in second["3"].named().items())
    assert total["3"].count == second["3"].count + 2 * first["3"].count


def test_positions_are_a_sample_of_all():
    x = torch.randn(64, 3, 32, 32)
    model = nn.Conv2d(3, 5, 3, padding=1)
    every, few = (singleton_fidelity(collect_second_moments(model, [x], positions=p), "") for p in (None, 64))
    assert collect_second_moments(model, [x], positions=64)[""].count == 64 * 64
    assert torch.allclose(every, few, atol=0.05)


def test_only_the_classes_asked_for_count():
    x, y = images()
    found = collect_second_moments(network(), loader(size=7), classes=[1, 3], num_classes=4)
    some = collect_second_moments(network(), [x[y % 2 == 1]])
    assert found.samples == 20
    assert found.classes == [1, 3]
    for layer in found:
        assert torch.allclose(found[layer].scatter, some[layer].scatter)
    with pytest.raises(ValueError, match="loader must give samples of \\[2\\]"):
        collect_second_moments(network(), [(x, y * 0)], classes=[2], num_classes=4)


def test_a_pass_goes_on_from_its_checkpoint(tmp_path):
    class Stop(Exception):
        pass

    data = TensorDataset(*images())

    class Ending(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            if index == 25 and not (tmp_path / "again").exists():
                raise Stop
            return data[index]

    def run():
        return collect_second_moments(
            network(), DataLoader(Ending(), batch_size=5), checkpoint=tmp_path / "state", checkpoint_every=0
        )

    with pytest.raises(Stop):
        run()
    (tmp_path / "again").touch()
    same(run(), collect_second_moments(network(), loader(size=5)))


def test_layers_that_cannot_be_read_are_named():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)).eval()
    moments = collect_second_moments(model, [torch.randn(2, 4, 8, 8)])
    assert list(moments) == ["1"]
    assert "groups" in moments.skipped["0"]
    with pytest.raises(ValueError, match="layers must name layers that can be read, '0' cannot: .* groups"):
        collect_second_moments(model, [torch.randn(2, 4, 8, 8)], layers=["0"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: collect_second_moments(network(), loader(), kind="half"),
            "^collect_second_moments: kind must be one of",
        ),
        (
            lambda m: collect_second_moments(network(), loader(), positions=0),
            "^collect_second_moments: positions must be an int",
        ),
        (lambda m: collect_second_moments(network(), loader(), classes=[1]), "classes needs num_classes"),
        (
            lambda m: collect_second_moments(network(), loader(), layers=["x"]),
            "'x' cannot: it is none of the 11",
        ),
        (lambda m: collect_second_moments(network(), []), "loader must give at least one sample"),
        (lambda m: collect_second_moments(network(), [images()[0] * math.nan]), "layer '0': feature maps must be fin"),
        (lambda m: singleton_fidelity(m, "y"), "layers must name layers of the moments, 'y' is none"),
        (lambda m: singleton_fidelity(m, []), "layers must name at least one layer"),
        (lambda m: singleton_fidelity(m, ["0", "3"]), "must read the same channels"),
        (lambda m: subset_fidelity(m, "0", [3]), r"subset must hold channels in 0\.\.2, got 3"),
        (lambda m: subset_fidelity(m, "0", [1, 1]), "subset must name each channel once"),
        (lambda m: compensation(m, "0", [0], ridge=-1), "ridge must be a finite number of at least 0, got -1"),
        (lambda m: greedy(m, "0", 4), r"k must be an integer in 0\.\.3, got 4"),
        (lambda m: top_k(torch.rand(3), -1), r"k must be an integer in 0\.\.3, got -1"),
    ],
)
def test_errors_say_what_is_wrong(whole, call, message):
    with pytest.raises(ValueError, match=message):
        call(whole)


def test_the_kind_that_is_asked_for_is_needed(single):
    for ask in (lambda: subset_fidelity(single, "0", [0]), lambda: greedy(single, "0", 1)):
        with pytest.raises(ValueError, match="moments must be of kind \"full\", they are of kind 'singleton'"):
            ask()


def test_what_does_not_belong_together_is_not_merged(whole, single, tmp_path):
    other = network()
    with torch.no_grad():
        other[3].weight.mul_(2)
    with pytest.raises(ValueError, match="layer '3': both must be of one kind, and of a layer with the same weights"):
        SecondMoments().merge(whole).merge(collect_second_moments(other, loader(), positions=None))
    with pytest.raises(ValueError, match="other must have .*'full'.* it has .*'singleton'"):
        SecondMoments().merge(single)
    (tmp_path / "m.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="m.safetensors"):
        SecondMoments.load(tmp_path / "m.safetensors")


@pytest.mark.data
def test_on_a_real_network(cifar):
    model = zoo.cifar_resnet("resnet20")
    data = zoo.batches(zoo.cifar10("train", limit=256), 64)
    full, single = (collect_second_moments(model, data, kind=kind, positions=16) for kind in ("full", "singleton"))
    assert len(full) == 20
    assert full.samples == 256
    for layer in full:
        assert torch.allclose(singleton_fidelity(full, layer), singleton_fidelity(single, layer), atol=1e-4)
        _order, reached = greedy(full, layer, full[layer].channels)
        ranked = top_k(singleton_fidelity(full, layer), 3)
        assert reached[2] >= subset_fidelity(full, layer, ranked) - 1e-2
        assert reached[-1] > 1 - 1e-6
