"""Operations that zero components, attenuate them, or replace them by a mean: rows of a layer and of its norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from discedit.model.forward import call, frozen_eval, hooked
from discedit.model.layers import gives_zero, input_of, is_affine, is_own, why_not_plain
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import Recipe, architecture_of, copied

AROUND = ("zero", "mean")
# In units in the last place of the largest number: what a norm adds up may cancel. Of 16 bits there are not so many.
ROUNDING, ROUNDING_OF_HALVES = 100, 16


def scaled_rows(
    model: nn.Module,
    norms: Mapping[str, str],
    rows: Mapping[str, list[int]],
    scale: float,
    means: Mapping[str, Tensor] | None,
) -> tuple[list[Operation], dict[str, Tensor]]:
    """What makes y, the output of some rows behind the layer's norm, m + scale * (y - m); and the values it writes.

    Args:
        norms: layer -> the norm that its output goes straight into.
        means: layer -> m, one for each row of the layer; 0 where None.

    Raises:
        ValueError: a layer whose output cannot be edited so.
    """
    operations: list[Operation] = []
    tensors: dict[str, Tensor] = {}
    for layer, channels in rows.items():
        index = tuple(channels)
        for name, dim in _rows_of(model, layer, norms.get(layer), scale):
            kind = "scale" if scale else "fill"
            operations.append(Operation(kind, name, dim=dim, index=index, value=scale))
        if means is not None:
            name = bias_of(model, layer, norms.get(layer))
            if not name:
                behind = f" with its norm {norms[layer]!r}" if layer in norms else ""
                raise ValueError(
                    f"unlearn: around='mean' needs a bias that can carry the mean, that of layer {layer!r}{behind} is "
                    "None."
                )
            tensors[f"set.{len(operations)}"] = ((1 - scale) * means[layer][channels]).to(
                model.get_parameter(name).dtype
            )
            operations.append(Operation("add", name, index=index))
    return operations, tensors


def _rows_of(model: nn.Module, layer: str, norm: str | None, scale: float) -> list[tuple[str, int]]:
    """The tensors whose rows are multiplied, each with the axis of the rows."""
    module = model.get_submodule(layer)
    rows = 0
    if isinstance(module, _ConvNd) and module.transposed:
        rows = 1
        if module.groups > 1:
            raise ValueError(f"unlearn: layer {layer!r} is a transposed convolution in groups, which is not supported.")
    own = [(f"{layer}.weight", rows), (f"{layer}.bias", 0)]
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


def why_not_scaled(model: nn.Module, layer: str, norm: str | None, scale: float, around: str) -> str:
    """Why `scaled_rows` would not do what it says for this layer; empty where it does."""
    if norm is None:
        return why_not_plain(model.get_submodule(layer))
    module = model.get_submodule(norm)
    if not isinstance(module, _BatchNorm) or module.running_mean is None or is_affine(module):
        own = is_own(module) and is_own(model.get_submodule(layer))
        return "" if own else _why_not_on_trial(model.get_submodule(layer), norm, module, scale, around)
    if scale == 0 and around == "zero" and gives_zero(module):
        return ""
    what = "the mean" if around == "mean" else "zero" if scale == 0 else f"{scale:g} times the output"
    return (
        f"the norm {norm!r} behind it is no affine map (it has an activation inside, say): its weights cannot "
        f"make it give {what}; use EraseDirections instead, or take scale=0, around='zero'"
    )


def bias_of(model: nn.Module, layer: str, norm: str | None) -> str:
    """The tensor that can carry a constant added to the layer's output behind its norm; empty where there is none."""
    place = layer if norm is None else norm
    return f"{place}.bias" if getattr(model.get_submodule(place), "bias", None) is not None else ""


def _why_not_on_trial(layer: nn.Module, name: str, norm: nn.Module, scale: float, around: str) -> str:
    """Ablates the first row of a copy, and looks at what it then gives."""
    if around == "mean" and getattr(norm, "bias", None) is None:
        return ""  # `scaled_rows` says so
    pair, norms, rows = nn.Sequential(layer, norm), {"0": "1"}, {"0": [0]}
    trial = copied(pair)
    means = {"0": torch.ones(1)} if around == "mean" else None
    try:
        operations, tensors = scaled_rows(pair, norms, rows, scale, means)
        recipe = Recipe("unlearn", {}, rows, architecture_of(pair), operations, tensors)
        why = wrong_rows(pair, recipe.apply(trial, inplace=True).model, norms, rows, scale, means, ()).get("0", "")
    except ValueError as error:
        return str(error).removeprefix("unlearn: ").removesuffix(".")
    return why.replace("the norm '1'", f"the norm {name!r}")


