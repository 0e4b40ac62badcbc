"""Budgets of structured pruning: how much goes, and which components that makes. Knows numbers and names, no models."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from discedit.common import validation
from discedit.recipes.divergences import DivergenceTable
from discedit.recipes.latencies import LatencyTable
from discedit.selection.divergence import Along, MeasureDivergence, least_divergence

ACROSS = ("auto", "divergence", "none", "mean", "max", "rank")
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
    def choice(self, order: _Order, cost: Cost | LatencyTable | None, progress: Progress) -> Choice:
        """What goes; arguments as for `choose`."""

    def named(self) -> Iterator[tuple[str, str]]:
        """(argument, layer) for each layer that it names."""
        for argument, value in ((self.name, self.value), ("floor", self.floor)):
            if isinstance(value, Mapping):
                yield from ((argument, layer) for layer in value)

    def asks(self) -> bool:
        """Whether anything is to go."""
        return any(self.value.values()) if isinstance(self.value, Mapping) else bool(self.value)


@dataclass(frozen=True)
class Progress:
    """How far pruning in several steps has come."""

    share: float = 1.0  # of the whole way, at the end of the step, in (0, 1]
    whole: float | None = None  # size or latency before the first step; None: of what is at hand
    lost: Mapping[str, int] = field(default_factory=dict)  # layer -> components that earlier steps have removed


@dataclass(frozen=True)
class Ratio(Budget):
    """At least this share of each layer's components goes, in [0, 1), but one stays; of heads the nearest number.

    `value` may also be layer -> share: layers that are not named stay whole.
    """

    name = "ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.value, Mapping):
            _check_ratio("ratio", self.value)
            return
        for layer, share in self.value.items():
            _check_ratio(f"ratio[{layer!r}]", share)

    def choice(self, order: _Order, cost: Cost | LatencyTable | None, progress: Progress) -> Choice:
        counts = {}
        for layer, width in order.widths.items():
            share = self.value.get(layer, 0.0) if isinstance(self.value, Mapping) else self.value
            lost = progress.lost.get(layer, 0)
            asked = _share_of(share * progress.share, width + lost, few=layer in order.few)
            counts[layer] = max(0, asked - lost)
        return order.removal(self.name, sum(counts.values()), counts)


@dataclass(frozen=True)
class Threshold(Budget):
    """Components that are less important than this go."""

    name = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not validation.is_number(self.value) or math.isnan(self.value):
            raise ValueError(f"prune: threshold must be a number, got {self.value!r}.")

    def choice(self, order: _Order, cost: Cost | LatencyTable | None, progress: Progress) -> Choice:
        counts = {layer: int((values < float(self.value)).sum()) for layer, values in order.values.items()}
        return order.removal(self.name, sum(counts.values()), counts)


@dataclass(frozen=True)
class AcrossLayers(Budget):
    """A budget for all layers together.

    Attributes:
        across: how components of different layers compare: "divergence", `MeasureDivergence` or a `DivergenceTable`
            that it gave (as much goes from each layer as makes the output diverge least); or by importances, "rank"
            (each layer loses the same share), "mean" or "max" (divided by the layer's), "none" (as they are). "auto":
            "divergence" where data repairs by least squares. Otherwise "none" for the criteria "reconstruction" and
            "combined", which are shares of what a layer's consumers get, unless a layer cannot be judged so; else
            "rank".
    """

    _: KW_ONLY
    across: str | MeasureDivergence | DivergenceTable = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.across, (MeasureDivergence, DivergenceTable)):
            validation.choice("prune", "across", self.across, ACROSS)

    def prefix(
        self, order: _Order, cost: Callable[[Mapping[str, int]], float], room: float, along: Along | None = None
    ) -> dict[str, int]:
        """How many components go from each layer, the fewest that leave no more than there is room for; all that may
        where that is not enough."""
        if isinstance(self.across, DivergenceTable):
            curves = {layer: self.across[layer].curve() for layer in order.widths}
            return least_divergence(curves, order.permitted(), cost, room, along)

        def fits(length: int) -> bool:
            return cost(order.allowed(order.prefix(length))) <= room

        # What is left never grows with the prefix. Where none is enough, this is the whole order.
        return order.allowed(order.prefix(bisect.bisect_left(range(len(order)), True, key=fits)))


@dataclass(frozen=True)
class GlobalRatio(AcrossLayers):
    """This share of all components together goes, in [0, 1), the least important first."""

    name = "global_ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio("global_ratio", self.value)

    def choice(self, order: _Order, cost: Cost | LatencyTable | None, progress: Progress) -> Choice:
        lost = sum(progress.lost.values())
        whole = sum(order.widths.values()) + lost
        asked = max(0, _share_of(self.value * progress.share, whole) - lost)
        held = order.widths if asked > len(order) else ()
        if isinstance(self.across, DivergenceTable):
            there = sum(order.widths.values())
            counts = self.prefix(order, lambda gone: there - sum(gone.values()), there - asked)
        else:
            counts = order.prefix(asked)
        return order.removal(self.name, asked, counts, held)


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

    def choice(self, order: _Order, cost: Cost | LatencyTable | None, progress: Progress) -> Choice:
        measure: Callable[[Mapping[str, int]], float] = getattr(cost, self.name)
        present = measure({})
        whole = present if progress.whole is None else progress.whole
        asked = self.target(whole)
        if asked < whole:
            left = whole - (whole - asked) * progress.share
            asked = left if isinstance(asked, float) else round(left)
        room = min(asked, present) * ROUNDING

        counts = self.prefix(order, measure, room, getattr(cost, "along", None))
        reached = measure(counts)
        met = reached <= room
        message = f"{self.name}: {self.shown(asked)} asked, {self.shown(reached)} reached"
        if present <= room:
            message = f"{self.name}: {self.shown(asked)} asked, {self.shown(present)} present: nothing has to go"
        elif not met:
            message += f": {order.at_floor(order.widths)}"
        return Choice(order.removed(counts), met, asked, reached, f"{message}.")

    def target(self, whole: float) -> float:
        """How much may be left of so much."""
        number = validation.index(self.value)
        return math.floor(self.value * whole * ROUNDING) if number is None else number

    def shown(self, size: float) -> str:
        return f"{round(size):,}"


@dataclass(frozen=True)
class MaxParameters(SizeBudget):
    """So many parameters may be left: an integer, or a share in (0, 1) of those of the whole model."""

    name, unit = "parameters", "parameters"


@dataclass(frozen=True)
class MaxMacs(SizeBudget):
    """So many multiply-accumulates of a forward pass on `example_inputs` may be left: an integer or a share."""

    name, unit = "macs", "multiply-accumulates"


@dataclass(frozen=True)
class MaxLatency(SizeBudget):
    """So long may a forward pass on `example_inputs` take, on the device and with the threads at hand: from 1 on
    milliseconds, or a share in (0, 1) of what the whole model takes.

    What the pass calls is timed at several widths, see `LatencyTable`. Few of these are faster than all larger ones
    (kernels like multiples of 8 or 16, and dislike odd numbers), and a layer keeps one of them.

    Attributes:
        table: of the same model and inputs, in place of measuring: `Edit.latencies` of another call.
        progress: show a progress bar on stderr; by default only on a terminal.
    """

    _: KW_ONLY
    table: LatencyTable | None = None
    progress: bool | None = None

    name, unit = "latency", "milliseconds"

    def __post_init__(self) -> None:
        AcrossLayers.__post_init__(self)
        if not validation.is_number(self.value) or not 0 < self.value < math.inf:
            raise ValueError(
                f"prune: latency must be a number of milliseconds from 1 on or a share in (0, 1), got {self.value!r}."
            )
        if self.table is not None:
            validation.instance("prune", "table", self.table, LatencyTable, "a LatencyTable")

    def target(self, whole: float) -> float:
        return float(self.value) if self.value >= 1 else self.value * whole

    def shown(self, size: float) -> str:
        return f"{size:.3g} ms"


def budget_across(budget: Budget) -> str | MeasureDivergence | DivergenceTable:
    """How a budget compares layers; "" where it does not."""
    return budget.across if isinstance(budget, AcrossLayers) else ""


BUDGETS: dict[str, type[Budget]] = {
    kind.name: kind for kind in (Ratio, GlobalRatio, Threshold, MaxParameters, MaxMacs, MaxLatency)
}


def budget_of(op: str, budget: Budget | None, given: Mapping[str, Any]) -> Budget:
    """The budget itself, or the one that an argument of its name stands for."""
    for name in given:
        if name not in BUDGETS:
            hint = "specialise takes classes" if name == "classes" else f"budgets are {', '.join(BUDGETS)}"
            raise TypeError(f"{op}() got an unexpected keyword argument {name!r}; {hint}.")
    asked: dict[str, Any] = {name: value for name, value in {"budget": budget, **given}.items() if value is not None}
    if len(asked) != 1:
        found = ", ".join(f"{name}={value!r}" for name, value in asked.items()) or "none of them"
        raise ValueError(f"{op}: exactly one of {', '.join(BUDGETS)} or budget must be given, got {found}.")
    [(name, value)] = asked.items()
    chosen = value if name == "budget" else BUDGETS[name](value)
    if not isinstance(chosen, Budget):
        classes = ", ".join(kind.__name__ for kind in BUDGETS.values())
        raise TypeError(f"{op}: budget must be one of {classes}, got {type(chosen).__name__}.")
    return chosen


@dataclass(frozen=True)
class Choice:
    """The components to remove."""

    removed: dict[str, list[int]]  # layer -> indices in ascending order; of a layer that stays whole, none
    met: bool  # False where all that the limits let go was not enough. What `Budget.round_to` rounds away is no failure
    asked: float  # what may be left, of a `SizeBudget`; of the others, how many components were to go
    reached: float  # the same, as it is
    message: str  # the same in words, and why where it was not met


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
        self._footprints, self._shapes, self._fixed_macs = footprints, shapes, float(fixed_macs)
        self._sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        # Per element, which for a convolution is the whole number of its positions: the products are exact then.
        self._macs_per_element = {name: number / max(self._sizes[name], 1) for name, number in macs.items()}

    def parameters(self, removed: Mapping[str, int]) -> int:
        """Elements left in all tensors when so many components are removed from each layer; {} for the whole model."""
        return sum(self._sizes_left(removed).values())

    def macs(self, removed: Mapping[str, int]) -> float:
        """Multiply-accumulates of a forward pass of what is left."""
        sizes = self._sizes_left(removed)
        return self._fixed_macs + sum(each * sizes[name] for name, each in self._macs_per_element.items())

    def _sizes_left(self, removed: Mapping[str, int]) -> dict[str, int]:
        shapes: dict[str, list[int]] = {}
        for layer, count in removed.items():
            for name, dim, entries in self._footprints[layer] if count else ():
                shapes.setdefault(name, list(self._shapes[name]))[dim] -= count * entries
        return self._sizes | {name: math.prod(shape) for name, shape in shapes.items()}


def choose(
    importances: Mapping[str, Tensor],
    budget: Budget,
    *,
    cost: Cost | LatencyTable | None = None,
    few: Collection[str] = (),
    progress: Progress = Progress(),
) -> Choice:
    """The least important components, as many as a budget asks for and its limits let go: first those of lower
    importance, then of earlier layers, then of lower index.

    A layer never gets below its floor, and the number that stays is rounded up to a multiple: no budget removes more
    than it asked for. What a limit keeps, `GlobalRatio` makes up for by the next ones in order; `MaxParameters` and
    `MaxMacs` go on in the order until what is rounded meets them. A target that cannot be met gives the smallest model.

    Args:
        importances: layer -> (components,), floating point, compared in float64; higher = keep. May be infinite.
        cost: what is left of the model, for `MaxParameters` and `MaxMacs`; for `MaxLatency` a table.
        few: layers whose components are few and large, such as heads: of these, `Ratio` removes the nearest number.

    Raises:
        ValueError: importances that are NaN, or that cannot be compared `across` layers as the budget says.

    Source: one order over all layers, Molchanov et al., ICLR 2017; numbers rounded to a multiple, torch-pruning.
    """
    across = budget.across if isinstance(budget, AcrossLayers) and isinstance(budget.across, str) else "none"
    values = {}
    for layer, given in importances.items():
        if bool((nan := given.isnan()).any()):
            raise ValueError(
                f"prune: importances must not be NaN, layer {layer!r} has {int(nan.sum())} of {len(given)}, the first "
                f"at component {int(nan.nonzero()[0, 0])}."
            )
        values[layer] = normalised(layer, given.detach().double(), across).cpu()
    table = cost if isinstance(cost, LatencyTable) else None
    return budget.choice(_Order(values, budget, few, table), cost, progress)


def normalised(layer: str, values: Tensor, how: str) -> Tensor:
    """Importances of a layer, (components,), as they compare across layers, see `AcrossLayers`; zeros stay zero.

    Raises:
        ValueError: for "mean" and "max", importances that are negative or infinite: division could turn their order
            round or lose it.

    Source: by mean and maximum, torch-pruning (Fang et al., DepGraph, CVPR 2023).
    """
    if how in ("none", "auto") or not len(values):
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

    def __init__(
        self, values: Mapping[str, Tensor], budget: Budget, few: Collection[str], latencies: LatencyTable | None = None
    ) -> None:
        self.values, self.few, self.multiple = values, few, budget.round_to
        self.widths = {layer: len(of_layer) for layer, of_layer in values.items()}
        floors = budget.floor if isinstance(budget.floor, Mapping) else dict.fromkeys(self.widths, budget.floor)
        self.floor = {layer: floors.get(layer, 1) for layer in self.widths}
        # Of some layers these numbers alone may go, ascending from 0.
        self.numbers: dict[str, list[int]] = {}
        if latencies is not None:
            for layer, width in self.widths.items():
                fast = [n for n in latencies.worthwhile(layer) if width - n >= self.floor[layer]]
                self.numbers[layer] = [0, *(n for n in fast if n and (width - n) % self.multiple == 0)]
        self.most = self.allowed(self.widths)
        self.indices = {layer: of_layer.argsort(stable=True) for layer, of_layer in values.items()}
        lowest = [values[layer][self.indices[layer][:most]] for layer, most in self.most.items()]
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
            if layer in self.numbers:
                allowed[layer] = self.numbers[layer][bisect.bisect_right(self.numbers[layer], allowed[layer]) - 1]
        return allowed

    def permitted(self) -> dict[str, list[int]]:
        """The numbers of components that may go from each layer, ascending."""
        numbers = {layer: range(width) for layer, width in self.widths.items()}
        return {layer: sorted({self.allowed({layer: n})[layer] for n in those}) for layer, those in numbers.items()}

    def removed(self, counts: Mapping[str, int]) -> dict[str, list[int]]:
        """The indices that go when so many are asked for in each layer."""
        return {layer: sorted(self.indices[layer][:count].tolist()) for layer, count in self.allowed(counts).items()}

    def removal(
        self, budget: str, asked: int, counts: Mapping[str, int], held: Collection[str] | None = None
    ) -> Choice:
        """The choice for a budget that says what goes; `held`: layers of which the limits keep more than it does."""
        if held is None:
            held = [layer for layer, count in counts.items() if count > self.most[layer]]
        removed = self.removed(counts)
        reached = sum(map(len, removed.values()))
        message = f"{budget}: {asked:,} components asked, {reached:,} removed"
        if held:
            message += f": {self.at_floor(held)}"
        elif reached < asked:
            message += f": what stays is rounded up to multiples of {self.multiple}"
        return Choice(removed, not held, asked, reached, f"{message}.")

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


def _check_ratio(argument: str, value: Any) -> None:
    if not validation.is_number(value) or not 0 <= value < 1:
        raise ValueError(f"prune: {argument} must be a number in [0, 1), got {value!r}.")


def _share_of(ratio: float, components: int, *, few: bool = False) -> int:
    """The least number of components that makes up a share of them, as torch-pruning counts, or the nearest number of
    a few: 0.3 of four heads are one, not two. One always stays."""
    asked = math.floor(ratio * components * ROUNDING + 0.5) if few else math.ceil(ratio * components / ROUNDING)
    return max(0, min(components - 1, asked))
