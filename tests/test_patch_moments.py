from functools import partial

import pytest
import torch
from helpers import BACKENDS, all_pairs, before_the_end_of_memory, hostile_maps

from discedit import ops, reference, zoo
from discedit.backends import IMPLEMENTATIONS, arguments, select

EPSILON = torch.finfo(torch.float64).eps
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]
MAPS = {name: x for name, x in hostile_maps().items() if x.ndim == 4}
# Arguments, and the (channels, height, width) of the maps that they meet.
WINDOWS = {
    "3x3": ((3, {"padding": 1}), (9, 7, 7)),
    "1x1": ((1, {}), (9, 5, 6)),
    "1x1 stride 2": ((1, {"stride": 2}), (9, 7, 6)),
    "3x3 stride 2": ((3, {"stride": 2, "padding": 1}), (16, 8, 9)),
    "5x5": ((5, {"padding": 2}), (8, 6, 11)),
    "7x7 stride 2": ((7, {"stride": 2, "padding": 3}), (3, 23, 20)),
    "11x11 stride 4": ((11, {"stride": 4, "padding": 2}), (2, 31, 29)),
    "dilated": ((3, {"dilation": 2, "padding": 2}), (10, 9, 9)),
    "dilated by rows": (((2, 3), {"dilation": (3, 1), "stride": (2, 3), "padding": (1, 0)}), (4, 9, 13)),
    "one sided": (((2, 3), {"padding": (0, 1, 2, 0)}), (9, 5, 6)),
    "map of one pixel": ((3, {"padding": 1}), (9, 1, 1)),
    "as large as the map": (((4, 5), {}), (9, 4, 5)),
    "larger than the map": (((5, 6), {"padding": (2, 1, 0, 2)}), (9, 3, 4)),
    "one channel": ((3, {}), (1, 12, 10)),
    "stride beyond the kernel": ((2, {"stride": 5}), (9, 17, 30)),
    "padding beyond the kernel": ((2, {"padding": 3}), (5, 3, 3)),
}


def window(x, kernel_size, stride=1, padding=0, dilation=1):
    return arguments.window("patch_moments", x, kernel_size, stride, padding, dilation)


def patches(x, kernel_size, positions=None, **options):
    """(channels, taps, patches) in float64, from the map's elements one by one."""
    read = window(x, kernel_size, **options)
    top, bottom, left, right = read.padding
    padded = torch.nn.functional.pad(x.double(), (left, right, top, bottom))
    rows, columns = read.outputs(x)
    taps = []
    for i in range(read.kernel[0]):
        for j in range(read.kernel[1]):
            first, second = i * read.dilation[0], j * read.dilation[1]
            seen = padded[:, :, first:, second:][:, :, :: read.stride[0], :: read.stride[1]][:, :, :rows, :columns]
            flat = seen.flatten(2)
            taps.append((flat if positions is None else flat[:, :, positions]).movedim(1, 0).flatten(1))
    return torch.stack(taps, 1)


def assert_right(ours, x, kernel_size, positions=None, **options):
    """Within the rounding of each difference from the channel's centre to float32, of which products are made. The
    centre is known to a standard deviation."""
    p = patches(x, kernel_size, positions, **options)
    n = p.shape[2]
    count, mean, scatter = ours
    assert count == n
    assert mean.dtype == scatter.dtype == torch.float64
    exact = p.mean(2)
    middle = x.double().mean((0, 2, 3))
    spread = (p - middle[:, None, None]).square().sum(2).sqrt()
    spread += n**0.5 * x.double().movedim(1, 0).flatten(1).std(1, correction=0)[:, None]
    unit = EPSILON if x.dtype == torch.float64 else 2.0**-23
    rounding = (unit + 64 * EPSILON) * spread + 64 * EPSILON * n**0.5 * exact.abs().amax(1, keepdim=True)
    assert bool(((mean - exact).abs() <= rounding / n**0.5 + EPSILON * exact.abs()).all())
    deviation = p - exact[:, :, None]
    error = (scatter - deviation @ deviation.mT).abs()
    allowed = 2 * (rounding[:, :, None] * spread[:, None, :] + spread[:, :, None] * rounding[:, None, :])
    assert bool((error <= allowed + 2 * rounding[:, :, None] * rounding[:, None, :]).all()), f"{error.max():.3e}"
    assert torch.equal(scatter, scatter.mT)
    eigenvalues = torch.linalg.eigvalsh(scatter)
    slack = (4 * rounding * spread).sum(1) + 4 * rounding.square().sum(1)
    assert bool((eigenvalues[:, 0] >= -slack).all())


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
CONSTANTS = [0.1, -1e4, 1e30, 1e-40]


