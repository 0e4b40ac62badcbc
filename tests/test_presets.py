"""The published algorithms by name: what they select, and that the faults of the published scripts are not theirs."""

import doctest
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.tvsprune import ldiff
from benchmarks.tvsprune import tvsprune_iterative as iterative
from discedit import Recipe, collect_moments, ops, presets, prune, score, zoo
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.presets import DISCEDIT_SP, DISCEDIT_U, PRESETS, TVSPRUNE, WITNESSPRUNE, preset

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NORMS = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
PRUNING = [DISCEDIT_SP, WITNESSPRUNE, TVSPRUNE]
by_name = pytest.mark.parametrize("algorithm", PRUNING, ids=lambda algorithm: algorithm.name)


# ---- an oracle from samples, in NumPy and float64 ------------------------------------------------------------------


def fisher(one, two):
    laws = [np.stack([t, t**2]) for t in (one, two)]
    delta = laws[0].mean(1) - laws[1].mean(1)
    ratio = delta @ np.linalg.solve(sum(np.cov(law, bias=True) for law in laws), delta)
    return ratio / (2 + ratio)


def hellinger(one, two):
    var1, var2, delta = one.var(), two.var(), one.mean() - two.mean()
    overlap = math.sqrt(2 * math.sqrt(var1 * var2) / (var1 + var2)) * math.exp(-(delta**2) / (4 * (var1 + var2)))
    return 1 - overlap


def witness_published(one, two):
    f, g = np.exp(-one), np.exp(-two)
    return (f.mean() - g.mean()) ** 2 / (2 * ((f**2).mean() + (g**2).mean()))


ORACLES = {"fisher": fisher, "hellinger": hellinger, "witness_published": witness_published}
POOLS = {
    "sum": lambda maps: maps.sum((2, 3)),
    "mean": lambda maps: maps.mean((2, 3)),
    "l2": lambda maps: np.sqrt((maps**2).sum((2, 3))),
}


def expected(algorithm, maps, labels):
    """One number per channel, for bounds and statistics that do not see an offset: from maps without one."""
    bound, labels = ORACLES[algorithm.bound], labels.numpy()
    pooled = POOLS[algorithm.statistic](maps.double().numpy())
    classes = range(labels.max() + 1)
    values = []
    for t in pooled.T:
        laws = [t[labels == k] for k in classes]
        if algorithm.reduction == "pairwise_min":
            values.append(min(bound(laws[i], laws[k]) for i in classes for k in classes if i < k))
        else:
            best = {"min": min, "max": max}[algorithm.reduction]
            values.append(best(bound(laws[k], t[labels != k]) for k in classes))
    return torch.tensor(values, dtype=torch.float64)


def scored(algorithm, maps, labels, sizes=None, **overrides):
    """The preset's scores of given maps: those of a model that passes them on, in batches of the given sizes."""
    loader = list(zip(maps.split(sizes or len(maps)), labels.split(sizes or len(labels)), strict=True))
    classes = int(labels.max()) + 1
    return algorithm.score(nn.Sequential(nn.Identity()), loader, classes, layers=["0"], **overrides)


def reduced(algorithm, maps, labels, sizes=None, **overrides):
    return scored(algorithm, maps, labels, sizes, **overrides).reduce(algorithm.reduction)["0"]


def dyadic_maps(samples=90, channels=5, side=8, classes=3):
    """Maps whose values are multiples of 1/16, so that offsets are exact in float32; classes of unequal size."""
    generator = torch.Generator().manual_seed(3)
    labels = (torch.arange(samples) % (2 * classes)).clamp(max=classes - 1)
    level = torch.randn(samples, channels, 1, 1, generator=generator) * 0.3
    shift = labels.view(-1, 1, 1, 1) * torch.linspace(0.1, 0.6, channels).view(1, -1, 1, 1)
    maps = level + shift + 0.2 * torch.randn(samples, channels, side, side, generator=generator)
    return (maps * 16).round() / 16, labels


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---- the six faults of the scripts ---------------------------------------------------------------------------------


