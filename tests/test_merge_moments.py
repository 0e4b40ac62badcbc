import itertools

import pytest
import torch
from helpers import BACKENDS

from discedit import ops
from discedit._state import ClassMoments

CLASSES = 4


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


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"a is \(4, 17\) on cpu, b is \(4, 16\) on cpu"):
        ops.merge_moments(ClassMoments.empty(4, 17), ClassMoments.empty(4, 16))
