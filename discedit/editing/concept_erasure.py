"""Erasure in closed form: what a layer reads no longer differs, on average, between classes to forget and the others.

The directions are those at which the Fisher bound of the layer's whole input is attained (nearly: a ridge steadies
them, and several classes share one covariance); taking the difference of the means out of the weights along them is the
oblique projection of LEACE (Belrose et al., "LEACE: Perfect linear concept erasure in closed form", NeurIPS 2023).
Layers are taken in the order in which they run, each on what those edited before it now give, all in one forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.model.forward import call, first_tensor, hooked, undisturbed
from discedit.model.functional import LayersCalled
from discedit.model.layers import as_its_class, input_of
from discedit.model.trace import ModelTrace
from discedit.ops import fisher_bound
from discedit.recipes.operations import Operation
from discedit.repair.lockstep import Pause, in_lockstep

RIDGE = 1e-2  # of the mean variance: a few hundred samples know little of the directions that hardly vary
LEAST_DIFFERENCE = 1e-6
MISSED = 0.1  # of what an erasure is to change, where the rounding of the weights may leave so much
ROWS_PER_CHANNEL = 64
LEAST_ROWS = 2**14
OTHERS = -1  # the group of all samples that stay


@dataclass
class Erased:
    """What an erasure did.

    Attributes:
        operations, tensors: for a recipe, with its "set.I".
        bounds: layer -> Fisher bound on the total variation distance between each class and the others, along the
            direction that is erased from what the layer reads, before it is.
        skipped: layer -> why its weights, as their type holds them, would not do what was asked; it is as it was.
        forgotten: share of the samples to forget that are still named rightly, a mean over classes.
    """

    operations: list[Operation] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    forgotten: float = 1.0


def erased(
    edited: nn.Module,
    layers: Sequence[str],
    trace: ModelTrace,
    parts: Sequence[tuple[Any, Tensor]],
    classes: Sequence[int],
    factor: float,
) -> Erased:
    """Erases directions from what layers read, in place.

    Args:
        edited: the model.
        layers: Conv2d (not in groups) and Linear, with a bias or a batch norm behind that can take one.
        trace: of the model before the edit.
        parts: inputs with labels. Samples of other classes are those that stay.
        classes: what to forget.
        factor: what is left of each direction: 0 erases it.

    Raises:
        ValueError: no sample of a class, feature maps that are not finite, or a model without logits.
    """
    result = Erased()
    trace = trace.of_copy(edited)
    sums = {layer: _Sums(len(classes)) for layer in layers}
    place = threading.local()

    def meet(layer: str) -> None:
        _edit(trace, layer, sums.pop(layer), factor, result)

    def enter(layer: str, module: nn.Module, arguments: Any) -> None:
        sums[layer].add(module, arguments[0], place.groups, len(parts), place.seed)
        place.pause(layer)

    right, seen = torch.zeros(2, len(classes), dtype=torch.float64)

    def run(inputs: Any, groups: Tensor, seed: int, pause: Pause) -> None:
        place.groups, place.seed, place.pause = groups, seed, pause
        with torch.no_grad(), LayersCalled(edited):  # this thread has modes of its own
            logits = first_tensor(call(edited, inputs))
        if logits is None or logits.ndim != 2:
            found = "none" if logits is None else f"shape {validation.shape_of(logits)}"
            raise ValueError(f"unlearn: model must give logits (samples, classes) to erase directions, got {found}.")
        named = logits.argmax(1).cpu()
        for i, cls in enumerate(classes):
            seen[i] += int((groups == i).sum())
            right[i] += int((named[groups == i] == cls).sum())

    for cls in classes:
        if not any(bool((labels == cls).any()) for _, labels in parts):
            raise ValueError(f"unlearn: data must hold samples of every class to forget, it holds none of class {cls}.")
    handles = [edited.get_submodule(layer).register_forward_pre_hook(partial(enter, layer)) for layer in layers]
    works = []
    for seed, (inputs, labels) in enumerate(parts):
        groups = torch.full_like(labels, OTHERS)
        for i, cls in enumerate(classes):
            groups[labels == cls] = i
        works.append(partial(run, inputs, groups, seed))
    with hooked(handles), undisturbed(edited):
        in_lockstep("unlearn", works, meet)
    result.forgotten = float((right / seen).mean())
    return result


class _Sums:
    """Means and covariances of what a layer reads at one position: (channels,), of each class and of the others."""

    def __init__(self, classes: int) -> None:
        self.totals: list[list[Tensor]] = [[] for _ in range(classes + 1)]  # the others last
        self.counts = [[0, 0] for _ in range(classes + 1)]
        self.shift = torch.empty(0)

    def add(self, layer: nn.Module, x: Tensor, groups: Tensor, parts: int, seed: int) -> None:
        """One part; means are over all positions, covariances over some."""
        x = x.detach()
        if isinstance(layer, nn.Conv2d):
            x = x.flatten(2).transpose(1, 2)
        else:
            x = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
        samples, places, channels = x.shape
        if not self.shift.numel():
            self.shift = x.mean((0, 1), dtype=torch.float32 if x.element_size() < 4 else x.dtype)
        each = min(places, -(-max(LEAST_ROWS, ROWS_PER_CHANNEL * channels) // (samples * parts)))
        generator = torch.Generator().manual_seed(seed)
        positions = torch.randperm(places, generator=generator)[:each].to(x.device)
        sums = x.sum(1, dtype=torch.float64)
        picked = x.index_select(1, positions) - self.shift
        for group in range(len(self.totals)):
            chosen = (groups == (group if group < len(self.totals) - 1 else OTHERS)).nonzero()[:, 0].to(x.device)
            if not len(chosen):
                continue
            rows = picked[chosen].flatten(0, 1)
            terms = [sums[chosen].sum(0), rows.sum(0, dtype=torch.float64), (rows.T @ rows).double()]
            known = self.totals[group]
            self.totals[group] = [a + b for a, b in zip(known, terms, strict=True)] if known else terms
            self.counts[group][0] += len(chosen) * places
            self.counts[group][1] += len(rows)

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of each group, float64."""
        found = []
        for (total, some, gram), (number, rows) in zip(self.totals, self.counts, strict=True):
            mean = some / rows  # around the shift
            found.append((total / number, gram / rows - torch.outer(mean, mean)))
        return found