@by_name
def test_fault_1_a_large_offset_costs_nothing_in_float32(algorithm):
    maps, labels = dyadic_maps()
    truth = expected(algorithm, maps, labels)
    shifted = maps + 4096
    assert torch.equal(shifted - 4096, maps)  # the offset itself loses nothing
    ours = reduced(algorithm, shifted, labels)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-6)

    # The same with float32 sums, their squares and raw second powers is far off.
    s = shifted.sum((2, 3))
    z = torch.stack([s, s**2], -1)
    worst = 0.0
    for channel in range(z.shape[1]):
        laws = [z[labels == k, channel] for k in (0, 1)]
        delta = laws[0].mean(0) - laws[1].mean(0)
        cov = sum(law.T @ law / len(law) - torch.outer(law.mean(0), law.mean(0)) for law in laws)
        ratio = float(delta @ torch.linalg.lstsq(cov, delta[:, None]).solution[:, 0])
        t = maps.sum((2, 3)).double().numpy()[:, channel]
        exact = fisher(t[labels == 0], t[labels == 1])
        worst = max(worst, abs(ratio / (2 + ratio) - exact) if ratio > 0 else exact)
    assert worst > 0.1


@pytest.mark.parametrize("beyond", [-128, 128])
def test_fault_1_a_map_whose_sum_passes_88_under_the_exp_witness(beyond):
    """The bound does not see a factor of f: adding to t what float32 cannot take the exponential of changes nothing."""
    maps, labels = dyadic_maps(side=2)
    algorithm = replace(DISCEDIT_U, statistic="sum")
    truth = expected(algorithm, maps, labels)
    shifted = maps + beyond / 4  # four pixels
    sums = shifted.sum((2, 3))
    assert float(sums.abs().min()) > 88
    torch.testing.assert_close(reduced(algorithm, shifted, labels), truth, rtol=1e-9, atol=0)
    # What float32 makes of it: Inf / Inf, or 0 / 0.
    naive = torch.exp(-sums)
    assert not torch.isfinite((naive**2)[labels == 0].mean(0) / (naive**2).mean(0)).any()


def test_fault_1_a_norm_that_passes_88():
    maps, labels = dyadic_maps(side=1)
    maps = maps.abs() + 1  # one positive pixel is its own norm
    truth = expected(DISCEDIT_U, maps, labels)
    assert float(truth.min()) > 1e-4
    torch.testing.assert_close(reduced(DISCEDIT_U, maps + 128, labels), truth, rtol=1e-9, atol=0)


@pytest.mark.parametrize("algorithm", [DISCEDIT_SP, WITNESSPRUNE], ids=lambda algorithm: algorithm.name)
def test_fault_2_a_covariance_that_is_nearly_but_not_exactly_singular(algorithm):
    """On two points, s^2 is a function of s: the covariance has rank 1, and the score is that of s alone."""
    labels = torch.arange(60) % 2
    shares = (0.2, 0.7)
    high = torch.zeros(60, dtype=torch.bool)
    for k, share in enumerate(shares):
        own = (labels == k).nonzero()[:, 0]
        high[own[: round(share * len(own))]] = True
    s = torch.where(high, 10.3, 10.1)
    spread = sum(p * (1 - p) for p in shares)
    ratio = (shares[1] - shares[0]) ** 2 / spread
    ours = reduced(algorithm, s.view(-1, 1, 1, 1), labels)
    assert float(ours) == pytest.approx(ratio / (2 + ratio), abs=1e-6)

    z = torch.stack([s, s**2], -1)
    laws = [z[labels == k] for k in (0, 1)]
    cov = sum((law - law.mean(0)).T @ (law - law.mean(0)) / len(law) for law in laws)
    assert float(torch.linalg.det(cov)) != 0  # so that the scripts would not add their 1e-5
    delta = laws[0].mean(0) - laws[1].mean(0)
    naive = float(delta @ torch.linalg.inv(cov) @ delta)
    assert abs(naive / (2 + naive) - ratio / (2 + ratio)) > 1e-3


