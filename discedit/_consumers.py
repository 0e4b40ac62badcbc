"""Follows the components of layers, channel by channel, through activations, norms, dropout and pooling."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from discedit._batches import version_of
from discedit._sharded import identity

# Functions that leave each channel in its place, by the name that torch gives them, whoever calls them.
PIECEWISE = {"relu", "relu_", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh", "threshold", "clamp"}
SMOOTH = {"elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "softsign"}
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm"}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
POOLINGS = {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
SHAPES = {"contiguous", "clone", "float", "to", "view_as", "flatten"}  # the last only where the maps are 1 x 1
ARITHMETIC = {"add", "mul", "sub", "div", "pow", "__mul__", "__rmul__", "__add__", "__radd__", "__pow__"}
ONE_BY_ONE = PIECEWISE | SMOOTH | NORMS | DROPOUTS | POOLINGS | SHAPES | ARITHMETIC


@dataclass(frozen=True)
class _Known:
    """A tensor whose channels are the components of layers. Held weakly: a pass must not keep every map alive."""

    layers: tuple[str, ...]
    tensor: weakref.ref[Tensor]
    version: int
    last: bool  # channels on the last axis, otherwise on axis 1


class Follow(TorchFunctionMode):
    """While it is entered, knows of each tensor whether its channels are the components of a noted layer, one by one.

    Not where components meet others: in sums of a residual stream, attention, concatenation. Nor behind a batch norm
    that normalises by the batch, where they depend on what else is in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, _Known] = {}

    def note(self, layer: str, tensor: Tensor, *, last: bool) -> None:
        """The tensor holds the components of the layer, on the last axis or on axis 1."""
        before = self._of(tensor)
        others = before.layers if before is not None and before.last == last else ()
        self._keep((*others, layer), tensor, last)

    def layers_of(self, tensor: Tensor, *, last: bool) -> tuple[str, ...]:
        """The layers whose components the tensor holds on the last axis, or on axis 1."""
        known = self._of(tensor)
        return known.layers if known is not None and (known.last == last or tensor.ndim == 2) else ()

    def _keep(self, layers: tuple[str, ...], tensor: Tensor, last: bool) -> None:
        local = identity(tensor)
        version = version_of(local)
        if version is not None:
            self._known[id(local)] = _Known(layers, weakref.ref(local), version, last)

    def _of(self, tensor: Any) -> _Known | None:
        tensor = identity(tensor)
        found = self._known.get(id(tensor))
        alive = None if found is None else found.tensor()
        if found is None or alive is None or alive is not tensor or found.version != version_of(alive):
            return None
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Before the call, which may change its arguments.
        maps = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1]
        sources = {known.layers if (known := self._of(arg)) else () for arg in maps}
        first = self._of(maps[0]) if maps else None
        shape = maps[0].shape if maps else torch.Size()
        result = func(*args, **(kwargs or {}))
        if first is not None and len(sources) == 1 and _is_one_by_one(func, args) and isinstance(result, Tensor):
            kept = result.shape == shape if first.last else result.shape[:2] == shape[:2]
            if kept:
                self._keep(first.layers, result, first.last)
        return result


def _is_one_by_one(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function works on each channel by itself, and on each sample."""
    name = getattr(func, "__name__", "")
    by_the_batch = name == "batch_norm" and (len(args) < 2 or args[1] is None)  # without running statistics
    return name in ONE_BY_ONE and not by_the_batch
