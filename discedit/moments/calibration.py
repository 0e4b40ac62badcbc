"""What a closed-form fit needs: calibration images in parts, what a layer reads at some positions, its moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from discedit.model.forward import device_of, first_tensor, narrowed, split
from discedit.model.trace import ModelTrace

SAMPLES = 1024  # at most this many are looked at
HELD_OUT = 8  # of so many samples one is kept back, for a check of what was made of the others
PARTS = 8  # in which they run, at most: each has threads of its own, and changing over takes time
MAP = 3 * 2**23  # bytes of the largest map of a part: of more, the memory would be given back and asked for each time
MEMORY = 4 * 2**30  # bytes that the feature maps of all samples may take at once
MAPS = 6  # as large as the largest that a network holds at one moment
ROWS_PER_UNKNOWN = 64  # inputs of a layer that are looked at, for each of its weights per output
LEAST_PER_UNKNOWN = 8  # where the following allows no more
WORK = 2e11  # rows x unknowns^2 of one layer
WIDE = 256  # unknowns, from which it pays to compute half of a symmetric product
CHUNK = 2**22  # entries of rows that are gathered at once: small enough for memory to be used again


def calibration(op: str, model: nn.Module, data: Iterable[Any], trace: ModelTrace | None = None) -> list[Any]:
    """As `calibrated`, the samples alone."""
    return calibrated(op, model, data, trace)[0]


def calibrated(
    op: str, model: nn.Module, data: Iterable[Any], trace: ModelTrace | None = None, *, further: bool = False
) -> tuple[list[Any], ModelTrace, Any]:
    """The first samples of `data` on the model's device, in equal parts, and the trace: by default of the first.

    At most `SAMPLES`, and no more than `MEMORY` allows. Ends at a batch that does not fit the others.

    With `further`, also a batch of the samples behind those, from the same pass over `data`, which may be shuffled anew
    in each; otherwise, and where there are none, None.

    Raises:
        ValueError: no sample, or inputs without a sample axis.
    """
    batches: list[tuple[Any, int]] = []
    behind: list[tuple[Any, int]] = []
    samples, limit, more, most = 0, SAMPLES, 0, 0
    device = device_of(model)
    for index, batch in enumerate(data):
        inputs, _ = split(op, batch, index, device, labels_needed=False)
        size = samples_of(op, inputs)
        if size and not batches:
            trace = ModelTrace.of(model, inputs) if trace is None else trace
            limit = max(1, min(SAMPLES, MEMORY // (MAPS * trace.largest)))
            most = held_out_of(limit) if further else 0
        if not size:
            continue
        if batches and not fits(batches[0][0], inputs):
            break
        few = min(size, limit - samples)
        if few:
            batches.append((narrowed(inputs, size, few), few))
            samples += few
        rest = min(size - few, most - more)
        if rest:
            behind.append((narrowed(inputs, size, rest, few), rest))
            more += rest
        if samples + more >= limit + most:
            break
    if not samples or trace is None:
        raise ValueError(f"{op}: data must give at least one sample, it gave none.")
    parts = 1 if device.type != "cpu" else min(PARTS, samples, -(-samples * trace.largest // MAP))
    each = -(-samples // parts)
    together = joined([inputs for inputs, _ in batches], batches[0][1])
    found = [narrowed(together, samples, min(each, samples - i), i) for i in range(0, samples, each)]
    return found, trace, joined([inputs for inputs, _ in behind], behind[0][1]) if behind else None


def held_out_of(samples: int) -> int:
    """How many of so many samples a check takes."""
    return max(1, samples // HELD_OUT)


@dataclass(frozen=True)
class HeldOut:
    """A batch of samples for a check of what was made of others."""

    inputs: Any
    samples: int
    apart: bool = True  # whether it was indeed made of others: of a single sample there are none


def kept_back(op: str, inputs: Sequence[Any], further: Any) -> tuple[list[Any], HeldOut]:
    """Parts to make something of, and samples to check it on: further ones, or else the last of those in the parts."""
    if further is not None:
        return list(inputs), HeldOut(further, samples_of(op, further))
    sizes = [samples_of(op, part) for part in inputs]
    number, samples = held_out_of(sum(sizes)), sum(sizes)
    if samples == 1:
        return list(inputs), HeldOut(inputs[0], 1, apart=False)
    whole = joined(inputs, sizes[0])
    left = samples - number
    each = -(-left // len(sizes))
    parts = [narrowed(whole, samples, min(each, left - i), i) for i in range(0, left, each)]
    return parts, HeldOut(narrowed(whole, samples, number, left), number)


def samples_of(op: str, inputs: Any) -> int:
    """Size of the first axis of the first tensor."""
    first = first_tensor(inputs)
    if first is None or not first.ndim:
        raise ValueError(f"{op}: data must give tensors with a sample axis, got {type(inputs).__name__}.")
    return len(first)


def fits(first: Any, other: Any) -> bool:
    """Whether two batches can be joined."""
    if isinstance(first, Tensor):
        return isinstance(other, Tensor) and first.shape[1:] == other.shape[1:] and first.dtype == other.dtype
    if isinstance(first, Mapping):
        return (
            isinstance(other, Mapping)
            and first.keys() == other.keys()
            and all(fits(first[name], other[name]) for name in first)
        )
    if isinstance(first, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(first) == len(other) and all(map(fits, first, other))
    return bool(first == other)


def joined(batches: Sequence[Any], samples: int) -> Any:
    """One batch of several, the first with so many samples; tensors without a sample axis as in the first."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(tuple(batches)) if first.ndim and len(first) == samples else first
    if isinstance(first, Mapping):
        return {name: joined([batch[name] for batch in batches], samples) for name in first}
    if isinstance(first, (tuple, list)):
        return tuple(joined(several, samples) for several in zip(*batches, strict=True))
    return first


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """By name, those with running statistics that training would change."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


def scale_of(norm: _BatchNorm) -> Tensor:
    """What a batch norm multiplies its inputs by, before whatever else is inside it: (channels,)."""
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach()


def matrix_of(layer: nn.Module) -> Tensor:
    """Weights as (outputs, inputs), float32 at least."""
    weight: Any = layer.weight
    found: Tensor = weight.detach().flatten(1)
    return found.float() if found.element_size() < 4 else found


class Positions:
    """Some positions of a layer's output, others in each sample, and what the layer reads and gives there.

    The same positions for the same layer and number of samples, whatever the number of its channels.

    Args:
        layer: Conv2d or Linear.
        seed: of the draw.
        parts: in how many parts the samples come.
    """

    def __init__(self, layer: nn.Module, seed: int, parts: int = 1) -> None:
        self.layer = layer
        self.axis = -1 if isinstance(layer, nn.Linear) else 1  # of channels
        self.seed = seed
        unknowns = matrix_of(layer).shape[1]
        rows = max(LEAST_PER_UNKNOWN * unknowns, min(ROWS_PER_UNKNOWN * unknowns, WORK / unknowns**2))
        self.rows = int(-(-rows // parts))
        self.chosen = torch.empty(0)

    def draw(self, output: Tensor) -> None:
        """Chooses positions of this output."""
        samples, *_ = output.shape
        places = self._flat(output).shape[1]
        each = min(places, -(-self.rows // samples))
        generator = torch.Generator().manual_seed(self.seed)
        if 8 * each > places:
            chosen = torch.rand(samples, places, generator=generator).argsort(1)[:, :each]
        else:  # few of many: the same one twice does no harm
            chosen = torch.randint(places, (samples, each), generator=generator)
        self.chosen = chosen.to(output.device)

    def of_output(self, output: Tensor) -> Tensor:
        """(rows, outputs), float32 at least."""
        flat = self._flat(output)
        index = self.chosen[:, :, None].expand(-1, -1, flat.shape[2])
        rows = flat.gather(1, index).flatten(0, 1)
        return rows.float() if rows.element_size() < 4 else rows

    def of_input(self, x: Tensor) -> Iterable[tuple[slice, Tensor]]:
        """Chunks of (rows, inputs of one output), float32 at least, each with its place among all rows."""
        samples, each = self.chosen.shape
        unknowns = matrix_of(self.layer).shape[1]
        step = max(1, max(CHUNK, 2 * unknowns**2) // (each * unknowns))  # no fewer rows than make a sum worth its while
        for start in range(0, samples, step):
            part = x[start : start + step]
            part = part.float() if part.element_size() < 4 else part
            rows = self._rows(part, self.chosen[start : start + step])
            yield slice(start * each, start * each + len(rows)), rows

    def _flat(self, output: Tensor) -> Tensor:
        """(samples, positions, outputs), a view where there is one."""
        if isinstance(self.layer, nn.Linear):
            return output.flatten(1, -2) if output.ndim > 2 else output[:, None]
        return output.flatten(2).transpose(1, 2)

    def _rows(self, x: Tensor, chosen: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            flat = self._flat(x)
            return flat.gather(1, chosen[:, :, None].expand(-1, -1, flat.shape[2])).flatten(0, 1)
        assert isinstance(layer, nn.Conv2d)
        x = functional.pad(x, padding_of(layer))
        sizes, steps, gaps = layer.kernel_size, layer.stride, layer.dilation
        width = (x.shape[3] - gaps[1] * (sizes[1] - 1) - 1) // steps[1] + 1
        ends = (chosen // width * steps[0], chosen % width * steps[1])
        down, across = (
            end[:, :, None] + gap * torch.arange(size, device=x.device)
            for end, gap, size in zip(ends, gaps, sizes, strict=True)
        )
        # Channels last, so that what is gathered lies together.
        pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        first = torch.arange(len(x), device=x.device)[:, None, None, None] * (x.shape[2] * x.shape[3])
        index = first + down[:, :, :, None] * x.shape[3] + across[:, :, None, :]  # samples, positions, kernel
        patches = pixels.index_select(0, index.flatten()).view(chosen.numel(), -1, x.shape[1])
        return patches.transpose(1, 2).reshape(chosen.numel(), -1)


def padding_of(layer: nn.Conv2d) -> list[int]:
    """As `functional.pad` takes it: last axis first."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2]
    down, across = (int(pad) for pad in layer.padding)
    return [across, across, down, down]


