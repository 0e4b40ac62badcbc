"""What a layer reads, its moments and the fit from them: against unfolding, NumPy and ridge regression."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from discedit.model.trace import ModelTrace
from discedit.moments import calibration as module
from discedit.moments import covariances
from discedit.moments import positions as sampling
from discedit.moments.covariances import Sums
from discedit.moments.positions import Positions, matrix_of
from discedit.repair.least_squares import ridge_regression

LAYERS = [
    *(
        nn.Conv2d(4, 3, kernel, stride=stride, padding=padding, dilation=dilation)
        for kernel, stride, padding, dilation in itertools.product(
            (1, 3, (2, 4)), (1, (2, 3)), (0, (1, 2)), (1, (1, 2))
        )
    ),
    nn.Conv2d(4, 3, (5, 3), padding="same", dilation=(1, 2)),
    nn.Conv2d(4, 3, (2, 4), padding="same"),
    nn.Conv2d(4, 3, 3, padding="valid", stride=2),
    nn.Conv2d(4, 3, 3, padding=1, bias=False),
]
SHAPES = [(7, 5), (7, 6, 5), (7, 2, 6, 5)]


def calibration(op, model, data):
    return module.calibrated(op, ModelTrace(model), data)[0]


def drawn(layer, output, seed=3):
    return Positions.drawn(layer, output, seed)


def rows_of(positions, x, chunk=2**22):
    """All rows, of one chunk after the other."""
    parts = positions.chunks(len(x), positions.chosen.shape[1], chunk)
    return torch.cat([positions.inputs(x, part) for part in parts])


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_of_a_convolution_give_its_output(layer, monkeypatch):
    monkeypatch.setattr(sampling, "ROWS_PER_UNKNOWN", 10**6)  # every position
    x = seeded(7, 4, 12, 13)
    output = layer(x).detach()
    positions = drawn(layer, output)
    expected = positions.outputs(output)
    bias = 0 if layer.bias is None else layer.bias.detach()
    for chunk in (2**25, 2000):
        ours = rows_of(positions, x, chunk) @ matrix_of(layer).T
        torch.testing.assert_close(ours + bias, expected, rtol=1e-4, atol=1e-5)
    whole = output.flatten(2).transpose(1, 2)
    assert positions.chosen.sort(1).values.tolist() == [list(range(whole.shape[1]))] * 7
    torch.testing.assert_close(expected.view(whole.shape).sum(1), whole.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.padding != "same"], ids=str)
def test_rows_of_a_convolution_are_those_of_unfold(layer):
    x = seeded(5, 4, 12, 13)
    positions = drawn(layer, layer(x).detach())
    padding = 0 if layer.padding == "valid" else layer.padding
    unfolded = functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
    index = positions.chosen[:, :, None].expand(-1, -1, unfolded.shape[2])
    assert torch.equal(rows_of(positions, x), unfolded.gather(1, index).flatten(0, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_a_linear_layer_give_its_output(shape):
    layer, x = nn.Linear(5, 3), seeded(*shape)
    output = layer(x).detach()
    positions = drawn(layer, output)
    rows = rows_of(positions, x)
    assert rows.shape == (x.numel() // 5, 5)
    torch.testing.assert_close(rows @ matrix_of(layer).T + layer.bias.detach(), positions.outputs(output))
    assert sorted(rows.sum(1).tolist()) == sorted(x.flatten(0, -2).sum(1).tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(5, 3), (7, 6, 5)), (nn.Conv2d(5, 3, 3, padding=1), (7, 5, 6, 6))], ids=str
)
def test_narrow_types_are_widened_without_loss(layer, shape, dtype):
    layer, x = layer.to(dtype), seeded(*shape, dtype=dtype)
    output = seeded(*((7, 6, 3) if isinstance(layer, nn.Linear) else (7, 3, 6, 6)), seed=1, dtype=dtype)
    narrow, wide = drawn(layer, output), drawn(layer, output.float())
    rows, y = rows_of(narrow, x), narrow.outputs(output)
    assert narrow.inputs(x).dtype == y.dtype == matrix_of(layer).dtype == torch.float32
    assert torch.equal(rows, rows_of(wide, x.float()))
    assert torch.equal(y, wide.outputs(output.float()))
    assert torch.equal(matrix_of(layer), layer.weight.detach().flatten(1).float())


def test_positions_differ_between_samples_but_not_between_widths(monkeypatch):
    monkeypatch.setattr(sampling, "ROWS_PER_UNKNOWN", 8)
    narrow = drawn(nn.Conv2d(2, 3, 1), torch.zeros(8, 3, 10, 10))
    again = drawn(nn.Conv2d(2, 5, 1), torch.zeros(8, 5, 10, 10))
    other = drawn(nn.Conv2d(2, 3, 1), torch.zeros(8, 3, 10, 10), seed=4)
    assert narrow.chosen.shape == (8, 2)  # 8 rows for each of 2 unknowns
    assert torch.equal(narrow.chosen, again.chosen)
    assert not torch.equal(narrow.chosen, other.chosen)
    assert len({tuple(row) for row in narrow.chosen.tolist()}) > 4


def moments_of(rows, y, step=7):
    """`Sums` of given rows of a linear layer, in chunks."""
    layer = nn.Linear(rows.shape[1], y.shape[1])
    positions = Positions.drawn(layer, y, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CHUNK", step * rows.shape[1])
        sums = Sums()
        sums.add(positions, rows, y)
        return sums.fit()


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (1e4, 1.0), (-1e4, 1.0), (1e4, 1e-2)])
def test_moments_are_those_of_float64(offset, spread):
    mixing = seeded(6, 6, seed=1)
    rows = seeded(101, 6) @ mixing * spread + offset * torch.arange(1, 7)
    y = seeded(101, 4, seed=2) * spread + rows[:, :4] - 2 * offset
    fit = moments_of(rows, y)
    x64, y64 = rows.double().numpy(), y.double().numpy()
    joint = np.cov(np.concatenate([x64, y64], 1), rowvar=False, bias=True)
    scale = float(np.abs(joint).max())
    assert fit.xx.dtype == fit.yx.dtype == fit.yy.dtype == fit.mean_x.dtype == fit.mean_y.dtype == torch.float64
    # Differences to the mean of the first rows are exact up to rounding of that mean, which cancels.
    for ours, exact in (
        (fit.xx, joint[:6, :6]),
        (fit.yx, joint[6:, :6]),
        (fit.yy, joint[6:, 6:].diagonal()),
    ):
        np.testing.assert_allclose(ours.numpy(), exact, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(fit.mean_x.numpy(), x64.mean(0), rtol=0, atol=1e-5 * spread)
    np.testing.assert_allclose(fit.mean_y.numpy(), y64.mean(0), rtol=0, atol=1e-5 * spread)


@pytest.mark.parametrize("unknowns", [1, 255, 256, 257, 515])
def test_half_of_a_symmetric_product_is_the_whole(unknowns):
    rows = seeded(40, unknowns)
    torch.testing.assert_close(covariances.gram_of(rows), rows.T @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 10.0])
def test_solve_is_ridge_regression_around_the_weights(ridge):
    """Least squares on the rows and, for each input, one more row that draws its weight to the given one."""
    rows, y, weights = seeded(60, 5).double() + 3, seeded(60, 2, seed=1).double(), seeded(2, 5, seed=2).double()
    fit = moments_of(rows, y)
    ours = ridge_regression("prune", fit, weights, ridge)
    x, target = rows - rows.mean(0), y - y.mean(0)
    pull = (len(x) * ridge * x.square().mean()).sqrt() * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([target, pull @ weights.T])).solution.T
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_solve_keeps_weights_that_are_right():
    rows, weights = seeded(60, 5).double(), seeded(2, 5, seed=2).double()
    ours = ridge_regression("prune", moments_of(rows, rows @ weights.T + 7), weights, 1.0)
    torch.testing.assert_close(ours, weights, rtol=1e-12, atol=1e-12)


def test_solve_of_a_singular_system_is_finite_and_right():
    """Three inputs that are one: any weights with the right sum give y."""
    one = seeded(60, 1).double()
    rows = torch.cat([one, one, one, torch.zeros(60, 1)], 1)
    weights = torch.tensor([[5.0, -1.0, 0.5, 2.0]], dtype=torch.float64)
    for ridge in (1e-30, 1e-12):
        ours = ridge_regression("prune", moments_of(rows, 3 * one), weights, ridge)
        torch.testing.assert_close(rows @ ours.T, 3 * one, rtol=1e-6, atol=1e-6)
        assert ours[0, 3] == pytest.approx(2.0)


def test_solve_without_variance_keeps_the_weights():
    weights = seeded(2, 3).double()
    fit = moments_of(torch.full((20, 3), 0.1), seeded(20, 2))
    fit.xx.zero_()
    assert torch.equal(ridge_regression("prune", fit, weights, 1e-3), weights)


def test_solve_of_moments_that_are_not_finite_comes_to_an_end():
    """In a process of its own, since a loop without end could not be told from inside."""
    code = (
        "import torch; from discedit.repair.least_squares import LayerMoments, ridge_regression\n"
        "n = torch.full((2, 2), float('nan')).double()\n"
        "try: ridge_regression('prune', LayerMoments(n[0], n[0], n, n, n[0]), torch.zeros(2, 2).double(), 1e-3)\n"
        "except (ValueError, RuntimeError): pass"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, y=None, scale=None):
        x = self.linear(x)
        x = x if y is None else x + y
        return x if scale is None else x * scale


def test_batches_of_every_form_are_joined():
    x = [seeded(n, 3, seed=n) for n in (5, 5, 2)]
    y = [seeded(n, 2, seed=n + 9) for n in (5, 5, 2)]
    labels = torch.zeros(5, dtype=torch.int64)
    for batches in (x, [(part, labels) for part in x], [[part] for part in x]):
        (inputs,) = calibration("prune", net(), iter(batches))
        assert torch.equal(inputs, torch.cat(x))
    (pairs,) = calibration("prune", Named(), [((a, b), labels) for a, b in zip(x, y, strict=True)])
    assert isinstance(pairs, tuple)
    assert all(torch.equal(ours, torch.cat(parts)) for ours, parts in zip(pairs, (x, y), strict=True))
    (dicts,) = calibration("prune", Named(), [{"x": a, "y": b, "labels": labels} for a, b in zip(x, y, strict=True)])
    assert dicts.keys() == {"x", "y"}
    assert torch.equal(dicts["x"], torch.cat(x))
    assert torch.equal(dicts["y"], torch.cat(y))


def test_what_has_no_sample_axis_is_not_joined():
    batches = [{"x": seeded(4, 3, seed=n), "scale": torch.tensor([1.0, 2.0])} for n in range(2)]
    (inputs,) = calibration("prune", Named(), batches)
    assert inputs["x"].shape == (8, 3)
    assert torch.equal(inputs["scale"], batches[0]["scale"])


@pytest.mark.parametrize(
    "other",
    [torch.zeros(4, 3, 3), torch.zeros(4, 3, dtype=torch.float64), {"input": torch.zeros(4, 3)}],
    ids=["shape", "dtype", "dict"],
)
def test_a_batch_of_another_form_ends_it(other):
    first, last = seeded(4, 3), seeded(4, 3, seed=1)
    (inputs,) = calibration("prune", net(), [first, other, last])
    assert torch.equal(inputs, first)


def test_no_more_samples_than_the_limit(monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 7)
    taken = []

    def batches():
        for index in range(10):
            taken.append(index)
            yield seeded(3, 3, seed=index)

    (inputs,) = calibration("prune", net(), batches())
    assert torch.equal(inputs, torch.cat([seeded(3, 3, seed=index) for index in range(3)])[:7])
    assert taken == [0, 1, 2]


def test_no_more_samples_than_the_memory_allows(monkeypatch):
    """The largest feature map of `net` has 4 floats."""
    batches = [seeded(4, 3, seed=n) for n in range(20)]
    monkeypatch.setattr(module, "MEMORY", 5 * module.MAPS * 4 * 4)
    parts = calibration("prune", net(), batches)
    assert torch.equal(torch.cat(parts), torch.cat(batches)[: 5 * module.ROOMS])
    assert max(map(len, parts)) <= 5  # side by side with none
    monkeypatch.setattr(module, "MEMORY", 1)
    parts = calibration("prune", net(), batches)
    assert torch.equal(torch.cat(parts), torch.cat(batches)[: module.ROOMS])
    assert {len(part) for part in parts} == {1}


@pytest.mark.parametrize("op", ["prune", "unlearn"])
def test_data_without_samples_is_an_error(op):
    for batches in ([], [torch.zeros(0, 3)]):
        with pytest.raises(ValueError, match=f"^{op}: data must give at least one sample, it gave none"):
            calibration(op, net(), batches)
    with pytest.raises(ValueError, match=f"^{op}: data must give tensors with a sample axis, got Tensor"):
        calibration(op, net(), [torch.tensor(1.0)])


def test_an_empty_batch_is_passed_over():
    first, last = seeded(4, 3), seeded(4, 3, seed=1)
    (inputs,) = calibration("prune", net(), [torch.zeros(0, 3), first, torch.zeros(0, 3), last])
    assert torch.equal(inputs, torch.cat([first, last]))


def test_parts_of_one_size_in_order(monkeypatch):
    """The largest feature map of `net` has 4 floats for each sample."""
    monkeypatch.setattr(module, "MAP", 4 * 4 * 3)
    batches = [{"x": seeded(5, 3, seed=n), "scale": torch.ones(2)} for n in range(2)]
    parts = calibration("prune", Named(), batches)
    whole = torch.cat([batch["x"] for batch in batches])
    assert torch.equal(torch.cat([part["x"] for part in parts]), whole)
    assert all(torch.equal(part["scale"], torch.ones(2)) for part in parts)
    monkeypatch.setattr(module, "PARTS", 2)
    assert [len(part) for part in calibration("prune", net(), [whole[:7]])] == [4, 3]


class Viewed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.one, self.two, self.how = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 5), how

    def forward(self, x):
        maps = self.one(x).relu()
        if self.how == "view":
            return self.two(maps.view(len(x), -1))
        if self.how == "strides":
            return self.two(maps.as_strided((len(x), 8 * 16), (8 * 16, 1)))
        assert self.how != "contiguous" or x.is_contiguous()
        return self.two(maps.flatten(1))


@pytest.mark.parametrize("how", ["flatten", "view", "strides", "contiguous"])
def test_maps_lie_as_the_model_allows(how):
    """On CPUs with channels last, unless the model makes views that only the other layout allows."""
    x, model = seeded(40, 3, 4, 4), Viewed(how).eval()
    (inputs,) = calibration("prune", model, [x])
    assert torch.equal(inputs, x)
    assert inputs.is_contiguous(memory_format=torch.channels_last) is (how == "flatten")
    torch.testing.assert_close(model(inputs), model(x))
    assert model.one.weight.is_contiguous()


def test_inputs_of_a_model_without_convolutions_lie_as_they_did():
    (inputs,) = calibration("prune", nn.Flatten(), [seeded(40, 3, 4, 4)])
    assert inputs.is_contiguous()


def test_sums_of_parts_are_sums_of_all():
    rows, y = seeded(90, 5) + 1e3, seeded(90, 4, seed=1) - 1e3
    layer = nn.Linear(5, 4)
    sums = Sums()
    for part in (slice(0, 10), slice(10, 70), slice(70, 90)):
        sums.add(Positions.drawn(layer, y[part], 0), rows[part], y[part])
    ours, whole = sums.fit(), moments_of(rows, y)
    for name in ("mean_x", "mean_y", "xx", "yx", "yy"):
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
