"""Scores as a picture."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMES = 28  # of layers along the axis: more would overlap


def plot(scores: Any, path: str | os.PathLike[str] | None, class_names: list[str] | None) -> Figure:
    """Of `Scores`: see `Scores.plot`."""
    from matplotlib.figure import Figure

    if class_names is not None and len(class_names) != scores.num_classes:
        raise ValueError(
            f"Scores.plot: class_names must name {scores.num_classes} classes, got {len(class_names)} names."
        )
    columns, edges = [], [0]
    for values in scores.values():
        order = values.nan_to_num().amax(1).argsort(descending=True)
        columns.append(values[order].T.cpu())
        edges.append(edges[-1] + len(values))
    figure = Figure(figsize=(12, 1.8 + 0.28 * scores.num_classes), layout="constrained")
    axes = figure.add_subplot()
    heat = torch.cat(columns, dim=1).numpy()
    image = axes.imshow(heat, aspect="auto", vmin=0, vmax=1, cmap="magma", interpolation="nearest")
    for edge in edges[1:-1]:
        axes.axvline(edge - 0.5, color="white", linewidth=0.4 if len(scores) > 12 else 1.0)
    step = -(-len(scores) // MOST_NAMES)
    middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
    names = [f"{layer} ({len(values)})" for layer, values in scores.items()]
    few = len(scores) <= 8
    axes.set_xticks(middles[::step], names[::step], rotation=0 if few else 60, ha="center" if few else "right")
    axes.set_yticks(range(scores.num_classes), class_names or [str(k) for k in range(scores.num_classes)])
    axes.set_xlabel("layer (channels, the most discriminative first)")
    axes.set_ylabel("class")
    axes.set_title(f"How well each component tells each class from the rest ({scores.bound}, {scores.witness})")
    bounds = scores.bound != "hellinger"
    label = "lower bound on total variation" if bounds else "squared Hellinger distance of Gaussians"
    figure.colorbar(image, ax=axes, label=label, pad=0.01)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure
