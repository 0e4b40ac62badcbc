"""Ranks components by their fidelity on samples of a class: by how much of what their readers give they give alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from discedit.graph.pruning_graph import Graph
from discedit.model.forward import chosen
from discedit.moments.calibration import SAMPLES
from discedit.moments.forget_retain import Classified
from discedit.selection.importance import fidelities
from discedit.selection.ranking import Ranking, Units, ranked


def rank_by_fidelity(
    model: nn.Module, graph: Graph, units: Units, data: Classified, by: str
) -> tuple[list[Ranking], dict[str, str]]:
    """A ranking for each class to forget, in their order; and layer -> why it is in none.

    Args:
        units: what is ranked, all layers together: components that the graph has found.
        by: "fidelity": on samples of the class; "contrast": that minus the same on samples of the classes that stay.

    Raises:
        ValueError: no sample of a class, feature maps that are not finite, no layer that can be ranked, or nothing
            above 0.
    """
    counts = {layer: len(parts) for layer, parts in units.items()}
    rest, unread = fidelities(model, graph, counts, data.parts("retain"), data.trace) if by == "contrast" else ({}, {})
    rankings = []
    for cls in data.forget:
        values, unread = fidelities(model, graph, counts, _of_class(data, cls), data.trace)
        if not values:
            why = "; ".join(f"{layer}: {reason}" for layer, reason in unread.items())
            raise ValueError(f"unlearn: layers must name at least one layer that by={by!r} can rank ({why}).")
        if by == "contrast":
            values = {layer: own - rest[layer] for layer, own in values.items()}
        for layer, own in values.items():
            if not bool(own.isfinite().all()):
                raise ValueError(f"unlearn: data must give finite feature maps, what reads {layer!r} gets NaN or inf.")
        ranking = ranked(values, {layer: _spread(own) for layer, own in values.items()})
        if not ranking.places:
            raise ValueError(f"unlearn: by={by!r} is above 0 for no component of the chosen layers and class {cls}.")
        rankings.append(ranking)
    return rankings, unread


def _spread(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std(correction=0))


def _of_class(data: Classified, cls: int) -> list[Any]:
    """Samples of one class to forget, in parts."""
    parts = []
    for inputs, labels in data.labelled("forget", SAMPLES):
        places = (labels == cls).nonzero()[:, 0]
        if len(places):
            parts.append(chosen(inputs, places, len(labels)))
    if not parts:
        raise ValueError(f"unlearn: data must hold samples of every class to forget, it holds none of class {cls}.")
    return parts
