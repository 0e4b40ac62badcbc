"""Which layer reads the components of another channel by channel, after activations, norms, dropout and pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from discedit._batches import call

# Functions that leave each channel in its place, by the name that torch gives them, whoever calls them.
ACTIVATIONS = {
    *(
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
    ),
    *("hardtanh", "sigmoid", "tanh", "softplus", "softsign", "threshold", "clamp", "clamp_"),
}
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm"}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
POOLINGS = {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
SHAPES = {"contiguous", "clone", "float", "to", "flatten"}  # the last only where the maps are 1 x 1
ARITHMETIC = {"add", "mul", "sub", "div", "pow", "__mul__", "__rmul__", "__add__", "__radd__", "__pow__"}
ONE_BY_ONE = ACTIVATIONS | NORMS | DROPOUTS | POOLINGS | SHAPES | ARITHMETIC


@dataclass(frozen=True)
class _Known:
    """A tensor whose channels are the components of a layer. Holding it keeps its identity its own."""

    layer: str
    tensor: Tensor
    version: int
    last: bool  # channels on the last axis, otherwise on axis 1


class _Follow(TorchFunctionMode):
    """Follows the outputs of layers through all that leaves channels in place."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, _Known] = {}

    def note(self, layer: str, tensor: Tensor, *, last: bool) -> None:
        self.known[id(tensor)] = _Known(layer, tensor, tensor._version, last)

    def of(self, tensor: Any) -> _Known | None:
        found = self.known.get(id(tensor))
        return found if found is not None and found.version == found.tensor._version else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Before the call, which may change its arguments.
        maps = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1]
        sources = {known.layer if (known := self.of(arg)) else None for arg in maps}
        first = self.of(maps[0]) if maps else None
        shape = maps[0].shape if maps else torch.Size()
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ONE_BY_ONE and first is not None and len(sources) == 1:
            kept = isinstance(result, Tensor) and (
                result.shape == shape if first.last else result.shape[:2] == shape[:2]
            )
            if kept:
                self.note(first.layer, result, last=first.last)
        return result


def channel_consumers(model: nn.Module, layers: Iterable[str], inputs: Any) -> dict[str, str]:
    """Layer -> the first convolution or linear layer whose input channels are the components of the layer, one by one.

    Layers whose components meet others first (residual sums, attention, concatenation) are left out. Runs the model
    once on `inputs`, of which every feature map is kept meanwhile: a few samples are enough.
    """
    follow = _Follow()
    found: dict[str, str] = {}
    handles = []

    def leave(name: str, module: nn.Module) -> Any:
        last = isinstance(module, (nn.Linear, nn.LayerNorm))

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 1:
                follow.note(name, output, last=last)

        return hook

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            source = follow.of(args[0]) if args else None
            if source is not None:
                found.setdefault(source.layer, name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            handles.append(module.register_forward_pre_hook(enter(name)))
    for name in layers:
        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(leave(name, module)))
    try:
        with follow:
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
