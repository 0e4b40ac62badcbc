"""Which components go: ranked by how well they tell a class from the rest, and taken up to a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from discedit.common import validation
from discedit.scoring.scores import Scores

SIGNS = ("up", "any")
OF_DATA = ("fidelity", "contrast")
MEASURES = ("score", "specific", *OF_DATA)
LIMITS = ("fraction", "top", "deviations", "damage")
ROUNDING = 1 + 1e-12
Units = Mapping[str, Sequence[Sequence[int]]]  # layer -> the rows of each of its components


@dataclass(frozen=True)
class Ranking:
    """Components of all layers in the order in which they go for one class.

    Attributes:
        places: (layer, component), the first to go first.
        values: layer -> (components,) float64: what they are ranked by; not above 0 where a component is never to go.
        spread: layer -> mean and standard deviation of what its components are ranked by, all of them.
        sizes: how many components the layers have together.
    """

    places: list[tuple[str, int]]
    values: dict[str, Tensor]
    spread: dict[str, tuple[float, float]]
    sizes: int


def rank(scores: Scores, units: Units, cls: int, others: Sequence[int], *, by: str, sign: str) -> Ranking:
    """Ranks the components of these layers for a class.

    Args:
        units: components that are several rows of a layer count by the mean over them.
        others: classes that are not forgotten.
        by: "score", or "specific": the score minus the highest that the component has for one of the others (with
            sign="up": that it is more active for).
        sign: "up": only components that are more active for the class.
    """
    values: dict[str, Tensor] = {}
    spread: dict[str, tuple[float, float]] = {}
    for layer, parts in units.items():
        score = scores[layer].cpu().nan_to_num(0.0)
        up = scores.direction[layer].cpu() > 0
        value = score[:, cls]
        if by == "specific":
            rivals = (score if sign == "any" else torch.where(up, score, 0.0))[:, list(others)]
            value = value - rivals.amax(dim=1)
        of_parts = torch.stack([value[list(rows)].mean() for rows in parts])
        spread[layer] = (float(of_parts.mean()), float(of_parts.std(correction=0)))
        if sign == "up":
            active = torch.stack([up[list(rows), cls].double().mean() for rows in parts]) > 0.5
            of_parts = torch.where(active, of_parts, -1.0)
        values[layer] = of_parts.double()
    return ranked(values, spread)


def ranked(values: dict[str, Tensor], spread: dict[str, tuple[float, float]]) -> Ranking:
    """All layers together, the highest first; what is not above 0 never goes."""
    places = [(layer, part) for layer, of_parts in values.items() for part in range(len(of_parts))]
    together = torch.cat(list(values.values()))
    order = together.argsort(descending=True, stable=True).tolist()
    return Ranking([places[i] for i in order if together[i] > 0], values, spread, len(places))


def retain_damage(scores: Scores, units: Units, others: Sequence[int]) -> dict[str, Tensor]:
    """How much of what tells the other classes apart each component carries: layer -> (components,), 1 in total.

    The mean over these classes of its scores for those that it is more active for, over the sum of all components.
    """
    found = {}
    for layer, parts in units.items():
        score = torch.where(scores.direction[layer].cpu() > 0, scores[layer].cpu().nan_to_num(0.0), 0.0)
        of_rows = score[:, list(others)].double().mean(dim=1)
        found[layer] = torch.stack([of_rows[list(rows)].mean() for rows in parts])
    total = sum(float(values.sum()) for values in found.values())
    return {layer: values / total if total else values for layer, values in found.items()}


def check_limit(op: str, name: str, value: float) -> None:
    """Whether a limit is in range.

    Raises:
        ValueError: it is not.
    """
    if name == "top":
        validation.positive_integer(op, name, value)
    elif name == "deviations":
        if not validation.is_number(value) or not math.isfinite(value):
            raise ValueError(f"{op}: deviations must be a finite number, got {value!r}.")
    elif not validation.is_number(value) or not 0 < value < 1:
        raise ValueError(f"{op}: {name} must be a number in (0, 1), got {value!r}.")


def taken(ranking: Ranking, name: str, value: float, damage: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """What goes for one class, in the order of the ranking.

    Args:
        name, value: "fraction": so many of all components, at least one; "top": so many of each layer; "deviations":
            those that lie more than so many standard deviations above the mean of their layer; "damage": as many as
            carry, together, no more than this share of `damage`.
    """
    places = ranking.places
    if name == "fraction":
        return places[: max(1, math.floor(value * ranking.sizes * ROUNDING))]
    if name == "top":
        left = dict.fromkeys(ranking.values, int(value))
        chosen = []
        for layer, part in places:
            if left[layer]:
                left[layer] -= 1
                chosen.append((layer, part))
        return chosen
    if name == "deviations":
        least = {layer: mean + value * deviation for layer, (mean, deviation) in ranking.spread.items()}
        return [(layer, part) for layer, part in places if float(ranking.values[layer][part]) > least[layer]]
    spent, chosen = 0.0, []
    for layer, part in places:
        spent += float(damage[layer][part])
        if spent > value:
            break
        chosen.append((layer, part))
    return chosen
