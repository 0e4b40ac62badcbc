"""What is left of a pruned network, set right in closed form: forward passes only, no gradients, no labels.

The layers that read removed components are taken in the order in which they run. Each gets the weights (least squares)
or the bias alone (mean) that bring its output, on what the layers repaired before it now give, closest to what it was
in the model before pruning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from discedit._batches import call, device_of, first_tensor, split, undisturbed

SAMPLES = 1024  # images that are looked at
ROWS_PER_UNKNOWN = 16  # positions for each input of a layer, over all images
RIDGE = 1e-3  # of the mean variance of an input, towards the weights as they are


class _Enough(Exception):
    """Ends a forward pass: what comes after is not needed."""


@dataclass
class _Sums:
    """First and second moments of (input, output) rows: what least squares needs of them. Float64."""

    number: int = 0
    x: Any = 0.0
    y: Any = 0.0
    xx: Any = 0.0
    yx: Any = 0.0

    def add(self, x: Tensor, y: Tensor, second: bool) -> None:
        self.number += len(x)
        self.x = self.x + x.sum(0, dtype=torch.float64)
        self.y = self.y + y.sum(0, dtype=torch.float64)
        if second:
            self.xx = self.xx + (x.T @ x).double()
            self.yx = self.yx + (y.T @ x).double()


@dataclass
class Repairs:
    """New values by tensor name, and the layers that could not be repaired, with reasons."""

    values: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def repaired(
    model: nn.Module,
    edited: nn.Module,
    consumers: Iterable[str],
    components: dict[str, list[int]],
    norms: dict[str, str],
    data: Iterable[Any],
    *,
    weights: bool,
) -> Repairs:
    """Repairs `edited` in place, and returns what it set.

    Args:
        model: before pruning.
        edited: after it; the same module names.
        consumers: the layers that read removed components.
        components: layer -> its removed components.
        norms: layer -> the norm that its output goes straight into, as in `Moments`.
        data: batches, of which the first `SAMPLES` samples are used; labels are not.
        weights: least squares; otherwise the bias alone.
    """
    batches, samples = _first_batches(data, device_of(edited))
    if not samples:
        raise ValueError("prune: data must give at least one sample to repair on, it gave none.")
    result = Repairs()
    wanted = []
    for name in dict.fromkeys(consumers):
        why = _why_not(edited, name, norms)
        if why:
            result.skipped[name] = why
        else:
            wanted.append(name)
    for name, runs in _in_order(edited, wanted, batches[0]).items():
        if runs > 1:
            result.skipped[name] = "it runs more than once per forward pass"
            continue
        original, layer = model.get_submodule(name), edited.get_submodule(name)
        gone = set(components.get(name, ()))
        kept = [row for row in range(len(_matrix(original))) if row not in gone]
        target = _matrix(original)[kept]
        rows = _Rows(layer, samples)
        sums = _Sums()
        for index, inputs in enumerate(batches):
            now = rows.of(_input(edited, name, inputs), index)
            before = rows.of(_input(model, name, inputs), index)
            sums.add(now, before @ target.T, weights)
        _set_right(edited, name, sums, norms, result, weights)
    return result


def samples_of(inputs: Any) -> int:
    """Size of the first axis of the first tensor."""
    first = first_tensor(inputs)
    if first is None or not first.ndim:
        raise ValueError(f"prune: data must give tensors with a sample axis, got {type(inputs).__name__}.")
    return len(first)


def _first_batches(data: Iterable[Any], device: torch.device) -> tuple[list[Any], int]:
    batches, samples = [], 0
    for index, batch in enumerate(data):
        inputs, _ = split("prune", batch, index, device, labels_needed=False)
        batches.append(inputs)
        samples += samples_of(inputs)
        if samples >= SAMPLES:
            break
    return batches, samples


def _why_not(model: nn.Module, name: str, norms: dict[str, str]) -> str:
    """Why a layer cannot be repaired; empty when it can."""
    layer = model.get_submodule(name)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return f"it is a {type(layer).__name__}; only Conv2d and Linear can be repaired"
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.padding_mode != "zeros"):
        return "it is a convolution in groups, or one that does not pad with zeros"
    if layer.bias is None and _norm_of(model, name, norms) is None:
        return "it has neither a bias nor a batch norm behind it that could take one"
    return ""


def _norm_of(model: nn.Module, name: str, norms: dict[str, str]) -> _BatchNorm | None:
    norm = model.get_submodule(norms[name]) if name in norms else None
    return norm if isinstance(norm, _BatchNorm) and norm.running_mean is not None else None


def _matrix(layer: nn.Module) -> Tensor:
    """Weights as (outputs, inputs), float32 at least."""
    weight: Any = layer.weight
    found: Tensor = weight.detach().flatten(1)
    return found.float() if found.element_size() < 4 else found


def _in_order(model: nn.Module, names: list[str], inputs: Any) -> dict[str, int]:
    """The layers in the order in which they first run, and how often they do."""
    seen: dict[str, int] = {}

    def count(name: str) -> None:
        seen[name] = seen.get(name, 0) + 1

    handles = [model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: count(name)) for name in names]
    try:
        with undisturbed(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _input(model: nn.Module, name: str, inputs: Any) -> Tensor:
    """What the layer reads; the pass ends there."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].detach())
        raise _Enough

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        with undisturbed(model):
            call(model, inputs)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


