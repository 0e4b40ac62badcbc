"""The CUDA kernels against the reference, without a GPU: compiled for the host and run there (tests/cuda_on_host)."""

from __future__ import annotations

import ctypes
import itertools
import math
from functools import partial

import cuda_on_host
import pytest
import torch
from helpers import all_pairs, before_the_end_of_memory, hostile_maps, labels_for, poisoned, same_bits
from test_patch_moments import (
    CONSTANTS,
    NOT_FINITE,
    WINDOWS,
    assert_constant,
    assert_right,
    assert_stays,
    batch,
    window,
)
from torch.utils.dlpack import to_dlpack

from discedit import _cpu, backends, reference
from discedit.backends.arguments import Rule
from discedit.common.state import ClassMoments, VectorMoments

EPSILON = torch.finfo(torch.float64).eps
STATISTICS = ("mean", "sum", "l2", "rms", "absmax", "max", "positive_fraction")
CLASSES = 6
MAPS = hostile_maps()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(scope="session")
def cuda(made_once):
    if cuda_on_host.compiler() is None:
        pytest.skip("needs g++ to compile the kernels for the host")
    return cuda_on_host.load(made_once("cuda_on_host", cuda_on_host.compile_in))


ORDERS = ["0", "1", "7"]  # ascending, descending, shuffled
INDIRECT = {"indirect": ["order_of_threads"]}


@pytest.fixture(params=ORDERS)
def order_of_threads(request, monkeypatch):
    monkeypatch.setenv("CUDA_ON_HOST_ORDER", request.param)


# ---- calls: outputs and working memory start as NaN -----------------------------------------------------------------


def nan(*shape):
    return torch.full(shape, math.nan, dtype=torch.float64)


def capsules(*tensors):
    return tuple(to_dlpack(tensor) for tensor in tensors)


def pool(cuda, x, statistics, channel_axis=1):
    data, out = to_dlpack(x), nan(len(statistics), x.shape[0], x.shape[channel_axis])
    size = cuda.pool_scratch(data, channel_axis, statistics)
    scratch = to_dlpack(nan(size)) if size else None
    cuda.pool(to_dlpack(x), channel_axis, statistics, to_dlpack(out), scratch, 0)
    return out


def fold(cuda, pooled, labels, state, scale=0.0, ordered=True):
    order = to_dlpack(labels.argsort(stable=True)) if ordered else None
    cuda.fold_moments(to_dlpack(pooled), scale, to_dlpack(labels), order, capsules(*state.tensors()), 0)
    return state


def one_vs_rest(cuda, state, bound, witness):
    out = nan(state.channels, state.num_classes)
    scratch = nan(cuda.one_vs_rest_scratch(capsules(*state.tensors())))
    cuda.one_vs_rest(capsules(*state.tensors()), bound, witness, *capsules(out, scratch), 0)
    return out


def pairwise_min(cuda, state, bound, witness):
    values, pairs = nan(state.channels), torch.full((state.channels, 2), -7)
    scratch = nan(cuda.pairwise_min_scratch(capsules(*state.tensors())))
    cuda.pairwise_min(capsules(*state.tensors()), bound, witness, *capsules(values, pairs, scratch), 0)
    return values, pairs


def patch_moments(cuda, x, kernel_size, positions=None, **options):
    read = window(x, kernel_size, **options)
    mean, scatter = nan(x.shape[1], read.taps), nan(x.shape[1], read.taps, read.taps)
    count = None if positions is None else len(positions)
    scratch = to_dlpack(nan(cuda.patch_moments_scratch(to_dlpack(x), *read, count)))
    places = None if positions is None else to_dlpack(positions)
    cuda.patch_moments(to_dlpack(x), *read, places, *capsules(mean, scatter), scratch, 0)
    rows, columns = read.outputs(x)
    return len(x) * (rows * columns if count is None else count), mean, scatter


# ---- pool -----------------------------------------------------------------------------------------------------------


def rounding(x, channel_axis=1):
    """What each statistic can be off by, as in test_pool.py: n roundings of the absolute terms of a sum, and three of
    2^-24 where float16 is first added in fours; extremes are exact. Infinite where the exact sum is not finite."""
    v = x.double().movedim(channel_axis, 1).flatten(2) if x.ndim > 2 else x.double()[..., None]
    n = v.shape[2]
    unit = n * EPSILON + (3 * 2.0**-24 if x.dtype == torch.float16 else 0)
    total, root = unit * v.abs().sum(2), (unit + 3 * EPSILON) * v.square().sum(2).sqrt()
    positive = EPSILON * (v > 0).double().mean(2)
    zero = torch.zeros_like(total)
    return torch.stack([total / n, total, root, root / math.sqrt(n), zero, zero, positive])