@pytest.mark.parametrize("algorithm", [*PRUNING, DISCEDIT_U], ids=lambda algorithm: algorithm.name)
def test_fault_3_every_sample_counts_once(algorithm):
    """Classes of unequal size, in batches that hold them unequally: the moments are those of the samples."""
    maps, labels = dyadic_maps()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(4))
    scores = scored(algorithm, maps[order], labels[order], [7, 40, 1, 30, 12])
    assert torch.equal(scores.counts, torch.bincount(labels))
    assert len(set(scores.counts.tolist())) > 1
    truth = expected(algorithm, maps, labels)
    torch.testing.assert_close(scores.reduce(algorithm.reduction)["0"], truth, rtol=1e-8, atol=1e-9)


def test_fault_4_nothing_is_removed_when_none_is_to_go(trained):
    model, train, _ = trained
    for algorithm, nothing in ((DISCEDIT_SP, {"ratio": 0}), (WITNESSPRUNE, {"ratio": 0}), (TVSPRUNE, {"threshold": 0})):
        scores = algorithm.score(model, zoo.batches(train), 10)
        edit = algorithm.prune(model, scores, example_inputs=X, **nothing)
        assert list(edit.recipe.components) == ["conv1", "conv2", "conv3", "fc1"]
        assert not any(edit.recipe.components.values())
        assert same_state(edit.model, model)


def test_fault_4_nothing_is_masked_where_nothing_tells_the_class(trained):
    model, train, _ = trained
    model = zoo.DigitsNet().eval()
    model.load_state_dict(trained[0].state_dict())
    nn.init.zeros_(model.bn3.weight)
    nn.init.zeros_(model.bn3.bias)
    scores = DISCEDIT_U.score(model, zoo.batches(train), 10)
    assert not scores["conv3"].any()
    edit = DISCEDIT_U.unlearn(model, scores, classes=[3], layers=["conv2", "conv3"])
    assert {layer: len(channels) for layer, channels in edit.recipe.components.items()} == {"conv2": 3}
    assert torch.equal(edit.model.conv3.weight, model.conv3.weight)


@pytest.mark.parametrize("algorithm", [*PRUNING, DISCEDIT_U], ids=lambda algorithm: algorithm.name)
def test_fault_5_moments_come_from_all_batches(algorithm):
    maps, labels = dyadic_maps()
    whole = reduced(algorithm, maps, labels)
    for sizes in ([9] * 10, [60, 1, 1, 28], [1] * 90):
        torch.testing.assert_close(reduced(algorithm, maps, labels, sizes), whole, rtol=1e-9, atol=1e-12)
    first = reduced(algorithm, maps[:18], labels[:18])
    assert float((first - whole).abs().max()) > 0.01


@pytest.mark.parametrize("statistic", [("mean", "rms"), ("mean", "rms", "max")], ids=len)
def test_fault_6_minimax_runs_in_several_dimensions(statistic):
    with pytest.raises(TypeError):
        np.linalg.matrix_power(np.eye(2), 0.5)  # the square root of the scripts
    maps, labels = dyadic_maps(channels=3)
    algorithm = replace(DISCEDIT_SP, statistic=statistic, witness="vector", bound="minimax")
    ours = scored(algorithm, maps, labels)["0"]
    features = ops.pool(maps, statistic=statistic).numpy()
    for channel in range(features.shape[1]):
        for cls in range(3):
            laws = [features[(labels == cls).numpy(), channel], features[(labels != cls).numpy(), channel]]
            assert float(ours[channel, cls]) == pytest.approx(best_direction(*laws), rel=2e-3)
    published = scored(replace(algorithm, bound="minimax_published"), maps, labels)["0"]
    k = (ours / (1 - ours)).sqrt()
    torch.testing.assert_close(published, (k / (math.sqrt(2) + k)) ** 2, rtol=1e-6, atol=1e-9)


