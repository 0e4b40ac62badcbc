"""discedit._cpu on its own: NumPy arrays in, no torch in the process, nothing read or written out of bounds."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from discedit import _cpu

RULE = ("robust", 1.0, 0.0, 0.0, 0.0, 1.0)


def state(classes, channels):
    return (np.zeros(classes, np.int64), *(np.zeros((classes, channels)) for _ in range(4)))


def vector(dimension, classes, channels):
    entries = dimension * (dimension + 1) // 2
    return (
        np.zeros(classes, np.int64),
        np.zeros((dimension, classes, channels)),
        np.zeros((entries, classes, channels)),
    )


def pool(x, channel_axis, out, statistics=("mean",)):
    _cpu.pool(x, channel_axis, statistics, out)


def class_moments(x, labels, into, statistics=("mean",)):
    _cpu.class_moments(x, 1, statistics, 0.0, labels, into)


def patch_moments(x, kernel=(3, 2), stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), positions=None, taps=6):
    mean, scatter = np.zeros((3, taps)), np.zeros((3, taps, taps))
    _cpu.patch_moments(x, kernel, stride, padding, dilation, positions, mean, scatter)
    return mean, scatter


def test_runs_without_torch():
    script = f"""
        import sys
        sys.modules["torch"] = None  # any import of torch now fails
        import importlib.util
        spec = importlib.util.spec_from_file_location("_cpu", {_cpu.__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        import numpy as np
        x = np.random.default_rng(0).normal(size=(20, 3, 4, 5)).astype(np.float32)
        labels = np.arange(20) % 2
        arrays = (np.zeros(2, np.int64), *(np.full((2, 3), np.nan) for _ in range(4)))
        module.class_moments(x, 1, ["mean"], 0.0, labels, arrays, 2)
        pooled = x.astype(np.float64).mean((2, 3))
        for k in range(2):
            own = pooled[labels == k]
            np.testing.assert_allclose(arrays[1][k], own.mean(0), rtol=1e-12)
            np.testing.assert_allclose(arrays[2][k], ((own - own.mean(0)) ** 2).sum(0), rtol=1e-12)
        out = np.empty((3, 2))
        module.one_vs_rest(arrays, "minimax", "quadratic", out, 2)
        assert ((out > 0) & (out < 1)).all(), out
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_read_only_and_strided_numpy():
    x = np.random.default_rng(0).normal(size=(5, 6, 7, 8))
    x.setflags(write=False)
    view = x[::-1, ::2, :, 1:-1]
    out = np.full((5, 3), np.nan)
    pool(view, 1, out)
    np.testing.assert_allclose(out, view.mean((2, 3)), rtol=1e-13)


def test_empty_arrays_of_any_strides():
    empty = np.zeros((2, 0, 30))[0]
    _cpu.bound("fisher", empty, np.zeros((0, 30, 30)), empty, np.zeros((0, 30, 30)), np.zeros(0))
    out = np.zeros((4, 0, 3))[1]
    pool(np.zeros((0, 3, 5)), 1, out)


def test_patches_of_a_view():
    x = np.random.default_rng(0).normal(size=(5, 6, 4, 8)).astype(np.float32)
    view = x[::-1, ::2, ::-1, 1:-1:2]
    mean, scatter = patch_moments(view, positions=np.array([1]))
    seen = view[:, :, :3, 1:].transpose(1, 2, 3, 0).reshape(3, 6, 5).astype(np.float64)
    np.testing.assert_allclose(mean, seen.mean(2), rtol=1e-6)
    deviation = seen - seen.mean(2, keepdims=True)
    np.testing.assert_allclose(scatter, deviation @ deviation.swapaxes(1, 2), rtol=1e-5, atol=1e-6)


def misaligned(shape):
    size = int(np.prod(shape)) * 8
    return np.frombuffer(bytearray(size + 1), np.uint8)[1:].view(np.float64).reshape(shape)


def read_only(array):
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool([1.0], 1, np.zeros(1)), "pool: x must be a NumPy array or support DLPack, got list"),
        (lambda: pool(np.zeros((2, 3), np.int32), 1, np.zeros((2, 3))), "pool: x has the unsupported type int32"),
        (lambda: pool(np.zeros((2, 3), ">f4"), 1, np.zeros((2, 3))), "pool: x must have native byte order"),
        (lambda: pool(np.zeros((2, 3), np.int64), 1, np.zeros((2, 3))), "pool: x must be float16, .* got int64"),
        (lambda: pool(np.zeros((2, 3)), 2, np.zeros((2, 3))), r"pool: channel_axis must lie in 1..1 .* got 2"),
        (lambda: pool(np.zeros((2, 3)), 0, np.zeros((2, 3))), "channel_axis must lie in 1..1"),
        (lambda: pool(np.zeros(2), 1, np.zeros(2)), "channel_axis must lie"),
        (
            lambda: pool(np.zeros((2, 3)), 1, np.zeros((2, 2))),
            r"pool: out must hold 6 elements, got shape \(2, 2\)",
        ),
        (
            lambda: pool(np.zeros((2, 3)), 1, np.zeros((2, 3), np.float32)),
            "pool: out must be float64, got float32",
        ),
        (lambda: pool(np.zeros((2, 3)), 1, np.zeros((2, 6))[:, ::2]), "pool: out must be contiguous"),
        (lambda: pool(np.zeros((2, 3)), 1, read_only(np.zeros((2, 3)))), "pool: out .* must not be read-only"),
        (lambda: pool(misaligned((2, 3)), 1, np.zeros((2, 3))), "pool: x must be aligned to its element type"),
        (lambda: pool(np.zeros((1,) * 9), 1, np.zeros((1, 1))), "pool: x has 9 axes; at most 8 are supported"),
        (
            lambda: class_moments(np.zeros((2, 3)), np.array([0, 7]), state(2, 3)),
            r"class_moments: labels must lie in 0..1 \(num_classes=2\), found 7 at position 1",
        ),
        (
            lambda: class_moments(np.zeros((2, 3)), np.zeros(3, np.int64), state(2, 3)),
            "class_moments: labels must hold 2 elements",
        ),
        (
            lambda: class_moments(np.zeros((2, 3)), np.zeros(2, np.int64), state(2, 4)),
            "class_moments: the state must hold 3 channels like x, got 4",
        ),
        (
            lambda: _cpu.merge_moments(state(2, 3), state(2, 4)),
            "merge_moments: the states must have the same kind and shape",
        ),
        (
            lambda: _cpu.merge_moments((), ()),
            r"a state must be a tuple \(count, mean, m2, m3, m4\) or \(count, mean, scatter\), got 0 entries",
        ),
        (
            lambda: class_moments(np.zeros((2, 3)), np.zeros(2, np.int64), state(2, 3), ["mean", "rms"]),
            "class_moments: the state must hold 2 statistics, got 1",
        ),
        (
            lambda: class_moments(np.zeros((2, 3)), np.zeros(2, np.int64), vector(9, 2, 3)),
            r"mean must have shape \(d, classes, channels\) with d in 1..8, got \(9, 2, 3\)",
        ),
        (
            lambda: class_moments(np.zeros((2, 3)), np.zeros(2, np.int64), vector(2, 2, 3)[:2] + state(2, 3)[:1]),
            "class_moments: scatter must be float64, got int64",
        ),
        (
            lambda: pool(np.zeros((2, 3)), 1, np.zeros((1, 2, 3)), ["median"]),
            "statistics must be among .* got 'median'",
        ),
        (lambda: pool(np.zeros((2, 3)), 1, np.zeros((1, 2, 3)), []), "statistics must name at least one"),
        (lambda: pool(np.zeros((2, 3)), 1, np.zeros((8, 2, 3)), ["mean"] * 8), "statistics must be at most 7, got 8"),
        (
            lambda: pool(np.zeros((2, 3, 0)), 1, np.zeros((2, 3))),
            r"x must have at least one element per map, got shape \(2, 3, 0\)",
        ),
        (
            lambda: _cpu.fold_moments(np.zeros((2, 3)), 0.0, np.zeros(2, np.int64), state(2, 3)),
            r"pooled must have shape \(statistics, samples, channels\), got \(2, 3\)",
        ),
        (
            lambda: _cpu.one_vs_rest(state(2, 3), "fisher", "vector", np.zeros((3, 2))),
            "witness must be 'linear' or 'quadratic', got 'vector'",
        ),
        (
            lambda: _cpu.pairwise_min(vector(2, 2, 3), "fisher", "linear", np.zeros(3), np.zeros((3, 2), np.int64)),
            "witness must be 'vector' for a vector state, got 'linear'",
        ),
        (
            lambda: _cpu.pairwise_min(state(2, 3), "fisher", "linear", np.zeros(3), np.zeros((2, 2), np.int64)),
            r"pairs must hold 6 elements, got shape \(2, 2\)",
        ),
        (
            lambda: _cpu.one_vs_rest(state(2, 3), "chernoff", "linear", np.zeros((3, 2))),
            "bound must be 'fisher' or 'minimax', got 'chernoff'",
        ),
        (
            lambda: _cpu.one_vs_one(state(2, 3), RULE, "linear", "sum", np.zeros(3), None),
            "comparison must be with_rest, all_pairs, mean or least, got 'sum'",
        ),
        (
            lambda: _cpu.one_vs_one(state(2, 3), RULE, "linear", "all_pairs", np.zeros((3, 2)), None),
            r"out must hold 12 elements, got shape \(3, 2\)",
        ),
        (
            lambda: _cpu.one_vs_one(state(2, 3), RULE, "linear", "least", np.zeros(3), np.zeros((2, 2), np.int64)),
            r"pairs must hold 6 elements, got shape \(2, 2\)",
        ),
        (
            lambda: _cpu.one_vs_one(state(2, 3), ("witness", *RULE[1:]), "quadratic", "mean", np.zeros(3), None),
            "this bound takes the witness 'linear' alone, got 'quadratic'",
        ),
        (
            lambda: _cpu.one_vs_one(vector(2, 2, 3), ("certified", *RULE[1:]), "vector", "mean", np.zeros(3), None),
            "this bound takes the witness 'linear' alone, got 'vector'",
        ),
        (
            lambda: _cpu.one_vs_one(state(2, 3), ("chernoff", *RULE[1:]), "linear", "mean", np.zeros(3), None),
            "rule must name a member of the family of bounds, got 'chernoff'",
        ),
        (
            lambda: _cpu.one_vs_one(state(2, 3), RULE[:3], "linear", "mean", np.zeros(3), None),
            r"rule must be \(name, radius, rho, log_term, low, high\)",
        ),
        (
            lambda: _cpu.member(RULE, *[np.zeros((2, 1)), np.zeros((2, 1, 1))] * 2, np.zeros(3), np.zeros(2)),
            r"radius must hold 2 elements, got shape \(3,\)",
        ),
        (
            lambda: _cpu.member(
                ("witness", *RULE[1:]), *[np.zeros((2, 1)), np.zeros((2, 1, 1))] * 2, None, np.zeros(2)
            ),
            "member: this one takes no covariances",
        ),
        (
            lambda: _cpu.witness(True, np.zeros(3), np.zeros(3), np.zeros(2), np.zeros(3), np.zeros(3)),
            r"mean2 must hold 3 elements, got shape \(2,\)",
        ),
        (lambda: patch_moments(np.zeros((2, 3, 4))), r"x must have shape .* got \(2, 3, 4\)"),
        (lambda: patch_moments(np.zeros((2, 3, 4, 5), np.int64)), "patch_moments: x must be float16, .* got int64"),
        (lambda: patch_moments(np.zeros((2, 3, 0, 5))), r"x must have at least one element per map"),
        (lambda: patch_moments(np.zeros((2, 3, 4, 5)), taps=5), r"mean must hold 18 elements, got shape \(3, 5\)"),
        (lambda: patch_moments(np.zeros((2, 3, 4, 5)), stride=(0, 1)), "stride and dilation must be at least 1"),
        (lambda: patch_moments(np.zeros((2, 3, 4, 5)), padding=(0, -1, 0, 0)), "padding at least 0 on each axis"),
        (lambda: patch_moments(np.zeros((2, 3, 4, 5)), dilation=(1, 5)), "it covers 6 of 5 on axis 3"),
        (
            lambda: patch_moments(np.zeros((2, 3, 4, 5)), padding=(2**30, 0, 0, 0)),
            "at most 268435456 wide and high: it covers 3 of 1073741828 on axis 2",
        ),
        (lambda: patch_moments(np.zeros((2, 3, 4, 5)), padding=(2**40, 0, 0, 0)), "incompatible function arguments"),
        (
            lambda: patch_moments(np.zeros((2, 3, 4, 5)), positions=np.array([0, 8])),
            r"patch_moments: positions must lie in 0..7, found 8 at position 1",
        ),
        (
            lambda: patch_moments(np.zeros((2, 3, 4, 5)), positions=np.array([0.0])),
            "patch_moments: positions must be int64, got float64",
        ),
        (
            lambda: _cpu.bound("fisher", np.zeros((1, 33)), np.zeros((1, 33, 33)), 0, 0, np.zeros(1)),
            "bound: mean2 must be a NumPy array",
        ),
        (
            lambda: _cpu.bound("fisher", *[np.zeros((1, 33)), np.zeros((1, 33, 33))] * 2, np.zeros(1)),
            r"bound: mean1 must have shape \(pairs, d\) with d in 1..32, got \(1, 33\)",
        ),
    ],
)
def test_bad_arrays_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