def assert_pooled(ours, x, statistics, channel_axis=1):
    exact = reference.pool(x, channel_axis, statistics)
    allowed = rounding(x, channel_axis)[[STATISTICS.index(name) for name in statistics]]
    # The reference sums in float64 too, with roundings of its own; what is not finite must be the same.
    special = ~exact.isfinite()
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours[special].nan_to_num(), exact[special].nan_to_num())
    excess = ((ours - exact).abs() - 2 * allowed)[~special]
    assert bool((excess <= 0).all()), f"off by {excess.max():.3e} too much"


@pytest.mark.parametrize("name", MAPS)
def test_pool_of_hostile_maps(cuda, name):
    for statistics in (("mean",), ("rms", "mean"), ("max", "mean"), STATISTICS):
        assert_pooled(pool(cuda, MAPS[name], statistics), MAPS[name], statistics)


@pytest.mark.parametrize(("dtype", "channels", "tokens"), all_pairs(DTYPES, [1, 3, 8, 65, 200], [1, 2, 7, 50, 197]))
def test_pool_of_tokens(cuda, dtype, channels, tokens):
    x = torch.randn(3, tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    for maps in (x, x[:, 1:] if tokens > 1 else x, x[:, ::3], x[..., : channels // 2 + 1]):
        assert_pooled(pool(cuda, maps, STATISTICS, 2), maps, STATISTICS, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 5, 16, 49, 255, 512, 1024, 2049, 9000])
def test_pool_of_rows_of_every_length(cuda, dtype, size):
    """Lanes per row and chunks change with the length; `off` shifts the alignment."""
    generator = torch.Generator().manual_seed(0)
    for off in (0, 1, 3):
        buffer = torch.randn(2 * 5 * size + off, generator=generator).to(dtype)
        x = buffer[off:].view(2, 5, size)
        assert_pooled(pool(cuda, x, STATISTICS), x, STATISTICS)
        assert torch.equal(pool(cuda, x, STATISTICS), pool(cuda, x.clone(), STATISTICS))  # alignment leaves no trace


@pytest.mark.parametrize(("dtype", "memory_format", "order_of_threads"), all_pairs(DTYPES, FORMATS, ORDERS), **INDIRECT)
def test_few_long_maps_are_cut_into_spans(cuda, dtype, memory_format, order_of_threads):
    x = torch.randn(1, 3, 233, 301, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1] = -x[0, 1].abs() - 1
    x[0, 2, 200, 7] = math.nan
    x = x.contiguous(memory_format=memory_format)
    assert cuda.pool_scratch(to_dlpack(x), 1, STATISTICS) >= 5 * 2 * 3
    assert_pooled(pool(cuda, x, STATISTICS), x, STATISTICS)
    sliced = x[..., 1:-1]
    assert_pooled(pool(cuda, sliced, ("mean",)), sliced, ("mean",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [False, True])
def test_every_16_bit_value_widens_exactly(cuda, dtype, columns):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = bits.view(256, 256, 1) if columns else bits.view(-1, 1)
    ours = pool(cuda, x, STATISTICS).flatten(1)
    v = bits.double()
    size = (v * v).sqrt()
    expected = torch.stack([v, v, size, size, v.abs(), v, torch.where(v.isnan(), v, (v > 0).double())])
    torch.testing.assert_close(ours, expected, rtol=2 * EPSILON, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "memory_format", "size"), all_pairs(DTYPES, FORMATS, [1, 3, 40]))
def test_nan_stays_in_its_map_and_infinity_counts(cuda, dtype, memory_format, size):
    clean = torch.randn(2, 5, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = pool(cuda, clean.contiguous(memory_format=memory_format), STATISTICS)
    for place, value in itertools.product((0, size * size // 2, size * size - 1), (math.nan, -math.nan, math.inf)):
        x = clean.clone(memory_format=torch.contiguous_format)
        x[1, 3].view(-1)[place] = value
        x = x.contiguous(memory_format=memory_format)
        ours = pool(cuda, x, STATISTICS)
        assert_pooled(ours, x, STATISTICS)
        ours[:, 1, 3] = before[:, 1, 3]
        assert torch.equal(ours, before)


def test_pool_of_subnormal_numbers_and_zeros_of_either_sign(cuda):
    for dtype in DTYPES:
        least = torch.full((1, 2, 7, 5), torch.finfo(dtype).smallest_normal, dtype=torch.float64)
        x = (least.to(dtype) / 4) if dtype != torch.float64 else least / 4
        x[:, 1] = -0.0
        names = ("mean", "sum", "absmax", "max", "positive_fraction")
        assert_pooled(pool(cuda, x, names), x, names)
        assert pool(cuda, x, ("positive_fraction",)).flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (0, 3)])
def test_pool_of_nothing(cuda, shape):
    assert pool(cuda, torch.zeros(shape), STATISTICS).shape == (7, *shape[:2])


@pytest.mark.parametrize("name", ["plain", "channels_last", "sliced", "float16 channels_last", "features"])
def test_pool_does_not_depend_on_the_order_of_threads(cuda, name, monkeypatch):
    results = []
    for order in ("0", "1", "5"):
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
        results.append(pool(cuda, MAPS[name], STATISTICS))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (2, 3, 40, 52), (3, 5), (1, 70, 90)])
def test_pool_reads_nothing_behind_the_last_element(cuda, dtype, shape):
    x = before_the_end_of_memory(torch.randn(math.prod(shape)).to(dtype))
    for maps, axis in ((x.view(shape), 1), (x.view(shape), len(shape) - 1)):
        assert_pooled(pool(cuda, maps, STATISTICS, axis), maps, STATISTICS, axis)


# ---- class moments --------------------------------------------------------------------------------------------------


def assert_same_state(ours, exact, pooled):
    """Both are rounded: a deviation to eps |t|, and a power of it accordingly; a sum carries a few roundings more."""
    samples = pooled.shape[1]
    size, spread = pooled.abs().amax((1, 2)), (pooled.amax((1, 2)) - pooled.amin((1, 2)))
    off = 32 * EPSILON * size
    widest = spread + off
    assert torch.equal(ours.count, exact.count)
    seen = exact.count > 0
    mean = (ours.mean - exact.mean)[..., seen, :].abs()
    assert bool((mean <= (off[:, None, None] if mean.ndim == 3 else off)).all())
    if isinstance(exact, ClassMoments):
        for power, name in ((2, "m2"), (3, "m3"), (4, "m4")):
            atol = samples * (power * widest ** (power - 1) * off + 64 * EPSILON * widest**power)
            assert bool(((getattr(ours, name) - getattr(exact, name))[seen].abs() <= atol).all()), name
    else:
        rows, columns = torch.tril_indices(exact.dimension, exact.dimension)
        one, two = widest[rows], widest[columns]
        atol = samples * (one * off[columns] + off[rows] * two + 64 * EPSILON * one * two)
        assert bool(((ours.scatter - exact.scatter)[:, seen].abs() <= atol[:, None, None]).all())


def features(samples, channels, statistics=1, offset=0.0):
    generator = torch.Generator().manual_seed(samples + channels)
    return torch.randn(statistics, samples, channels, generator=generator, dtype=torch.float64) + offset


def empty(statistics, classes, channels):
    if statistics == 0:
        return ClassMoments.empty(classes, channels)
    return VectorMoments.empty(statistics, classes, channels)


@pytest.mark.parametrize(
    ("shape", "dimension", "offset", "ordered"),
    all_pairs(
        [(1, 1), (12, 33), (37, 5), (600, 3), (300, 70)], [0, 1, 2, 3, 4, 5, 7, 8], [0.0, 1e4, -1e8], [True, False]
    ),
)
def test_fold_matches_the_reference(cuda, shape, dimension, offset, ordered):
    samples, channels = shape
    pooled, labels = features(samples, channels, max(1, dimension), offset), labels_for(samples, CLASSES)
    ours, exact = poisoned(empty(dimension, CLASSES, channels)), empty(dimension, CLASSES, channels)
    for repeat in range(2):  # the second time into what was seen before
        batch = pooled + repeat
        fold(cuda, batch, labels, ours, ordered=ordered)
        reference.fold_moments(batch, 0.0, labels, exact)
    assert_same_state(ours, exact, torch.cat([pooled, pooled + 1], 1))


@pytest.mark.parametrize("dimension", [0, 3, 8])
def test_order_and_threads_leave_no_trace(cuda, dimension, monkeypatch):
    pooled, labels = features(700, 40, max(1, dimension)), labels_for(700, 9)
    states = []
    for ordered, order in itertools.product((True, False), ("0", "1", "5")):
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
        states.append(fold(cuda, pooled, labels, empty(dimension, 9, 40), ordered=ordered))
    assert all(same_bits(states[0], other) for other in states[1:])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 7.5])
