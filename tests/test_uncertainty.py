"""Standard errors, blocks, shrinkage and certified scores."""

import math

import pytest
import torch
from torch import nn

import discedit
from discedit import ops, uncertainty
from discedit.common.state import VectorMoments

NAMES = ("mean", "max", "l2")


def two_classes(samples, channels, shift, seed=0, spread=1.0):
    """Independent data sets, one per channel: normal laws, the second shifted and spread."""
    x = torch.randn(2 * samples, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[samples:] = spread * x[samples:] + shift
    return x, torch.arange(2 * samples) // samples


def vectors(samples, dimension, classes=2, channels=3, seed=0):
    """A state of correlated statistics."""
    generator = torch.Generator().manual_seed(seed)
    state = VectorMoments.empty(dimension, classes, channels)
    pooled = torch.randn(dimension, samples * classes, channels, generator=generator, dtype=torch.float64)
    pooled[-1] = pooled[-1] * 5 + pooled[0]
    discedit.backends.IMPLEMENTATIONS["reference"]["fold_moments"](
        pooled, 0.0, torch.arange(samples * classes) % classes, state
    )
    return state, pooled


# ---- delta method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["minimax", "fisher"])
@pytest.mark.parametrize(("shift", "spread"), [(1.0, 1.0), (1.0, 3.0), (0.0, 1.0)])
def test_standard_error_is_the_spread_over_repeated_samples(bound, shift, spread):
    x, labels = two_classes(200, 4000, shift, spread=spread)
    state = ops.class_moments(x, labels, 2)
    errors = uncertainty.standard_error(state, bound=bound)
    # Signed: near 0 the separation itself is folded.
    r = uncertainty.separation(ops.one_vs_rest(state, bound=bound, witness="linear"))[:, 0]
    signed = r * (state.mean[1] - state.mean[0]).sign()
    assert float(errors[:, 0].square().mean().sqrt()) == pytest.approx(float(signed.std()), rel=0.05)
    assert torch.equal(errors[:, 0], errors[:, 1])


@pytest.mark.parametrize("bound", ["minimax", "fisher"])
def test_standard_error_follows_from_the_influence_of_each_sample(bound):
    """The delta method by brute force: the derivative of r in the weight of every sample."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(60, 2, generator=generator, dtype=torch.float64) ** 2
    labels = torch.arange(60) % 3
    ours = uncertainty.standard_error(ops.class_moments(x, labels, 3), bound=bound)
    for cls in range(3):
        for channel in range(2):
            laws = [x[labels == cls, channel], x[labels != cls, channel]]
            weights = [torch.ones_like(law, requires_grad=True) for law in laws]
            means = [(w * t).sum() / w.sum() for w, t in zip(weights, laws, strict=True)]
            variances = [(w * (t - m) ** 2).sum() / w.sum() for w, t, m in zip(weights, laws, means, strict=True)]
            if bound == "minimax":
                below = variances[0].sqrt() + variances[1].sqrt()
            else:
                below = (2 * (variances[0] + variances[1])).sqrt()
            ((means[0] - means[1]) / below).backward()
            variance = sum(
                float((len(t) * w.grad).square().sum()) / len(t) / (len(t) - 1)
                for w, t in zip(weights, laws, strict=True)
            )
            assert float(ours[channel, cls]) == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_standard_error_of_thin_and_constant_classes():
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [5.0, 1.0]])
    errors = uncertainty.standard_error(ops.class_moments(x, torch.tensor([0, 0, 0, 1]), 3))
    assert errors[:, 1:].isnan().all()
    assert errors[:, 0].isnan().all()  # a rest of one sample
    errors = uncertainty.standard_error(ops.class_moments(x, torch.tensor([0, 0, 1, 1]), 2))
    assert errors[1].tolist() == [0.0, 0.0]
    assert bool((errors[0] > 0).all())


def test_bad_input():
    scalar = ops.class_moments(torch.rand(4, 2), torch.tensor([0, 0, 1, 1]), 2)
    vector, _ = vectors(5, 3)
    with pytest.raises(TypeError, match="standard_error: moments must be a ClassMoments, got VectorMoments"):
        uncertainty.standard_error(vector)
    with pytest.raises(ValueError, match="bound must be one of 'minimax', 'fisher', got 'hellinger'"):
        uncertainty.standard_error(scalar, bound="hellinger")
    with pytest.raises(ValueError, match="witness must be one of 'linear', 'exp', got 'quadratic'"):
        uncertainty.standard_error(scalar, witness="quadratic")
    with pytest.raises(TypeError, match="jackknife: blocks must be a sequence of states, got ClassMoments"):
        uncertainty.jackknife(scalar)
    with pytest.raises(ValueError, match="blocks must be at least two states, got 1"):
        uncertainty.jackknife([scalar])
    with pytest.raises(ValueError, match="bound must not be 'certified'"):
        uncertainty.jackknife([scalar, scalar], bound="certified")
    with pytest.raises(ValueError, match="a and b must have the same kind"):
        uncertainty.jackknife([scalar, scalar, ops.class_moments(torch.rand(4, 3), torch.tensor([0, 0, 1, 1]), 2)])
    with pytest.raises(TypeError, match="shrink: moments must be a VectorMoments, got ClassMoments"):
        uncertainty.shrink(scalar)
    for wrong in (1.5, -0.1, "ledoit", True, float("nan")):
        with pytest.raises(ValueError, match=r"shrink: intensity must be 'auto' or a number in 0..1, got"):
            uncertainty.shrink(vector, wrong)


# ---- jackknife ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("witness", ["linear", "quadratic"])
@pytest.mark.parametrize("blocks", [2, 3, 7])
def test_jackknife_is_its_formula(witness, blocks):
    x, labels = two_classes(30, 6, 0.7)
    part = torch.arange(len(x)) % blocks
    states = [ops.class_moments(x[part == b], labels[part == b], 2) for b in range(blocks)]
    ours = uncertainty.jackknife(states, witness=witness)
    r = torch.stack(
        [
            uncertainty.separation(
                ops.one_vs_rest(ops.class_moments(x[part != b], labels[part != b], 2), witness=witness)
            )
            for b in range(blocks)
        ]
    )
    expected = ((blocks - 1) / blocks * (r - r.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-12)


def test_jackknife_agrees_with_the_delta_method():
    x, labels = two_classes(400, 500, 1.0)
    part = torch.arange(len(x)) % 20
    states = [ops.class_moments(x[part == b], labels[part == b], 2) for b in range(20)]
    ours = uncertainty.jackknife(states, witness="linear")
    other = uncertainty.standard_error(ops.class_moments(x, labels, 2))
    assert float((ours / other).square().mean()) == pytest.approx(1.0, abs=0.05)


def test_classes_with_fewer_samples_than_blocks_have_no_error():
    x, labels = torch.rand(23, 2), torch.tensor([0] * 20 + [1] * 3)
    states = [ops.class_moments(x[b::4], labels[b::4], 2) for b in range(4)]
    errors = uncertainty.jackknife(states, witness="linear")
    assert errors[:, 1].isnan().all()
    assert errors[:, 0].isfinite().all()


# ---- coverage: benchmarks/bench_coverage.py has more laws and sizes -------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_intervals_cover_the_value_of_the_bound(shift):
    x, labels = two_classes(50, 2000, shift)
    exact = shift**2 / (shift**2 + 4)  # k = shift / 2
    moments = discedit.Moments(2)
    moments.update("layer", x, labels)
    low, high = discedit.score(moments, witness="linear", errors=True).interval(0.95)["layer"][:, 0].unbind(-1)
    covered = float(((low <= exact) & (exact <= high)).double().mean())
    assert 0.92 <= covered <= 0.98
    blocks = []
    for b in range(10):
        block = discedit.Moments(2)
        block.update("layer", x[b::10], labels[b::10])
        blocks.append(block)
    low, high = discedit.score(blocks).interval(0.95)["layer"][:, 0].unbind(-1)
    covered = float(((low <= exact) & (exact <= high)).double().mean())
    assert 0.92 <= covered <= (0.98 if shift else 1.0)


@pytest.mark.parametrize("samples", [20, 200])
def test_certified_scores_hold(samples):
    """Uniform on [0, 1] against [0.3, 1]: TV 0.3, and a certified score above that in at most 5 % of the data sets."""
    generator = torch.Generator().manual_seed(samples)
    x = torch.rand(2 * samples, 2000, generator=generator, dtype=torch.float64)
    x[samples:] = 0.3 + 0.7 * x[samples:]
    state = ops.class_moments(x, torch.arange(2 * samples) // samples, 2)
    values = ops.one_vs_rest(state, bound="certified", witness="linear", value_range=(0, 1), comparisons=1)
    assert float((values > 0.3).double().mean()) <= 0.05
    plain = ops.one_vs_rest(state, witness="linear")
    assert bool((values <= plain).all())


def test_certified_scores_rise_with_the_sample():
    x = torch.tensor([0.0, 1.0])
    values = []
    for n in (10, 100, 1000, 100_000):
        state = ops.class_moments(x.repeat_interleave(n)[:, None], torch.arange(2).repeat_interleave(n), 2)
        values.append(float(ops.one_vs_rest(state, bound="certified", witness="linear", value_range=(0, 1))[0, 0]))
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] > 0.99
    one = ops.class_moments(x[:, None], torch.arange(2), 2)
    assert ops.one_vs_rest(one, bound="certified", witness="linear", value_range=(0, 1)).tolist() == [[0.0, 0.0]]


# ---- shrinkage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intensity", [0.0, 0.3, 1.0])
def test_shrink_is_its_formula(intensity):
    state, _ = vectors(9, 4)
    ours = uncertainty.shrink(state, intensity).covariance()
    own = state.covariance()
    unit = torch.diagonal(own.mean(0), dim1=-2, dim2=-1).sqrt()
    scaled = own / unit[..., :, None] / unit[..., None, :]
    target = torch.diagonal(scaled, dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(4).double()
    mixed = ((1 - intensity) * scaled + intensity * target) * unit[..., :, None] * unit[..., None, :]
    torch.testing.assert_close(ours, mixed, rtol=1e-12, atol=1e-12)


def test_automatic_shrinkage_is_for_few_samples_of_many_statistics():
    enough, _ = vectors(9, 4)
    assert torch.equal(uncertainty.shrink(enough).scatter, enough.scatter)
    plane, _ = vectors(2, 2)
    assert torch.equal(uncertainty.shrink(plane).scatter, plane.scatter)
    few, _ = vectors(3, 6)
    shrunk = uncertainty.shrink(few)
    assert bool((torch.linalg.eigvalsh(few.covariance())[..., 0] < 1e-12).all())
    assert bool((torch.linalg.eigvalsh(shrunk.covariance())[..., 0] > 1e-3).all())
    assert torch.equal(shrunk.mean, few.mean)
    assert torch.equal(shrunk.count, few.count)
    # Singular covariances say 1 of laws that are one and the same.
    assert bool((ops.one_vs_rest(few) > 1 - 1e-9).all())
    assert bool((ops.one_vs_rest(shrunk) < 0.9).all())


def test_automatic_shrinkage_is_closer_to_the_truth():
    """The expected squared error falls, as the estimate promises."""
    generator = torch.Generator().manual_seed(0)
    d, n = 6, 5
    factor = torch.randn(d, d, generator=generator, dtype=torch.float64) * 0.3 + torch.eye(d)
    truth = factor @ factor.T
    state = VectorMoments.empty(d, 1, 400)
    pooled = torch.einsum("ij,jnc->inc", factor, torch.randn(d, n, 400, generator=generator, dtype=torch.float64))
    discedit.backends.IMPLEMENTATIONS["reference"]["fold_moments"](
        pooled, 0.0, torch.zeros(n, dtype=torch.int64), state
    )
    plain, shrunk = (s.covariance()[0] * n / (n - 1) - truth for s in (state, uncertainty.shrink(state)))
    assert float(shrunk.square().sum()) < 0.7 * float(plain.square().sum())


def test_shrinkage_does_not_depend_on_units_and_leaves_constants():
    _, pooled = vectors(3, 4)
    units = torch.tensor([1.0, 1e-3, 50.0, 1.0], dtype=torch.float64)
    other = VectorMoments.empty(4, 2, 3)
    pooled[3] = 7.0
    fold = discedit.backends.IMPLEMENTATIONS["reference"]["fold_moments"]
    constant = VectorMoments.empty(4, 2, 3)
    fold(pooled, 0.0, torch.arange(6) % 2, constant)
    fold(pooled * units[:, None, None], 0.0, torch.arange(6) % 2, other)
    mine, theirs = uncertainty.shrink(constant).covariance(), uncertainty.shrink(other).covariance()
    torch.testing.assert_close(theirs, mine * units[:, None] * units, rtol=1e-9, atol=1e-12)
    assert not mine[..., 3].any()


# ---- score ----------------------------------------------------------------------------------------------------------


def network_and_data(samples=46, classes=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(4 * 16, classes))
    x = torch.randn(samples, 1, 8, 8)
    labels = torch.randint(0, classes, (samples,))
    return model, [(x[i : i + 7], labels[i : i + 7]) for i in range(0, samples, 7)], labels


@pytest.mark.parametrize("options", [{}, {"witness": "vector", "statistic": NAMES}], ids=["scalar", "vector"])
def test_blocks_are_a_pass_in_parts(options):
    model, loader, labels = network_and_data()
    whole = discedit.collect_moments(model, loader, 3, **options)
    blocks = discedit.collect_blocks(model, loader, 3, blocks=4, **options)
    assert [type(block) for block in blocks] == 4 * [discedit.Moments]
    counts = torch.stack([block["0"].count for block in blocks])
    assert torch.equal(counts.sum(0), torch.bincount(labels, minlength=3))
    assert int((counts.amax(0) - counts.amin(0)).max()) <= 1  # evenly spread, whatever the order
    together = discedit.score(blocks, shrinkage=None)
    alone = discedit.score(whole, shrinkage=None)
    for layer in alone:
        torch.testing.assert_close(together[layer], alone[layer], rtol=1e-9, atol=1e-12)
        expected = uncertainty.jackknife([block[layer] for block in blocks])
        assert torch.equal(together.errors[layer], expected)
    assert together.degrees.tolist() == [3.0, 3.0, 3.0]
    assert blocks[0].samples < whole.samples  # scoring has not merged into them


def test_blocks_of_predicted_labels_and_bad_numbers():
    model, loader, _ = network_and_data()
    blocks = discedit.collect_blocks(model, [x for x, _ in loader], 3, blocks=2, labels="predicted")
    assert sum(block.samples for block in blocks) == 46
    for wrong in (1, 0, 2.5, True, "4"):
        with pytest.raises(ValueError, match="collect_blocks: blocks must be an integer of at least 2, got"):
            discedit.collect_blocks(model, loader, 3, blocks=wrong)


def test_scores_with_errors_and_pairs_are_saved_whole(tmp_path):
    model, loader, _ = network_and_data()
    scores = discedit.score(discedit.collect_blocks(model, loader, 3, blocks=3), bound="robust", radius=1.0, pairs=True)
    scores.save(tmp_path / "s.safetensors")
    again = discedit.Scores.load(tmp_path / "s.safetensors")
    assert again.options == {"radius": 1.0}
    for layer in scores:
        assert torch.equal(again.pairs[layer], scores.pairs[layer])
        assert torch.equal(again.errors[layer], scores.errors[layer])
    assert torch.equal(again.degrees, scores.degrees)
    for reduction, column in (("pairwise_min", 0), ("pairwise_mean", 1)):
        assert torch.equal(again.reduce(reduction)["0"], scores.pairs["0"][:, column])
    ours = again.standard_error()["0"]
    table = again.to_dataframe()
    assert table["standard_error"][table["layer"] == "0"].tolist() == ours.flatten().tolist()
    r = uncertainty.separation(scores["0"])
    torch.testing.assert_close(ours, 2 * r / (1 + r**2) ** 2 * scores.errors["0"])


def test_pairs_are_those_of_ops():
    model, loader, _ = network_and_data()
    moments = discedit.collect_moments(model, loader, 3)
    scores = discedit.score(moments, bound="hellinger", pairs=True)
    least = ops.pairwise_min(moments["2"], bound="hellinger")[0]
    mean = ops.pairwise_mean(moments["2"], bound="hellinger")
    assert torch.equal(scores.pairs["2"], torch.stack([least, mean], -1))
    with pytest.raises(ValueError, match=r"reduction='pairwise_min' needs the scores of pairs: score\(moments, pairs"):
        discedit.score(moments).reduce("pairwise_min")


def test_certified_shares_alpha_over_all_scores():
    model, loader, _ = network_and_data(200)
    moments = discedit.collect_moments(model, loader, 3, statistic="positive_fraction", witness="exp", scale=1.0)
    scores = discedit.score(moments, bound="certified", alpha=0.1)
    assert scores.options == {"comparisons": 3 * (5 + 4), "alpha": 0.1}
    expected = ops.one_vs_rest(moments["0"], bound="certified", witness="exp", alpha=0.1, comparisons=27)
    assert torch.equal(scores["0"], expected)
    plain = discedit.collect_moments(model, loader, 3, witness="exp", scale=1.0)
    with pytest.raises(ValueError, match="value_range must be given for bound='certified' with statistic='mean'"):
        discedit.score(plain, bound="certified")


def test_refusals_of_score():
    model, loader, _ = network_and_data()
    moments = discedit.collect_moments(model, loader, 3)
    with pytest.raises(ValueError, match="errors must be False for bound='minimax' and witness='quadratic'"):
        discedit.score(moments, errors=True)
    with pytest.raises(ValueError, match="witness must be 'linear' or 'exp' for bound='witness'"):
        discedit.score(moments, bound="witness", witness="quadratic")
    assert discedit.score(moments, bound="witness").witness == "linear"
    with pytest.raises(TypeError, match="'radius' is no option of bound='minimax', which takes no options"):
        discedit.score(moments, radius=1.0)
    with pytest.raises(TypeError, match="'alpha' is no option of bound='robust', which takes 'radius', 'rho'"):
        discedit.score(moments, bound="robust", alpha=0.1)
    with pytest.raises(TypeError, match="moments must be a Moments or a sequence of them, got dict"):
        discedit.score({"a": moments})
    with pytest.raises(ValueError, match="moments must hold at least one block"):
        discedit.score([])
    scores = discedit.score(moments)
    for method in (scores.interval, scores.standard_error):
        with pytest.raises(ValueError, match="scores must have been computed with errors"):
            method()
    with pytest.raises(ValueError, match="confidence must be a probability above 0 and below 1, got 95"):
        scores.interval(95)
    with pytest.warns(UserWarning, match=r"classes with fewer samples than there are blocks \(30\)"):
        thin = discedit.score(discedit.collect_blocks(model, loader, 3, blocks=30))
    assert thin.errors["0"].isnan().all()
