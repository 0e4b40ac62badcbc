"""Components that give zero, less, or their mean: what is written into rows of a layer and of its norm, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit.model.forward import call, frozen_eval, hooked
from discedit.model.layers import input_of, is_own, why_not_plain
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import Recipe, architecture_of, copied

AROUND = ("zero", "mean")
# In units in the last place of the largest number: what a norm adds up may cancel. Of 16 bits there are not so many.
ROUNDING, ROUNDING_OF_HALVES = 100, 16
FAR = 100  # times random input: an activation inside a norm may have bounds


@dataclass(frozen=True)
class RowEdit:
    """Makes y, the output of some rows behind the layer's norm, m + scale * (y - m)."""

    model: nn.Module
    norms: Mapping[str, str]  # layer -> the norm that its output goes straight into
    rows: Mapping[str, list[int]]
    scale: float
    means: Mapping[str, Tensor] | None  # layer -> m, one for each row of the layer; None: 0

    def recipe(self, settings: dict[str, Any]) -> Recipe:
        operations: list[Operation] = []
        tensors: dict[str, Tensor] = {}
        for layer, channels in self.rows.items():
            index, norm = tuple(channels), self.norms.get(layer)
            for name, dim in _tensors_of(self.model, layer, norm, self.scale):
                kind = "scale" if self.scale else "fill"
                operations.append(Operation(kind, name, dim=dim, index=index, value=self.scale))
            if self.means is not None:
                name = bias_of(self.model, layer, norm)
                if not name:
                    behind = f" with its norm {norm!r}" if norm else ""
                    raise ValueError(
                        f"unlearn: around='mean' needs a bias that can carry the mean, that of layer {layer!r}{behind} "
                        "is None."
                    )
                bias = (1 - self.scale) * self.means[layer][channels]
                tensors[f"set.{len(operations)}"] = bias.to(self.model.get_parameter(name).dtype)
                operations.append(Operation("add", name, index=index))
        return Recipe("unlearn", settings, dict(self.rows), architecture_of(self.model), operations, tensors)

    def wrong(self, edited: nn.Module, batches: Iterable[Any]) -> dict[str, str]:
        """Layers of the edited model whose rows do not give what they are to give, each with the reason.

        Found out by running it on some batches; layers that do not run there as modules run by themselves, on random
        input.
        """
        reasons: dict[str, str] = {}
        seen = set()

        def look(layer: str, _: nn.Module, args: Any, output: Any) -> None:
            if not bool(args[0].isfinite().all()):
                raise ValueError(f"unlearn: data must give finite feature maps, what {layer!r} reads holds NaN or Inf.")
            seen.add(layer)
            if isinstance(output, Tensor) and (why := self._why_wrong(edited, layer, args[0], output)):
                reasons[layer] = why

        parts = {layer: edited.get_submodule(layer) for layer in self.rows}
        with frozen_eval(self.model), frozen_eval(edited):
            with hooked([part.register_forward_hook(partial(look, layer)) for layer, part in parts.items()]):
                for batch in batches:
                    call(edited, batch)
            for layer, part in parts.items():
                if layer in seen:
                    continue
                try:
                    x = input_of(part)
                    found = (self._why_wrong(edited, layer, far * x, part(far * x)) for far in (1, FAR))
                    why = next(filter(None, found), "")
                except Exception as error:  # whatever a forward of somebody's own may need
                    own = is_own(part) and is_own(edited.get_submodule(self.norms.get(layer, layer)))
                    why = f"it cannot be run by itself to see what it gives ({type(error).__name__}: {error})"
                    why = "" if own else why
                if why:
                    reasons[layer] = why
        return reasons

    def _why_wrong(self, edited: nn.Module, layer: str, x: Tensor, output: Tensor) -> str:
        """Of what the edited layer makes of x."""
        index = torch.tensor(self.rows[layer], device=output.device)
        axis = output.ndim - 1 if isinstance(self.model.get_submodule(layer), nn.Linear) else 1

        def behind_norm(model: nn.Module, y: Tensor) -> Tensor:
            # Of a clone: an activation inside a norm may write over what it reads.
            y = y if layer not in self.norms else model.get_submodule(self.norms[layer])(y.clone())
            return y.index_select(axis, index).movedim(axis, -1).double()

        found = behind_norm(edited, output)
        mean = torch.zeros(len(index), dtype=torch.float64, device=output.device)
        if self.means is not None:
            mean = self.means[layer].to(mean)[index]
        due, size = mean.expand_as(found), float(mean.abs().max())
        if self.scale:  # otherwise nothing is left of what it gave before
            before = behind_norm(self.model, self.model.get_submodule(layer)(x))
            due, size = mean + self.scale * (before - mean), max(size, float(before.abs().max()))
        units = ROUNDING if output.element_size() >= 4 else ROUNDING_OF_HALVES
        missed = float((found - due).abs().max()) if found.numel() else 0.0
        if missed <= units * torch.finfo(output.dtype).eps * max(1.0, abs(self.scale)) * size:
            return ""
        where = f"behind the norm {self.norms[layer]!r} " if layer in self.norms else ""
        what = f"{self.scale:g} times their output" if self.scale else "zero" if self.means is None else "the mean"
        around = " around the mean" if self.scale and self.means is not None else ""
        zero = "take scale=0, around='zero', " if self.scale or self.means is not None else ""
        return (
            f"its components do not give {what}{around} {where}when their weights are made to, they miss it by "
            f"{missed:.3g}; use EraseDirections instead, {zero}or leave the layer out"
        )


