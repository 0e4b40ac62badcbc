import pytest
import torch
from helpers import BACKENDS, hostile_maps

from discedit import ops

MAPS = hostile_maps()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAPS)
def test_is_the_float64_mean(backend, name):
    x = MAPS[name]
    ours = ops.pool(x, backend=backend)
    exact = x.double().flatten(2).mean(2) if x.ndim > 2 else x.double()
    assert ours.dtype == torch.float64
    # The sum of n float64 terms carries at most n roundings of its absolute terms.
    elements = x[0, 0].numel()
    gross = x.double().abs().flatten(2).mean(2) if x.ndim > 2 else x.double().abs()
    assert bool(((ours - exact).abs() <= elements * 2.3e-16 * gross).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_put_channels_last(backend):
    x = torch.randn(4, 7, 5)
    torch.testing.assert_close(ops.pool(x, layout="tokens", backend=backend), x.double().mean(1))
    torch.testing.assert_close(ops.pool(x, layout="nchw", backend=backend), x.double().mean(2))
    nhwc = torch.randn(4, 3, 2, 600)
    torch.testing.assert_close(ops.pool(nhwc, layout="tokens", backend=backend), nhwc.double().mean((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_bits_for_any_number_of_threads(dtype, memory_format):
    x = torch.randn(37, 96, 61, 63).to(dtype).contiguous(memory_format=memory_format)  # enough for three threads
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.pool(x, backend="cpp"))
    finally:
        torch.set_num_threads(2)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_widens_exactly(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ours = ops.pool(bits[:, None], backend="cpp")[:, 0]
    exact = bits.double()
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours[~ours.isnan()], exact[~exact.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend):
    assert ops.pool(torch.zeros(0, 3, 2, 2), backend=backend).shape == (0, 3)
    assert ops.pool(torch.zeros(2, 0, 2, 2), backend=backend).shape == (2, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_stays_in_its_map(backend):
    x = torch.ones(2, 2, 3, 3)
    x[0, 1, 2, 2] = torch.inf
    x[1, 0, 0, 0] = torch.nan
    assert ops.pool(x, backend=backend).isfinite().tolist() == [[True, False], [False, True]]


def test_gradients_are_left_alone():
    x = torch.ones(2, 3, 2, 2, requires_grad=True)
    assert not ops.pool(x).requires_grad
    assert x.requires_grad


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([1.0], {}, r"pool: x must be a torch.Tensor, got list"),
        (torch.ones(3), {}, r"pool: x must have at least a sample and a channel axis, got shape \(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), {}, r"pool: x must be one of float16, .* got int64 \(shape \(3, 3\)\)"),
        (torch.ones(2, 3, 4), {}, r"pool: layout must be named .* x has shape \(2, 3, 4\)"),
        (torch.ones(2, 3, 0, 4), {}, r"pool: x must have at least one element per map .* got shape \(2, 3, 0, 4\)"),
        (torch.ones(2, 3), {"statistic": "median"}, r"pool: statistic must be one of 'mean', got 'median'"),
        (torch.ones(2, 3), {"layout": "nhwc"}, r"pool: layout must be one of 'auto', 'nchw', 'tokens', got 'nhwc'"),
    ],
)
def test_bad_input(x, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.pool(x, **options)
