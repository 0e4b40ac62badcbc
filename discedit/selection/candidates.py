"""Layers that may lose components, and what is known beforehand of what each of their rows counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.model.trace import components_in, width_of
from discedit.recipes.operations import Slots
from discedit.recipes.recipe import Edit
from discedit.scoring.scores import Scores


@dataclass(frozen=True)
class Candidates:
    """Layers, each with its number of rows; and their scores, or importances of the caller's own, or neither."""

    widths: dict[str, int]
    scores: Scores | None = None
    importances: Mapping[str, Tensor] | None = None  # layer -> (rows,) floating point, higher = keep
    rows: Mapping[str, int | None] = field(default_factory=dict)  # module of the model -> its rows; None: it has none

    @classmethod
    def of(cls, op: str, model: nn.Module, scores: Scores | Mapping[str, Tensor] | None) -> Candidates:
        """Without scores, all layers.

        Raises:
            ValueError: importances that are not one number for each row.
        """
        rows = {name: components_in(module) for name, module in model.named_modules()}
        if scores is None:
            return cls({name: width for name, width in rows.items() if width}, rows=rows)
        if isinstance(scores, Scores):
            return cls({layer: len(scores[layer]) for layer in scores}, scores=scores, rows=rows)
        validation.instance(op, "scores", scores, Mapping, "a discedit.Scores, or importances by layer")
        for layer, values in scores.items():
            if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 1:
                what = f"a {type(values).__name__}"
                if isinstance(values, Tensor):
                    what = f"shape {validation.shape_of(values)} of {values.dtype}"
                raise ValueError(
                    f"{op}: scores must be Scores, or one floating-point number for each row of a layer, layer "
                    f"{layer!r} has {what}."
                )
        return cls({layer: len(values) for layer, values in scores.items()}, importances=scores, rows=rows)

    def beside(self, more: Mapping[str, int]) -> Candidates:
        """With components that belong to no layer: name -> how many."""
        return replace(self, widths={**self.widths, **more}, rows={**self.rows, **more})

    @property
    def unscored(self) -> bool:
        return self.scores is None and self.importances is None

    def chosen(self, op: str, layers: Iterable[str] | None) -> list[str]:
        """The layers asked for, or all, each known to both the model and the scores, which have so many rows."""
        chosen = list(self.widths) if layers is None else list(layers)
        for layer in chosen:
            check_scored(op, "layers", layer, self.widths)
            if layer not in self.rows:
                raise ValueError(f"{op}: scores must come from this model: it has no layer {layer!r}.")
            if self.rows[layer] not in (None, self.widths[layer]):
                raise ValueError(
                    f"{op}: scores must come from this model: layer {layer!r} has {self.rows[layer]} components, its "
                    f"scores {self.widths[layer]}."
                )
        return chosen

    def left(self, edit: Edit) -> Candidates:
        """What is known of the rows that an edit has left."""
        kept: dict[str, Tensor] = {}
        for operation in edit.recipe.operations:
            layer, _, tensor = operation.target.rpartition(".")
            heads, _, projection = layer.rpartition(".")
            if operation.kind != "keep":
                continue
            if projection == "out_proj" and heads in self.widths and operation.dim == 1:
                kept[heads] = torch.tensor(operation.index)
            if layer in self.widths and tensor == "weight":
                transposed = getattr(edit.model.get_submodule(layer), "transposed", False)
                if operation.dim == int(transposed):
                    kept[layer] = torch.tensor(operation.index)
        importances = self.importances and {
            layer: values[kept[layer].to(values.device)] if layer in kept else values
            for layer, values in self.importances.items()
        }
        left = {layer: len(index) for layer, index in kept.items()}
        return Candidates(
            self.widths | left, self.scores and self.scores.select(kept), importances, {**self.rows, **left}
        )


def check_scored(op: str, argument: str, layer: str, widths: Mapping[str, int]) -> None:
    if layer not in widths:
        raise ValueError(f"{op}: {argument} must name layers that scores holds, {layer!r} is none of {list(widths)}.")


def why_not_editable(slots: Slots, layers: Iterable[str]) -> dict[str, str]:
    """Layers of a model whose weights cannot be edited by rows, each with the reason."""
    names: dict[str, list[str]] = {}
    for name, first in slots.first.items():
        names.setdefault(first, []).append(name)
    of_one = {name: names[first] for name, first in slots.first.items()}
    found = {layer: _why_not_editable(slots.model.get_submodule(layer), layer, of_one) for layer in layers}
    return {layer: why for layer, why in found.items() if why}


def _why_not_editable(module: nn.Module, layer: str, of_one: Mapping[str, list[str]]) -> str:
    """By all names of the tensor that has a name; empty when it can."""
    if width_of(module) is None:
        return f"it is a {type(module).__name__}; only convolutions and linear layers can be edited"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed (parametrized or masked) and must be made a plain parameter first"
    for name, _ in module.named_parameters(layer, recurse=False):
        if len(of_one[name]) > 1:
            return f"its parameters are shared: {', '.join(of_one[name])} are one tensor"
    return ""