def wrong_rows(
    model: nn.Module,
    edited: nn.Module,
    norms: Mapping[str, str],
    rows: Mapping[str, list[int]],
    scale: float,
    means: Mapping[str, Tensor] | None,
    batches: Iterable[Any],
) -> dict[str, str]:
    """Layers whose edited rows do not give m + scale * (y - m), each with the reason.

    Found out by running `edited`; layers that do not run there as modules run by themselves, on random input. y is what
    `model` makes of what the edited layer reads.

    Args:
        batches: inputs of the model.
        The others as for `scaled_rows`.
    """
    check = _RowCheck(model, norms, rows, scale, means)
    places = {layer: norms.get(layer, layer) for layer in rows}
    handles = [edited.get_submodule(layer).register_forward_pre_hook(partial(check.enter, layer)) for layer in rows]
    handles += [
        edited.get_submodule(place).register_forward_hook(partial(check.leave, layer))
        for layer, place in places.items()
    ]
    with frozen_eval(model), frozen_eval(edited):
        with hooked(handles):
            for batch in batches:
                call(edited, batch)
        for layer in rows:
            if layer not in check.seen:
                check.alone(layer, edited.get_submodule(layer), edited.get_submodule(places[layer]))
    return check.reasons


class _RowCheck:
    """Compares what edited rows give with what they are to give; arguments as for `scaled_rows`."""

    def __init__(
        self,
        model: nn.Module,
        norms: Mapping[str, str],
        rows: Mapping[str, list[int]],
        scale: float,
        means: Mapping[str, Tensor] | None,
    ) -> None:
        self.model, self.norms, self.rows, self.scale, self.means = model, norms, rows, scale, means
        self.reasons: dict[str, str] = {}
        self.seen: set[str] = set()
        self._due: dict[str, Tensor] = {}

    def enter(self, layer: str, _: nn.Module, args: Any) -> None:
        if not bool(args[0].isfinite().all()):
            raise ValueError(f"unlearn: data must give finite feature maps, what {layer!r} reads holds NaN or Inf.")
        y = self._before(layer, args[0])
        self._due[layer] = args[0] if y is None else y

    def leave(self, layer: str, _: nn.Module, __: Any, output: Any) -> None:
        if layer in self._due and isinstance(output, Tensor):
            y = self._due.pop(layer)
            self._compare(layer, output, y if self.scale else None)
            self.seen.add(layer)

    def alone(self, layer: str, part: nn.Module, norm: nn.Module) -> None:
        """A layer that did not run as a module, on random input."""
        try:
            x = input_of(part)
            y = self._before(layer, x)
            output = part(x) if layer not in self.norms else norm(part(x))
        except Exception as error:  # whatever a forward of somebody's own may need
            if not (is_own(part) and is_own(norm)):
                self.reasons[layer] = (
                    f"it cannot be run by itself to see what it gives ({type(error).__name__}: {error})"
                )
            return
        self._compare(layer, output, y)

    def _before(self, layer: str, x: Tensor) -> Tensor | None:
        """Behind the norm, in the model before the edit; not needed where nothing is left of it."""
        if not self.scale:
            return None
        y: Tensor = self.model.get_submodule(layer)(x)
        return y if layer not in self.norms else self.model.get_submodule(self.norms[layer])(y)

    def _compare(self, layer: str, output: Tensor, y: Tensor | None) -> None:
        index = torch.tensor(self.rows[layer], device=output.device)
        axis = output.ndim - 1 if isinstance(self.model.get_submodule(layer), nn.Linear) else 1
        found = output.index_select(axis, index).movedim(axis, -1).double()
        mean = torch.zeros(len(index), dtype=torch.float64, device=output.device)
        if self.means is not None:
            mean = self.means[layer].to(mean)[index]
        due, size = mean.expand_as(found), float(mean.abs().max())
        if y is not None:
            before = y.index_select(axis, index).movedim(axis, -1).double()
            due, size = mean + self.scale * (before - mean), max(size, float(before.abs().max()))
        units = ROUNDING if output.element_size() >= 4 else ROUNDING_OF_HALVES
        missed = float((found - due).abs().max()) if found.numel() else 0.0
        if not missed <= units * torch.finfo(output.dtype).eps * max(1.0, abs(self.scale)) * size:
            where = f"behind the norm {self.norms[layer]!r} " if layer in self.norms else ""
            what = f"{self.scale:g} times their output" if self.scale else "zero" if self.means is None else "the mean"
            around = " around the mean" if self.scale and self.means is not None else ""
            self.reasons[layer] = (
                f"its components do not give {what}{around} {where}when their weights are made to, they miss it by "
                f"{missed:.3g}; use EraseDirections instead, or leave the layer out"
            )
