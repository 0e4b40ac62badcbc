"""Budgets of structured pruning: which components go so that a target is met. Knows numbers and names, no models."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from discedit.common import validation

BUDGETS = ("ratio", "global_ratio", "threshold", "parameters", "macs")
NORMALISATIONS = ("none", "mean", "max", "rank")
UNITS = {"parameters": "parameters", "macs": "multiply-accumulates"}
ROUNDING = 1 + 1e-12  # keeps 0.1 * 30 from becoming 4 for one ulp


@dataclass(frozen=True)
class Limits:
    """What must stay, whatever the budget.

    Attributes:
        floor: layer -> components that must stay, at least 1; 1 where a layer is not named.
        multiple: the number of components that stay in a layer is a multiple of this, or the layer stays whole.
    """

    floor: Mapping[str, int] = field(default_factory=dict)
    multiple: int = 1


@dataclass(frozen=True)
class Choice:
    """The components to remove.

    Attributes:
        removed: layer -> indices in ascending order; every layer is named, with an empty list where it stays whole.
        met: False where all that the limits let go was not enough. What `Limits.multiple` rounds away is no failure.
        asked, reached: of the budgets `parameters` and `macs`, how many may be left and how many are; of the others,
            how many components were to go and how many do.
        message: the same in words, and why where it was not met.
    """

    removed: dict[str, list[int]]
    met: bool
    asked: float
    reached: float
    message: str


class Cost:
    """Exact size of what is left of a model when components are removed from its layers.

    Args:
        footprints: layer -> (tensor, dim, entries) triples: each component of the layer takes `entries` entries of
            dimension `dim` of that tensor away. Entries of different layers are different ones: they add up.
        shapes: tensor -> its whole shape, for every parameter of the model.
        macs: tensor -> multiply-accumulates of a forward pass that are proportional to the size of that tensor.
        fixed_macs: those that no removal changes.

    Raises:
        ValueError: a footprint or `macs` names a tensor that `shapes` does not have (or has without elements), a
            dimension that the tensor does not have or entries below 1; multiply-accumulates that are negative or not
            finite.
    """

    def __init__(
        self,
        footprints: Mapping[str, Sequence[tuple[str, int, int]]],
        shapes: Mapping[str, tuple[int, ...]],
        macs: Mapping[str, float],
        fixed_macs: float,
    ) -> None:
        for layer, triples in footprints.items():
            for triple in triples:
                name, dim, entries = triple
                if name not in shapes or not 0 <= dim < len(shapes[name]) or entries < 1:
                    raise ValueError(
                        f"prune: footprints must name a tensor, one of its dimensions and at least 1 entry of it, got "
                        f"{triple!r} for layer {layer!r} (shape {shapes.get(name)})."
                    )
        self._footprints = {layer: tuple(triples) for layer, triples in footprints.items()}
        self._shapes = dict(shapes)
        self._sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._whole = sum(self._sizes.values())
        self._fixed_macs = validation.at_least_zero("prune", "fixed_macs", fixed_macs)
        # Per element, which for a convolution is the whole number of its positions: the products are exact then.
        self._macs_per_element = {}
        for name, number in macs.items():
            number = validation.at_least_zero("prune", f"macs[{name!r}]", number)
            size = self._sizes.get(name, 0)
            if name not in shapes or (number > 0 and size == 0):
                raise ValueError(f"prune: macs must name tensors that have elements, got {name!r}.")
            self._macs_per_element[name] = number / max(size, 1)

    def parameters(self, removed: Mapping[str, int]) -> int:
        """Elements left in all tensors when so many components are removed from each layer; {} for the whole model.

        Raises:
            ValueError: a layer without a footprint, or more entries taken from a tensor than it has.
        """
        return self._whole + sum(size - self._sizes[name] for name, size in self._sizes_left(removed).items())

    def macs(self, removed: Mapping[str, int]) -> float:
        """Multiply-accumulates of a forward pass of what is left; arguments and errors as for `parameters`."""
        sizes = {**self._sizes, **self._sizes_left(removed)}
        return self._fixed_macs + sum(each * sizes[name] for name, each in self._macs_per_element.items())

    def _sizes_left(self, removed: Mapping[str, int]) -> dict[str, int]:
        """Elements left in every tensor that loses some."""
        shapes: dict[str, list[int]] = {}
        for layer, count in removed.items():
            if layer not in self._footprints:
                raise ValueError(
                    f"prune: footprints must name every layer that can lose components, {layer!r} is missing."
                )
            if count:
                for name, dim, entries in self._footprints[layer]:
                    shapes.setdefault(name, list(self._shapes[name]))[dim] -= count * entries
        for name, shape in shapes.items():
            if min(shape) < 0:
                raise ValueError(
                    f"prune: footprints must not take more entries than a tensor has, from {name!r} of shape "
                    f"{self._shapes[name]} they leave {tuple(shape)}."
                )
        return {name: math.prod(shape) for name, shape in shapes.items()}


def choose(
    importances: Mapping[str, Tensor],
    *,
    ratio: float | Mapping[str, float] | None = None,
    global_ratio: float | None = None,
    threshold: float | None = None,
    parameters: int | float | None = None,
    macs: int | float | None = None,
    cost: Cost | None = None,
    limits: Limits,
    few: Collection[str] = (),
) -> Choice:
    """The least important components, as many as one budget asks for and the limits let go.

    Exactly one budget is given. Components of one importance go in the order of layers, then of indices.
    `global_ratio`, `threshold`, `parameters` and `macs` compare importances across layers: see `normalised`.

    Args:
        importances: layer -> (components,), floating point, compared in float64; higher = keep. May be infinite.
        ratio: share of each layer's components to remove, in [0, 1), or layer -> share; layers not named stay whole.
            At least this share goes, ceil(ratio x components), but one component stays.
        global_ratio: the same of the components of all layers together; what a limit keeps is made up for by the next
            ones in order.
        threshold: components with an importance below it go.
        parameters: how many may be left: an integer, or a share of the whole model's in (0, 1). Components go in
            ascending order of importance over all layers, and no more of them than are needed.
        macs: the same for multiply-accumulates of a forward pass.
        cost: what is left of the model, for `parameters` and `macs`.
        limits: a layer never gets below its floor, and the number that stays is rounded up to a multiple: no budget
            removes more than it asked for. `parameters` and `macs` go on in the order until what is rounded meets them.
        few: layers whose components are few and large, such as heads: of these, `ratio` removes the nearest number.

    Returns:
        `Choice`. A target that cannot be met gives the smallest model that the limits allow, with `met=False`.

    Raises:
        ValueError: no budget or several, one outside its range, importances that are NaN or no vector, names of unknown
            layers, limits below 1, or a target without a cost.
        TypeError: importances that are no tensors.

    Source: one order over all layers, Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient
    Inference, ICLR 2017; numbers rounded to a multiple, torch-pruning (Fang et al., DepGraph, CVPR 2023).
    """
    given: dict[str, Any] = dict(zip(BUDGETS, (ratio, global_ratio, threshold, parameters, macs), strict=True))
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        found = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
        raise ValueError(f"prune: exactly one of {', '.join(BUDGETS)} must be given, got {found}.")
    [(budget, value)] = given.items()
    order = _Order(_vectors(importances), limits)
    if budget in UNITS:
        return _left(order, budget, value, cost)
    if budget == "global_ratio":
        asked = share_of(_ratio("global_ratio", value), sum(order.widths.values()))
        return _gone(order, budget, asked, order.prefix(asked), order.widths if asked > len(order) else ())
    if budget == "ratio":
        counts = _ratio_of_each(value, order.widths, few)
    else:
        if not validation.is_number(value) or math.isnan(value):
            raise ValueError(f"prune: threshold must be a number, got {value!r}.")
        counts = {layer: int((values < float(value)).sum()) for layer, values in order.values.items()}
    held = [layer for layer, count in counts.items() if count > order.most[layer]]
    return _gone(order, budget, sum(counts.values()), counts, held)


def normalised(importances: Mapping[str, Tensor], how: str) -> dict[str, Tensor]:
    """Importances that can be compared across layers.

    Args:
        importances: layer -> (components,), floating point.
        how: per layer, "none": as they are; "mean" and "max": divided by the layer's mean or maximum, where a layer of
            zeros stays zero; "rank": 1 for the lowest to n for the highest, the first index first among equals, over
            n, so that all layers lose the same share of their components.

    Returns:
        layer -> (components,), float64, on the device of the argument.

    Raises:
        ValueError: an unknown `how`, NaN, or for "mean" and "max", importances that are negative or infinite: division
            could turn their order round or lose it.
        TypeError: importances that are no tensors.

    Source: by mean and maximum, torch-pruning (Fang et al., DepGraph, CVPR 2023).
    """
    validation.choice("prune", "how", how, NORMALISATIONS)
    return {layer: _normalised(layer, values, how) for layer, values in _vectors(importances).items()}


def _normalised(layer: str, values: Tensor, how: str) -> Tensor:
    if how == "none" or not len(values):
        return values
    if how == "rank":
        return (values.argsort(stable=True).argsort() + 1).double() / len(values)
    wrong = (values < 0) | values.isinf()
    if bool(wrong.any()):
        raise ValueError(
            f"prune: importances must be finite and at least 0 to be divided by their {how}, layer {layer!r} has "
            f"{float(values[wrong][0])!r}."
        )
    if not values.max():
        return values
    # The maximum first, also for the mean: a sum of the values themselves could overflow, and a mean underflow.
    values = values / values.max()
    return values if how == "max" else values / values.mean()


class _Order:
    """The components that the limits let go, in ascending order of importance, within and across layers."""

    def __init__(self, importances: Mapping[str, Tensor], limits: Limits) -> None:
        self.values = {layer: values.cpu() for layer, values in importances.items()}
        self.widths = {layer: len(values) for layer, values in self.values.items()}
        self.multiple = validation.positive_integer("prune", "round_to", limits.multiple)
        _known("floor", limits.floor, self.widths)
        self.floor = {
            layer: validation.positive_integer("prune", f"floor[{layer!r}]", limits.floor.get(layer, 1))
            for layer in self.widths
        }
        self.most = self.allowed(self.widths)
        self.indices = {layer: values.argsort(stable=True) for layer, values in self.values.items()}
        lowest = [self.values[layer][self.indices[layer][:most]] for layer, most in self.most.items()]
        layers = torch.arange(len(lowest)).repeat_interleave(torch.tensor([*self.most.values()]))
        self._layers = layers[torch.cat(lowest).argsort(stable=True)]

    def __len__(self) -> int:
        return len(self._layers)

    def prefix(self, length: int) -> dict[str, int]:
        """How many components of each layer are among the first of all."""
        counts = torch.bincount(self._layers[:length], minlength=len(self.widths))
        return dict(zip(self.widths, counts.tolist(), strict=True))

    def allowed(self, counts: Mapping[str, int]) -> dict[str, int]:
        """How many the limits let go of the number asked for in each layer: never more than that number."""
        allowed = {}
        for layer, count in counts.items():
            stay = max(self.widths[layer] - count, self.floor[layer])
            stay += -stay % self.multiple
            allowed[layer] = max(0, self.widths[layer] - stay)
        return allowed

    def removed(self, counts: Mapping[str, int]) -> dict[str, list[int]]:
        """The indices that go when so many are asked for in each layer."""
        return {layer: sorted(self.indices[layer][:count].tolist()) for layer, count in self.allowed(counts).items()}

    def at_floor(self, layers: Iterable[str]) -> str:
        """That these layers cannot lose more, in words."""
        stay = {layer: self.widths[layer] - self.most[layer] for layer in layers}
        largest = sorted(stay, key=lambda layer: -stay[layer])[:3]
        named = [f"{layer} ({stay[layer]} of {self.widths[layer]})" for layer in largest]
        if len(stay) > len(named):
            named.append("...")
        who = "every layer is at its floor"
        if len(stay) < len(self.widths):
            who = f"at the floor: {len(stay)} of {len(self.widths)} layers"
        return f"{who} (largest layers left: {', '.join(named)})"


def _gone(order: _Order, budget: str, asked: int, counts: Mapping[str, int], held: Collection[str]) -> Choice:
    """The choice for a budget that says what goes; `held` are the layers of which the limits keep more than it does."""
    removed = order.removed(counts)
    reached = sum(map(len, removed.values()))
    message = f"{budget}: {asked:,} components asked, {reached:,} removed"
    if held:
        message += f": {order.at_floor(held)}"
    elif reached < asked:
        message += f": what stays is rounded up to multiples of {order.multiple}"
    return Choice(removed, not held, asked, reached, f"{message}.")


def _left(order: _Order, budget: str, value: Any, cost: Cost | None) -> Choice:
    """The choice for a target of what is left: the shortest prefix of the order that meets it."""
    if cost is None:
        raise ValueError(f"prune: cost must be given for a target of {budget}, got None.")
    measure: Callable[[Mapping[str, int]], float] = cost.parameters if budget == "parameters" else cost.macs

    def left(length: int) -> float:
        return measure(order.allowed(order.prefix(length)))

    present = left(0)
    asked = _target(budget, value, present)
    room = asked if budget == "parameters" else min(asked, present) * ROUNDING
    # What is left never grows with the prefix. Where none is enough, this is the whole order.
    length = bisect.bisect_left(range(len(order)), True, key=lambda length: left(length) <= room)
    reached = left(length)
    met = reached <= room
    if present <= room:
        message = f"{budget}: {round(asked):,} asked, {round(present):,} present: nothing has to go"
    else:
        message = f"{budget}: {round(asked):,} asked, {round(reached):,} reached"
        if not met:
            message += f": {order.at_floor(order.widths)}"
    return Choice(order.removed(order.prefix(length)), met, asked, reached, f"{message}.")


def _vectors(importances: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The importances, checked, in float64."""
    if not importances:
        raise ValueError("prune: importances must hold at least one layer, got none.")
    vectors = {}
    for layer, values in importances.items():
        validation.tensor("prune", f"importances[{layer!r}]", values, validation.FLOATS)
        if values.ndim != 1:
            raise ValueError(
                f"prune: importances must hold one number per component, layer {layer!r} has shape "
                f"{validation.shape_of(values)}."
            )
        nan = values.isnan()
        if bool(nan.any()):
            raise ValueError(
                f"prune: importances must not be NaN, layer {layer!r} has {int(nan.sum())} of {len(values)}, the first "
                f"at component {int(nan.nonzero()[0, 0])}."
            )
        vectors[layer] = values.detach().double()
    return vectors


