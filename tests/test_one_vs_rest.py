import pytest
import torch
from helpers import BACKENDS

from discedit import ops

CASES = [(bound, witness) for bound in ("fisher", "minimax") for witness in ("linear", "quadratic")]


def from_definition(x, labels, classes, bound, witness):
    """Scores from the formulas: features in float64, covariances of two explicit samples."""
    t = x.double().flatten(2).mean(2) if x.ndim > 2 else x.double()
    t = (t - t.mean(0)) / t.std(0)
    function = {"fisher": ops.fisher_bound, "minimax": ops.minimax_bound}[bound]
    out = torch.empty(t.shape[1], classes, dtype=torch.float64)
    for c in range(t.shape[1]):
        phi = torch.stack([t[:, c], t[:, c] ** 2], 1) if witness == "quadratic" else t[:, c : c + 1]
        for k in range(classes):
            own, rest = phi[labels == k], phi[labels != k]
            mean1, mean2 = own.mean(0), rest.mean(0)
            cov1 = (own - mean1).T @ (own - mean1) / len(own)
            cov2 = (rest - mean2).T @ (rest - mean2) / len(rest)
            out[c, k] = function(mean1, cov1, mean2, cov2, backend="reference")
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


def test_bad_input():
    moments = ops.class_moments(torch.ones(2, 1), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match=r"one_vs_rest: bound must be one of 'fisher', 'minimax', got 'chernoff'"):
        ops.one_vs_rest(moments, bound="chernoff")
    with pytest.raises(ValueError, match=r"one_vs_rest: witness must be one of 'linear', 'quadratic', got 'cubic'"):
        ops.one_vs_rest(moments, witness="cubic")


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
