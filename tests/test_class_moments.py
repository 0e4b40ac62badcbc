import itertools

import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    POOLING_BACKENDS,
    assert_no_worse_than,
    hostile_maps,
    labels_for,
    naive_moments,
    poisoned_state,
    poisoned_vector,
    same_bits,
)

from discedit import ops
from discedit.common.state import ClassMoments, VectorMoments

# What a GPU does without a word, the interpreter of Triton warns of through NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
CLASSES = 6
MAPS = hostile_maps()
EPSILON = torch.finfo(torch.float64).eps
NAMES = ("mean", "l2", "absmax", "max")
VECTORS = [("mean",), NAMES, ("sum", "l2", "rms", "absmax", "max", "positive_fraction", "mean")]


def scoring(backend):
    """A backend that has `one_vs_rest`."""
    return backend if backend in BACKENDS else "auto"


def exact_moments(x, labels):
    return naive_moments(x.double(), labels, CLASSES)


def gross_sums(x, labels, exact_mean):
    """Sums of |t - mean|^p (p >= 2) and |mean| itself: the scale that rounding is relative to."""
    pooled = x.double().flatten(2).mean(2) if x.ndim > 2 else x.double()
    onehot = torch.nn.functional.one_hot(labels, CLASSES).double()
    deviation = (pooled - exact_mean[labels]).abs()
    return [exact_mean.abs()] + [onehot.T @ deviation**p for p in (2, 3, 4)]


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("name", MAPS)
def test_matches_the_exact_moments(backend, name):
    x = MAPS[name]
    labels = labels_for(len(x))
    ours = ops.class_moments(x, labels, CLASSES, backend=backend)
    exact = exact_moments(x, labels)
    naive = naive_moments(x, labels, CLASSES)
    scale = gross_sums(x, labels, exact[0])
    # A pooled value is rounded to eps |t|, and a deviation of size s therefore to relative eps |t| / s.
    pooled = x.double().flatten(2).mean(2) if x.ndim > 2 else x.double()
    rounding = 64 * 2.3e-16 * pooled.abs().max()
    assert torch.equal(ours.count, torch.bincount(labels, minlength=CLASSES))
    assert_no_worse_than(ours.mean, naive[0], exact[0], rounding)
    widest = (pooled - pooled.mean(0)).abs().max() + rounding
    for power, mine in ((2, ours.m2), (3, ours.m3), (4, ours.m4)):
        atol = 1e-12 * scale[power - 1] + len(x) * power * widest ** (power - 1) * rounding
        assert_no_worse_than(mine, naive[power - 1], exact[power - 1], atol)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("statistic", ["sum", "l2", "rms", "absmax", "max", "positive_fraction"])
def test_is_pool_then_the_moments_of_a_vector_of_numbers(backend, statistic):
    """The map is pooled (test_pool.py), and what is pooled is folded as features without axes are (above)."""
    names = ("plain", "channels_last", "bfloat16 channels_last", "sliced", "float16", "features")
    for name, witness in zip(names, itertools.cycle(["quadratic", "linear"])):
        x, labels = MAPS[name], labels_for(12)
        ours = ops.class_moments(x, labels, CLASSES, statistic=statistic, witness=witness, backend=backend)
        pooled = ops.pool(x, statistic=statistic, backend=backend)
        assert same_bits(ours, ops.class_moments(pooled, labels, CLASSES, backend=backend))


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 7.5])
def test_exp_has_the_moments_of_exp(backend, scale):
    for name in ("plain", "all negative", "many channels", "float16", "tiny", "features"):
        x, labels = MAPS[name], labels_for(12)
        ours = ops.class_moments(x, labels, CLASSES, witness="exp", scale=scale, backend=backend)
        f = torch.exp(-scale * (x.double().flatten(2).mean(2) if x.ndim > 2 else x.double()))
        # t and scale * t are rounded, which moves exp(-scale t) by a relative eps scale |t|; exp itself has a few ulps.
        exponent = f.log().abs().max()
        off = (8 + 64 * exponent) * EPSILON * f.max()
        exact = naive_moments(f, labels, CLASSES)
        widest = (f - f.mean(0)).abs().max() + off
        assert torch.equal(ours.count, torch.bincount(labels, minlength=CLASSES))
        assert bool(((ours.mean - exact[0]).abs() <= off).all())
        for power, mine in ((2, ours.m2), (3, ours.m3), (4, ours.m4)):
            atol = 12 * (power * widest ** (power - 1) * 2 * off + 64 * EPSILON * widest**power)
            assert bool(((mine - exact[power - 1]).abs() <= atol).all())


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_exp_of_very_large_and_small_exponents(backend):
    t = torch.tensor([[0.0, 700.0, 745.0, 1e308, -700.0, -1e308]], dtype=torch.float64)
    f = ops.class_moments(t, torch.tensor([0]), 1, witness="exp", scale=1.0, backend=backend).mean
    torch.testing.assert_close(f[:, :5], torch.exp(-t[:, :5]), rtol=4e-13, atol=5e-324)
    assert not f[:, 5].isfinite()