def test_fold_of_exponentials(cuda, scale):
    pooled, labels = features(40, 9), labels_for(40)
    ours, exact = empty(0, CLASSES, 9), empty(0, CLASSES, 9)
    fold(cuda, pooled, labels, ours, scale)
    reference.fold_moments(pooled, scale, labels, exact)
    assert_same_state(ours, exact, torch.exp(-scale * pooled))


@pytest.mark.parametrize("dimension", [0, 2])
def test_constant_channels_and_single_samples_have_exact_moments(cuda, dimension):
    pooled, labels = torch.full((max(1, dimension), 40, 5), 0.1, dtype=torch.float64), labels_for(40)
    state = empty(dimension, CLASSES, 5)
    for _ in range(2):
        fold(cuda, pooled, labels, state)
    seen = state.count > 0
    assert bool((state.mean[..., seen, :] == 0.1).all())
    assert not any(sums.any() for sums in state.tensors()[2:])
    assert not state.mean[..., ~seen, :].any()


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("dimension", [0, 2])
def test_nan_and_infinity_stay_in_their_class_and_channel(cuda, dimension, ordered):
    pooled, labels = features(40, 5, max(1, dimension)), torch.arange(40) % 4
    clean = fold(cuda, pooled, labels, empty(dimension, 4, 5), ordered=ordered)
    pooled[0, 9, 2], pooled[0, 12, 3] = math.nan, math.inf
    ours = fold(cuda, pooled, labels, empty(dimension, 4, 5), ordered=ordered)
    touched = torch.zeros(4, 5, dtype=torch.bool)
    touched[1, 2] = touched[0, 3] = True
    for mine, before in zip(ours.tensors()[1:], clean.tensors()[1:], strict=True):
        assert torch.equal(mine[..., ~touched], before[..., ~touched])
        assert not mine.reshape(-1, 4, 5)[0][touched].isfinite().any()


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("dimension", [0, 2])
def test_labels_out_of_range_are_left_out_and_write_nowhere(cuda, dimension, ordered):
    pooled, labels = features(50, 5, max(1, dimension)), torch.arange(50) % 4
    wrong = labels.clone()
    wrong[::3] = torch.tensor([-1, 4, 2**40, -(2**62), 5])[torch.arange(17) % 5]
    kept = wrong == labels
    guard = 1000  # what is written just outside lands in the margins
    state, buffers = [], []
    for tensor in empty(dimension, 4, 5).tensors():
        buffer = torch.full((tensor.numel() + 2 * guard,), 77, dtype=tensor.dtype)
        inside = buffer[guard:-guard].view(tensor.shape)
        state.append(inside.zero_())
        buffers.append(buffer)
    ours = fold(cuda, pooled, wrong, type(empty(dimension, 4, 5))(*state), ordered=ordered)
    for buffer in buffers:
        assert bool((buffer[:guard] == 77).all())
        assert bool((buffer[-guard:] == 77).all())
    expected = fold(cuda, pooled[:, kept].contiguous(), labels[kept], empty(dimension, 4, 5), ordered=ordered)
    assert same_bits(ours, expected)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_million_classes(cuda, ordered):
    labels = torch.tensor([0, 2**20 - 1, 5, 5])
    pooled = torch.tensor([[[1.0], [2.0], [3.0], [5.0]]], dtype=torch.float64)
    state = fold(cuda, pooled, labels, ClassMoments.empty(2**20, 1), ordered=ordered)
    assert state.mean[[0, 5, 2**20 - 1], 0].tolist() == [1.0, 4.0, 2.0]
    assert int(state.count.sum()) == 4