def assert_stays(run, x, value):
    """`run` takes moments of x, (5, channels, 6, 6), by 3 x 3. What is not finite shows where it is seen alone."""
    clean = run(x, 3)
    x[2, 1, 0, 0] = value  # only the first tap reaches it
    _, mean, scatter = run(x, 3)
    others = [i for i in range(x.shape[1]) if i != 1]
    for ours, before in ((mean, clean[1]), (scatter, clean[2])):
        assert torch.equal(ours[others], before[others])
    assert mean[1].isfinite().tolist() == [False] + 8 * [True]
    assert not scatter[1, 0].isfinite().any()
    assert scatter[1, 1:, 1:].isfinite().all()
    unseen = run(x, 3, positions=torch.tensor([1, 5]))
    assert unseen[1].isfinite().all()
    assert unseen[2].isfinite().all()


def assert_constant(run, x):
    """Of channels with one value each, by 3 x 3."""
    count, mean, scatter = run(x, 3)
    samples, _, height, width = x.shape
    assert count == samples * (height - 2) * (width - 2)
    assert torch.equal(mean, x[0, :, :3, :3].flatten(1).double())
    assert not scatter.any()


def batch(shape, dtype, memory_format=torch.contiguous_format, samples=5):
    x = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0)) + 0.5
    return x.relu().to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("dtype", "memory_format", "name"), all_pairs(DTYPES, FORMATS, WINDOWS))
def test_is_its_definition_in_float64(dtype, memory_format, name):
    (kernel_size, options), shape = WINDOWS[name]
    x = batch(shape, dtype, memory_format)
    for backend in BACKENDS:
        assert_right(ops.patch_moments(x, kernel_size, backend=backend, **options), x, kernel_size, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAPS)
