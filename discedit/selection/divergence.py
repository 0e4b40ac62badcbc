"""Budgets spent where the output diverges least: how it is measured, and how much then goes from each layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discedit.common import validation
from discedit.recipes.divergences import DivergenceTable

ROUNDS = 8  # of choices of all layers in turn, in which they settle: two or three, as a rule
HALVINGS = 24  # of the interval in which the logarithm of the price of a unit of cost lies
LEAST_PRICE, MOST_PRICE = 1e-9, 1e12  # of the whole cost, in divergence
TRIALS = 128
LEAST_SAMPLES, MOST_SAMPLES, WORK = 24, 512, 5e12  # multiply-accumulates of all trials
LEVELS = 5  # trials of a layer, at most: more told no more on CIFAR-10
# What is saved of a cost where so many of a layer's components go, for several numbers, and of others what is given.
Along = Callable[[Mapping[str, int], str, Tensor], Tensor]


@dataclass(frozen=True)
class MeasureDivergence:
    """How `prune` measures what each layer's components are worth to the output, see `DivergenceTable`.

    Each layer is pruned alone, at several levels, with the layers that read it repaired; what follows them runs on what
    was computed before. The costs of a trial are forward passes of the rest of the network.

    Attributes:
        samples: of the data that trials run on, at most; by default 512, or fewer, but no fewer than 24, where all
            trials together would take more than 5e12 multiply-accumulates: minutes on two cores.
        trials: in all, at most, shared equally by the layers, at least one for each; by default 128, or one for each
            layer where there are more.
        path: of a file for the table, which is written after each layer; what it holds already, of the same model and
            settings, is not measured again.
        progress: show a progress bar on stderr; by default only on a terminal.

    Raises:
        ValueError: samples or trials below 1.

    Source: that distortions of the output of single layers nearly add up, Wang et al., ICCV 2023 (2308.10438).
    """

    samples: int | None = None
    trials: int | None = None
    path: str | os.PathLike[str] | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, number in (("samples", self.samples), ("trials", self.trials)):
            if number is not None:
                validation.positive_integer("MeasureDivergence", name, number)

    def levels(self, layers: int) -> int:
        """Trials of each of so many layers."""
        trials = max(TRIALS, layers) if self.trials is None else self.trials
        if layers > trials:
            raise ValueError(
                f"prune: across must allow one trial for each layer, MeasureDivergence has trials={trials} for "
                f"{layers} layers."
            )
        return min(LEVELS, trials // max(1, layers))

    def samples_of(self, trials: int, macs: int) -> int:
        """For so many trials of a model with so many multiply-accumulates per sample."""
        if self.samples is not None:
            return self.samples
        # Half of a pass, in the mean over layers.
        return max(LEAST_SAMPLES, min(MOST_SAMPLES, int(WORK / max(1, trials * macs / 2))))


def check_table(
    op: str, table: DivergenceTable, architecture: Mapping[str, Any], components: Mapping[str, int]
) -> None:
    """Raises a ValueError unless a table is of this model, and of the layers that can lose so many components."""
    if table.architecture != architecture:
        raise ValueError(f"{op}: across must be a table of this model, {table!r} is of one with other shapes.")
    for layer, number in components.items():
        if len(table[layer].importances) != number:
            raise ValueError(
                f"{op}: across must be a table of the same components, layer {layer!r} has {number}, in the table "
                f"{len(table[layer].importances)}."
            )


def least_divergence(
    curves: Mapping[str, Tensor],
    permitted: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], float],
    room: float,
    along: Along | None = None,
) -> dict[str, int]:
    """How many components go from each layer so that the cost of what is left fits and the output diverges least.

    Divergences of layers are added. For a price of a unit of cost, each layer takes the number that is cheapest while
    the others stay, in turns until none changes; the price is found by bisection, and what is left of the room is given
    back where that helps most. Costs need not be additive: a convolution's depends on two layers.

    Args:
        curves: layer -> (components,) divergence for each number that goes.
        permitted: layer -> the numbers that may go, ascending, 0 first.
        cost: of what is left when so many go; never grows with them.
        room: for it. Where all that may go is not enough, all goes.
        along: what one layer saves; by default a line.
    """
    most = {layer: numbers[-1] for layer, numbers in permitted.items()}
    if cost(most) > room:
        return most
    numbers = {layer: torch.tensor(those) for layer, those in permitted.items()}
    losses = {layer: curves[layer][those] for layer, those in numbers.items()}
    whole = cost({}) or 1.0

    def line(gone: Mapping[str, int], layer: str, those: Tensor) -> Tensor:
        return (cost({**gone, layer: 0}) - cost({**gone, layer: most[layer]})) / most[layer] * those

    def settled(price: float, start: Mapping[str, int]) -> dict[str, int]:
        gone = dict(start)
        for _ in range(ROUNDS):
            before = dict(gone)
            for layer, those in numbers.items():
                if most[layer]:
                    saved = (along or line)(gone, layer, those)
                    best = (losses[layer] - price / whole * saved).argmin()
                    gone[layer] = int(those[best])
            if gone == before:
                break
        return gone

    high = 1.0
    found = settled(high, dict.fromkeys(curves, 0))
    while cost(found) > room and high < MOST_PRICE:
        high *= 8
        found = settled(high, found)
    if cost(found) > room:  # nothing diverges at all by what would have to go
        found = most
    low, start = LEAST_PRICE, found
    for _ in range(HALVINGS):
        price = math.sqrt(low * high)
        start = settled(price, start)
        if cost(start) <= room:
            high, found = price, start
        else:
            low = price
    return _given_back(found, permitted, curves, cost, room)


def _given_back(
    gone: dict[str, int],
    permitted: Mapping[str, Sequence[int]],
    curves: Mapping[str, Tensor],
    cost: Callable[[Mapping[str, int]], float],
    room: float,
) -> dict[str, int]:
    """With components back as long as there is room, each time those that gain most for what they cost."""
    while True:
        present, choices = cost(gone), []
        for layer, number in gone.items():
            if number:
                fewer = permitted[layer][permitted[layer].index(number) - 1]
                more = cost({**gone, layer: fewer})
                gain = float(curves[layer][number] - curves[layer][fewer])
                if more <= room:
                    choices.append((gain / max(more - present, 1e-12 * max(room, 1.0)), layer, fewer))
        if not choices:
            return gone
        _, layer, fewer = max(choices)
        gone = {**gone, layer: fewer}