class _Rows:
    """The inputs of a layer at some of its positions, as rows: enough of them for its number of unknowns."""

    def __init__(self, layer: nn.Module, samples: int) -> None:
        self.layer = layer
        self.each = max(1, math.ceil(ROWS_PER_UNKNOWN * _matrix(layer).shape[1] / samples))

    def of(self, x: Tensor, batch: int) -> Tensor:
        """(rows, inputs of one output). The same positions for the same batch, whatever the number of channels."""
        x = x.float() if x.element_size() < 4 else x
        layer = self.layer
        if isinstance(layer, nn.Linear):
            rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
            return rows[:, self._chosen(rows.shape[1], batch, x.device)].flatten(0, 1)
        assert isinstance(layer, nn.Conv2d)
        x = functional.pad(x, _padding(layer))
        sizes, steps, gaps = layer.kernel_size, layer.stride, layer.dilation
        height, width = ((x.shape[2 + i] - gaps[i] * (sizes[i] - 1) - 1) // steps[i] + 1 for i in range(2))
        chosen = self._chosen(height * width, batch, x.device)
        ends = (chosen // width * steps[0], chosen % width * steps[1])
        down, across = (
            end[:, None] + gap * torch.arange(size, device=x.device)
            for end, gap, size in zip(ends, gaps, sizes, strict=True)
        )
        patches = x[:, :, down[:, :, None], across[:, None, :]]  # samples, channels, positions, kernel
        return patches.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1)

    def _chosen(self, positions: int, batch: int, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randperm(positions, generator=generator)[: self.each].to(device)


def _padding(layer: nn.Conv2d) -> list[int]:
    """As `functional.pad` takes it: last axis first."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2]
    down, across = (int(pad) for pad in layer.padding)
    return [across, across, down, down]


@torch.no_grad()
def _set_right(model: nn.Module, name: str, sums: _Sums, norms: dict[str, str], result: Repairs, weights: bool) -> None:
    layer: Any = model.get_submodule(name)
    mean_x, mean_y = sums.x / sums.number, sums.y / sums.number
    matrix = _matrix(layer).double()
    if weights:
        xx = sums.xx / sums.number - torch.outer(mean_x, mean_x)
        yx = sums.yx / sums.number - torch.outer(mean_y, mean_x)
        ridge = RIDGE * float(xx.diagonal().mean())
        system = xx + ridge * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        if ridge > 0:
            matrix = torch.linalg.solve(system, (yx + ridge * matrix).T).T
            layer.weight.copy_(matrix.view_as(layer.weight))
            result.values[f"{name}.weight"] = layer.weight.detach().clone()
    bias = mean_y - matrix @ mean_x
    if layer.bias is not None:
        # The layer's own bias is no part of y.
        layer.bias.add_(bias)
        result.values[f"{name}.bias"] = layer.bias.detach().clone()
        return
    norm = _norm_of(model, name, norms)
    assert norm is not None
    assert norm.running_mean is not None
    norm.running_mean.sub_(bias)
    result.values[f"{norms[name]}.running_mean"] = norm.running_mean.detach().clone()