def test_hostile_maps(backend, name):
    x = MAPS[name]
    for padding, kernel_size in ((0, min(2, *x.shape[2:])), (1, 3)):
        ours = ops.patch_moments(x, kernel_size, padding=padding, backend=backend)
        assert_right(ours, x, kernel_size, padding=padding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_unfold_on_the_order_of_taps(dtype):
    """The variance of what one channel adds to an output is a product with the weight as it lies in memory."""
    x = batch((4, 9, 8), dtype)
    convolution = torch.nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(1, 1), bias=False).double()
    count, mean, scatter = ops.patch_moments(x, (3, 2), stride=(1, 2), padding=(1, 1))
    for channel in range(4):
        weight = convolution.weight.detach()[:, channel].flatten(1)
        alone = torch.nn.functional.conv2d(
            x.double()[:, channel : channel + 1], weight.view(3, 1, 3, 2), stride=(1, 2), padding=(1, 1)
        )
        torch.testing.assert_close(weight @ mean[channel], alone.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
        variance = (weight @ scatter[channel] * weight).sum(1) / count
        torch.testing.assert_close(variance, alone.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("places", [[0], [27], [13, 13, 13], [27, 0, 5, 6, 5], list(range(0, 28, 3)), []])
def test_positions(backend, memory_format, places):
    x = batch((9, 8, 14), torch.float32, memory_format)
    options = {"stride": 2, "padding": 1}
    positions = torch.tensor(places, dtype=torch.int64)
    count, mean, scatter = ops.patch_moments(x, 3, positions=positions, backend=backend, **options)
    if not places:
        assert (count, mean.abs().sum(), scatter.abs().sum()) == (0, 0, 0)
        return
    assert_right((count, mean, scatter), x, 3, positions, **options)
    # A strided view of the positions, and another order of them.
    again = ops.patch_moments(x, 3, positions=positions.repeat_interleave(2)[::2], backend=backend, **options)
    assert torch.equal(again[2], scatter)
    if backend == "cpp":
        assert torch.equal(ops.patch_moments(x, 3, positions=positions.flip(0), **options)[2], scatter)
        everywhere = ops.patch_moments(x, 3, **options)
        assert torch.equal(ops.patch_moments(x, 3, positions=torch.arange(28), **options)[2], everywhere[2])


@pytest.mark.data
@pytest.mark.parametrize("name", ["conv1", "layer2.0.conv1", "layer3.2.conv2"])
def test_what_convolutions_of_a_trained_network_read(cifar, name):
    """Behind a ReLU: many zeros, dead channels, no centre that suits all."""
    model, train, _ = cifar
    layer, seen = model.get_submodule(name), []
    with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        model(next(iter(zoo.batches(train)))[0][:64])
    for x in (seen[0], seen[0].bfloat16()):
        ours = ops.patch_moments(x, layer.kernel_size, stride=layer.stride, padding=layer.padding)
        assert_right(ours, x, layer.kernel_size, stride=layer.stride, padding=layer.padding)


def test_large_maps_go_band_by_band():
    x = batch((9, 150, 170), torch.bfloat16, samples=2)
    for options in ({"padding": 1}, {"padding": 3, "stride": 2, "dilation": 3}):
        assert_right(ops.patch_moments(x, 3, backend="cpp", **options), x, 3, **options)
    positions = torch.tensor([0, 80 * 150, 169, 169, 25_000])
    assert_right(ops.patch_moments(x, 3, padding=1, positions=positions), x, 3, positions, padding=1)
    wide = batch((2, 12, 5000), torch.float32, samples=1)
    assert_right(ops.patch_moments(wide, 11, backend="cpp"), wide, 11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", CONSTANTS)
def test_a_constant_channel_has_no_scatter(backend, value):
    assert_constant(partial(ops.patch_moments, backend=backend), torch.full((7, 9, 6, 5), value))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_far_above_the_spread(backend):
    """Float32 around 0 would lose the spread: 1e8 of a patch's square against 1."""
    x = (torch.randn(8, 9, 14, 14, generator=torch.Generator().manual_seed(0)) + 1e4).double()
    for given in (x, x.float()):
        _, mean, scatter = ops.patch_moments(given, 3, padding=1, backend=backend)
        centre = patches(given, 3, padding=1)[:, 4]  # the one tap that never sees padding
        torch.testing.assert_close(mean[:, 4], centre.mean(1), rtol=1e-14, atol=0)
        torch.testing.assert_close(scatter[:, 4, 4], centre.var(1) * (centre.shape[1] - 1), rtol=1e-6, atol=0)
        assert_right(ops.patch_moments(given, 3, padding=1, backend=backend), given, 3, padding=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (0, 0, 4, 4)])
def test_nothing_in_nothing_out(backend, shape):
    count, mean, scatter = ops.patch_moments(torch.zeros(shape), 3, backend=backend)
    assert count == shape[0] * 4
    assert mean.shape == (shape[1], 9)
    assert scatter.shape == (shape[1], 9, 9)
    assert not mean.any()
    assert not scatter.any()


@pytest.mark.parametrize(
    ("backend", "memory_format", "value", "channels"), all_pairs(BACKENDS, FORMATS, NOT_FINITE, [3, 20])
)
def test_what_is_not_finite_stays_with_the_taps_that_see_it(backend, memory_format, value, channels):
    assert_stays(
        partial(ops.patch_moments, backend=backend), batch((channels, 6, 6), torch.float32, memory_format), value
    )


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("channels", "kernel_size"), [(3, 5), (40, 3), (9, 1)])
def test_same_bits_for_any_number_of_threads(memory_format, channels, kernel_size):
    x = batch((channels, 15, 13), torch.float32, memory_format, samples=7)
    results = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        results.append(ops.patch_moments(x, kernel_size, padding=kernel_size // 2, backend="cpp"))
    for _, mean, scatter in results[1:]:
        assert torch.equal(mean, results[0][1])
        assert torch.equal(scatter, results[0][2])


def test_the_layout_does_not_matter():
    x = batch((20, 9, 11), torch.bfloat16)
    _, mean, scatter = ops.patch_moments(x, 3, backend="cpp")
    wide = torch.zeros(5, 40, 9, 22, dtype=torch.bfloat16)
    wide[:, ::2, :, ::2] = x
    for same in (
        x.to(memory_format=torch.channels_last),
        wide[:, ::2, :, ::2],
        x.flip(2).flip(2),
        x.mT.contiguous().mT,
    ):
        ours = ops.patch_moments(same, 3, backend="cpp")
        assert torch.equal(ours[1], mean)
        assert torch.equal(ours[2], scatter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 9, 1, 1), (2, 17, 3, 9)])
def test_reads_nothing_behind_the_last_element(dtype, shape):
    samples, channels, height, width = shape
    x = before_the_end_of_memory(batch((channels, height, width), dtype, samples=samples))
    for maps in (x.view(shape), x.view(samples, height, width, channels).permute(0, 3, 1, 2)):
        assert_right(ops.patch_moments(maps, 3, padding=1, backend="cpp"), maps, 3, padding=1)


def test_every_output_is_written(monkeypatch):
    x = batch((20, 7, 7), torch.float32)
    expected = ops.patch_moments(x, 3, backend="cpp")
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, float("nan"), **options))
    assert all(torch.equal(a, b) for a, b in zip(ops.patch_moments(x, 3)[1:], expected[1:], strict=True))
    for nothing in (x[:0], x):
        positions = torch.tensor([], dtype=torch.int64)
        _, mean, scatter = ops.patch_moments(nothing, 3, positions=positions)
        assert not mean.any()
        assert not scatter.any()


