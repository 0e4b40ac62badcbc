"""Which components go for a class: ranked by how well they tell it from the rest, and selected up to a limit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.graph.pruning_graph import Graph
from discedit.model.forward import index_samples
from discedit.moments.calibration import SAMPLES
from discedit.moments.forget_retain import ForgetRetainSplit
from discedit.scoring.scores import Scores
from discedit.selection.importance import fidelities

SIGNS = ("up", "any")
OF_DATA = ("fidelity", "contrast")
MEASURES = ("score", "specific", *OF_DATA)
ROUNDING = 1 + 1e-12
Units = Mapping[str, Sequence[Sequence[int]]]  # layer -> the rows of each of its components


@dataclass(frozen=True)
class Ranking:
    """Components of all layers in the order in which they go for one class."""

    places: list[tuple[str, int]]  # (layer, component), the first to go first
    values: dict[str, Tensor]  # layer -> (components,) float64: not above 0 where a component is never to go
    measures: dict[str, Tensor]  # the same of all components, also of those that are never to go

    @property
    def sizes(self) -> int:
        """How many components the layers have together."""
        return sum(map(len, self.values.values()))


def rank(scores: Scores, units: Units, cls: int, others: Sequence[int], *, by: str, sign: str) -> Ranking:
    """Ranks the components of these layers for a class; those of several rows count by the mean over them.

    By the score; by "specific" minus the highest that the component has for one of the others, of those that it is more
    active for with sign="up". That sign leaves only components that are more active for the class.
    """
    values, measures = {}, {}
    for layer, parts in units.items():
        score = scores[layer].cpu().nan_to_num(0.0)
        up = scores.direction[layer].cpu() > 0
        value = score[:, cls]
        if by == "specific":
            rivals = (score if sign == "any" else torch.where(up, score, 0.0))[:, list(others)]
            value = value - rivals.amax(dim=1)
        measures[layer] = of_parts = torch.stack([value[list(rows)].mean() for rows in parts])
        if sign == "up":
            active = torch.stack([up[list(rows), cls].double().mean() for rows in parts]) > 0.5
            of_parts = torch.where(active, of_parts, -1.0)
        values[layer] = of_parts.double()
    return ranking_of(values, measures)


def ranking_of(values: dict[str, Tensor], measures: dict[str, Tensor]) -> Ranking:
    """All layers together, the highest first; what is not above 0 never goes."""
    places = [(layer, part) for layer, of_parts in values.items() for part in range(len(of_parts))]
    together = torch.cat(list(values.values()))
    # Stable: of equal scores the first goes first, on every machine.
    order = together.argsort(descending=True, stable=True).tolist()
    return Ranking([places[i] for i in order if together[i] > 0], values, measures)


def retain_damage(scores: Scores, units: Units, others: Sequence[int]) -> dict[str, Tensor]:
    """How much of what tells the other classes apart each component carries, see `MaxDamage`: layer -> (components,), 1
    in total."""
    found = {}
    for layer, parts in units.items():
        score = torch.where(scores.direction[layer].cpu() > 0, scores[layer].cpu().nan_to_num(0.0), 0.0)
        of_rows = score[:, list(others)].double().mean(dim=1)
        found[layer] = torch.stack([of_rows[list(rows)].mean() for rows in parts])
    total = sum(float(values.sum()) for values in found.values())
    return {layer: values / total if total else values for layer, values in found.items()}


@dataclass(frozen=True)
class Limit(ABC):
    """How many components go for each class.

    Raises:
        ValueError: a value out of its range.
    """

    value: float
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not validation.is_number(self.value) or not 0 < self.value < 1:
            raise ValueError(f"unlearn: {self.name} must be a number in (0, 1), got {self.value!r}.")

    @abstractmethod
    def select(self, ranking: Ranking, damage: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        """What goes for one class, in the order of the ranking."""


@dataclass(frozen=True)
class TopFraction(Limit):
    """This share of all components, in (0, 1); at least one."""

    name = "fraction"

    def select(self, ranking: Ranking, damage: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        return ranking.places[: max(1, math.floor(self.value * ranking.sizes * ROUNDING))]


@dataclass(frozen=True)
class TopFractionOfEach(Limit):
    """This share of each layer's components, in (0, 1); at least one, where one tells the class."""

    name = "fraction_of_each"

    def select(self, ranking: Ranking, damage: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        most = {layer: max(1, math.floor(self.value * len(v) * ROUNDING)) for layer, v in ranking.values.items()}
        return first_of_each(ranking, most)


@dataclass(frozen=True)
class TopK(Limit):
    """So many components of each layer."""

    name = "top"

    def __post_init__(self) -> None:
        validation.positive_integer("unlearn", self.name, self.value)

    def select(self, ranking: Ranking, damage: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        return first_of_each(ranking, dict.fromkeys(ranking.values, int(self.value)))


def first_of_each(ranking: Ranking, most: Mapping[str, int]) -> list[tuple[str, int]]:
    """The first so many of each layer, in the order of the ranking."""
    left = dict(most)
    selected = []
    for layer, part in ranking.places:
        if left[layer]:
            left[layer] -= 1
            selected.append((layer, part))
    return selected


@dataclass(frozen=True)
class AboveDeviations(Limit):
    """Those that lie more than so many standard deviations above the mean of their layer."""

    name = "deviations"

    def __post_init__(self) -> None:
        if not validation.is_number(self.value) or not math.isfinite(self.value):
            raise ValueError(f"unlearn: deviations must be a finite number, got {self.value!r}.")

    def select(self, ranking: Ranking, damage: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        least = {
            layer: float(of_all.mean()) + self.value * float(of_all.std(correction=0))
            for layer, of_all in ranking.measures.items()
        }
        return [(layer, part) for layer, part in ranking.places if float(ranking.values[layer][part]) > least[layer]]


@dataclass(frozen=True)
class MaxDamage(Limit):
    """As many as carry together no more than this share, in (0, 1), of what tells the other classes apart: the mean,
    over these classes, of the scores for those that a component is more active for."""

    name = "damage"

    def select(self, ranking: Ranking, damage: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        spent, selected = 0.0, []
        for layer, part in ranking.places:
            spent += float(damage[layer][part])
            if spent > self.value:
                break
            selected.append((layer, part))
        return selected


def rank_by_fidelity(
    model: nn.Module, graph: Graph, units: Units, data: ForgetRetainSplit, by: str
) -> tuple[list[Ranking], dict[str, str]]:
    """A ranking for each class to forget, in their order; and layer -> why it is in none.

    By the fidelity on samples of the class; by "contrast" minus that on samples of the classes that stay.
    """
    counts = {layer: len(parts) for layer, parts in units.items()}
    rest, unread = fidelities(model, graph, counts, data.parts("retain"), data.trace) if by == "contrast" else ({}, {})
    rankings = []
    for cls in data.forget:
        values, unread = fidelities(model, graph, counts, _samples_of_class(data, cls), data.trace)
        if not values:
            why = "; ".join(f"{layer}: {reason}" for layer, reason in unread.items())
            raise ValueError(f"unlearn: layers must name at least one layer that by={by!r} can rank ({why}).")
        if by == "contrast":
            values = {layer: own - rest[layer] for layer, own in values.items()}
        for layer, own in values.items():
            if not bool(own.isfinite().all()):
                raise ValueError(f"unlearn: data must give finite feature maps, what reads {layer!r} gets NaN or inf.")
        ranking = ranking_of(values, values)
        if not ranking.places:
            raise ValueError(f"unlearn: by={by!r} is above 0 for no component of the chosen layers and class {cls}.")
        rankings.append(ranking)
    return rankings, unread


def _samples_of_class(data: ForgetRetainSplit, cls: int) -> list[Any]:
    """Samples of one class to forget, in parts."""
    parts = []
    for inputs, labels in data.labelled("forget", SAMPLES):
        places = (labels == cls).nonzero()[:, 0]
        if len(places):
            parts.append(index_samples(inputs, places, len(labels)))
    if not parts:
        raise ValueError(f"unlearn: data must hold samples of every class to forget, it holds none of class {cls}.")
    return parts
