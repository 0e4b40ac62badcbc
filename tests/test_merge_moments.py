import itertools

import pytest
import torch
from helpers import BACKENDS, poisoned_vector, same_bits

from discedit import ops
from discedit.common.state import ClassMoments, VectorMoments

CLASSES = 4
VECTOR = {"statistic": ("mean", "max", "l2"), "witness": "vector"}


def data(offset=0.0):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(240, 17, generator=generator, dtype=torch.float64).exp() + offset
    return x, torch.randint(0, CLASSES, (240,), generator=generator)


def scales(x, labels, whole):
    onehot = torch.nn.functional.one_hot(labels, CLASSES).double()
    deviation = (x - whole.mean[labels]).abs()
    return [whole.mean.abs() + deviation.max()] + [onehot.T @ deviation**p for p in (2, 3, 4)]


def assert_close(a, b, scale, relative):
    assert torch.equal(a.count, b.count)
    for mine, theirs, size in zip(a.tensors()[1:], b.tensors()[1:], scale, strict=True):
        assert bool(((mine - theirs).abs() <= relative * size).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 60, 240])
def test_any_split_agrees(backend, parts):
    x, labels = data()
    whole = ops.class_moments(x, labels, CLASSES, backend=backend)
    state = ClassMoments.empty(CLASSES, 17)
    for rows, classes in zip(x.tensor_split(parts), labels.tensor_split(parts), strict=True):
        ops.class_moments(rows, classes, CLASSES, out=state, backend=backend)
    assert_close(state, whole, scales(x, labels, whole), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_order_agrees(backend):
    x, labels = data()
    whole = ops.class_moments(x, labels, CLASSES, backend=backend)
    cuts = [0, 1, 50, 51, 240]
    shards = [ops.class_moments(x[a:b], labels[a:b], CLASSES, backend=backend) for a, b in itertools.pairwise(cuts)]
    for order in itertools.permutations(shards):
        left = ClassMoments.empty(CLASSES, 17)
        for shard in order:
            left = ops.merge_moments(left, shard, backend=backend)
        a, b, c, d = order
        tree = ops.merge_moments(
            ops.merge_moments(a, b, backend=backend), ops.merge_moments(c, d, backend=backend), backend=backend
        )
        for merged in (left, tree):
            assert_close(merged, whole, scales(x, labels, whole), 1e-12)


@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_an_offset_costs_only_its_own_rounding(offset):
    x, labels = data(offset)
    whole = ops.class_moments(x, labels, CLASSES)
    state = ClassMoments.empty(CLASSES, 17)
    for rows, classes in zip(x.split(16), labels.split(16), strict=True):
        ops.class_moments(rows, classes, CLASSES, out=state)
    spread = (x - x.mean(0)).std()
    # Means are rounded to eps * offset; relative to the spread, that is what a merge can lose.
    assert_close(state, whole, scales(x, labels, whole), 1e-12 + 40 * 2.3e-16 * offset / spread)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_is_neutral_to_the_bit(backend):
    x, labels = data()
    state = ops.class_moments(x, labels, CLASSES)
    empty = ClassMoments.empty(CLASSES, 17)
    for merged in (
        ops.merge_moments(state, empty, backend=backend),
        ops.merge_moments(empty, state, backend=backend),
    ):
        assert all(torch.equal(a, b) for a, b in zip(merged.tensors(), state.tensors(), strict=True))
    assert not any(tensor.any() for tensor in empty.tensors())


def test_backends_agree():
    x, labels = data()
    a, b = (ops.class_moments(x[part], labels[part], CLASSES) for part in (slice(0, 99), slice(99, None)))
    ours, reference = (ops.merge_moments(a, b, backend=backend) for backend in BACKENDS)
    assert_close(ours, reference, scales(x, labels, reference), 1e-13)


def vectors(offset=0.0):
    """Maps whose three statistics differ, and their features."""
    x, labels = data(offset)
    maps = torch.stack([x, x.flip(1), x.roll(3, 1)], 2)
    return maps, labels, ops.pool(maps, statistic=VECTOR["statistic"], layout="nchw", backend="reference")


def vector_state(maps, labels, backend, out=None):
    return ops.class_moments(maps, labels, CLASSES, layout="nchw", out=out, backend=backend, **VECTOR)


def assert_is_scatter(state, pooled, labels, relative):
    rows, columns = torch.tril_indices(3, 3)
    for k in range(CLASSES):
        own = pooled[labels == k]
        deviation = own - own.mean(0)
        assert state.count[k] == len(own)
        limit = relative * deviation.abs().max()
        assert bool(((state.mean[:, k] - own.mean(0).T).abs() <= limit).all())
        exact = torch.einsum("nci,ncj->ijc", deviation, deviation)[rows, columns]
        size = deviation.abs().amax((0, 1))
        limit = relative * len(own) * (size[rows] * size[columns])[:, None]
        assert bool(((state.scatter[:, k] - exact).abs() <= limit).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [1, 2, 7, 60, 240])
def test_any_split_of_vectors_agrees(backend, parts):
    maps, labels, pooled = vectors()
    state = VectorMoments.empty(3, CLASSES, 17)
    merged = VectorMoments.empty(3, CLASSES, 17)
    for rows, classes in zip(maps.tensor_split(parts), labels.tensor_split(parts), strict=True):
        vector_state(rows, classes, backend, out=state)
        merged = ops.merge_moments(merged, vector_state(rows, classes, backend), backend=backend)
    assert_is_scatter(state, pooled, labels, 1e-12)
    assert_is_scatter(merged, pooled, labels, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_an_offset_costs_vectors_only_its_own_rounding(backend, offset):
    maps, labels, pooled = vectors(offset)
    state = VectorMoments.empty(3, CLASSES, 17)
    for rows, classes in zip(maps.split(16), labels.split(16), strict=True):
        state = ops.merge_moments(state, vector_state(rows, classes, backend), backend=backend)
    # As above; l2 of three values is at most sqrt(3) times the offset.
    assert_is_scatter(state, pooled, labels, 1e-12 + 80 * 2.3e-16 * offset / float(pooled[..., 0].std(0).mean()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_empty_vector_state_is_neutral_to_the_bit(backend):
    maps, labels, _ = vectors()
    state = vector_state(maps, labels, "reference")
    for empty in (VectorMoments.empty(3, CLASSES, 17), poisoned_vector(3, CLASSES, 17)):
        before = empty.clone()
        for merged in (
            ops.merge_moments(state, empty, backend=backend),
            ops.merge_moments(empty, state, backend=backend),
        ):
            assert same_bits(merged, state)
        assert torch.equal(empty.count, before.count)


def test_backends_agree_on_vectors():
    maps, labels, _ = vectors()
    a, b = (vector_state(maps[part], labels[part], "reference") for part in (slice(0, 99), slice(99, None)))
    ours, reference = (ops.merge_moments(a, b, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(ours.mean, reference.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ours.scatter, reference.scatter, rtol=1e-13, atol=1e-12)


def test_different_shapes_are_refused():
    scalar, vector = ClassMoments.empty(4, 17), VectorMoments.empty(3, 4, 17)
    message = r"a is a ClassMoments of 4 classes and 17 channels on cpu, b is a "
    with pytest.raises(ValueError, match=message + "ClassMoments of 4 classes and 16 channels on cpu"):
        ops.merge_moments(scalar, ClassMoments.empty(4, 16))
    with pytest.raises(ValueError, match=message + "VectorMoments of 3 statistics, 4 classes and 17 channels on cpu"):
        ops.merge_moments(scalar, vector)
    with pytest.raises(
        ValueError, match=r"a is a VectorMoments of 3 statistics, .* b is a VectorMoments of 2 statistics"
    ):
        ops.merge_moments(vector, VectorMoments.empty(2, 4, 17))
    with pytest.raises(TypeError, match="merge_moments: b must be a ClassMoments or VectorMoments, got NoneType"):
        ops.merge_moments(vector, None)