def _edit(trace: ModelTrace, name: str, sums: _Sums, factor: float, result: Erased) -> None:
    """Takes the directions out of one layer's weights, around the mean of the samples that stay."""
    *forget, (mean, covariance) = sums.moments()
    if not all(bool(m.isfinite().all() and c.isfinite().all()) for m, c in (*forget, (mean, covariance))):
        raise ValueError(f"unlearn: data must give finite feature maps, what {name!r} reads holds NaN or Inf.")
    differences = torch.stack([m - mean for m, _ in forget], dim=1)  # (channels, classes)
    within = torch.stack([c for _, c in forget]).mean(0) + covariance
    variance = float(within.diagonal().mean())
    eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    directions = torch.linalg.solve(within + (RIDGE * variance if variance > 0 else 1.0) * eye, differences)
    between = differences.T @ directions
    # In squares of standard deviations. A difference that is rounding, as behind what was just erased, is none.
    least = {"atol": LEAST_DIFFERENCE, "rtol": 1e-10, "hermitian": True}
    projected = torch.linalg.pinv((between + between.T) / 2, **least) @ directions.T
    layer: Any = trace.model.get_submodule(name)
    weight = layer.weight.detach().double()
    moved = (1 - factor) * torch.einsum("oi...,ic->oc...", weight, differences)  # what the layer makes of them
    change = -torch.einsum("oc...,ci->oi...", moved, projected)
    lost = torch.einsum("oc...,c->o...", moved, projected @ mean)
    bias = lost.flatten(1).sum(1) if lost.ndim > 1 else lost  # padding counts as what else is read
    new = (weight + change).to(layer.weight.dtype).double()
    if why := _why_not_erased(layer, weight, new, differences @ (projected @ differences), factor):
        result.skipped[name] = why
        return
    result.bounds[name] = _bounds(directions.T, forget, (mean, covariance))
    _add(result, f"{name}.weight", layer.weight, change)
    if layer.bias is not None:
        _add(result, f"{name}.bias", layer.bias, bias)
        return
    norm = trace.bias_norm(name)
    assert norm is not None
    assert norm.running_mean is not None
    # Not the norm's bias: so the means are, but for padding, those that it would find on the classes that stay.
    _add(result, f"{trace.norms[name]}.running_mean", norm.running_mean, -bias)


def _why_not_erased(layer: nn.Module, old: Tensor, new: Tensor, differences: Tensor, factor: float) -> str:
    """Why a layer with new weights does not give factor times as much for differences (channels, classes) of what it
    reads, in any mixture at any place; empty where it does."""
    x = input_of(layer).double()
    if isinstance(layer, nn.Conv2d):
        x = torch.einsum("skhw,ck->schw", x[:, :1].expand(-1, differences.shape[1], -1, -1), differences)
    else:
        x = x[:, :1] * differences.sum(1)
    spread = {"weight": old.abs(), "bias": None}, x.abs()
    before, after = (as_its_class(layer, {"weight": weight, "bias": None}, x) for weight in (old, new))
    missed, due = float((after - factor * before).norm()), float((1 - factor) * before.norm())
    rounding = torch.finfo(torch.float32).eps * float(as_its_class(layer, *spread).norm())
    if missed <= max(MISSED * abs(due), 4 * rounding):
        return ""
    kind = str(layer.weight.dtype).removeprefix("torch.")
    share = f"{100 * missed / abs(due):.0f} %" if due else "all"
    return (
        f"its weights, in {kind}, miss what erasing is to change by {share}; make it in a type of more digits "
        "(model.float()), or leave the layer out"
    )


def _bounds(directions: Tensor, forget: list[tuple[Tensor, Tensor]], others: tuple[Tensor, Tensor]) -> list[float]:
    """The Fisher bound of each class against the others, along the direction (a row) that is erased for it."""

    def along(means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
        return (directions * means).sum(1, keepdim=True), directions[:, None] @ covariances @ directions[:, :, None]

    means, covariances = (torch.stack(moments) for moments in zip(*forget, strict=True))
    found = fisher_bound(*along(means, covariances), *along(*others))
    return [round(bound, 4) for bound in found.tolist()]


@torch.no_grad()
def _add(result: Erased, name: str, tensor: Tensor, values: Tensor) -> None:
    """Adds, as the recipe's operation will."""
    values = values.to(tensor.dtype)
    result.tensors[f"set.{len(result.operations)}"] = values.cpu()
    result.operations.append(Operation("add", name, index=tuple(range(len(tensor)))))
    tensor += values
