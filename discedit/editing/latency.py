"""How long a model takes when layers lose components: its calls, each by itself, timed at several widths."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from discedit.graph.pruning_graph import Components, Graph
from discedit.model.forward import call, device_of, frozen_eval, samples_in, to_device
from discedit.recipes.latencies import LatencyTable, LatencyTerm, joined_terms
from discedit.recipes.recipe import architecture_of, reduced

PER_AXIS = {1: 32, 2: 8, 3: 4}  # widths that a call is timed at, by the number of its axes
# A round times every call. The shortest time of all rounds counts: others on the machine take whole slices of it.
MOST_ROUNDS, LEAST_ROUNDS, SECONDS = 9, 3, 20.0
MOST_TURNS, LEAST_TURNS, SECONDS_OF_TURNS = 31, 5, 5.0  # passes of each model, of which the median counts
REPEATED = {"cpu": 1, "cuda": 10}  # a GPU works while the next call is made
SHOWN_AFTER = 2.0  # seconds

_Where = tuple[int, int]  # in the arguments of a call: which of them, and the dimension; of a number, -1
_Sizes = dict[_Where, int]
_Direction = tuple[tuple[str, int], ...]  # layer -> factor: sizes depend on the sum of factors times what layers lost


class _Shape(NamedTuple):
    """Of a tensor in a call, dense in memory."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]  # of the dimensions in memory, the slowest first
    dtype: torch.dtype

    def made(self, device: torch.device) -> Tensor:
        # Zeros are indices that hold everywhere, and a half overflows nowhere.
        value = 0.5 if self.dtype.is_floating_point else 0
        dense = torch.full([self.sizes[dim] for dim in self.order], value, dtype=self.dtype, device=device)
        return dense.permute(sorted(range(len(self.order)), key=self.order.__getitem__))


