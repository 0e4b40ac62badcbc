import pytest
import torch
from helpers import BACKENDS, bound_of_samples, poisoned_vector, scalar_features

from discedit import ops

BOUNDS = ("fisher", "minimax")
CASES = [(bound, witness) for bound in BOUNDS for witness in ("linear", "quadratic")]


def from_definition(x, labels, classes, bound, witness):
    """Scores from the formulas: features in float64, covariances of two explicit samples."""
    t = x.double().flatten(2).mean(2) if x.ndim > 2 else x.double()
    out = torch.empty(t.shape[1], classes, dtype=torch.float64)
    for c in range(t.shape[1]):
        phi = scalar_features(t[:, c], witness)
        for k in range(classes):
            out[c, k] = bound_of_samples(phi[labels == k], phi[labels != k], bound)
    return out


@pytest.mark.parametrize(("bound", "witness"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_its_definition(backend, bound, witness):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (400,), generator=generator)
    x = torch.randn(400, 12, 3, 3, generator=generator) + 0.3 * labels[:, None, None, None]
    x[:, 6:] = x[:, 6:].exp()
    moments = ops.class_moments(x, labels, 5, backend=backend)
    ours = ops.one_vs_rest(moments, bound=bound, witness=witness, backend=backend)
    torch.testing.assert_close(ours, from_definition(x, labels, 5, bound, witness), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("bound", "witness"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_exceeds_the_total_variation_of_the_samples(backend, bound, witness):
    """The whole path, moments included, on samples whose own law is discrete and known."""
    generator = torch.Generator().manual_seed(7)
    channels, sizes = 8000, (17, 9)
    labels = torch.cat([torch.zeros(sizes[0]), torch.ones(sizes[1])]).long()
    atoms = torch.randint(1, 6, (channels,), generator=generator)
    index = (torch.rand(len(labels), channels, generator=generator, dtype=torch.float64) * atoms).long()
    values = torch.randn(6, channels, generator=generator, dtype=torch.float64) ** 3
    values[:, ::5] += 1e3  # far from 0, where raw second moments would cancel
    values[:, 1::5] = torch.arange(6)[:, None].double()  # equal steps: exact ties and symmetric laws
    x = values.gather(0, index)
    exact = torch.zeros(channels, dtype=torch.float64)
    for atom in range(6):
        p, q = ((index[labels == k] == atom).double().mean(0) for k in (0, 1))
        exact += (p - q).abs() / 2
    ours = ops.one_vs_rest(
        ops.class_moments(x, labels, 2, backend=backend), bound=bound, witness=witness, backend=backend
    )
    assert not ours.isnan().any()
    assert float((ours - exact[:, None]).max()) <= 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bound", "witness"), CASES)
def test_shift_and_scale_change_nothing(backend, bound, witness):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (300,), generator=generator)
    x[labels == 1] *= 2
    plain = ops.one_vs_rest(
        ops.class_moments(x, labels, 3, backend=backend), bound=bound, witness=witness, backend=backend
    )
    for shift, scale in ((0, 1e-30), (0, 1e30), (1e3, 1.0), (-5, -2.0), (1e4, 1e6)):
        moved = ops.class_moments(x * scale + shift * abs(scale), labels, 3, backend=backend)
        ours = ops.one_vs_rest(moved, bound=bound, witness=witness, backend=backend)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bound", "witness"), CASES)
def test_documented_values_of_degenerate_channels(backend, bound, witness):
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    x = torch.zeros(6, 4, dtype=torch.float64)
    x[:, 1] = 0.1  # constant and equal
    x[:, 2] = torch.tensor([0.3, 0.3, 0.3, 0.7, 0.7, 0.7])  # constant per class: tells 0 from the rest
    x[:, 3] = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    scores = ops.one_vs_rest(
        ops.class_moments(x, labels, 3, backend=backend), bound=bound, witness=witness, backend=backend
    )
    assert not scores[:2].any()
    assert scores[2, 0] == pytest.approx(1, abs=1e-12)
    assert scores[3].min() >= 0
    assert scores[3].max() <= 1
    assert not scores.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_without_samples_are_nan_and_do_not_matter(backend):
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(60, 5, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    few = ops.one_vs_rest(ops.class_moments(x, labels, 3), backend=backend)
    many = ops.one_vs_rest(ops.class_moments(x, labels + 1, 5), backend=backend)
    assert many[:, [0, 4]].isnan().all()
    torch.testing.assert_close(many[:, 1:4], few, rtol=1e-12, atol=0)
    assert ops.one_vs_rest(ops.class_moments(x, labels * 0, 3), backend=backend).isnan().all()


def test_quadratic_sees_what_linear_cannot():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(4000) % 2
    x = torch.randn(4000, 1, generator=generator) * (1 + 9 * labels[:, None])
    moments = ops.class_moments(x, labels, 2)
    assert float(ops.one_vs_rest(moments, witness="linear").max()) < 0.01
    assert float(ops.one_vs_rest(moments, witness="quadratic").min()) > 0.3


def test_backends_agree_on_real_features(digit_moments):
    for state in digit_moments.values():
        for bound, witness in CASES:
            ours, reference = (
                ops.one_vs_rest(state, bound=bound, witness=witness, backend=backend) for backend in BACKENDS
            )
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", [ops.one_vs_rest, ops.pairwise_min])
def test_bad_input(function):
    op = function.__name__
    x, labels = torch.ones(2, 1), torch.tensor([0, 1])
    moments = ops.class_moments(x, labels, 2)
    with pytest.raises(
        ValueError, match=rf"{op}: bound must be one of 'fisher', 'minimax', .*'certified', got 'chernoff'"
    ):
        function(moments, bound="chernoff")
    for witness in ("cubic", "vector"):
        message = rf"{op}: witness must be one of 'linear', 'quadratic', 'exp' for ClassMoments, got '{witness}'"
        with pytest.raises(ValueError, match=message):
            function(moments, witness=witness)
    vector = ops.class_moments(x, labels, 2, statistic=("mean", "max"), witness="vector")
    for witness in ("linear", "quadratic", "exp"):
        with pytest.raises(ValueError, match=rf"{op}: witness must be 'vector' for VectorMoments, got '{witness}'"):
            function(vector, witness=witness)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_exp_is_linear_in_its_own_state(backend, bound):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=generator)
    x = torch.randn(300, 9, generator=generator).abs() * (1 + labels[:, None])
    moments = ops.class_moments(x, labels, 4, witness="exp", scale=0.8, backend=backend)
    ours = ops.one_vs_rest(moments, bound=bound, witness="exp", backend=backend)
    assert torch.equal(ours, ops.one_vs_rest(moments, bound=bound, witness="linear", backend=backend))
    f = torch.exp(-0.8 * x.double())
    torch.testing.assert_close(ours, from_definition(f, labels, 4, bound, "linear"), rtol=1e-9, atol=1e-12)


def vector_scores(pooled, labels, classes, bound):
    """From the definition, of explicit features (samples, channels, d)."""
    out = torch.full((pooled.shape[1], classes), float("nan"), dtype=torch.float64)
    for c in range(pooled.shape[1]):
        for k in labels.unique().tolist():
            out[c, k] = bound_of_samples(pooled[labels == k, c], pooled[labels != k, c], bound)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("names", [("mean",), ("l2", "max"), ("mean", "rms", "absmax"), ("sum", "l2", "max", "absmax")])
def test_vector_is_its_definition(backend, bound, names):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=generator) + 1  # class 0 is empty
    x = torch.randn(300, 7, 3, 3, generator=generator) * (1 + 0.2 * labels[:, None, None, None])
    moments = ops.class_moments(x, labels, 5, statistic=names, witness="vector", backend=backend)
    ours = ops.one_vs_rest(moments, bound=bound, backend=backend)
    exact = vector_scores(ops.pool(x, statistic=names), labels, 5, bound)
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_vector_of_dependent_statistics_is_that_of_the_independent_ones(backend, bound):
    """mean and sum, l2 and rms are multiples of each other: the covariance is singular."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 3
    x = torch.randn(200, 6, 4, 4, generator=generator) + 0.2 * labels[:, None, None, None]
    few, many = (
        ops.one_vs_rest(
            ops.class_moments(x, labels, 3, statistic=names, witness="vector", backend=backend),
            bound=bound,
            backend=backend,
        )
        for names in (("mean", "l2"), ("mean", "sum", "l2", "rms"))
    )
    torch.testing.assert_close(many, few, rtol=1e-6, atol=1e-9)
    assert bool((few > 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_vector_scores_of_degenerate_channels(backend, bound):
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    x = torch.zeros(6, 4, 2, dtype=torch.float64)
    x[:, 1] = 0.1  # constant and equal
    x[:, 2] = torch.tensor([0.3, 0.3, 0.3, 0.7, 0.7, 0.7])[:, None]  # constant per class: tells 0 from the rest
    x[:, 3] = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])[:, None]
    options = {"statistic": ("mean", "max", "l2"), "witness": "vector", "layout": "nchw", "backend": backend}
    moments = ops.class_moments(x, labels, 4, out=poisoned_vector(3, 4, 4), **options)
    scores = ops.one_vs_rest(moments, bound=bound, backend=backend)
    assert scores[:, 3].isnan().all()
    scores = scores[:, :3]
    assert not scores[:2].any()
    assert scores[2, 0] == pytest.approx(1, abs=1e-12)
    assert not scores.isnan().any()
    assert 0 <= float(scores.min()) <= float(scores.max()) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_vector_never_exceeds_the_total_variation_of_the_samples(backend, bound):
    """As above for scalars: maps of two atoms' values, so that the laws of (mean, max) are discrete and known."""
    generator = torch.Generator().manual_seed(7)
    channels, sizes = 4000, (17, 9)
    labels = torch.cat([torch.zeros(sizes[0]), torch.ones(sizes[1])]).long()
    atoms = torch.randint(1, 6, (channels,), generator=generator)
    index = (torch.rand(len(labels), channels, generator=generator, dtype=torch.float64) * atoms).long()
    values = torch.randn(6, channels, 2, generator=generator, dtype=torch.float64) ** 3
    values[:, ::5] += 1e3
    x = values.gather(0, index[..., None].expand(-1, -1, 2))
    exact = torch.zeros(channels, dtype=torch.float64)
    for atom in range(6):
        p, q = ((index[labels == k] == atom).double().mean(0) for k in (0, 1))
        exact += (p - q).abs() / 2
    moments = ops.class_moments(
        x, labels, 2, statistic=("mean", "max"), witness="vector", layout="nchw", backend=backend
    )
    ours = ops.one_vs_rest(moments, bound=bound, backend=backend)
    assert not ours.isnan().any()
    assert float((ours - exact[:, None]).max()) <= 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-140, 1e-90, 1e80, 1e120])
def test_beyond_the_range_of_fourth_powers_the_linear_witness_holds(backend, scale):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64) + labels[:, None]
    linear = ops.one_vs_rest(ops.class_moments(x, labels, 3), witness="linear", backend=backend)
    scaled = ops.class_moments(x * scale, labels, 3, backend=backend)
    ours = ops.one_vs_rest(scaled, witness="quadratic", backend=backend)
    torch.testing.assert_close(ours, linear, rtol=1e-9, atol=1e-12)