class Sums:
    """Sums of what a layer reads (x) and of what it is to give (y), over several parts.

    Taken around the mean of the first rows: products in the input's type, chunk by chunk, and their sum in float64.
    """

    def __init__(self) -> None:
        self.number = 0
        self.sums: list[Tensor] = []
        self.shift_x = self.shift_y = torch.empty(0)

    def add(self, positions: Positions, x: Tensor, y: Tensor) -> None:
        """A layer's input, and rows of its output."""
        for place, rows in positions.of_input(x):
            part = y[place]
            if not self.number:
                self.shift_x, self.shift_y = rows.mean(0), part.mean(0)
            self.number += len(rows)
            rows, part = rows.sub_(self.shift_x), part - self.shift_y
            terms = (rows.sum(0), part.sum(0), gram_of(rows), part.T @ rows, part.square().sum(0))
            if not self.sums:
                self.sums = [term.double() for term in terms]
            else:
                for total, term in zip(self.sums, terms, strict=True):
                    total += term

    def fit(self) -> Fit:
        mean_x, mean_y, xx, yx, yy = (total / self.number for total in self.sums)
        return Fit(
            mean_x + self.shift_x,
            mean_y + self.shift_y,
            xx - torch.outer(mean_x, mean_x),
            yx - torch.outer(mean_y, mean_x),
            yy - mean_y.square(),
        )