def best_direction(one, two):
    """k^2 / (1 + k^2) at the best of many directions; of random ones first, then of ever nearer ones."""
    unit = np.concatenate([one, two]).std(0)
    one, two = one / unit, two / unit
    delta, cov1, cov2 = one.mean(0) - two.mean(0), np.cov(one.T, bias=True), np.cov(two.T, bias=True)
    generator = np.random.default_rng(0)
    best, centre, radius = 0.0, np.linalg.solve(cov1 + cov2, delta), 1.0
    for _ in range(12):
        u = centre + radius * np.linalg.norm(centre) * generator.standard_normal((4000, len(delta)))
        spread = sum(np.sqrt(np.einsum("ni,ij,nj->n", u, cov, u)) for cov in (cov1, cov2))
        ratio = np.abs(u @ delta) / spread
        if ratio.max() > best:
            best, centre = ratio.max(), u[ratio.argmax()]
        radius /= 2
    return best**2 / (1 + best**2)


# ---- what is selected ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tv_scores(trained):
    return TVSPRUNE.score(trained[0], zoo.batches(trained[1]), 10)


def hidden(model, components):
    """The model with the components zeroed behind their norms."""
    copy = zoo.DigitsNet().eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer, channels in components.items():
            for name in (layer, NORMS.get(layer)):
                for parameter in copy.get_submodule(name).parameters() if name else ():
                    parameter[channels] = 0
    return copy


def assert_same_function(edit, model):
    with torch.no_grad():
        torch.testing.assert_close(edit.model(X), hidden(model, edit.recipe.components)(X), rtol=1e-4, atol=1e-5)


def test_names():
    assert list(PRESETS) == ["discedit_sp", "discedit_u", "witnessprune", "tvsprune"]
    for name, algorithm in PRESETS.items():
        assert preset(name) is algorithm
        assert algorithm.name == name
    with pytest.raises(ValueError, match=r"preset: name must be one of 'discedit_sp', .*, got 'tvs'"):
        preset("tvs")
    assert doctest.testmod(presets) == (0, 1)  # none of one example failed


def test_a_preset_is_checked():
    with pytest.raises(ValueError, match="Preset: selection must be one of 'lowest', 'below', 'highest', got 'best'"):
        replace(TVSPRUNE, selection="best")
    for amount in (1, -0.1, math.nan, "0.5", True):
        with pytest.raises(ValueError, match=r"Preset: amount must be a number in \[0, 1\), got"):
            replace(TVSPRUNE, amount=amount)
    with pytest.raises(AttributeError):
        TVSPRUNE.bound = "fisher"


def test_scores_are_those_of_the_public_functions(trained):
    model, train, _ = trained
    for algorithm in PRESETS.values():
        scores = algorithm.score(model, zoo.batches(train), 10)
        options = {"statistic": algorithm.statistic, "witness": algorithm.witness, "scale": algorithm.scale}
        moments = collect_moments(model, zoo.batches(train), 10, read="norm", **options)
        plain = score(moments, bound=algorithm.bound, witness=algorithm.witness)
        assert scores.settings == plain.settings
        assert scores.bound == algorithm.bound
        for layer, values in plain.items():
            assert torch.equal(scores[layer], values)
    other = TVSPRUNE.score(model, zoo.batches(train), 10, bound="fisher", statistic="max", labels="predicted")
    assert (other.bound, other.statistic, other.witness) == ("fisher", "max", "linear")


