import itertools

import pytest
import torch
from helpers import BACKENDS, all_pairs, bound_of_samples, poisoned_vector, scalar_features

from discedit import ops
from discedit.common.state import ClassMoments

BOUNDS = ("fisher", "minimax")
CASES = [(bound, witness) for bound in BOUNDS for witness in ("linear", "quadratic", "exp", "vector")]
NAMES = ("mean", "max", "l2")
SCALE = 0.7


def moments_of(x, labels, classes, witness, backend):
    options = {
        "linear": {},
        "quadratic": {},
        "exp": {"scale": SCALE},
        "vector": {"statistic": NAMES},
    }[witness]
    return ops.class_moments(x, labels, classes, witness=witness, layout="nchw", backend=backend, **options)


def features_of(x, channel, witness):
    """Explicit features (samples, d) of one channel of maps (samples, channels, 2)."""
    v = x[:, channel].double()
    if witness == "vector":
        return torch.stack([v.mean(1), v.max(1).values, v.square().sum(1).sqrt()], 1)
    t = v.mean(1)
    return scalar_features(torch.exp(-SCALE * t), "linear") if witness == "exp" else scalar_features(t, witness)


def brute_force(x, labels, bound, witness):
    """All pairs' bounds from explicit samples: {(i, j): (channels,)}."""
    pairs = {}
    for i, j in itertools.combinations(labels.unique().tolist(), 2):
        row = []
        for c in range(x.shape[1]):
            phi = features_of(x, c, witness)
            row.append(bound_of_samples(phi[labels == i], phi[labels == j], bound))
        pairs[i, j] = torch.tensor(row, dtype=torch.float64)
    return pairs


def assert_is_minimum(values, pairs, exact, rtol, atol):
    """The value is the least of all, and the pair returned has it."""
    assert values.dtype == torch.float64
    assert pairs.dtype == torch.int64
    assert pairs.shape == (len(values), 2)
    torch.testing.assert_close(values, torch.stack(list(exact.values())).amin(0), rtol=rtol, atol=atol)
    attained = torch.stack([exact[tuple(pair)][c] for c, pair in enumerate(pairs.tolist())])  # KeyError unless i < j
    torch.testing.assert_close(values, attained, rtol=rtol, atol=atol)