def _known(argument: str, given: Iterable[str], layers: Collection[str]) -> None:
    for layer in given:
        if layer not in layers:
            raise ValueError(
                f"prune: {argument} must name layers that can lose components, {layer!r} is none of {[*layers]}."
            )


def _ratio(argument: str, value: Any) -> float:
    if not validation.is_number(value) or not 0 <= value < 1:
        raise ValueError(f"prune: {argument} must be a number in [0, 1), got {value!r}.")
    return float(value)


def _ratio_of_each(value: Any, widths: Mapping[str, int], few: Collection[str]) -> dict[str, int]:
    """How many components of each layer a ratio, or a mapping of them, asks for."""
    if isinstance(value, Mapping):
        _known("ratio", value, widths)
        ratios = {layer: _ratio(f"ratio[{layer!r}]", share) for layer, share in value.items()}
    else:
        ratios = dict.fromkeys(widths, _ratio("ratio", value))
    return {layer: share_of(ratios.get(layer, 0.0), width, few=layer in few) for layer, width in widths.items()}


def share_of(ratio: float, components: int, *, few: bool = False) -> int:
    """The least number of components that makes up a share of them, as torch-pruning counts, or the nearest number of
    a few: 0.3 of four heads are one, not two. One always stays."""
    asked = math.floor(ratio * components * ROUNDING + 0.5) if few else math.ceil(ratio * components / ROUNDING)
    return max(0, min(components - 1, asked))


def _target(budget: str, value: Any, present: float) -> float:
    """How many may be left."""
    number = validation.index(value)
    if number is not None and number >= 0:
        return number
    if not validation.is_number(value) or not 0 < value < 1:
        raise ValueError(
            f"prune: {budget} must be an integer number of {UNITS[budget]} or a share in (0, 1), got {value!r}."
        )
    return math.floor(value * present * ROUNDING) if budget == "parameters" else float(value) * present