@pytest.mark.parametrize("dimension", [0, 2])
@pytest.mark.parametrize("before", [0, 2**40])
def test_counts_of_a_state_of_many_tiles(cuda, dimension, before, order_of_threads):
    """While a batch is folded, a count's upper bits hold how many tiles are done."""
    channels = 32 * 300 + 1
    pooled, labels = features(5, channels, max(1, dimension)), torch.tensor([2, 0, 2, 2, 5])
    state = empty(dimension, CLASSES, channels)
    state.count[:] = torch.tensor([before, before, before, 0, before, before])
    fold(cuda, pooled, labels, state)
    assert (state.count - torch.tensor([before, before, before, 0, before, before])).tolist() == [1, 0, 3, 0, 0, 1]
    exact = empty(dimension, CLASSES, channels)
    exact.count[:] = torch.tensor([before, before, before, 0, before, before])
    reference.fold_moments(pooled, 0.0, labels, exact)
    torch.testing.assert_close(state.mean, exact.mean, rtol=1e-9, atol=1e-24)


@pytest.mark.parametrize("dimension", [0, 2])
def test_counts_of_a_state_without_channels(cuda, dimension):
    state = fold(cuda, features(3, 0, max(1, dimension)), torch.tensor([1, 1, 0]), empty(dimension, 2, 0))
    assert state.count.tolist() == [1, 2]