def data(classes=6, samples=200, channels=5):
    """Maps (samples, channels, 2); classes 0 and 3 are empty."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    labels[labels == 0], labels[labels == 3] = 1, 2
    x = torch.randn(samples, channels, 2, generator=generator, dtype=torch.float64)
    shift = torch.randn(classes, channels, generator=generator, dtype=torch.float64)
    spread = torch.rand(classes, channels, generator=generator, dtype=torch.float64) + 0.2
    return x * spread[labels][..., None] + shift[labels][..., None], labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bound", "witness"), CASES)
def test_is_the_minimum_over_all_pairs(backend, bound, witness):
    x, labels = data()
    moments = moments_of(x, labels, 6, witness, backend)
    values, pairs = ops.pairwise_min(moments, bound=bound, witness=witness, backend=backend)
    assert_is_minimum(values, pairs, brute_force(x, labels, bound, witness), 1e-8, 1e-11)
    if witness in ("quadratic", "vector"):
        default = ops.pairwise_min(moments, bound=bound, backend=backend)
        assert torch.equal(values, default[0])
        assert torch.equal(pairs, default[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bound", "witness"), CASES)
def test_of_two_classes_it_is_one_vs_rest(backend, bound, witness):
    x, labels = data()
    moments = moments_of(x, labels % 2, 2, witness, backend)
    values, pairs = ops.pairwise_min(moments, bound=bound, witness=witness, backend=backend)
    scores = ops.one_vs_rest(moments, bound=bound, witness=witness, backend=backend)
    torch.testing.assert_close(values, scores[:, 0], rtol=1e-12, atol=1e-14)
    assert pairs.tolist() == [[0, 1]] * 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bound", "witness"), CASES)
def test_documented_values_of_degenerate_channels(backend, bound, witness):
    labels = torch.arange(12) % 3
    x = torch.zeros(12, 5, 2, dtype=torch.float64)
    x[:, 1] = 0.1  # constant and equal
    x[:, 2] = (0.3 + 0.4 * labels)[:, None]  # constant and different
    x[:, 3] = torch.where(labels == 2, 0.9, 0.2)[:, None]  # constant; classes 0 and 1 equal
    x[:, 4] = (1 + torch.arange(12) // 3)[:, None]  # the same samples in every class: a tie of all pairs
    moments = moments_of(x, labels, 3, witness, backend)
    values, pairs = ops.pairwise_min(moments, bound=bound, witness=witness, backend=backend)
    assert values[[0, 1, 3]].tolist() == [0, 0, 0]
    assert values[2] == pytest.approx(1, abs=1e-12)
    assert pairs[3].tolist() == [0, 1]
    assert float(values[4]) == pytest.approx(0, abs=1e-12)
    assert bool((pairs[:, 0] < pairs[:, 1]).all())
    assert bool((pairs >= 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bound", "witness"), CASES)
def test_two_point_laws(backend, bound, witness):
    """Each class takes two values, so that (z, z^2) and (mean, max, l2) have singular covariances in each law."""
    generator = torch.Generator().manual_seed(0)
    classes, channels = 4, 40
    labels = torch.arange(40) % classes
    points = torch.randint(0, 4, (classes, 2, channels), generator=generator).double()
    side = torch.randint(0, 2, (40, channels), generator=generator)
    x = points[labels].gather(1, side[:, None])[:, 0][..., None].expand(-1, -1, 2).contiguous()
    moments = moments_of(x, labels, classes, witness, backend)
    values, pairs = ops.pairwise_min(moments, bound=bound, witness=witness, backend=backend)
    assert bool(((values >= 0) & (values <= 1)).all())
    # The total variation of the two samples is known; no bound may exceed it, for whichever pair.
    for c, (i, j) in enumerate(pairs.tolist()):
        atoms = torch.unique(x[:, c, 0])
        p, q = ((x[labels == k, c, 0][:, None] == atoms).double().mean(0) for k in (i, j))
        assert float(values[c]) <= float((p - q).abs().sum() / 2) + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bound", "witness"), [(b, w) for b, w in CASES if w in ("linear", "quadratic")])
@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_a_far_offset_costs_little(backend, bound, witness, offset):
    """Mean over spread of 1e8: 16 ulps of a mean are 4e-7 of a spread, which the bound charges, and no more."""
    x, labels = data()
    near = ops.pairwise_min(moments_of(x, labels, 6, witness, backend), bound=bound, witness=witness, backend=backend)
    far = ops.pairwise_min(
        moments_of(x + offset, labels, 6, witness, backend), bound=bound, witness=witness, backend=backend
    )
    torch.testing.assert_close(far[0], near[0], rtol=1e-9 + 1e-13 * offset, atol=1e-9 + 1e-13 * offset)
    exact = brute_force(x, labels, bound, witness)
    attained = torch.stack([exact[tuple(pair)][c] for c, pair in enumerate(far[1].tolist())])
    torch.testing.assert_close(attained, near[0], rtol=0, atol=1e-9 + 1e-12 * offset)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("witness", ["linear", "quadratic", "exp", "vector"])
def test_fewer_than_two_classes_have_no_pair(backend, witness):
    x, labels = data()
    for classes, state_labels in ((1, labels * 0), (4, labels * 0 + 2)):
        values, pairs = ops.pairwise_min(moments_of(x, state_labels, classes, witness, backend), backend=backend)
        assert values.isnan().all()
        assert pairs.tolist() == [[-1, -1]] * 5
    nothing = moments_of(x[:0], labels[:0], 3, witness, backend)
    assert ops.pairwise_min(nothing, backend=backend)[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_without_samples_are_never_read(backend):
    x, labels = data()
    clean = moments_of(x, labels, 6, "vector", backend)
    dirty = ops.class_moments(
        x, labels, 6, statistic=NAMES, witness="vector", layout="nchw", out=poisoned_vector(3, 6, 5), backend=backend
    )
    assert dirty.mean[:, 0].isnan().all()
    for a, b in zip(ops.pairwise_min(clean, backend=backend), ops.pairwise_min(dirty, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "case", "value"), all_pairs(BACKENDS, CASES, [float("nan"), float("inf")]))
def test_moments_that_are_not_finite_have_no_pair(backend, case, value):
    bound, witness = case
    x, labels = data()
    moments = moments_of(x, labels, 6, witness, backend)
    clean = ops.pairwise_min(moments, bound=bound, witness=witness, backend=backend)
    for tensor in moments.tensors()[1:]:
        tensor[..., 4, 2] = value  # one class of one channel
    values, pairs = ops.pairwise_min(moments, bound=bound, witness=witness, backend=backend)
    assert values[2].isnan()
    assert pairs[2].tolist() == [-1, -1]
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(values[others], clean[0][others])
    assert torch.equal(pairs[others], clean[1][others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_channels(backend):
    values, pairs = ops.pairwise_min(ClassMoments.empty(3, 0), backend=backend)
    assert values.shape == (0,)
    assert pairs.shape == (0, 2)


@pytest.mark.parametrize("witness", ["quadratic", "vector"])
def test_same_bits_for_any_number_of_threads(witness):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 60
    x = torch.randn(600, 300, 2, generator=generator) + labels[:, None, None] % 7
    moments = moments_of(x, labels, 60, witness, "cpp")
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(ops.pairwise_min(moments, backend="cpp"))
    for values, pairs in results[1:]:
        assert torch.equal(values, results[0][0])
        assert torch.equal(pairs, results[0][1])


@pytest.mark.parametrize(("bound", "witness"), CASES)
def test_backends_agree_on_many_classes(bound, witness):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 16
    x = torch.randn(160, 12, 2, generator=generator, dtype=torch.float64) + 0.02 * labels[:, None, None]
    moments = moments_of(x, labels, 16, witness, "reference")
    (ours, pairs), (exact, _) = (
        ops.pairwise_min(moments, bound=bound, witness=witness, backend=backend) for backend in BACKENDS
    )
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11)
    phi = [features_of(x, c, witness) for c in range(12)]
    for c, (i, j) in enumerate(pairs.tolist()):
        attained = bound_of_samples(phi[c][labels == i], phi[c][labels == j], bound)
        assert attained == pytest.approx(float(ours[c]), rel=1e-7, abs=1e-10)
