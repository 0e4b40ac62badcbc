"""A network as its trace and torch-pruning's graph show it, and the names for places in it that have channels."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from discedit.graph.dependencies import DependencyTrace
from discedit.model.forward import to_device
from discedit.model.trace import IN_TRAINING, ModelTrace
from discedit.recipes.operations import Slots

# A module and its side ("out", "in"; "through" where it works channel by channel), or a tensor and one of its axes.
Key = tuple[str, str | int]
Members = dict[Key, list[int]]  # where something has channels, and which
OUTPUT, OPAQUE = "output", "opaque"  # sides of what is no module: an output of the model, what cannot be followed


class Network:
    """What is known of a model before anything is removed from it.

    Args:
        op: what asks, for errors.
        model: unchanged.
        example_inputs: what the model can run on.
        keep_outputs: whether outputs beside the logits (the first tensor) keep their shapes.

    Attributes:
        model: a copy of the model in eval mode, whose parameters want gradients.
        slots: the model's own tensors.
        shared: modules that have a parameter in common with another.
        trace, dependencies: the model's trace, and what torch-pruning makes of it.
    """

    def __init__(self, op: str, model: nn.Module, example_inputs: Any, *, keep_outputs: bool) -> None:
        self.op, self.original, self.keep_outputs = op, model, keep_outputs
        # A copy: torch-pruning follows autograd's graph, so parameters must want gradients, and the search for
        # heads writes NaN into them.
        self.model = copy.deepcopy(model).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        self.names = {id(part): name for name, part in (*self.model.named_modules(), *self.model.named_parameters())}
        self.tensors = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        self.slots = Slots(model)
        names = Counter(self.slots.first.values())
        several = {first for first, n in names.items() if n > 1 and isinstance(self.slots.get(first), nn.Parameter)}
        self.shared = {name.rpartition(".")[0] for name, first in self.slots.first.items() if first in several}
        try:
            self.trace = ModelTrace.of(self.model, example_inputs, few=None, training=True)
            self.inputs = to_device(example_inputs, self.trace.device)
            self.dependencies = DependencyTrace(self.trace, self.inputs)
        except Exception as error:
            raise ValueError(f"{self.op}: the model cannot be traced on example_inputs: {error}") from error
        self.graph, self.order = self.dependencies.graph, self.trace.order

    def turn(self, name: str) -> float:
        """When a module runs, among the others."""
        return self.order.get(name, math.inf)

    def module(self, key: Key) -> nn.Module | None:
        return None if isinstance(key[1], int) or key[1] in (OUTPUT, OPAQUE) else self.model.get_submodule(key[0])

    def own(self, layer: str) -> Key:
        """The side on which a layer has its components."""
        return layer, "through" if is_depthwise(self.model.get_submodule(layer)) else "out"

    def size(self, key: Key) -> int:
        """How many channels there are; 0 where the module takes any number."""
        if isinstance(key[1], int):
            return self.tensors[key[0]].shape[key[1]]
        module = self.module(key)
        if module is None:
            return 0
        pruner = self.graph.get_pruner_of_module(module)
        return (pruner.get_in_channels(module) if key[1] == "in" else pruner.get_out_channels(module)) or 0

    @property
    def main(self) -> str:
        """Where the logits stand in what the model gives, or the only output; empty when there is neither."""
        outputs = self.trace.outputs
        return self.trace.logits or (next(iter(outputs)) if len(outputs) == 1 else "")

    def stays(self, place: str) -> bool:
        """Whether an output must keep its shape."""
        return self.keep_outputs or place.removesuffix(IN_TRAINING) == self.main

    def reshaped(self, place: str) -> str:
        """What to say where an output would change its shape."""
        if place == self.main:
            return "the model's output would change its shape"
        may = ", which the kind 'outputs' in components allows" if self.op == "prune" and self.keep_outputs else ""
        return f"the model's {place} would change its shape{may}"


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def groups_of(module: nn.Module) -> int:
    """How many groups of channels a convolution or norm works on, each by itself; 0 where all go together, or none."""
    if isinstance(module, nn.GroupNorm):
        groups: int = module.num_groups
    elif isinstance(module, _ConvNd):
        groups = 0 if is_depthwise(module) else module.groups
    else:
        return 0
    return groups if groups > 1 else 0


def channel_axis(module: nn.Module) -> int:
    # From the end, where it is the same for a map without an axis of samples.
    return 1 - int(module.weight.ndim) if isinstance(module, _ConvNd) else -1


def kept_indices(size: int, gone: Iterable[int]) -> list[int]:
    return sorted(set(range(size)) - set(gone))


def is_inside(name: str, place: str) -> bool:
    return not place or name.startswith(f"{place}.")


def innermost_module(names: list[str]) -> str:
    """The innermost module in which all of these are."""
    paths = [name.split(".")[:-1] for name in names]
    return ".".join(first[0] for first in itertools.takewhile(lambda s: len(set(s)) == 1, zip(*paths, strict=False)))