class _Call(NamedTuple):
    """What a forward pass asks torch for."""

    function: Any
    leaves: tuple[Any, ...]  # of its arguments; a `_Shape` for a tensor
    spec: TreeSpec

    def prepared(self, device: torch.device) -> Callable[[], object]:
        """Itself, on tensors of its shapes."""
        leaves = [leaf.made(device) if isinstance(leaf, _Shape) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return lambda: self.function(*args, **kwargs)

    def sizes(self) -> _Sizes:
        found: _Sizes = {}
        for place, leaf in enumerate(self.leaves):
            if isinstance(leaf, _Shape):
                found |= {(place, dim): size for dim, size in enumerate(leaf.sizes)}
            elif type(leaf) is int:
                found[place, -1] = leaf
        return found

    def smaller(self, less: Mapping[_Where, int]) -> _Call:
        leaves = list(self.leaves)
        for (place, dim), by in less.items():
            leaf = leaves[place]
            if isinstance(leaf, _Shape):
                leaves[place] = leaf._replace(sizes=(*leaf.sizes[:dim], leaf.sizes[dim] - by, *leaf.sizes[dim + 1 :]))
            else:
                leaves[place] = leaf - by
        return self._replace(leaves=tuple(leaves))


class _Varying(NamedTuple):
    """A call whose sizes depend on what layers lose."""

    call: _Call
    axes: list[_Direction]
    places: list[list[int]]  # on each, where it is timed
    sizes: dict[_Where, tuple[int, int]]  # those that change: along which axis, and by how much for each place of it

    def at(self, places: Sequence[int]) -> _Call:
        return self.call.smaller({where: by * places[axis] for where, (axis, by) in self.sizes.items()})


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what a forward pass asks for, but for views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            leaves, spec = tree_flatten((args, kwargs or {}))
            self.seen.append(_Call(func, tuple(map(_described, leaves)), spec))
        return func(*args, **(kwargs or {}))


def _described(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    strides: tuple[int, ...] = leaf.stride()
    order = sorted(range(leaf.ndim), key=lambda dim: -strides[dim])
    return _Shape(tuple(leaf.shape), tuple(order), leaf.dtype)


def _calls_of(model: nn.Module, inputs: Any) -> list[_Call]:
    calls = _Calls()
    with frozen_eval(model), calls:
        call(model, inputs)
    return calls.seen


def measured_latencies(
    op: str, graph: Graph, found: Mapping[str, Components], example_inputs: Any, *, progress: bool | None = None
) -> tuple[LatencyTable, dict[str, str]]:
    """Times each call of a forward pass on the example inputs at the widths that it may get.

    Args:
        found: layer -> its components.
        progress: whether to show a bar; None: on a terminal.

    Returns:
        The table, and layers that it cannot hold, with reasons.
    """
    model, device = graph.model, device_of(graph.model)
    if device.type not in REPEATED:
        raise ValueError(f"{op}: latency can be measured on a CPU or with CUDA, the model is on {device}.")
    inputs = to_device(example_inputs, device)
    whole = _calls_of(model, inputs)
    changes, failed = _changes(graph, found, whole, inputs)
    half = {layer: _half(len(found[layer].rows)) for layer in changes}
    operations, why = graph.plan({layer: range(number) for layer, number in half.items()})
    failed |= why
    widths = {layer: len(found[layer].rows) for layer in changes if layer not in why}
    varying, levels = _varying(whole, {layer: changes[layer] for layer in widths}, widths)
    terms = _timed(varying, device, sys.stderr.isatty() if progress is None else progress)
    settings = {"samples": samples_in(inputs), "device": device.type, "threads": torch.get_num_threads()}
    whole_time, of_half = latencies(model, reduced(model, operations), inputs)
    table = LatencyTable(whole_time, 1.0, levels, terms, settings, architecture_of(model))
    by_themselves = whole_time - table.latency({layer: half[layer] for layer in levels})
    scale = max(0.0, whole_time - of_half) / by_themselves if by_themselves > 0 else 0.0
    # Never more than the whole takes.
    return replace(table, scale=min(scale, whole_time / (table.of_calls or 1.0))), failed


def _changes(
    graph: Graph, found: Mapping[str, Components], whole: Sequence[_Call], inputs: Any
) -> tuple[dict[str, list[_Sizes]], dict[str, str]]:
    """By how much the sizes of each call get less with one component of a layer, and the layers that do not say."""
    changes: dict[str, list[_Sizes]] = {}
    failed: dict[str, str] = {}
    for layer, parts in found.items():
        if len(parts.rows) < 2:  # it stays
            changes[layer] = [{} for _ in whole]
            continue
        try:
            calls = _calls_of(graph.smaller({layer: [0]}), inputs)
        except Exception:  # of the model: a trial finds out what more must change
            operations, why = graph.plan({layer: [0]})
            if why:
                failed |= why
                continue
            calls = _calls_of(reduced(graph.model, operations), inputs)
        sizes = [(one.sizes(), other.sizes()) for one, other in zip(whole, calls, strict=False)]
        same = [one.function for one in whole] == [other.function for other in calls]
        if not same or any(one.keys() != other.keys() for one, other in sizes):
            failed[layer] = "with a component less the model calls something else, whose latency is not known"
            continue
        changes[layer] = [{at: one[at] - other[at] for at in one if one[at] != other[at]} for one, other in sizes]
    return changes, failed


def _varying(
    whole: Sequence[_Call], changes: Mapping[str, list[_Sizes]], widths: Mapping[str, int]
) -> tuple[list[_Varying], dict[str, list[int]]]:
    """The calls that change, and for each layer how many components may go, ascending from 0."""
    found: list[tuple[_Call, dict[_Where, _Direction], _Sizes]] = []
    for index, one in enumerate(whole):
        of: dict[_Where, dict[str, int]] = {}
        for layer, sizes in changes.items():
            for where, by in sizes[index].items():
                of.setdefault(where, {})[layer] = by
        # Sizes that change by multiples of one another are one axis.
        unit = {at: math.gcd(*by.values()) * (1 if min(by.values()) > 0 else -1) for at, by in of.items()}
        found.append(
            (one, {at: tuple((layer, n // unit[at]) for layer, n in by.items()) for at, by in of.items()}, unit)
        )
    axes = dict.fromkeys(widths, 1)
    for _, of_each, _ in found:
        number = len({*of_each.values()})
        for layer in {layer for axis in of_each.values() for layer, _ in axis} if number in PER_AXIS else ():
            axes[layer] = max(axes[layer], number)
    levels = {layer: _numbers(width, PER_AXIS[axes[layer]]) for layer, width in widths.items()}
    varying = []
    for one, of_each, unit in found:
        directions = list(dict.fromkeys(of_each.values()))
        if len(directions) in PER_AXIS:  # of more a table would be too large: what they save is in the scale
            places = [_places(axis, levels, PER_AXIS[len(directions)]) for axis in directions]
            sizes_of = {at: (directions.index(axis), unit[at]) for at, axis in of_each.items()}
            varying.append(_Varying(one, directions, places, sizes_of))
    return varying, levels


def _numbers(width: int, most: int) -> list[int]:
    """How many components of a layer may go: so many numbers, with which a multiple of a power of two stays."""
    step = 1
    while width > step * most:
        step *= 2
    return [0, *(width - stay for stay in range((width - 1) // step * step, 0, -step))]


def _half(width: int) -> int:
    """The one of them that is nearest to half, where there are few: then it is there where there are more."""
    return min(_numbers(width, min(PER_AXIS.values())), key=lambda number: abs(2 * number - width))


def _places(axis: _Direction, levels: Mapping[str, list[int]], number: int) -> list[int]:
    if len(axis) == 1:
        return levels[axis[0][0]]
    most = sum(factor * levels[layer][-1] for layer, factor in axis)
    return sorted({round(most * part / (number - 1)) for part in range(number)})


def _timed(varying: Sequence[_Varying], device: torch.device, shown: bool) -> list[LatencyTerm]:
    """Each call at its places, all in turns."""
    from tqdm.auto import tqdm

    at = [{places: one.at(places) for places in product(*one.places)} for one in varying]
    # Equal ones once; whatever they are given has a hash.
    points = {(each.function, each.leaves): each for calls in at for each in calls.values()}
    shortest = dict.fromkeys(points, math.inf)
    rounds, start, done = MOST_ROUNDS, time.perf_counter(), 0
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tqdm(total=rounds * len(points), desc="latency", unit="call", delay=SHOWN_AFTER, disable=not shown) as bar,
    ):
        while done < rounds:
            for key, each in list(points.items()):
                try:
                    run = each.prepared(device)
                    run()  # the first takes longer
                    shortest[key] = min(shortest[key], stopwatch(run, device))
                except Exception:  # of torch: its sizes do not go on as one component less shows
                    del points[key], shortest[key]
                bar.update()
            done += 1
            if done == 1:
                rounds = _within(SECONDS, time.perf_counter() - start, LEAST_ROUNDS, MOST_ROUNDS)
                bar.total = rounds * len(points)
    terms = []
    for one, calls in zip(varying, at, strict=True):
        keys = [(each.function, each.leaves) for each in calls.values()]
        if all(key in shortest for key in keys):
            times = torch.tensor([shortest[key] for key in keys], dtype=torch.float64)
            times = times.view([len(places) for places in one.places])
            terms.append(LatencyTerm(tuple(map(dict, one.axes)), tuple(map(torch.tensor, one.places)), times))
    return joined_terms(terms)


def latencies(whole: nn.Module, smaller: nn.Module, inputs: Any) -> tuple[float, float]:
    """Milliseconds of a forward pass of each of two models, by passes in turns: machines differ from second to second,
    so the second is the median of ratios times the first."""
    device = device_of(whole)
    inputs = to_device(inputs, device)
    taken: list[float] = []
    ratios: list[float] = []
    with torch.no_grad(), frozen_eval(whole), frozen_eval(smaller), torch._C.DisableTorchFunction():
        call(whole, inputs), call(smaller, inputs)
        turns = 1
        while len(taken) < turns:
            taken.append(stopwatch(lambda: call(whole, inputs), device))
            other = stopwatch(lambda: call(smaller, inputs), device)
            ratios.append(other / taken[-1])
            turns = _within(SECONDS_OF_TURNS, (taken[0] + other) / 1000, LEAST_TURNS, MOST_TURNS)
    before = statistics.median(taken)
    return before, before * statistics.median(ratios)


def _within(seconds: float, each: float, least: int, most: int) -> int:
    """How often something is done."""
    return max(least, min(most, int(seconds / max(each, 1e-9))))


def stopwatch(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one run, the mean of some on a GPU."""
    times = REPEATED[device.type]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start) / times
