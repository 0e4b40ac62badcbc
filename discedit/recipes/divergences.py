"""What the output of a network loses when one layer alone is pruned: measured once, spent by any budget."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from discedit.common import files
from discedit.common.by_layer import ByLayer
from discedit.common.tables import format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "divergences"
STEEPER = 2.0  # with few components left, each counts more: by the trials of ResNet-50 and ResNet20


@dataclass(frozen=True, eq=False)
class LayerDivergence:
    """Of one layer.

    Attributes:
        importances: (components,), float64; the least important go first.
        removed: (trials,), int64, ascending: how many had gone in each trial.
        divergence: (trials,), float64: of the output, then.
    """

    importances: Tensor
    removed: Tensor
    divergence: Tensor

    def curve(self) -> Tensor:
        """Divergence for each number of components that go, from none to all but one: (components,), float64.

        Between trials its root is linear, since a divergence is quadratic in small changes, and it never falls; behind
        the last one the root grows `STEEPER` times as fast as before it.
        """
        numbers = torch.arange(len(self.importances))
        steps = torch.cat([torch.zeros(1, dtype=torch.int64), self.removed])
        roots = torch.cat([torch.zeros(1, dtype=torch.float64), self.divergence.clamp(min=0).sqrt()]).cummax(0).values
        if len(steps) < 2:  # of a layer with a single component, which stays
            return torch.zeros(len(numbers), dtype=torch.float64)
        slopes = roots.diff() / steps.diff()
        before = (torch.searchsorted(steps, numbers, right=True) - 1).clamp(max=len(steps) - 1)
        slopes = torch.cat([slopes, STEEPER * slopes[-1:]])
        return (roots[before] + slopes[before] * (numbers - steps[before])).square()


@dataclass(frozen=True, eq=False)
class DivergenceTable(ByLayer[LayerDivergence]):
    """How much a model's output diverges when one layer alone loses components and the layers that read them make up
    for it: a mapping from layer name to `LayerDivergence`.

    A divergence is the squared difference of the outputs over their square: of logits around their mean over classes,
    which is what the Kullback-Leibler divergence is at a high temperature (Hinton, Vinyals and Dean 2015). That at
    temperature 1 rests on few samples, and spends a budget worse (docs/pruning.md).

    `prune` measures it where a budget is spent by divergence, and keeps it in `Edit.divergences`. As the `across` of
    another budget (``MaxMacs(0.4, across=edit.divergences)``) it needs no data and no trials.

    Attributes:
        layers: of all that can lose components.
        settings: what it was measured with; "outputs" is the square of the outputs, which tells data and weights.
        architecture: tensor name -> shape, of the model.
    """

    layers: dict[str, LayerDivergence]
    settings: dict[str, Any]
    architecture: dict[str, list[int]] = field(repr=False)

    def __repr__(self) -> str:
        trials = sum(len(layer.removed) for layer in self.values())
        return f"DivergenceTable({len(self)} layers, {trials} trials, {self.settings})"

    def summary(self) -> str:
        """A table: divergence of the output with a quarter, half and three quarters of each layer gone."""
        rows: list[list[str]] = [["layer", "components", "1/4", "1/2", "3/4"]]
        for name, layer in self.items():
            curve = layer.curve()
            rows.append([name, str(len(curve)), *(f"{float(curve[part * len(curve) // 4]):.4f}" for part in (1, 2, 3))])
        return format_table(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """A safetensors file, replaced atomically."""
        header = {"settings": self.settings, "architecture": self.architecture}
        tensors = {
            f"{name}/{part}": getattr(layer, part)
            for name, layer in self.items()
            for part in ("importances", "removed", "divergence")
        }
        files.save_tensors(path, KIND, header | {"layers": list(self)}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DivergenceTable:
        """Raises FileNotFoundError, or ValueError for a file that is damaged or another one."""
        header, tensors = files.load_tensors(path, KIND)
        layers = {}
        for name in files.field(header, "layers", list, path):
            parts = [tensors.get(f"{name}/{part}") for part in ("importances", "removed", "divergence")]
            if any(part is None or part.ndim != 1 for part in parts):
                raise ValueError(f"{str(path)!r} is damaged: layer {name!r} lacks a tensor.")
            layers[name] = LayerDivergence(*(part for part in parts if part is not None))
        settings, shapes = (files.field(header, name, dict, path) for name in ("settings", "architecture"))
        return cls(layers, settings, shapes)

    def plot(self, path: str | os.PathLike[str] | None = None, *, removed: Mapping[str, int] | None = None) -> Figure:
        """Divergence against the share of components removed, layer by layer; needs matplotlib.

        Args:
            path: of a picture to write.
            removed: layer -> how many went, which is then marked: of `edit`, ``{layer: len(rows) for layer, rows in
                edit.recipe.components.items()}``.
        """
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, layer) in enumerate(self.items()):
            curve = layer.curve().sqrt()
            colour = colormaps["viridis"](place / max(1, len(self) - 1))
            axes.plot(torch.arange(len(curve)) / len(curve), curve, color=colour, label=name, linewidth=1)
            if removed and (gone := removed.get(name)):
                axes.plot(gone / len(curve), curve[gone], "o", color=colour, markersize=4)
        axes.set_xlabel("share of the layer's components removed")
        axes.set_ylabel("root of the output's divergence")
        axes.set_ylim(bottom=0)
        title = "layer, in the order in which they run"
        figure.legend(fontsize="xx-small", ncols=-(-len(self) // 40), title=title, loc="outside right upper")
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=130)
        return figure
