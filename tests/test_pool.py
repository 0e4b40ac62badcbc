import itertools
import math

import pytest
import torch
from helpers import POOLING_BACKENDS, all_pairs, hostile_maps

from discedit import ops

# What a GPU does without a word, the interpreter of Triton warns of through NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
MAPS = hostile_maps()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]
EPSILON = torch.finfo(torch.float64).eps
# From the definitions, on float64 maps (samples, channels, elements). "cls" has tests of its own.
EXACT = {
    "mean": lambda v: v.mean(2),
    "sum": lambda v: v.sum(2),
    "l2": lambda v: torch.linalg.vector_norm(v, dim=2),
    "rms": lambda v: torch.linalg.vector_norm(v, dim=2) / math.sqrt(v.shape[2]),
    "absmax": lambda v: torch.maximum(v.max(2).values, -v.min(2).values),
    "max": lambda v: v.sort(2).values[..., -1],
    "positive_fraction": lambda v: v.sign().clamp(min=0).mean(2),
}
NAMES = tuple(EXACT)


def flat(x):
    """Maps (samples, channels, elements) of a map with channels on axis 1."""
    return x.double().flatten(2) if x.ndim > 2 else x.double()[..., None]


def rounding(x, statistic, backend="reference"):
    """What a sum of n float64 terms can be off by: n roundings of its absolute terms; extremes are exact. The C++ core
    first adds 16-bit elements in fours in float32: at most three more roundings, each of 2^-24."""
    v = flat(x)
    n = v.shape[2]
    unit = n * EPSILON + (3 * 2.0**-24 if backend == "cpp" and x.element_size() == 2 else 0)
    if statistic in ("mean", "sum"):
        return unit * v.abs().sum(2) / (n if statistic == "mean" else 1)
    if statistic in ("l2", "rms"):  # the root halves the relative error of the sum; three more roundings around it
        return (unit + 3 * EPSILON) * EXACT[statistic](v)
    return EPSILON * v.sign().clamp(min=0).mean(2) if statistic == "positive_fraction" else torch.zeros(v.shape[:2])


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("name", MAPS)
def test_is_its_definition_in_float64_alone_and_among_others(backend, name):
    x = MAPS[name]
    v, alone = flat(x), {}
    for statistic in NAMES:
        alone[statistic] = ours = ops.pool(x, statistic=statistic, backend=backend)
        assert ours.dtype == torch.float64
        assert ours.shape == v.shape[:2]
        error = (ours - EXACT[statistic](v)).abs()
        assert bool((error <= rounding(x, statistic, backend)).all()), f"{statistic} off by {error.max():.3e}"
    for names in (NAMES, ("max", "mean"), ["absmax", "l2", "sum"], ("positive_fraction",)):
        together = ops.pool(x, statistic=names, backend=backend)
        assert together.shape == (*v.shape[:2], len(names))
        assert together.permute(2, 0, 1).is_contiguous()
        for k, statistic in enumerate(names):
            assert bool(((together[..., k] - alone[statistic]).abs() <= rounding(x, statistic, backend)).all())


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("several", [False, True])
def test_cls_is_the_first_token(backend, dtype, several):
    x = torch.randn(6, 5, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tokens in (x, x[:, 1:], x[:, :, ::3], x.transpose(0, 1), x[:, :1]):
        if not several:
            assert torch.equal(
                ops.pool(tokens, statistic="cls", layout="tokens", backend=backend), tokens[:, 0].double()
            )
            continue
        for place in range(3):
            names = ["mean", "max"]
            names.insert(place, "cls")
            ours = ops.pool(tokens, statistic=names, layout="tokens", backend=backend)
            assert torch.equal(ours[..., place], tokens[:, 0].double())
            torch.testing.assert_close(ours[..., names.index("mean")], tokens.double().mean(1), rtol=0, atol=1e-14)
            assert torch.equal(ours[..., names.index("max")], tokens.double().amax(1))


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_tokens_put_channels_last(backend):
    x = torch.randn(4, 7, 5)
    torch.testing.assert_close(ops.pool(x, layout="tokens", backend=backend), x.double().mean(1))
    torch.testing.assert_close(ops.pool(x, layout="nchw", backend=backend), x.double().mean(2))
    nhwc = torch.randn(4, 3, 2, 600)
    torch.testing.assert_close(ops.pool(nhwc, layout="tokens", backend=backend), nhwc.double().mean((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_for_any_number_of_threads(dtype, memory_format):
    x = torch.randn(37, 96, 61, 63).to(dtype).contiguous(memory_format=memory_format)  # enough for five threads
    long = torch.randn(3, 2, 700, 1001).to(dtype).contiguous(memory_format=memory_format)  # more threads than maps
    for maps, statistic in itertools.product((x, long), ("mean", NAMES)):
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(ops.pool(maps, statistic=statistic, backend="cpp"))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize(("dtype", "memory_format"), [*zip([torch.float16, torch.bfloat16], FORMATS, strict=True)])
def test_ten_million_16_bit_elements_lose_nothing(backend, dtype, memory_format):
    """A mean of 200 with a spread of 1: an accumulator of less than float64 stalls or drifts."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 2, 1600, 1600, generator=generator) + 200).to(dtype).contiguous(memory_format=memory_format)
    ours = ops.pool(x, statistic=NAMES, backend=backend)
    for k, statistic in enumerate(NAMES):
        v = flat(x)
        assert bool(((ours[..., k] - EXACT[statistic](v)).abs() <= rounding(x, statistic)).all())


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize(
    ("memory_format", "scale", "spread"),
    all_pairs(FORMATS, [1e-39, 1e-25, 1e-12, 1e-6, 1e18, 1e38], [1.0, 1e-8, 1e-20]),
)
def test_bfloat16_has_a_range_that_its_sums_and_squares_leave(backend, memory_format, scale, spread):
    """Elements up to 3 scale beside others that are `spread` times smaller, in the same map and in whole maps."""
    x = torch.randn(3, 40, 9, 10, generator=torch.Generator().manual_seed(0)).clamp(-3, 3).double() * scale
    x[..., ::3] *= spread
    x[:, ::4] *= spread
    x[:, 1::4] = x[:, 1::4].abs()
    x = x.bfloat16().contiguous(memory_format=memory_format)
    ours = ops.pool(x, statistic=NAMES, backend=backend)
    for k, statistic in enumerate(NAMES):
        exact = EXACT[statistic](flat(x))
        assert bool(exact.isfinite().all())
        assert bool(((ours[..., k] - exact).abs() <= rounding(x, statistic, backend)).all()), statistic
        alone = ops.pool(x, statistic=statistic, backend=backend)
        assert bool(((alone - exact).abs() <= rounding(x, statistic, backend)).all()), statistic


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_widens_exactly(backend, dtype):
    """Alone in its map every statistic is a function of one number: NaN, both infinities and subnormals among them."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ours = ops.pool(bits.view(64, 1024), statistic=NAMES, backend=backend).flatten(0, 1)
    v = bits.double()
    size = (v * v).sqrt()
    expected = torch.stack([v, v, size, size, v.abs(), v, torch.where(v.isnan(), v, (v > 0).double())], 1)
    torch.testing.assert_close(ours, expected, rtol=2 * EPSILON, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_subnormal_numbers_count_in_full(backend):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        least = torch.full((1, 1, 7, 5), torch.finfo(dtype).smallest_normal).to(dtype) / 4
        least[..., ::2] *= -1
        v = flat(least)
        assert bool((v != 0).all())
        for statistic in NAMES:
            ours = ops.pool(least, statistic=statistic, backend=backend)
            assert bool(((ours - EXACT[statistic](v)).abs() <= rounding(least, statistic)).all()), statistic
    tiny = torch.full((1, 1, 4), 5e-324, dtype=torch.float64)
    ours = ops.pool(
        tiny, statistic=("mean", "sum", "absmax", "max", "positive_fraction"), layout="nchw", backend=backend
    )
    assert ours[0, 0].tolist() == [5e-324, 2e-323, 5e-324, 5e-324, 1.0]


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("statistic", [*NAMES, NAMES])
def test_nothing_in_nothing_out(backend, statistic):
    tail = () if isinstance(statistic, str) else (len(NAMES),)
    for shape in ((0, 3, 2, 2), (2, 0, 2, 2), (0, 3), (0, 3, 0, 2)):
        pooled = ops.pool(torch.zeros(shape), statistic=statistic, backend=backend)
        assert pooled.shape == (*shape[:2], *tail)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize(("dtype", "memory_format", "size"), all_pairs(DTYPES, FORMATS, [1, 3, 40]))
def test_nan_anywhere_is_nan_and_stays_in_its_map(backend, dtype, memory_format, size):
    clean = torch.randn(2, 5, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = ops.pool(clean, statistic=NAMES, backend=backend)
    for place in (0, size * size // 2, size * size - 1):
        for sign in (1.0, -1.0):
            x = clean.clone(memory_format=torch.contiguous_format)
            x[1, 3].view(-1)[place] = math.copysign(math.nan, sign)
            ours = ops.pool(x.contiguous(memory_format=memory_format), statistic=NAMES, backend=backend)
            assert ours[1, 3].isnan().all()
            ours[1, 3] = before[1, 3]
            allowed = torch.stack([rounding(clean, statistic, backend) for statistic in NAMES], -1)
            assert bool(((ours - before).abs() <= 2 * allowed).all())


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_counts_as_a_value(backend, dtype):
    x = torch.zeros(1, 3, 4, 5, dtype=dtype)
    x[0, 0, 1, 1] = math.inf
    x[0, 1, 2, 2] = -math.inf
    x[0, 2, 0, 0], x[0, 2, 3, 4] = math.inf, -math.inf
    ours = ops.pool(x, statistic=NAMES, backend=backend)[0]
    inf, nan, share = math.inf, math.nan, 1 / 20
    expected = torch.tensor(
        [
            [inf, inf, inf, inf, inf, inf, share],
            [-inf, -inf, inf, inf, inf, 0.0, 0.0],
            [nan, nan, inf, inf, inf, inf, share],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_cls_knows_its_own_token_alone(backend):
    x = torch.ones(2, 3, 4)
    x[0, 2, 1], x[1, 0, 2] = math.nan, math.inf
    ours = ops.pool(x, statistic=("cls", "mean"), layout="tokens", backend=backend)
    expected = torch.ones(2, 4, 2, dtype=torch.float64)
    expected[0, 1, 1] = math.nan
    expected[1, 2] = math.inf
    torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_a_view_that_negates_is_read_negated(backend):
    x = torch.randn(4, 3, 5, 5, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(ops.pool(x, backend=backend), x.double().mean((2, 3)))
    labels = torch.arange(4) % 2
    mean = ops.class_moments(x, labels, 2, backend=backend).mean
    torch.testing.assert_close(mean[1], x[1::2].double().mean((0, 2, 3)))


@pytest.mark.parametrize("backend", POOLING_BACKENDS)
def test_the_maximum_of_negative_maps_is_negative(backend):
    """Padding with zeros, or a start at zero, would show."""
    for size in (1, 2, 31, 65):
        x = -1 - torch.rand(3, 4, size, size)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                maps = x.to(dtype).contiguous(memory_format=memory_format)
                assert torch.equal(ops.pool(maps, statistic="max", backend=backend), maps.double().amax((2, 3)))
                assert not ops.pool(maps, statistic="positive_fraction", backend=backend).any()


def test_gradients_are_left_alone():
    x = torch.ones(2, 3, 2, 2, requires_grad=True)
    assert not ops.pool(x).requires_grad
    assert x.requires_grad


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([1.0], {}, r"pool: x must be a torch.Tensor, got list"),
        (torch.ones(3), {}, r"pool: x must have at least a sample and a channel axis, got .* shape \(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), {}, r"pool: x must be one of float16, .* got int64 \(shape \(3, 3\)\)"),
        (torch.ones(2, 3, 4), {}, r"pool: layout must be named .* and shape \(2, 3, 4\)"),
        (torch.ones(2, 3, 0, 4), {}, r"pool: x must have at least one element per map, got .* shape \(2, 3, 0, 4\)"),
        (torch.ones(2, 3), {"statistic": "median"}, r"pool: statistic must be one of 'mean', 'sum', .* got 'median'"),
        (torch.ones(2, 3), {"statistic": ("mean", "median")}, r"pool: statistic must be one of .* got 'median'"),
        (torch.ones(2, 3), {"statistic": ("mean", "max", "mean")}, r"each once, got \('mean', 'max', 'mean'\)"),
        (torch.ones(2, 3), {"statistic": []}, r"pool: statistic must name at least one statistic .* got \[\]"),
        (torch.ones(2, 3), {"statistic": 7}, r"pool: statistic must be a name or a tuple or list of names, got int"),
        (torch.ones(2, 3), {"statistic": "cls", "layout": "tokens"}, r"'cls', .* layout='tokens' and shape \(2, 3\)"),
        (torch.ones(2, 3, 4), {"statistic": "cls"}, r"'cls', .* got layout='auto' and shape \(2, 3, 4\)"),
        (torch.ones(2, 3, 4), {"statistic": "cls", "layout": "nchw"}, r"got layout='nchw' and shape \(2, 3, 4\)"),
        (
            torch.ones(2, 3, 4, 5),
            {"statistic": ["mean", "cls"], "layout": "tokens"},
            r"pool: statistic 'cls', the token at position 0, needs layout='tokens' and x \(samples, tokens, "
            r"channels\), got layout='tokens' and shape \(2, 3, 4, 5\)",
        ),
        (torch.ones(2, 3), {"layout": "nhwc"}, r"pool: layout must be one of 'auto', 'nchw', 'tokens', got 'nhwc'"),
    ],
)
def test_bad_input(x, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.pool(x, **options)
