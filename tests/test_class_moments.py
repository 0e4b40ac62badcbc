import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    assert_no_worse_than,
    hostile_maps,
    labels_for,
    naive_moments,
    poisoned_state,
)

from discedit import ops
from discedit._state import ClassMoments

CLASSES = 6
MAPS = hostile_maps()


def exact_moments(x, labels):
    return naive_moments(x.double(), labels, CLASSES)


def gross_sums(x, labels, exact_mean):
    """Sums of |t - mean|^p (p >= 2) and |mean| itself: the scale that rounding is relative to."""
    pooled = x.double().flatten(2).mean(2) if x.ndim > 2 else x.double()
    onehot = torch.nn.functional.one_hot(labels, CLASSES).double()
    deviation = (pooled - exact_mean[labels]).abs()
    return [exact_mean.abs()] + [onehot.T @ deviation**p for p in (2, 3, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_channels_have_exact_moments(backend):
    x = torch.full((12, 5, 7, 7), 0.1)
    labels = labels_for(12)
    state = ops.class_moments(x, labels, CLASSES, backend=backend)
    ops.class_moments(x, labels, CLASSES, out=state, backend=backend)
    seen = state.count > 0
    assert torch.equal(state.mean[seen], x.double().mean((2, 3))[0].expand(int(seen.sum()), 5))
    assert not torch.cat([state.m2, state.m3, state.m4]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_state_is_never_read(backend):
    x, labels = MAPS["plain"], labels_for(12)
    fresh = ops.class_moments(x, labels, CLASSES, backend=backend)
    poisoned = ops.class_moments(x, labels, CLASSES, out=poisoned_state(CLASSES, 5), backend=backend)
    seen = fresh.count > 0
    for a, b in zip(fresh.tensors()[1:], poisoned.tensors()[1:], strict=True):
        assert torch.equal(a[seen], b[seen])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_labels(dtype):
    x, labels = MAPS["plain"], labels_for(12)
    expected = ops.class_moments(x, labels, CLASSES)
    ours = ops.class_moments(x, labels.to(dtype)[::1], CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(expected.tensors(), ours.tensors(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples_change_nothing(backend):
    state = ops.class_moments(MAPS["plain"], labels_for(12), CLASSES, backend=backend)
    before = state.clone()
    ops.class_moments(torch.zeros(0, 5, 7, 7), torch.zeros(0, dtype=torch.int64), CLASSES, out=state, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), state.tensors(), strict=True))


def test_same_bits_for_any_number_of_threads():
    x, labels = torch.randn(600, 300, 4, 4), torch.randint(0, 9, (600,))
    states = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        states.append(ops.class_moments(x, labels, 9, backend="cpp"))
    torch.set_num_threads(2)
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0].tensors(), other.tensors(), strict=True))


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
        ([0, 1, 2], r"labels must be a torch.Tensor of class indices, got list"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_labels_leave_the_state_alone(labels, message, backend):
    x = torch.ones(3, 4)
    state = ClassMoments.empty(10, 4)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.class_moments(x, labels, 10, out=state, backend=backend)
    assert not any(tensor.any() for tensor in state.tensors())


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "10"])
def test_bad_num_classes(num_classes):
    with pytest.raises(ValueError, match=r"class_moments: num_classes must be an integer of at least 1, got"):
        ops.class_moments(torch.ones(1, 1), torch.tensor([0]), num_classes)


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"out must hold 10 classes and 4 channels on cpu, it holds 10 and 5 on cpu"):
        ops.class_moments(torch.ones(3, 4), torch.tensor([0, 1, 2]), 10, out=ClassMoments.empty(10, 5))


@pytest.mark.parametrize("backend", BACKENDS)
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
        ops.one_vs_rest(strided, backend=backend), ops.one_vs_rest(expected, backend=backend), equal_nan=True
    )
    doubled = ops.merge_moments(strided, strided, backend=backend)
    assert torch.equal(doubled.count, 2 * expected.count)


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
    with pytest.raises(TypeError, match="one_vs_rest: moments must be a ClassMoments, got dict"):
        ops.one_vs_rest({})


def test_num_classes_of_any_library():
    state = ops.class_moments(torch.ones(1, 1), torch.tensor([0]), np.int64(3))
    assert state.num_classes == 3