def test_the_reference_takes_a_few_maps_at_a_time(monkeypatch):
    x = batch((4, 7, 6), torch.float64)
    whole = reference.patch_moments(x, window(x, 3), None)
    largest = []
    unfold = torch.nn.functional.unfold
    monkeypatch.setattr(torch.nn.functional, "unfold", lambda *a: largest.append(out := unfold(*a)) or out)
    for maps in (0, 1, 3, 8):
        monkeypatch.setattr(reference, "PATCH_BYTES", maps * 8 * 9 * 20)
        for ours, expected in zip(reference.patch_moments(x, window(x, 3), None), whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
        assert max(len(out) for out in largest) == max(1, maps)
        largest.clear()


def test_gradients_are_left_alone_and_auto_takes_the_kernel(monkeypatch):
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    called = []
    real = IMPLEMENTATIONS["cpp"]["patch_moments"]
    monkeypatch.setitem(IMPLEMENTATIONS["cpp"], "patch_moments", lambda *a: called.append(1) or real(*a))
    _, mean, scatter = ops.patch_moments(x, 3)
    assert called == [1]
    assert not mean.requires_grad
    assert not scatter.requires_grad


X = torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], 3), {}, r"x must be a torch.Tensor, got list"),
        ((X[0], 3), {}, r"x must have shape \(samples, channels, height, width\), got shape \(3, 4, 5\)"),
        ((X.long(), 3), {}, r"x must be one of float16, .* got int64 \(shape \(2, 3, 4, 5\)\)"),
        ((X[:, :, :0], 1), {}, r"x must have at least one element per map, got .* shape \(2, 3, 0, 5\)"),
        ((X, 0), {}, r"kernel_size must be an integer of at least 1 or a pair of them, got 0"),
        ((X, (3, 3, 3)), {}, r"kernel_size must be an integer of at least 1 or a pair of them, got \(3, 3, 3\)"),
        ((X, (3, 2.0)), {}, r"kernel_size must be an integer .* got \(3, 2.0\)"),
        ((X, ()), {}, r"kernel_size must be an integer .* got \(\)"),
        ((X, 3), {"stride": 0}, r"stride must be an integer of at least 1 or a pair of them, got 0"),
        ((X, 3), {"stride": True}, r"stride must be an integer of at least 1 or a pair of them, got True"),
        ((X, 3), {"dilation": "2"}, r"dilation must be an integer of at least 1 or a pair of them, got '2'"),
        ((X, 3), {"padding": -1}, r"padding must be an integer of at least 0, a pair .* or four .* got -1"),
        ((X, 3), {"padding": (1, 1, 1)}, r"padding must be an integer of at least 0, .* got \(1, 1, 1\)"),
        ((X, 3), {"padding": "same"}, r"padding must be an integer of at least 0, .* got 'same'"),
        (
            (X, (5, 3)),
            {},
            r"kernel_size must fit into the padded map: it covers 5 x 3 with dilation=1, the map has 4 x 5 with "
            r"padding=0 \(x has shape \(2, 3, 4, 5\)\)",
        ),
        ((X, 3), {"dilation": (1, 3), "padding": (5, 0)}, r".* it covers 3 x 7 with .* the map has 14 x 5"),
        ((X, 3), {"positions": [0]}, r"positions must be a torch.Tensor, got list"),
        ((X, 3), {"positions": torch.tensor([0.0])}, r"positions must be one of int64, got float32 \(shape \(1,\)\)"),
        ((X, 3), {"positions": torch.tensor([[0]])}, r"positions must have shape \(positions,\), got \(1, 1\)"),
        (
            (X, 3),
            {"positions": torch.tensor([0, 5, 6])},
            r"positions must lie in 0..5 \(2 x 3 outputs\), found 6 at position 2",
        ),
        ((X, 3), {"positions": torch.tensor([-1])}, r"positions must lie in 0..5 .* found -1 at position 0"),
        (
            (X, 3),
            {"positions": torch.tensor([0], device="meta")},
            r"positions must be on the device of x, cpu, got meta",
        ),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=rf"^patch_moments: {message}"):
        ops.patch_moments(*arguments, **options)


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match=r"patch_moments: backend 'cuda' cannot run: (it takes|discedit._cuda) "):
        ops.patch_moments(X, 3, backend="cuda")
    with pytest.raises(RuntimeError, match=r"'cpp' cannot run: it takes CPU tensors, and these are on meta"):
        ops.patch_moments(X.to("meta"), 3, backend="cpp")
    assert select("patch_moments", "auto", torch.device("meta")) is reference.patch_moments