def _tensors_of(model: nn.Module, layer: str, norm: str | None, scale: float) -> list[tuple[str, int]]:
    """The tensors whose rows are multiplied, each with the axis of the rows."""
    module = model.get_submodule(layer)
    transposed = isinstance(module, _ConvNd) and module.transposed
    if transposed and module.groups != 1:
        raise ValueError(f"unlearn: layer {layer!r} is a transposed convolution in groups, which is not supported.")
    own = [(f"{layer}.weight", int(transposed)), (f"{layer}.bias", 0)]
    present = dict([*model.named_parameters(), *model.named_buffers()])
    if norm is None:
        targets = own
    elif f"{norm}.weight" in present:
        of_norm = [(f"{norm}.weight", 0), (f"{norm}.bias", 0)]
        # The norm's alone do it. Zeros in the layer leave nothing behind that a new norm could bring back.
        targets = of_norm if scale else own + of_norm
    elif isinstance(model.get_submodule(norm), (nn.GroupNorm, nn.LayerNorm)):
        raise ValueError(
            f"unlearn: layer {layer!r} cannot be ablated: {norm!r} behind it mixes channels and has no weights."
        )
    else:  # such a norm gives scale times as much for scale times the input around scale times the mean
        targets = [*own, (f"{norm}.running_mean", 0)]
    return [(name, dim) for name, dim in targets if name in present]


def bias_of(model: nn.Module, layer: str, norm: str | None) -> str:
    """The tensor that can carry a constant added to the layer's output behind its norm; empty where there is none."""
    place = layer if norm is None else norm
    return f"{place}.bias" if getattr(model.get_submodule(place), "bias", None) is not None else ""


def why_not_scaled(model: nn.Module, layer: str, norm: str | None, scale: float, around: str) -> str:
    """Why a `RowEdit` would not do what it says for this layer; empty where it does.

    Modules that do not run torch's own code are tried out: the first row is edited in a copy of them.
    """
    part = model.get_submodule(layer)
    if norm is None:
        return why_not_plain(part)
    behind = model.get_submodule(norm)
    if (is_own(part) and is_own(behind)) or (around == "mean" and not bias_of(model, layer, norm)):
        return ""  # of a bias that there is not, the recipe says so
    pair = nn.Sequential(part, behind)
    # An activation inside the norm may leave a mean above 0 as it is.
    means = {"0": -torch.ones(1)} if around == "mean" else None
    trial = RowEdit(pair, {"0": "1"}, {"0": [0]}, scale, means)
    try:
        edited = trial.recipe({}).apply(copied(pair), inplace=True).model
    except ValueError as error:
        return str(error).removeprefix("unlearn: ").removesuffix(".")
    return trial.wrong(edited, ()).get("0", "").replace("the norm '1'", f"the norm {norm!r}")