def gram_of(rows: Tensor) -> Tensor:
    """rows' rows: of a wide one, what is symmetric is computed once."""
    unknowns = rows.shape[1]
    if unknowns < WIDE:
        return rows.T @ rows
    half = unknowns // 2
    left, right = rows[:, :half], rows[:, half:]
    gram = rows.new_empty(unknowns, unknowns)
    gram[:half, :half], gram[half:, half:] = gram_of(left), gram_of(right)
    gram[:half, half:] = left.T @ right
    gram[half:, :half] = gram[:half, half:].T
    return gram


@dataclass
class Fit:
    """Moments of what a layer reads (x) and of what it is to give (y), float64: all that least squares needs."""

    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor  # covariance (inputs, inputs)
    yx: Tensor  # covariance (outputs, inputs)
    yy: Tensor  # variances (outputs,)

    def solve(self, op: str, weights: Tensor, ridge: float, guard: Tensor | None = None) -> Tensor:
        """The weights (outputs, inputs) that give y from x, drawn towards the given ones.

        Args:
            op: what asks, for errors.
            ridge: share of the mean variance of an input that is added to each; ten times as much as often as the
                system is not positive definite in float64.
            guard: second moments (inputs, inputs) of inputs for which the given weights are to stay right.
        """
        if not bool(self.xx.isfinite().all() and self.yx.isfinite().all()):
            raise ValueError(f"{op}: data must give finite feature maps, found NaN or Inf.")
        variance = float(self.xx.diagonal().mean())
        if variance <= 0:  # nothing varies: nothing to learn
            return weights
        missing = self.yx - weights @ self.xx
        eye = torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        system = self.xx if guard is None else self.xx + guard
        while True:
            factor, failed = torch.linalg.cholesky_ex(system + ridge * variance * eye)
            if not failed:
                return weights + torch.cholesky_solve(missing.T, factor).T
            ridge *= 10

    def bias(self, weights: Tensor) -> Tensor:
        """The bias (outputs,) that goes with weights."""
        return self.mean_y - weights @ self.mean_x