def exact_vector(pooled, labels):
    """Mean (d, classes, channels) and scatter (d, d, classes, channels) of float64 features (samples, channels, d)."""
    d, channels = pooled.shape[2], pooled.shape[1]
    mean = torch.zeros(d, CLASSES, channels, dtype=torch.float64)
    scatter = torch.zeros(d, d, CLASSES, channels, dtype=torch.float64)
    for k in labels.unique().tolist():
        own = pooled[labels == k]
        mean[:, k] = own.mean(0).T
        deviation = own - own.mean(0)
        scatter[:, :, k] = torch.einsum("nci,ncj->ijc", deviation, deviation)
    return mean, scatter


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize(("name", "names"), [*zip(MAPS, itertools.cycle(VECTORS))])
def test_vector_matches_its_definition(backend, names, name):
    """The map is pooled before it is folded: of each map one vector, of each vector many maps."""
    if backend == "triton" and name == "many channels":
        pytest.skip("a minute in the interpreter; the work has the shape of 'channels_last'")
    x = MAPS[name]
    labels = labels_for(len(x))
    ours = ops.class_moments(x, labels, CLASSES, statistic=names, witness="vector", backend=backend)
    pooled = ops.pool(x, statistic=names, backend=backend)
    mean, scatter = exact_vector(pooled, labels)
    size = pooled.abs().amax((0, 1))
    spread = (pooled - pooled.mean(0)).abs().amax((0, 1)) + EPSILON * size
    assert torch.equal(ours.count, torch.bincount(labels, minlength=CLASSES))
    assert bool(((ours.mean - mean).abs() <= 16 * EPSILON * size[:, None, None]).all())
    rows, columns = torch.tril_indices(len(names), len(names))
    assert ours.scatter.shape[0] == len(rows)
    # A deviation is rounded with the mean that it is from; sums of 12 products carry a few roundings each.
    off = 16 * EPSILON * size
    atol = 12 * (
        spread[rows] * off[columns] + off[rows] * spread[columns] + 64 * EPSILON * spread[rows] * spread[columns]
    )
    assert bool(((ours.scatter - scatter[rows, columns]).abs() <= atol[:, None, None]).all())
    covariance = ours.covariance()
    assert covariance.shape == (CLASSES, x.shape[1], len(names), len(names))
    assert torch.equal(covariance, covariance.mT)
    expected = torch.zeros_like(scatter)
    expected[rows, columns] = expected[columns, rows] = ours.scatter / ours.count.clamp(min=1)[:, None]
    assert torch.equal(covariance, expected.permute(2, 3, 0, 1))


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_vector_of_all_eight_statistics(backend):
    x = torch.randn(30, 6, 9, generator=torch.Generator().manual_seed(0))
    labels = labels_for(30)
    names = ("mean", "cls", "sum", "l2", "rms", "absmax", "max", "positive_fraction")
    ours = ops.class_moments(x, labels, CLASSES, statistic=names, witness="vector", layout="tokens", backend=backend)
    mean, scatter = exact_vector(ops.pool(x, statistic=names, layout="tokens", backend=backend), labels)
    torch.testing.assert_close(ours.mean, mean, rtol=1e-13, atol=1e-14)
    rows, columns = torch.tril_indices(8, 8)
    torch.testing.assert_close(ours.scatter, scatter[rows, columns], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("witness", ["quadratic", "exp", "vector"])
def test_cls_reads_the_first_token_alone(backend, witness):
    x = torch.randn(30, 6, 9, generator=torch.Generator().manual_seed(0))
    labels = labels_for(30)
    options = {"witness": witness, "scale": 2.0 if witness == "exp" else None, "backend": backend}
    cls, mean = ("cls", "mean") if witness != "vector" else (("cls",), ("mean",))
    ours = ops.class_moments(x, labels, CLASSES, statistic=cls, layout="tokens", **options)
    assert same_bits(ours, ops.class_moments(x[:, 0], labels, CLASSES, statistic=mean, **options))


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_a_far_offset_costs_the_scatter_only_its_own_rounding(backend):
    """The spread is 1e-8 of the mean: squares of the values themselves would hold none of it."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(200, 5, 2, generator=generator, dtype=torch.float64)
    labels = torch.arange(200) % CLASSES
    state = VectorMoments.empty(2, CLASSES, 5)
    for rows in range(0, 200, 50):
        x = (t[rows : rows + 50] + 1e8).transpose(1, 2).reshape(50, 2, 5)  # tokens: cls and mean are two numbers
        ops.class_moments(
            x,
            labels[rows : rows + 50],
            CLASSES,
            statistic=("cls", "sum"),
            witness="vector",
            layout="tokens",
            out=state,
            backend=backend,
        )
    first, both = t[..., 0] + 1e8, (t[..., 0] + 1e8) + (t[..., 1] + 1e8)
    _, scatter = exact_vector(torch.stack([first, both], 2) - 1e8, labels)
    rows, columns = torch.tril_indices(2, 2)
    torch.testing.assert_close(state.scatter, scatter[rows, columns], rtol=0, atol=200 * 4 * 16 * EPSILON * 2e8)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_empty_and_single_classes(backend):
    x = MAPS["plain"]
    state = ops.class_moments(x, labels_for(len(x)), CLASSES, backend=backend)
    assert state.count[1] == 0
    assert state.count[2] == 1
    for sums in (state.m2, state.m3, state.m4):
        assert not sums[1].any()
        assert not sums[2].any()
    assert not state.mean[1].any()
    torch.testing.assert_close(state.mean[2], x[len(x) // 2].double().mean((1, 2)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_constant_channels_have_exact_moments(backend):
    x = torch.full((12, 5, 7, 7), 0.1)
    labels = labels_for(12)
    state = ops.class_moments(x, labels, CLASSES, backend=backend)
    ops.class_moments(x, labels, CLASSES, out=state, backend=backend)
    seen = state.count > 0
    assert torch.equal(state.mean[seen], x.double().mean((2, 3))[0].expand(int(seen.sum()), 5))
    assert not torch.cat([state.m2, state.m3, state.m4]).any()


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_an_empty_state_is_never_read(backend):
    x, labels = MAPS["plain"], labels_for(12)
    fresh = ops.class_moments(x, labels, CLASSES, backend=backend)
    poisoned = ops.class_moments(x, labels, CLASSES, out=poisoned_state(CLASSES, 5), backend=backend)
    seen = fresh.count > 0
    for a, b in zip(fresh.tensors()[1:], poisoned.tensors()[1:], strict=True):
        assert torch.equal(a[seen], b[seen])


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_an_empty_vector_state_is_never_read(backend):
    options = {"statistic": NAMES, "witness": "vector", "backend": backend}
    for labels in (labels_for(12), torch.full((12,), 4)):
        fresh = ops.class_moments(MAPS["plain"], labels, CLASSES, **options)
        ours = ops.class_moments(MAPS["plain"], labels, CLASSES, out=poisoned_vector(4, CLASSES, 5), **options)
        seen = fresh.count > 0
        assert torch.equal(fresh.mean[:, seen], ours.mean[:, seen])
        assert torch.equal(fresh.scatter[:, seen], ours.scatter[:, seen])
        assert not ours.covariance()[~seen].any()
        assert not fresh.scatter[:, fresh.count < 2].any()


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_constant_vectors_have_exact_moments(backend):
    labels, options = labels_for(12), {"statistic": NAMES, "witness": "vector", "backend": backend}
    state = ops.class_moments(MAPS["constant"], labels, CLASSES, **options)
    assert ops.class_moments(MAPS["constant"], labels, CLASSES, out=state, **options) is state
    pooled = ops.pool(MAPS["constant"], statistic=NAMES, backend=backend)[0].T
    seen = state.count > 0
    assert torch.equal(state.mean[:, seen], pooled[:, None].expand(-1, int(seen.sum()), -1))
    assert not state.scatter.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_labels(dtype):
    x, labels = MAPS["plain"], labels_for(12)
    expected = ops.class_moments(x, labels, CLASSES)
    ours = ops.class_moments(x, labels.to(dtype)[::1], CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(expected.tensors(), ours.tensors(), strict=True))


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_no_samples_change_nothing(backend):
    state = ops.class_moments(MAPS["plain"], labels_for(12), CLASSES, backend=backend)
    before = state.clone()
    ops.class_moments(torch.zeros(0, 5, 7, 7), torch.zeros(0, dtype=torch.int64), CLASSES, out=state, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), state.tensors(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"witness": "exp", "scale": 0.7}, {"witness": "vector", "statistic": ("mean", "rms", "max")}],
    ids=["quadratic", "exp", "vector"],
)
def test_same_bits_for_any_number_of_threads(options):
    x, labels = torch.randn(600, 300, 4, 4), torch.randint(0, 9, (600,))
    states = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        states.append(ops.class_moments(x, labels, 9, backend="cpp", **options))
    assert all(same_bits(states[0], other) for other in states[1:])


def test_a_million_classes():
    labels = torch.tensor([0, 2**20 - 1, 5, 5])
    state = ops.class_moments(torch.tensor([[1.0], [2.0], [3.0], [5.0]]), labels, 2**20)
    assert state.mean[[0, 5, 2**20 - 1], 0].tolist() == [1.0, 4.0, 2.0]
    assert int(state.count.sum()) == 4


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 10]), r"labels must lie in 0..9 \(num_classes=10\), found 10 at position 2"),
        (torch.tensor([0, -1, 1]), r"labels must lie in 0..9 \(num_classes=10\), found -1 at position 1"),
        (torch.tensor([0, 1]), r"x has 3 samples \(shape \(3, 4\)\), labels has shape \(2,\)"),
        (torch.tensor([[0, 1, 2]]), r"labels has shape \(1, 3\)"),
        (torch.tensor([0.0, 1.0, 2.0]), r"labels must be integers \(class indices\), got float32 \(shape \(3,\)\)"),
        (torch.tensor([True, False, True]), r"labels must be integers .* got bool"),
        ([0, 1, 2], r"labels must be a torch.Tensor, got list"),
    ],
)
@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_bad_labels_leave_the_state_alone(labels, message, backend):
    x = torch.ones(3, 4)
    for state, options in (
        (ClassMoments.empty(10, 4), {}),
        (VectorMoments.empty(1, 10, 4), {"statistic": ["max"], "witness": "vector"}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ops.class_moments(x, labels, 10, out=state, backend=backend, **options)
        assert not any(tensor.any() for tensor in state.tensors())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"witness": "cubic"}, r"witness must be one of 'linear', 'quadratic', 'exp', 'vector', got 'cubic'"),
        (
            {"witness": "vector"},
            r"tuple or list of names for witness='vector' .* got statistic='mean' with witness='vec",
        ),
        (
            {"statistic": ["mean"]},
            r"one name for every other witness, got statistic=\['mean'\] with witness='quadratic'",
        ),
        ({"statistic": ("a", "b"), "witness": "vector"}, r"statistic must be one of .* got 'a'"),
        ({"witness": "exp"}, r"scale must be a finite number above 0 for witness='exp', got None"),
        ({"witness": "exp", "scale": 0}, r"scale must be a finite number above 0 .* got 0"),
        ({"witness": "exp", "scale": -1.0}, r"scale must be a finite number above 0 .* got -1.0"),
        ({"witness": "exp", "scale": float("inf")}, r"scale must be a finite number above 0 .* got inf"),
        ({"witness": "exp", "scale": float("nan")}, r"scale must be a finite number above 0 .* got nan"),
        ({"witness": "exp", "scale": "2"}, r"scale must be a finite number above 0 .* got '2'"),
        ({"scale": 2.0}, r"scale must be left out unless witness='exp', got 2.0 with witness='quadratic'"),
    ],
)
def test_witness_statistic_and_scale_must_fit(options, message):
    with pytest.raises(ValueError, match=f"class_moments: .*{message}"):
        ops.class_moments(torch.ones(2, 3), torch.tensor([0, 1]), 2, **options)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "10"])
def test_bad_num_classes(num_classes):
    with pytest.raises(ValueError, match=r"class_moments: num_classes must be an integer of at least 1, got"):
        ops.class_moments(torch.ones(1, 1), torch.tensor([0]), num_classes)


def test_a_state_of_another_shape_is_refused():
    x, labels = torch.ones(3, 4), torch.tensor([0, 1, 2])
    scalar = r"out must be a ClassMoments of 10 classes and 4 channels on cpu, it is a "
    with pytest.raises(ValueError, match=scalar + "ClassMoments of 10 classes and 5 channels on cpu"):
        ops.class_moments(x, labels, 10, out=ClassMoments.empty(10, 5))
    with pytest.raises(ValueError, match=scalar + "VectorMoments of 2 statistics, 10 classes and 4 channels on cpu"):
        ops.class_moments(x, labels, 10, out=VectorMoments.empty(2, 10, 4))
    vector = (
        r"out must be a VectorMoments of 2 statistics, 10 classes and 4 channels on cpu, it is a VectorMoments of 3"
    )
    out = VectorMoments.empty(3, 10, 4)
    with pytest.raises(ValueError, match=vector):
        ops.class_moments(x, labels, 10, statistic=("mean", "max"), witness="vector", out=out)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_strided_states_are_handled(backend):
    x, labels = MAPS["plain"], labels_for(12)
    expected = ops.class_moments(x, labels, CLASSES)
    strided = ClassMoments(
        torch.zeros(2 * CLASSES, dtype=torch.int64)[::2],
        *(torch.zeros(5, CLASSES, dtype=torch.float64).T for _ in range(4)),
    )
    ops.class_moments(x, labels, CLASSES, out=strided, backend=backend)
    for ours, theirs in zip(strided.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        *(ops.one_vs_rest(state, backend=scoring(backend)) for state in (strided, expected)), equal_nan=True
    )
    for ours, theirs in zip(
        ops.pairwise_min(strided, backend=backend), ops.pairwise_min(expected, backend=backend), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    doubled = ops.merge_moments(strided, strided, backend=scoring(backend))
    assert torch.equal(doubled.count, 2 * expected.count)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_strided_vector_states_are_handled(backend):
    x, labels, options = MAPS["plain"], labels_for(12), {"statistic": ("mean", "max"), "witness": "vector"}
    expected = ops.class_moments(x, labels, CLASSES, backend=backend, **options)
    strided = VectorMoments(
        torch.zeros(2 * CLASSES, dtype=torch.int64)[::2],
        torch.zeros(2, 5, CLASSES, dtype=torch.float64).mT,
        torch.zeros(5, CLASSES, 3, dtype=torch.float64).permute(2, 1, 0),
    )
    assert not strided.mean.is_contiguous()
    ops.class_moments(x, labels, CLASSES, out=strided, backend=backend, **options)
    assert same_bits(strided, expected)
    for function in (ops.one_vs_rest, lambda state, **backend: ops.pairwise_min(state, **backend)[0]):
        torch.testing.assert_close(
            function(strided, backend=scoring(backend)),
            function(expected, backend=scoring(backend)),
            rtol=0,
            atol=0,
            equal_nan=True,
        )
    assert same_bits(
        ops.merge_moments(strided, strided, backend=scoring(backend)), ops.merge_moments(expected, expected)
    )


def test_states_that_do_not_fit_together_are_refused():
    good = ClassMoments.empty(3, 4)
    wrong = ClassMoments(good.count, good.mean.float(), good.m2, good.m3, good.m4)
    message = r"must hold count \(classes,\) int64 and mean, m2, m3, m4 .* it holds \(3,\) int64, \(3, 4\) float32"
    for call in (
        lambda: ops.class_moments(torch.ones(1, 4), torch.tensor([0]), 3, out=wrong),
        lambda: ops.merge_moments(good, wrong),
        lambda: ops.one_vs_rest(wrong),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    vector = VectorMoments.empty(3, 2, 4)
    for wrong in (
        VectorMoments(vector.count, vector.mean, vector.scatter[:4]),
        VectorMoments(vector.count, vector.mean[0], vector.scatter),
        VectorMoments.empty(9, 2, 4),
        VectorMoments(vector.count[:1], vector.mean, vector.scatter),
        VectorMoments(vector.count, vector.mean, vector.scatter.float()),
    ):
        for call in (ops.one_vs_rest, ops.pairwise_min, lambda state: ops.merge_moments(vector, state)):
            with pytest.raises(ValueError, match=r"mean \(d, classes, channels\) and scatter .* with d in 1..8"):
                call(wrong)
    with pytest.raises(TypeError, match="one_vs_rest: moments must be a ClassMoments or VectorMoments, got dict"):
        ops.one_vs_rest({})


def test_num_classes_of_any_library():
    state = ops.class_moments(torch.ones(1, 1), torch.tensor([0]), np.int64(3))
    assert state.num_classes == 3