def test_no_samples_change_nothing(cuda):
    state = fold(cuda, features(20, 5), labels_for(20), empty(0, CLASSES, 5))
    before = state.clone()
    fold(cuda, features(20, 5)[:, :0].contiguous(), torch.zeros(0, dtype=torch.int64), state)
    assert same_bits(state, before)


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [0, 1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("channels", [1, 7, 300])
def test_merge_matches_the_reference(cuda, dimension, channels):
    pooled, labels = features(80, channels, max(1, dimension), 1e4), labels_for(80)
    parts = []
    for rows in (slice(0, 30), slice(30, 80)):
        part = empty(dimension, CLASSES, channels)
        reference.fold_moments(pooled[:, rows], 0.0, labels[rows] % (3 if rows.start else 6), part)
        parts.append(part)
    into, exact = poisoned_where_empty(parts[0]), parts[0].clone()
    cuda.merge_moments(capsules(*into.tensors()), capsules(*poisoned_where_empty(parts[1]).tensors()), 0)
    reference.merge_moments(exact, parts[1])
    assert_same_state(into, exact, pooled)


def poisoned_where_empty(state):
    copy = state.clone()
    for tensor in copy.tensors()[1:]:
        tensor[..., copy.count == 0, :] = math.nan
    return copy


@pytest.mark.parametrize("dimension", [0, 3])
def test_an_empty_state_is_neutral_to_the_bit(cuda, dimension):
    state = fold(cuda, features(60, 40, max(1, dimension)), torch.arange(60) % 4, empty(dimension, 4, 40))
    into = poisoned(empty(dimension, 4, 40))
    cuda.merge_moments(capsules(*into.tensors()), capsules(*state.tensors()), 0)
    assert same_bits(into, state)
    cuda.merge_moments(capsules(*into.tensors()), capsules(*poisoned(empty(dimension, 4, 40)).tensors()), 0)
    assert same_bits(into, state)


# ---- bounds ---------------------------------------------------------------------------------------------------------


def laws(pairs, d):
    generator = torch.Generator().manual_seed(d)
    root = torch.randn(2, pairs, d, d, generator=generator, dtype=torch.float64)
    root[:, ::5, :, 0] = 0  # singular
    mean = torch.randn(2, pairs, d, generator=generator, dtype=torch.float64)
    cov = root @ root.mT
    mean[1, 1::7], cov[:, 1::7] = mean[0, 1::7], 0  # constant and equal
    cov[:, 2::7] = 0  # constant and different
    mean[0, 3::7, 0] = math.nan
    cov[1, 4::7, d - 1, d - 1] = math.inf
    return mean[0], cov[0], mean[1], cov[1]


def same_solver(bound, given):
    out = nan(len(given[0]))
    _cpu.bound(bound, *capsules(*given, out))
    return out


@pytest.mark.parametrize(
    ("bound", "d", "pairs"), all_pairs(["fisher", "minimax"], [1, 2, 3, 4, 5, 7, 8], [0, 1, 64, 150])
)
def test_bound_matches_the_reference(cuda, bound, d, pairs):
    given = [tensor.contiguous() for tensor in laws(pairs, d)]
    out = nan(pairs)
    cuda.bound(bound, *capsules(*given, out), 0)
    exact = reference.BOUNDS[bound](*reference._difference(given[0], given[2]), given[1], given[3])
    # Where the covariances are singular, rounding decides how tight the bound comes out: as for the CPU core, which
    # shares the solver.
    exact[::5] = same_solver(bound, given)[::5]
    torch.testing.assert_close(out, exact, rtol=1e-8, atol=1e-11, equal_nan=True)
    assert bool((out[1::7] == 0).all())
    assert bool((out[2::7] == 1).all())


# ---- one against the rest, and every pair ---------------------------------------------------------------------------

WITNESSES = ["linear", "quadratic", "vector"]
CASES = [(bound, witness) for bound in ("fisher", "minimax") for witness in WITNESSES]


def moments_of(witness, classes, channels, samples=None, dimension=3, empty_classes=True):
    """Classes 1 and 4 are empty, channel 0 is constant and equal, channel 1 constant in each class."""
    samples = samples or 12 * classes
    generator = torch.Generator().manual_seed(classes + channels)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    if empty_classes and classes > 5:
        labels[(labels == 1) | (labels == 4)] = 0
    d = dimension if witness == "vector" else 1
    pooled = torch.randn(d, samples, channels, generator=generator, dtype=torch.float64)
    pooled += 0.4 * torch.randn(d, classes, channels, generator=generator, dtype=torch.float64)[:, labels]
    pooled[..., 0] = 0.1
    if channels > 1:
        pooled[..., 1] = labels.double()
    state = empty(dimension if witness == "vector" else 0, classes, channels)
    reference.fold_moments(pooled, 0.0, labels, state)
    return state


@pytest.mark.parametrize(
    ("bound", "witness", "shape"),
    all_pairs(["fisher", "minimax"], WITNESSES, [(1, 3), (2, 1), (9, 40), (16, 5), (17, 150), (70, 3)]),
)
def test_one_vs_rest_matches_the_reference(cuda, bound, witness, shape):
    state = moments_of(witness, *shape)
    exact = reference.one_vs_rest(state, Rule(bound), witness)
    ours = one_vs_rest(cuda, poisoned_where_empty(state), bound, witness)
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("bound", ["fisher", "minimax"])
@pytest.mark.parametrize("dimension", [1, 2, 4, 5, 8])
def test_vectors_of_every_dimension(cuda, bound, dimension):
    state = moments_of("vector", 8, 6, dimension=dimension, samples=400)
    exact = reference.one_vs_rest(state, Rule(bound), "vector")
    torch.testing.assert_close(one_vs_rest(cuda, state, bound, "vector"), exact, rtol=1e-8, atol=1e-11, equal_nan=True)
    values, pairs = pairwise_min(cuda, state, bound, "vector")
    least, first = reference.pairwise_min(state, Rule(bound), "vector")
    torch.testing.assert_close(values, least, rtol=1e-8, atol=1e-11)
    assert torch.equal(pairs[1:], first[1:])


@pytest.mark.parametrize(
    ("bound", "witness", "shape"),
    all_pairs(["fisher", "minimax"], WITNESSES, [(1, 3), (2, 1), (9, 40), (65, 4), (140, 2)]),
)
def test_pairwise_min_matches_the_reference(cuda, bound, witness, shape):
    state = moments_of(witness, *shape)
    values, pairs = pairwise_min(cuda, poisoned_where_empty(state), bound, witness)
    least, first = reference.pairwise_min(state, Rule(bound), witness)
    torch.testing.assert_close(values, least, rtol=1e-8, atol=1e-11, equal_nan=True)
    if int((state.count > 0).sum()) < 2:
        assert pairs.tolist() == [[-1, -1]] * shape[1]
        return
    assert bool((pairs[:, 0] < pairs[:, 1]).all())
    assert pairs[0].tolist() == first[0].tolist() == state.count.nonzero()[:2, 0].tolist()  # of equals, the first
    for channel, (i, j) in enumerate(pairs.tolist()):
        one, two = (reference._classes(state, torch.tensor([k])) for k in (i, j))
        attained = reference._between(one, two, Rule(bound), witness)[0, channel]
        torch.testing.assert_close(attained, least[channel], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("bound", "witness"), CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_moments_that_are_not_finite_have_no_pair(cuda, bound, witness, value):
    state = moments_of(witness, 9, 5)
    clean = pairwise_min(cuda, state, bound, witness)
    for tensor in state.tensors()[1:]:
        tensor[..., 5, 2] = value
    values, pairs = pairwise_min(cuda, state, bound, witness)
    assert values[2].isnan()
    assert pairs[2].tolist() == [-1, -1]
    others = [0, 1, 3, 4]
    assert torch.equal(values[others], clean[0][others])
    assert torch.equal(pairs[others], clean[1][others])


@pytest.mark.parametrize("witness", ["quadratic", "vector"])
def test_classes_are_compared_in_any_order_of_threads(cuda, witness, monkeypatch):
    state, results = moments_of(witness, 70, 3), []
    for order in ("0", "1", "5"):
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
        results.append((one_vs_rest(cuda, state, "minimax", witness), *pairwise_min(cuda, state, "minimax", witness)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


# ---- patch moments --------------------------------------------------------------------------------------------------


def assert_exact(ours, x, kernel_size, positions=None, **options):
    """No difference is rounded to float32."""
    assert_right(ours, x.double(), kernel_size, positions, **options)


@pytest.mark.parametrize(("dtype", "memory_format", "name"), all_pairs(DTYPES, FORMATS, WINDOWS))
def test_patch_moments_are_their_definition(cuda, dtype, memory_format, name):
    (kernel_size, options), shape = WINDOWS[name]
    x = batch(shape, dtype, memory_format)
    assert_exact(patch_moments(cuda, x, kernel_size, **options), x, kernel_size, **options)


@pytest.mark.parametrize("name", [name for name, x in MAPS.items() if x.ndim == 4])
def test_patch_moments_of_hostile_maps(cuda, name):
    x = MAPS[name]
    assert_exact(patch_moments(cuda, x, 3, padding=1), x, 3, padding=1)


@pytest.mark.parametrize(
    ("memory_format", "kernel_size", "places", "order_of_threads"),
    all_pairs(FORMATS, [1, 3, 5], [None, [0, 1599, 40, 40], list(range(0, 1600, 7))], ORDERS),
    **INDIRECT,
)
def test_patch_moments_are_cut_into_spans(cuda, kernel_size, memory_format, places, order_of_threads):
    x = batch((9, 40, 40), torch.float32, memory_format, samples=3)
    positions = None if places is None else torch.tensor(places)
    options = {"padding": kernel_size // 2}
    whole = 9 * (1 + kernel_size**2 * (kernel_size**2 + 3) // 2)
    size = cuda.patch_moments_scratch(to_dlpack(x), *window(x, kernel_size, **options), places and len(places))
    assert (size > whole) == (places is None or len(places) > 100)
    ours = patch_moments(cuda, x, kernel_size, positions, **options)
    assert_exact(ours, x, kernel_size, positions, **options)
    again = patch_moments(cuda, x, kernel_size, positions, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], again[1:], strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kernel_size", [1, 3, 4])
def test_patch_moments_do_not_depend_on_the_order_of_threads(cuda, kernel_size, memory_format, monkeypatch):
    x, results = batch((40, 13, 11), torch.bfloat16, memory_format), []
    for order in ("0", "1", "5"):
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
        results.append(patch_moments(cuda, x, kernel_size))
    for _, mean, scatter in results[1:]:
        assert torch.equal(mean, results[0][1])
        assert torch.equal(scatter, results[0][2])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("channels", [3, 20])
def test_patch_moments_that_are_not_finite_stay_with_their_taps(cuda, memory_format, value, channels):
    assert_stays(partial(patch_moments, cuda), batch((channels, 6, 6), torch.float32, memory_format), value)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", CONSTANTS)
def test_patch_moments_of_a_constant_channel(cuda, value, memory_format):
    assert_constant(partial(patch_moments, cuda), torch.full((7, 9, 6, 5), value).to(memory_format=memory_format))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 9, 1, 1), (2, 17, 3, 9)])
def test_patch_moments_read_nothing_behind_the_last_element(cuda, dtype, shape):
    samples, channels, height, width = shape
    x = before_the_end_of_memory(batch((channels, height, width), dtype, samples=samples))
    for maps in (x.view(shape), x.view(samples, height, width, channels).permute(0, 3, 1, 2)):
        assert_exact(patch_moments(cuda, maps, 3, padding=1), maps, 3, padding=1)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_patch_moments_of_nothing(cuda, shape):
    nothing = torch.tensor([], dtype=torch.int64)
    for x, places in ((torch.zeros(shape), None), (torch.ones(2, shape[1], 4, 4), nothing)):
        _, mean, scatter = patch_moments(cuda, x, 3, places)
        assert not mean.any()
        assert not scatter.any()


# ---- refusals -------------------------------------------------------------------------------------------------------


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def on_device(number, *shape, kind=2, keep=[]):  # noqa: B006  # the capsules borrow
    """A capsule of float64 that claims to lie on a CUDA device. What is refused is never read."""
    axes = (ctypes.c_int64 * len(shape))(*shape)
    tensor = DLTensor(None, kind, number, len(shape), 2, 64, 1, ctypes.addressof(axes), None, 0, None, None)
    keep.append((axes, tensor))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(tensor), b"dltensor", None)


def test_arrays_on_different_devices_are_refused(cuda):
    with pytest.raises(ValueError, match=r"pool: x and out must be on the same device, got cuda:0 and cuda:1\."):
        cuda.pool(on_device(0, 2, 3), 1, ["mean"], on_device(1, 1, 2, 3), None, 0)
    state = (to_dlpack(torch.zeros(2, dtype=torch.int64)), *(on_device(3, 2, 4) for _ in range(4)))
    with pytest.raises(ValueError, match=r"count and mean must be on the same device, got cuda:0 and cuda:3"):
        cuda.one_vs_rest_scratch(state)
    cov = on_device(0, 1, 2, 2)
    with pytest.raises(ValueError, match=r"bound: mean1 and mean2 .* got cuda:0 and cuda:2"):
        cuda.bound("fisher", on_device(0, 1, 2), cov, on_device(2, 1, 2), on_device(0, 1, 2, 2), on_device(0, 1), 0)


def test_other_memory_is_refused(cuda):
    with pytest.raises(ValueError, match=r"pool: x must be in CUDA memory, got DLPack device type 10"):
        cuda.pool(on_device(0, 2, 3, kind=10), 1, ["mean"], on_device(0, 1, 2, 3), None, 0)


def test_the_cpu_module_refuses_cuda_memory():
    with pytest.raises(ValueError, match=r"pool: x must be in CPU memory, got DLPack device type 2"):
        _cpu.pool(on_device(0, 2, 3), 1, ["mean"], on_device(0, 1, 2, 3))


def state_of(classes, channels):
    return capsules(*ClassMoments.empty(classes, channels).tensors())


READ = (3, 3), (1, 1), (0, 0, 0, 0), (1, 1)
OUT = nan(3, 9), nan(3, 9, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.pool(*capsules(torch.zeros(1, 1, 90000)), 1, ["mean"], *capsules(nan(1, 1, 1)), None, 0),
            "pool: scratch must be a NumPy array or support DLPack, got NoneType",
        ),
        (
            lambda m: m.pool(*capsules(torch.zeros(1, 1, 90000)), 1, ["mean"], *capsules(nan(1, 1, 1), nan(3)), 0),
            r"pool: scratch must hold at least \d+ elements, got shape \(3,\)",
        ),
        (
            lambda m: m.pool(*capsules(torch.zeros(2, 3)), 2, ["mean"], *capsules(nan(1, 2, 3)), None, 0),
            "channel_axis must lie in 1..1",
        ),
        (
            lambda m: m.pool(*capsules(torch.zeros(2, 3)), 1, ["mean"], *capsules(nan(1, 2, 2)), None, 0),
            "pool: out must hold 6 elements",
        ),
        (
            lambda m: m.pool(*capsules(torch.zeros(2, 3).long()), 1, ["mean"], *capsules(nan(1, 2, 3)), None, 0),
            "pool: x must be float16, bfloat16, float32 or float64, got int64",
        ),
        (
            lambda m: m.fold_moments(
                *capsules(nan(1, 4, 3)), 0.0, *capsules(torch.zeros(4).long(), torch.zeros(3).long()), state_of(2, 3), 0
            ),
            "fold_moments: order must hold 4 elements",
        ),
        (
            lambda m: m.fold_moments(*capsules(nan(1, 4, 3)), 0.0, *capsules(torch.zeros(4).long()), None, (), 0),
            "a state must be a tuple",
        ),
        (
            lambda m: m.patch_moments(*capsules(torch.zeros(2, 3, 4, 4)), *READ, None, *capsules(*OUT), None, 0),
            "patch_moments: scratch must be a NumPy array or support DLPack, got NoneType",
        ),
        (
            lambda m: m.patch_moments(*capsules(torch.zeros(2, 3, 4, 4)), *READ, None, *capsules(*OUT, nan(9)), 0),
            r"patch_moments: scratch must hold at least 165 elements, got shape \(9,\)",
        ),
        (
            lambda m: m.patch_moments(*capsules(torch.zeros(2, 3, 4, 4)), *READ, None, *capsules(*OUT[::-1]), None, 0),
            "patch_moments: mean must hold 27 elements",
        ),
        (
            lambda m: m.patch_moments_scratch(*capsules(torch.zeros(2, 3, 2, 4)), *READ, None),
            "patch_moments: kernel must fit into the padded map, .* it covers 3 of 2 on axis 2",
        ),
        (
            lambda m: m.merge_moments(state_of(2, 3), state_of(2, 4), 0),
            "merge_moments: the states must have the same kind and shape",
        ),
        (
            lambda m: m.one_vs_rest(state_of(2, 3), "fisher", "linear", *capsules(nan(3, 2), nan(2)), 0),
            "one_vs_rest: scratch must hold at least 60 elements",
        ),
        (
            lambda m: m.pairwise_min(
                state_of(2, 3), "fisher", "vector", *capsules(nan(3), torch.zeros(3, 2).long(), nan(99)), 0
            ),
            "witness must be 'linear' or 'quadratic'",
        ),
    ],
)
def test_bad_arrays_are_refused(cuda, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(cuda)


# ---- the Python side ------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(cuda, monkeypatch):
    """What `backends` runs under the name "cuda", on the host, with working memory and outputs full of NaN."""
    monkeypatch.setattr(backends.extensions, "cuda_module", lambda: (cuda, ""))
    torch.use_deterministic_algorithms(True)
    yield backends.IMPLEMENTATIONS["cuda"]
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("statistics", [("mean",), ("cls",), ("max", "cls", "l2")])
def test_backend_pools(backend, statistics):
    x = torch.randn(4, 9, 33)
    torch.testing.assert_close(
        backend["pool"](x, 2, statistics), reference.pool(x, 2, statistics), rtol=1e-12, atol=1e-12
    )
    long = torch.randn(1, 200_000, 3)  # cut into spans
    torch.testing.assert_close(
        backend["pool"](long, 2, statistics), reference.pool(long, 2, statistics), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("unsorted", [0, 100])
@pytest.mark.parametrize("dimension", [0, 3])
def test_backend_folds_merges_and_scores(backend, monkeypatch, unsorted, dimension):
    monkeypatch.setattr(backends.cuda, "UNSORTED", unsorted)
    x, labels = torch.randn(60, 7, 5), torch.arange(60) % 4
    statistics = ("mean", "max", "l2")[: max(1, dimension)]
    exact = empty(dimension, 5, 7)
    strided = type(exact)(*(t.new_zeros(*t.shape[::-1]).permute(*range(t.ndim)[::-1]) for t in exact.tensors()))
    for state, run in ((exact, reference.class_moments), (strided, backend["class_moments"])):
        run(x, 1, statistics, 0.0, labels, state)
        run(x * 2, 1, statistics, 0.0, labels, state)
    for ours, theirs in zip(strided.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    merged, doubled = exact.clone(), exact.clone()
    backend["merge_moments"](merged, strided)
    reference.merge_moments(doubled, exact)
    torch.testing.assert_close(merged.mean, doubled.mean, rtol=1e-11, atol=1e-11)
    witness = "vector" if dimension else "quadratic"
    for bound in ("fisher", "minimax"):
        torch.testing.assert_close(
            backend["one_vs_rest"](strided, Rule(bound), witness),
            reference.one_vs_rest(exact, Rule(bound), witness),
            rtol=1e-8,
            atol=1e-10,
            equal_nan=True,
        )
        values, pairs = backend["pairwise_min"](strided, Rule(bound), witness)
        least, attained = reference.pairwise_min(exact, Rule(bound), witness)
        torch.testing.assert_close(values, least, rtol=1e-8, atol=1e-10)
        assert torch.equal(pairs, attained)


@pytest.mark.parametrize("places", [None, torch.tensor([5, 0, 5])])
def test_backend_takes_moments_of_patches(backend, places):
    x = batch((9, 14, 14), torch.bfloat16)
    read = window(x, 3, padding=1, stride=2)
    exact = reference.patch_moments(x, read, places)
    for ours, theirs in zip(backend["patch_moments"](x, read, places), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", ["fisher", "minimax"])
def test_backend_bounds_keep_the_shape_of_the_laws(backend, bound):
    given = [tensor.contiguous() for tensor in laws(60, 3)]
    shaped = [tensor.view(3, 20, *tensor.shape[1:]) for tensor in given]
    ours = backend[f"{bound}_bound"](*shaped)
    torch.testing.assert_close(ours.view(-1), same_solver(bound, given), rtol=1e-12, atol=1e-14, equal_nan=True)
    assert backend[f"{bound}_bound"](*(tensor[:0] for tensor in shaped)).shape == (0, 20)
