"""Means and covariances of what layers read and are to give, from sums over sampled positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from discedit.model.forward import call, frozen_eval, hooked
from discedit.model.trace import ModelTrace
from discedit.moments import positions as sampling
from discedit.moments.calibration import PARTS
from discedit.moments.positions import Positions, flattened, sample_positions, unknowns_of

WIDE = 256  # unknowns, from which it pays to compute half of a symmetric product
ROWS_PER_CHANNEL = 64  # of which covariances between groups are estimated
LEAST_ROWS = 2**14
OTHERS = -1  # the group of all samples that are in no other


@dataclass
class LayerMoments:
    """Moments of what a layer reads (x) and of what it is to give (y), float64: all that least squares needs.

    Attributes:
        mean_x, mean_y: (inputs,), (outputs,).
        xx, yx: covariances, (inputs, inputs) and (outputs, inputs).
        yy: variances, (outputs,).
    """

    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor


class Sums:
    """Sums of what a layer reads (x) and is to give (y), around the mean of the first rows, chunk by chunk."""

    def __init__(self) -> None:
        self.number = 0
        self.sums: list[Tensor] = []
        self.shift_x = self.shift_y = torch.empty(0)

    def add(self, positions: Positions, x: Tensor, y: Tensor) -> None:
        """A layer's input, and (samples x positions, outputs) of its output."""
        each, unknowns = len(y) // len(x), unknowns_of(positions.layer)
        # No fewer rows at once than make a sum worth its while.
        for part in positions.chunks(len(x), each, max(sampling.CHUNK, 2 * unknowns**2)):
            rows, given = positions.inputs(x, part), y[part.start * each : part.stop * each]
            # Around a mean, if only that of the first rows: squares of large means would swallow the variance.
            if not self.number:
                self.shift_x, self.shift_y = rows.mean(0), given.mean(0)
            self.number += len(rows)
            rows, given = rows.sub_(self.shift_x), given - self.shift_y
            # Products in the type of the maps, which is fast; what adds up over all chunks in float64.
            terms = (rows.sum(0), given.sum(0), gram_of(rows), given.T @ rows, given.square().sum(0))
            self.sums = _added(self.sums, [term.double() for term in terms])

    def fit(self) -> LayerMoments:
        mean_x, mean_y, xx, yx, yy = (total / self.number for total in self.sums)
        return LayerMoments(
            mean_x + self.shift_x,
            mean_y + self.shift_y,
            xx - torch.outer(mean_x, mean_x),
            yx - torch.outer(mean_y, mean_x),
            yy - mean_y.square(),
        )


def fits_of(
    model: nn.Module, names: Iterable[str], inputs: Any, trace: ModelTrace
) -> dict[str, tuple[LayerMoments, int]]:
    """Moments of what layers read and give, and how many channels they read; of those that run just once."""
    once = [name for name in trace.in_order(names) if trace.runs[name] == 1]
    sums = {name: Sums() for name in once}
    channels: dict[str, int] = {}
    seeds = {name: count(PARTS * i) for i, name in enumerate(once)}

    def read(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        positions = Positions.drawn(module, output, next(seeds[name]), len(inputs))
        channels[name] = args[0].shape[-1 if isinstance(module, nn.Linear) else 1]
        sums[name].add(positions, args[0], positions.outputs(output))

    handles = [model.get_submodule(name).register_forward_hook(partial(read, name)) for name in once]
    with hooked(handles), frozen_eval(model):
        for batch in inputs if once else ():
            call(model, batch)
    return {name: (sums.pop(name).fit(), channels[name]) for name in once}


class GroupSums:
    """Means and covariances of what a layer reads at one position, of each group of samples; of `OTHERS` last."""

    def __init__(self, groups: int) -> None:
        self.groups = [*range(groups), OTHERS]
        self.sums: list[list[Tensor]] = [[] for _ in self.groups]
        self.counts = [[0, 0] for _ in self.groups]
        self.shift = torch.empty(0)

    def add(self, layer: nn.Module, x: Tensor, groups: Tensor, parts: int, seed: int) -> None:
        """One of so many parts; means are over all positions, covariances over some, drawn by the seed."""
        x = flattened(layer, x.detach())
        samples, places, channels = x.shape
        if not self.shift.numel():
            self.shift = x.mean((0, 1), dtype=torch.float32 if x.element_size() < 4 else x.dtype)
        each = min(places, -(-max(LEAST_ROWS, ROWS_PER_CHANNEL * channels) // (samples * parts)))
        picked = x.index_select(1, sample_positions("shared", (places,), each, seed).to(x.device)) - self.shift
        sums = x.sum(1, dtype=torch.float64)
        for i, group in enumerate(self.groups):
            chosen = (groups == group).nonzero()[:, 0].to(x.device)
            if len(chosen):
                rows = picked[chosen].flatten(0, 1)
                terms = [sums[chosen].sum(0), rows.sum(0, dtype=torch.float64), (rows.T @ rows).double()]
                self.sums[i] = _added(self.sums[i], terms)
                self.counts[i][0] += len(chosen) * places
                self.counts[i][1] += len(rows)

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of each group, float64."""
        found = []
        for (total, some, gram), (number, rows) in zip(self.sums, self.counts, strict=True):
            mean = some / rows  # around the shift
            found.append((total / number, gram / rows - torch.outer(mean, mean)))
        return found


def _added(totals: Sequence[Tensor], terms: list[Tensor]) -> list[Tensor]:
    return [total.add_(term) for total, term in zip(totals, terms, strict=True)] if totals else terms


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
