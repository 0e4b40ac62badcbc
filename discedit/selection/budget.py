"""Budgets of structured pruning: how much goes, and which components that makes. Knows numbers and names, no models."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from discedit.common import validation

NORMALISATIONS = ("none", "mean", "max", "rank")
ROUNDING = 1 + 1e-12  # keeps 0.1 * 30 from becoming 4 for one ulp


@dataclass(frozen=True)
class Budget(ABC):
    """How much goes; each subclass says it in its own unit.

    Attributes:
        value: the number, as the subclass says.
        floor: components that stay in each layer at least, or layer -> components; 1 where a layer is not named.
        round_to: the number of components that stay in a layer is a multiple of this, or the layer stays whole.

    Raises:
        ValueError: a value out of its range.
    """

    value: Any
    _: KW_ONLY
    floor: int | Mapping[str, int] = 1
    round_to: int = 1

    name: ClassVar[str]  # as an argument of `prune`

    def __post_init__(self) -> None:
        validation.positive_integer("prune", "round_to", self.round_to)
        floors = self.floor.items() if isinstance(self.floor, Mapping) else [("", self.floor)]
        for layer, least in floors:
            validation.positive_integer("prune", f"floor[{layer!r}]" if layer else "floor", least)

    @abstractmethod
    def choice(self, order: _Order, cost: Cost | None, few: Collection[str]) -> Choice:
        """What goes; arguments as for `choose`."""

    def step(self, progress: Progress) -> Budget:
        """The budget of one of several steps, of what those before it have left."""
        return self

    def within(self, layers: Collection[str]) -> Budget:
        """The same without what it says of other layers."""
        value, floor = (
            {layer: number for layer, number in part.items() if layer in layers} if isinstance(part, Mapping) else part
            for part in (self.value, self.floor)
        )
        return replace(self, value=value, floor=floor)

    def named(self) -> Iterator[tuple[str, str]]:
        """(argument, layer) for each layer that it names."""
        yield from ((self.name, layer) for layer, _ in _items(self.value))
        yield from (("floor", layer) for layer, _ in _items(self.floor))

    def asks(self) -> bool:
        """Whether anything is to go."""
        return any(self.value.values()) if isinstance(self.value, Mapping) else bool(self.value)


@dataclass(frozen=True)
class Progress:
    """How far pruning in several steps has come.

    Attributes:
        share: of the whole way, at the end of the step, in (0, 1].
        size: parameters or multiply-accumulates of the whole model.
        had, lost: layer -> components at the beginning and those lost since; empty before the first step.
        few: layers whose components are few and large, such as heads.
    """

    share: float = 1.0
    size: float = 0.0
    had: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    few: Collection[str] = ()


@dataclass(frozen=True)
class Ratio(Budget):
    """At least this share of each layer's components goes, in [0, 1), but one stays; of heads the nearest number.

    `value` may also be layer -> share: layers that are not named stay whole.
    """

    name = "ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer, share in _items(self.value):
            _ratio(f"ratio[{layer!r}]", share)
        if not isinstance(self.value, Mapping):
            _ratio("ratio", self.value)

    def of(self, layer: str) -> float:
        return float(self.value.get(layer, 0.0) if isinstance(self.value, Mapping) else self.value)

    def choice(self, order: _Order, cost: Cost | None, few: Collection[str]) -> Choice:
        counts = {layer: share_of(self.of(layer), width, few=layer in few) for layer, width in order.widths.items()}
        return _removal(order, self.name, sum(counts.values()), counts, order.held(counts))

    def step(self, progress: Progress) -> Budget:
        if not progress.had:
            scaled = {layer: ratio * progress.share for layer, ratio in _items(self.value)}
            return replace(self, value=scaled if isinstance(self.value, Mapping) else self.value * progress.share)
        shares = {}
        for layer, whole in progress.had.items():
            asked = share_of(self.of(layer) * progress.share, whole, few=layer in progress.few)
            shares[layer] = max(0, asked - progress.lost[layer]) / (whole - progress.lost[layer])
        return replace(self, value=shares)


@dataclass(frozen=True)
class Threshold(Budget):
    """Components that are less important than this go."""

    name = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not validation.is_number(self.value) or math.isnan(self.value):
            raise ValueError(f"prune: threshold must be a number, got {self.value!r}.")

    def choice(self, order: _Order, cost: Cost | None, few: Collection[str]) -> Choice:
        counts = {layer: int((values < float(self.value)).sum()) for layer, values in order.values.items()}
        return _removal(order, self.name, sum(counts.values()), counts, order.held(counts))


@dataclass(frozen=True)
class AcrossLayers(Budget):
    """A budget for all layers together.

    Attributes:
        across: how importances of different layers compare: "rank" (each layer loses the same share), "mean" or "max"
            (divided by the layer's), "none" (as they are). "auto": "none" for the criteria "reconstruction" and
            "combined", which are shares of what a layer's consumers get, unless a layer cannot be judged so; else
            "rank".
    """

    _: KW_ONLY
    across: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.choice("prune", "across", self.across, ("auto", *NORMALISATIONS))


@dataclass(frozen=True)
class GlobalRatio(AcrossLayers):
    """This share of all components together goes, in [0, 1), the least important first."""

    name = "global_ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ratio("global_ratio", self.value)

    def choice(self, order: _Order, cost: Cost | None, few: Collection[str]) -> Choice:
        asked = share_of(self.value, sum(order.widths.values()))
        held = order.widths if asked > len(order) else ()
        return _removal(order, self.name, asked, order.prefix(asked), held)

    def step(self, progress: Progress) -> Budget:
        if not progress.had:
            return replace(self, value=self.value * progress.share)
        had, lost = sum(progress.had.values()), sum(progress.lost.values())
        left = max(0, share_of(self.value * progress.share, had) - lost)
        return replace(self, value=left / (had - lost))


@dataclass(frozen=True)
class SizeBudget(AcrossLayers):
    """A budget of what is left."""

    unit: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = validation.index(self.value)
        share = validation.is_number(self.value) and 0 < self.value < 1
        if not share and (whole is None or whole < 0):
            raise ValueError(
                f"prune: {self.name} must be an integer number of {self.unit} or a share in (0, 1), got {self.value!r}."
            )

    def step(self, progress: Progress) -> Budget:
        whole = progress.size
        asked = math.floor(self.value * whole) if isinstance(self.value, float) else self.value
        return replace(self, value=round(whole - (whole - asked) * progress.share) if asked < whole else asked)

    def choice(self, order: _Order, cost: Cost | None, few: Collection[str]) -> Choice:
        if cost is None:
            raise ValueError(f"prune: cost must be given for a target of {self.name}, got None.")
        measure: Callable[[Mapping[str, int]], float] = getattr(cost, self.name)

        def left(length: int) -> float:
            return measure(order.allowed(order.prefix(length)))

        present = left(0)
        asked = self._asked(present)
        room = self._room(asked, present)
        # What is left never grows with the prefix. Where none is enough, this is the whole order.
        length = bisect.bisect_left(range(len(order)), True, key=lambda length: left(length) <= room)
        reached = left(length)
        met = reached <= room
        if present <= room:
            message = f"{self.name}: {round(asked):,} asked, {round(present):,} present: nothing has to go"
        else:
            message = f"{self.name}: {round(asked):,} asked, {round(reached):,} reached"
            if not met:
                message += f": {order.at_floor(order.widths)}"
        return Choice(order.removed(order.prefix(length)), met, asked, reached, f"{message}.")

    def _asked(self, present: float) -> float:
        number = validation.index(self.value)
        return float(self.value) * present if number is None else number

    def _room(self, asked: float, present: float) -> float:
        return asked


@dataclass(frozen=True)
class MaxParameters(SizeBudget):
    """So many parameters may be left: an integer, or a share in (0, 1) of those of the whole model."""

    name, unit = "parameters", "parameters"

    def _asked(self, present: float) -> float:
        asked = super()._asked(present)
        return asked if validation.index(self.value) is not None else math.floor(asked * ROUNDING)


@dataclass(frozen=True)
class MaxMacs(SizeBudget):
    """So many multiply-accumulates of a forward pass on `example_inputs` may be left: an integer, or a share in
    (0, 1)."""

    name, unit = "macs", "multiply-accumulates"

    def _room(self, asked: float, present: float) -> float:
        return min(asked, present) * ROUNDING


BUDGETS: dict[str, type[Budget]] = {kind.name: kind for kind in (Ratio, GlobalRatio, Threshold, MaxParameters, MaxMacs)}


def budget_of(op: str, budget: Budget | None, given: Mapping[str, Any]) -> Budget:
    """The budget itself, or the one that an argument of its name stands for.

    Raises:
        TypeError: an argument that is no budget's name.
        ValueError: none or several.
    """
    for name in given:
        if name not in BUDGETS:
            raise TypeError(f"{op}() got an unexpected keyword argument {name!r}; budgets are {', '.join(BUDGETS)}.")
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"{op}: budget must be one of {_classes()}, got {type(budget).__name__}.")
    asked = {name: value for name, value in {"budget": budget, **given}.items() if value is not None}
    if len(asked) != 1:
        found = ", ".join(f"{name}={value!r}" for name, value in asked.items()) or "none of them"
        raise ValueError(f"{op}: exactly one of {', '.join(BUDGETS)} or budget must be given, got {found}.")
    [(name, value)] = asked.items()
    return budget if budget is not None else BUDGETS[name](value)


def _classes() -> str:
    return ", ".join(kind.__name__ for kind in BUDGETS.values())


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, Mapping) else ()


@dataclass(frozen=True)
class Choice:
    """The components to remove.

    Attributes:
        removed: layer -> indices in ascending order; every layer is named, with an empty list where it stays whole.
        met: False where all that the limits let go was not enough. What `Budget.round_to` rounds away is no failure.
        asked, reached: of `MaxParameters` and `MaxMacs`, how many may be left and how many are; of the others,
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
    """

    def __init__(
        self,
        footprints: Mapping[str, Sequence[tuple[str, int, int]]],
        shapes: Mapping[str, tuple[int, ...]],
        macs: Mapping[str, float],
        fixed_macs: float,
    ) -> None:
        self._footprints = {layer: tuple(triples) for layer, triples in footprints.items()}
        self._shapes = dict(shapes)
        self._sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._whole = sum(self._sizes.values())
        self._fixed_macs = float(fixed_macs)
        # Per element, which for a convolution is the whole number of its positions: the products are exact then.
        self._macs_per_element = {name: number / max(self._sizes[name], 1) for name, number in macs.items()}

    def parameters(self, removed: Mapping[str, int]) -> int:
        """Elements left in all tensors when so many components are removed from each layer; {} for the whole model."""
        return self._whole + sum(size - self._sizes[name] for name, size in self._sizes_left(removed).items())

    def macs(self, removed: Mapping[str, int]) -> float:
        """Multiply-accumulates of a forward pass of what is left."""
        sizes = {**self._sizes, **self._sizes_left(removed)}
        return self._fixed_macs + sum(each * sizes[name] for name, each in self._macs_per_element.items())

    def _sizes_left(self, removed: Mapping[str, int]) -> dict[str, int]:
        """Elements left in every tensor that loses some."""
        shapes: dict[str, list[int]] = {}
        for layer, count in removed.items():
            for name, dim, entries in self._footprints[layer] if count else ():
                shapes.setdefault(name, list(self._shapes[name]))[dim] -= count * entries
        return {name: math.prod(shape) for name, shape in shapes.items()}


def choose(
    importances: Mapping[str, Tensor], budget: Budget, *, cost: Cost | None = None, few: Collection[str] = ()
) -> Choice:
    """The least important components, as many as a budget asks for and its limits let go.

    Components of one importance go in the order of layers, then of indices. Budgets across layers compare importances
    of different layers as they are: see `normalised`.

    Args:
        importances: layer -> (components,), floating point, compared in float64; higher = keep. May be infinite.
        budget: a layer never gets below its floor, and the number that stays is rounded up to a multiple: no budget
            removes more than it asked for. What a limit keeps, `GlobalRatio` makes up for by the next ones in order;
            `MaxParameters` and `MaxMacs` go on in the order until what is rounded meets them.
        cost: what is left of the model, for these two.
        few: layers whose components are few and large, such as heads: of these, `Ratio` removes the nearest number.

    Returns:
        `Choice`. A target that cannot be met gives the smallest model that the limits allow, with `met=False`.

    Raises:
        ValueError: importances that are NaN or no vector, or a target without a cost.
        TypeError: importances that are no tensors.

    Source: one order over all layers, Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient
    Inference, ICLR 2017; numbers rounded to a multiple, torch-pruning (Fang et al., DepGraph, CVPR 2023).
    """
    return budget.choice(_Order(_vectors(importances), budget), cost, few)


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

    def __init__(self, importances: Mapping[str, Tensor], budget: Budget) -> None:
        self.values = {layer: values.cpu() for layer, values in importances.items()}
        self.widths = {layer: len(values) for layer, values in self.values.items()}
        self.multiple = budget.round_to
        floors = budget.floor if isinstance(budget.floor, Mapping) else dict.fromkeys(self.widths, budget.floor)
        self.floor = {layer: floors.get(layer, 1) for layer in self.widths}
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

    def held(self, counts: Mapping[str, int]) -> list[str]:
        """Layers of which the limits keep more than asked."""
        return [layer for layer, count in counts.items() if count > self.most[layer]]

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


def _removal(order: _Order, budget: str, asked: int, counts: Mapping[str, int], held: Collection[str]) -> Choice:
    """The choice for a budget that says what goes; `held` are the layers of which the limits keep more than it does."""
    removed = order.removed(counts)
    reached = sum(map(len, removed.values()))
    message = f"{budget}: {asked:,} components asked, {reached:,} removed"
    if held:
        message += f": {order.at_floor(held)}"
    elif reached < asked:
        message += f": what stays is rounded up to multiples of {order.multiple}"
    return Choice(removed, not held, asked, reached, f"{message}.")


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


def _ratio(argument: str, value: Any) -> float:
    if not validation.is_number(value) or not 0 <= value < 1:
        raise ValueError(f"prune: {argument} must be a number in [0, 1), got {value!r}.")
    return float(value)


def share_of(ratio: float, components: int, *, few: bool = False) -> int:
    """The least number of components that makes up a share of them, as torch-pruning counts, or the nearest number of
    a few: 0.3 of four heads are one, not two. One always stays."""
    asked = math.floor(ratio * components * ROUNDING + 0.5) if few else math.ceil(ratio * components / ROUNDING)
    return max(0, min(components - 1, asked))