def test_lowest_is_prune_with_the_reduction_of_the_preset(trained):
    model, train, _ = trained
    for algorithm in (DISCEDIT_SP, WITNESSPRUNE):
        scores = algorithm.score(model, zoo.batches(train), 10)
        edit = algorithm.prune(model, scores, example_inputs=X)
        plain = prune(model, scores, ratio=0.5, criterion=algorithm.reduction, example_inputs=X)
        assert edit.recipe.components == plain.recipe.components
        assert same_state(edit.model, plain.model)
        assert {**plain.recipe.settings, "preset": algorithm.name} == edit.recipe.settings
    fewer = DISCEDIT_SP.prune(model, scores, example_inputs=X, ratio=0.1, layers=["conv2"], criterion="max")
    assert {layer: len(channels) for layer, channels in fewer.recipe.components.items()} == {"conv2": 7}


@pytest.mark.parametrize("threshold", [None, 0.01, 1.0])
def test_below_takes_what_scores_below_the_threshold(trained, tv_scores, threshold, tmp_path):
    model = trained[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit = TVSPRUNE.prune(model, tv_scores, example_inputs=X, threshold=threshold)
    taken = 0
    for layer, values in tv_scores.reduce("pairwise_min").items():
        limit = 0.5 * values.mean() if threshold is None else threshold
        below = (values < limit).nonzero()[:, 0].tolist()
        if len(below) == len(values):  # the best one stays
            below.remove(int(values.argmax()))
        assert edit.recipe.components[layer] == below
        assert edit.model.get_submodule(layer).weight.shape[0] == len(values) - len(below)
        taken += len(below)
    assert taken > 0
    assert_same_function(edit, model)
    assert edit.recipe.settings["preset"] == "tvsprune"
    assert edit.recipe.settings["threshold"] == threshold
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # One recipe for all layers: it survives a file, applies to a fresh model, and is undone bit for bit.
    recipe = Recipe.load(edit.recipe.save(tmp_path / "edit"))
    assert same_state(recipe.apply(model).model, edit.model)
    assert same_state(edit.recipe.undo(edit.model), model)


class Branches(nn.Module):
    """Shared channels (a and b), shuffled ones (c), and a layer that reads two layers at once (f: d and e)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.d, self.e, self.f = nn.Conv2d(8, 6, 3), nn.Conv2d(8, 5, 3), nn.Conv2d(11, 7, 1)
        self.head = nn.Linear(7, 10)

    def forward(self, x):
        x = self.a(x)
        x = self.c((x + self.b(x)).relu()).relu()
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        x = torch.cat([self.d(x), self.e(x)], 1).relu()
        return self.head(self.f(x).relu().mean((2, 3)))


def test_below_leaves_what_cannot_be_pruned_and_joins_the_rest(trained, tmp_path):
    model, train = Branches().eval(), trained[1]
    scores = TVSPRUNE.score(model, zoo.batches(train), 10)
    x = train.tensors[0][:5]
    edit = TVSPRUNE.prune(model, scores, example_inputs=x, threshold=1)
    assert {layer: len(channels) for layer, channels in edit.recipe.components.items()} == {"d": 5, "e": 4, "f": 6}
    assert edit.model.f.in_channels == 2
    assert "shares its channels" in edit.skipped["a"]
    assert "shares its channels" in edit.skipped["b"]
    assert edit.skipped["c"].startswith("the model does not run without its channels")
    zeroed = Branches().eval()
    with torch.no_grad():
        for layer, channels in edit.recipe.components.items():
            for parameter in zeroed.get_submodule(layer).parameters():
                parameter[channels] = 0
        torch.testing.assert_close(edit.model(x), zeroed(x), rtol=1e-4, atol=1e-5)
    recipe = Recipe.load(edit.recipe.save(tmp_path / "edit"))
    assert same_state(recipe.apply(model).model, edit.model)
    restored = edit.recipe.undo(edit.model)
    assert same_state(restored, model)
    assert restored.f.in_channels == 11
    for layer in ("a", "c"):
        with pytest.raises(ValueError, match=f"layer '{layer}' cannot be pruned"):
            TVSPRUNE.prune(model, scores, example_inputs=x, threshold=1, layers=[layer])
    with pytest.raises(ValueError, match="data must give at least one batch"):
        TVSPRUNE.prune(model, scores, example_inputs=x, threshold=1, data=[], repair="batchnorm")


def test_a_repair_of_a_preset(trained, tv_scores):
    model, train, _ = trained
    some = {"example_inputs": X, "layers": ["conv2", "conv3"]}
    edit = TVSPRUNE.prune(model, tv_scores, data=[train.tensors[0][:300]], **some)
    plain = TVSPRUNE.prune(model, tv_scores, **some)
    assert list(plain.recipe.components) == some["layers"]
    assert edit.recipe.components == plain.recipe.components
    assert not torch.equal(edit.model.bn2.running_var, plain.model.bn2.running_var)
    assert same_state(edit.recipe.undo(edit.model), model)


def test_highest_masks_the_best_of_each_layer(trained):
    model, train, test = trained
    scores = DISCEDIT_U.score(model, zoo.batches(train), 10)
    edit = DISCEDIT_U.unlearn(model, scores, classes=[4, 7], fraction=0.1)
    assert list(edit.recipe.components) == ["conv3", "fc1"]  # the last third
    for layer, channels in edit.recipe.components.items():
        best = {c for cls in (4, 7) for c in scores[layer][:, cls].argsort(descending=True)[:6].tolist()}
        assert channels == sorted(best)
    assert same_state(edit.model, hidden(model, edit.recipe.components))
    assert edit.recipe.settings["classes"] == [4, 7]
    assert edit.recipe.settings["sign"] == "any"
    assert same_state(edit.recipe.undo(edit.model), model)
    forgot = DISCEDIT_U.unlearn(model, scores, classes=[0], fraction=0.3)
    after = accuracy_per_class(forgot.model, zoo.batches(test), 10)
    assert after[0] < 0.6 < after[1:].mean()


def test_each_selection_has_its_method(trained, digit_scores):
    model = trained[0]
    with pytest.raises(ValueError, match=r"Preset.prune: selection must be .*, preset 'discedit_u' has 'highest'"):
        DISCEDIT_U.prune(model, digit_scores, example_inputs=X)
    with pytest.raises(ValueError, match=r"Preset.unlearn: selection must be 'highest', preset 'tvsprune' has 'below'"):
        TVSPRUNE.unlearn(model, digit_scores, classes=[1])
    with pytest.raises(ValueError, match=r"ratio must be left out for the selection 'below', got 0.5"):
        TVSPRUNE.prune(model, digit_scores, example_inputs=X, ratio=0.5)
    with pytest.raises(ValueError, match=r"threshold must be left out for the selection 'lowest', got 0.5"):
        DISCEDIT_SP.prune(model, digit_scores, example_inputs=X, threshold=0.5)
    for threshold in (-0.1, 1.1, math.nan, "low", True):
        with pytest.raises(ValueError, match=r"Preset.prune: threshold must be a number in \[0, 1\], got"):
            TVSPRUNE.prune(model, digit_scores, example_inputs=X, threshold=threshold)


# ---- LDIFF and the iterative version -------------------------------------------------------------------------------


def test_ldiff_is_the_distance_of_the_two_kinds(tv_scores):
    values = tv_scores.reduce("pairwise_min")
    middle = float(values["conv2"].median())
    mixed = ldiff(tv_scores, middle)
    for layer, own in values.items():
        high, low = own[own >= middle], own[own < middle]
        both = len(high) and len(low)
        assert mixed[layer] == pytest.approx(float(high.mean() - low.mean()) if both else 0.0)
    assert mixed["conv2"] > 0
    assert set(ldiff(tv_scores, 1.0).values()) == {0.0}  # no layer holds a perfect component: no mixture
    assert ldiff(tv_scores, 0.5, reduction="max") != ldiff(tv_scores, 0.5)
    for threshold in (-0.1, 2, math.nan, None):
        with pytest.raises(ValueError, match=r"ldiff: threshold must be a number in \[0, 1\], got"):
            ldiff(tv_scores, threshold)


def test_iterative_prunes_until_the_accuracy_falls(trained, tv_scores, tmp_path):
    model, train, test = trained
    data, held_out = zoo.batches(train, 1200), zoo.batches(test, 600)
    seen = []

    def accuracy(candidate):
        seen.append(float(accuracy_per_class(candidate, held_out, 10).mean()))
        return seen[-1]

    start = replace(TVSPRUNE, amount=0.3)
    # Just too high for the first round; what the machine's training has made of the network decides where that is.
    at_once = start.prune(model, tv_scores, example_inputs=X).model
    floor = float(accuracy_per_class(at_once, held_out, 10).mean()) + 0.02
    assert floor < accuracy(model) - 0.1
    edit = iterative(model, data, 10, example_inputs=X, accuracy=accuracy, floor=floor, step=0.1, algorithm=start)
    assert float(accuracy_per_class(edit.model, held_out, 10).mean()) >= floor
    kept = edit.recipe.settings["rounds"]
    assert kept == sum(value >= floor for value in seen[2:])
    assert kept >= 2
    assert seen[2] < floor  # the first round went too far, and was dropped
    once = replace(TVSPRUNE, amount=0.1).prune(model, tv_scores, example_inputs=X)
    assert edit.parameters_after < once.parameters_after < edit.parameters_before
    assert edit.macs_after < once.macs_after < edit.macs_before
    # The components are numbered as in the original model, and the recipe is one edit of it.
    assert_same_function(edit, model)
    recipe = Recipe.load(edit.recipe.save(tmp_path / "edit"))
    assert same_state(recipe.apply(model).model, edit.model)
    assert same_state(edit.recipe.undo(edit.model), model)


def test_iterative_ends_when_the_accuracy_never_falls(trained):
    model, train, _ = trained
    edit = iterative(model, zoo.batches(train, 1200), 10, example_inputs=X, accuracy=lambda _: 1.0, floor=1.0)
    scores = TVSPRUNE.score(edit.model, zoo.batches(train, 1200), 10)
    for values in scores.reduce("pairwise_min").values():
        assert len(values) == 1 or not (values < 0.5 * values.mean()).any()


def test_iterative_keeps_the_model_when_every_round_fails(trained):
    model, train, _ = trained
    judged = []

    def accuracy(candidate):
        judged.append(candidate)
        return float(candidate is model)

    edit = iterative(model, zoo.batches(train, 1200), 10, example_inputs=X, accuracy=accuracy, floor=0.5, step=0.25)
    assert len(judged) == 3  # the model, and the rounds at 0.5 and 0.25
    assert not any(edit.recipe.components.values())
    assert same_state(edit.model, model)


def test_iterative_refuses_what_it_cannot_do(trained):
    model, train, _ = trained
    call = {"example_inputs": X, "accuracy": lambda _: 0.5, "floor": 0.4}
    data = zoo.batches(train, 1200)
    with pytest.raises(ValueError, match=r"floor must not be above the accuracy of the model, 0.5, got 0.6"):
        iterative(model, data, 10, **{**call, "floor": 0.6})
    with pytest.raises(ValueError, match="floor must not be above the accuracy of the model, nan"):
        iterative(model, data, 10, **{**call, "accuracy": lambda _: math.nan})
    for step in (0, -1, math.inf, "1"):
        with pytest.raises(ValueError, match="step must be a finite number above 0, got"):
            iterative(model, data, 10, **call, step=step)
    with pytest.raises(ValueError, match="algorithm must have the selection 'below', it has 'lowest'"):
        iterative(model, data, 10, **call, algorithm=DISCEDIT_SP)
