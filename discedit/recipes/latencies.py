"""How long a model takes on one machine when its layers lose components: measured once, spent by any budget."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discedit.common import files

KIND = "latencies"
LEAST_SAVED = 0.01  # of the time of all that a layer changes: what saves less is noise


@dataclass(frozen=True, eq=False)
class LatencyTerm:
    """Of all calls whose sizes depend on the same layers in the same way.

    Attributes:
        axes: for each dimension of `times` layer -> factor: the place there is the sum of factors times what layers
            have lost.
        grid: for each dimension (places,), int64, ascending from 0: where it was measured.
        times: milliseconds, float64.
    """

    axes: tuple[dict[str, int], ...]
    grid: tuple[Tensor, ...]
    times: Tensor

    @cached_property
    def falling(self) -> NDArray[np.float64]:
        """The times, where none is longer than one for less that has gone: widths that a machine is slow at are not
        worth their place."""
        times: NDArray[np.float64] = self.times.numpy()
        for dim in range(times.ndim):
            times = np.minimum.accumulate(times, axis=dim)
        return times

    def at(self, places: Sequence[NDArray[np.int64]], times: NDArray[np.float64]) -> NDArray[np.float64]:
        """At (n,) places in each dimension: (n,), linear between those that were measured."""
        found = times
        low, part = [], []
        for grid, place in zip(self.grid, places, strict=True):
            known = grid.numpy()
            below = np.clip(np.searchsorted(known, place, side="right") - 1, 0, max(0, len(known) - 2))
            step = np.maximum(known[np.minimum(below + 1, len(known) - 1)] - known[below], 1)
            low.append(below)
            part.append(np.clip((place - known[below]) / step, 0, 1))
        total = np.zeros(np.broadcast_shapes(*(place.shape for place in places)))
        for corner in np.ndindex(*(min(2, size) for size in found.shape)):
            weight = math.prod(p if upper else 1 - p for p, upper in zip(part, corner, strict=True))
            total += weight * found[tuple(below + upper for below, upper in zip(low, corner, strict=True))]
        return total


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """How long one forward pass of a model takes on this machine when its layers lose components.

    What is called in the pass is timed by itself, with as many channels as may be left; what that saves is then
    scaled to what the whole model saved in truth with half of each layer gone. It holds for the batch, the device and
    the number of threads that it was measured with. `prune` measures it under `MaxLatency` and keeps it in
    `Edit.latencies`; as the `table` of another budget it needs no measuring, and what is chosen then does not depend on
    chance.

    Attributes:
        whole: milliseconds of the whole model.
        scale: what the model saves over what its calls save by themselves.
        layers: layer -> numbers of its components that may go, ascending from 0: those that were measured.
        terms: what the calls take.
        settings: what it was measured with.
        architecture: tensor name -> shape, of the model.
    """

    whole: float
    scale: float
    layers: dict[str, list[int]]
    terms: list[LatencyTerm]
    settings: dict[str, Any]
    architecture: dict[str, list[int]] = field(repr=False)

    def __repr__(self) -> str:
        return f"LatencyTable({self.whole:.2f} ms, {len(self.layers)} layers, {self.settings})"

    def latency(self, removed: Mapping[str, int]) -> float:
        """Milliseconds of what is left when so many components are removed from each layer: {} for the whole model."""
        return self.whole - self.scale * sum(self._saved(index, removed) for index in range(len(self.terms)))

    def along(self, removed: Mapping[str, int], layer: str, numbers: Tensor) -> Tensor:
        """Milliseconds saved by so many of one layer's components, (numbers,), float64, against none of them.

        Args:
            removed: layer -> components, of the others.
        """
        return self.scale * torch.from_numpy(self._along(removed, layer, numbers.numpy(), falling=True))

    def worthwhile(self, layer: str) -> list[int]:
        """The numbers of a layer's components that save more than any smaller number does, with the others whole."""
        numbers = np.array(self.layers[layer])
        saved = self._along({}, layer, numbers, falling=False)
        least = LEAST_SAVED * sum(float(self.terms[index].times.flatten()[0]) for index in self._terms_of[layer])
        found, most = [0], 0.0
        for number, gain in zip(numbers.tolist(), saved.tolist(), strict=True):
            if gain > most + least:
                found.append(number)
                most = gain
        return found

    @property
    def of_calls(self) -> float:
        """Milliseconds of all calls that change, by themselves."""
        return sum(float(term.falling.flat[0]) for term in self.terms)

    @cached_property
    def _terms_of(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {layer: [] for layer in self.layers}
        for index, term in enumerate(self.terms):
            for layer in {layer for axis in term.axes for layer in axis}:
                found[layer].append(index)
        return found

    @cached_property
    def _known(self) -> dict[tuple[int, ...], float]:
        return {}

    def _saved(self, index: int, removed: Mapping[str, int]) -> float:
        """Milliseconds that one term takes less."""
        term = self.terms[index]
        places = [sum(factor * removed.get(layer, 0) for layer, factor in axis.items()) for axis in term.axes]
        key = (index, *places)
        if key not in self._known:
            left = term.at([np.array([place]) for place in places], term.falling)
            self._known[key] = float(term.falling.flat[0] - left[0])
        return self._known[key]

    def _along(
        self, removed: Mapping[str, int], layer: str, numbers: NDArray[np.int64], *, falling: bool
    ) -> NDArray[np.float64]:
        total = np.zeros(len(numbers))
        others = {name: number for name, number in removed.items() if name != layer}
        for index in self._terms_of[layer]:
            term = self.terms[index]
            places = [
                sum(factor * others.get(name, 0) for name, factor in axis.items()) + axis.get(layer, 0) * numbers
                for axis in term.axes
            ]
            left = term.at(places, term.falling if falling else term.times.numpy())
            total += left[0] - left
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """A safetensors file, replaced atomically."""
        header = {name: getattr(self, name) for name in ("whole", "scale", "layers", "settings", "architecture")}
        tensors = {}
        for index, term in enumerate(self.terms):
            tensors[f"{index}/times"] = term.times
            tensors |= {f"{index}/grid/{dim}": places for dim, places in enumerate(term.grid)}
        files.save_tensors(path, KIND, header | {"axes": [list(term.axes) for term in self.terms]}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Raises FileNotFoundError, or ValueError for a file that is damaged or another one."""
        header, tensors = files.load_tensors(path, KIND)
        whole, scale = (files.field(header, name, float, path) for name in ("whole", "scale"))
        layers, settings, shapes = (
            files.field(header, name, dict, path) for name in ("layers", "settings", "architecture")
        )
        terms = []
        for index, axes in enumerate(files.field(header, "axes", list, path)):
            names = [f"{index}/grid/{dim}" for dim in range(len(axes))]
            missing = [name for name in (*names, f"{index}/times") if name not in tensors]
            if missing:
                raise ValueError(f"{str(path)!r} is damaged: tensor {missing[0]!r} is missing.")
            grid = tuple(tensors[name] for name in names)
            terms.append(LatencyTerm(tuple(axes), grid, tensors[f"{index}/times"]))
        return cls(whole, scale, layers, terms, settings, shapes)


def joined_terms(terms: Iterable[LatencyTerm]) -> list[LatencyTerm]:
    """One term for all on the same axes, and the same grid."""
    found: dict[Any, LatencyTerm] = {}
    for term in terms:
        key = tuple(tuple(axis.items()) for axis in term.axes)
        known = found.get(key)
        found[key] = term if known is None else LatencyTerm(term.axes, term.grid, known.times + term.times)
    return list(found.values())
