"""Labelled data split into the samples of the classes to forget and those of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.model.forward import (
    Quota,
    call,
    frozen_eval,
    hooked,
    index_samples,
)
from discedit.model.size import accuracy_per_class
from discedit.model.trace import FEW, ModelTrace
from discedit.moments.calibration import (
    SAMPLES,
    HeldOut,
    batch_size_of,
    calibrated,
    concat_batches,
    fits,
    held_out_of,
    kept_back,
)
from discedit.moments.class_samples import labelled

MEANS = 256  # samples that means are taken over
KEPT = {"forget": 1024, "retain": 4096}  # samples that are held in memory, as many of each class


class ForgetRetainSplit:
    """Batches of two kinds: "forget" and "retain", of each kind the first `KEPT` samples, spread evenly over classes.

    `data`, pairs of inputs and labels, is read once, and no further than needed.
    """

    def __init__(self, op: str, model: nn.Module, data: Iterable[Any], forget: list[int], num_classes: int) -> None:
        validation.batches(op, "data", data)
        self.op, self.model, self.num_classes = op, model, num_classes
        self.forget = forget
        share = {"forget": -(-KEPT["forget"] // len(forget))}
        share["retain"] = -(-KEPT["retain"] // max(1, num_classes - len(forget)))
        quota = Quota({cls: share["forget" if cls in forget else "retain"] for cls in range(num_classes)})
        self._labelled: dict[tuple[str, int], list[tuple[Any, Tensor]]] = {}
        self._few: dict[tuple[str, int, int], list[tuple[Any, Tensor]]] = {}
        self._apart: dict[str, tuple[list[Any], HeldOut]] = {}
        self._means: dict[Any, dict[str, Tensor]] = {}
        found: dict[str, list[tuple[Any, Tensor]]] = {"forget": [], "retain": []}
        for inputs, labels in labelled(op, model, data, num_classes, predicted=False):
            # The first of each class, however the data are sorted: so many in all would be of the first classes alone.
            wanted = quota.take(labels)
            among = torch.isin(labels[wanted], torch.tensor(forget))
            for kind, places in (("forget", wanted[among]), ("retain", wanted[~among])):
                if len(places):
                    found[kind].append((index_samples(inputs, places, len(labels)), labels[places]))
            if quota.full():
                break
        for kind, batches in found.items():
            if not batches:
                what = f"the classes {forget}" if kind == "forget" else f"classes other than {forget}"
                raise ValueError(f"{op}: data must hold samples of {what}, it holds none.")
        self.batches = found

    def accuracy(self, model: nn.Module, kind: str, most: int | None = None) -> float:
        """Mean over the classes of a kind, in [0, 1], of all samples or of so many of each class together."""
        batches = self.batches[kind] if most is None else self._first(kind, most)
        found = accuracy_per_class(model, batches, self.num_classes)
        return float(found[~found.isnan()].mean())

    def parts(self, kind: str) -> list[Any]:
        """Samples of a kind, as many of each class, in parts, as a repair takes them."""
        return [inputs for inputs, _ in self.labelled(kind, SAMPLES)]

    def kept_back(self, kind: str) -> tuple[list[Any], HeldOut]:
        """Samples of a kind as a repair takes them, and others to check it on: those behind, where there are some."""
        if kind not in self._apart:
            parts = self.parts(kind)
            number = held_out_of(sum(batch_size_of(self.op, part) for part in parts))
            behind = self._first(kind, number, behind=SAMPLES)
            further = None
            if behind:
                inputs, labels = _interleaved(behind)[0]  # of batches that cannot be joined, the first
                further = index_samples(inputs, torch.arange(min(number, len(labels))), len(labels))
            self._apart[kind] = kept_back(self.op, parts, further)
        return self._apart[kind]

    def last(self, number: int) -> list[Any]:
        """So many samples of each kind, the last ones, which little else looks at."""
        found = []
        for batches in self.batches.values():
            inputs, labels = batches[-1]
            found.append(index_samples(inputs, torch.arange(max(0, len(labels) - number), len(labels)), len(labels)))
        return found

    def labelled(self, kind: str, most: int) -> list[tuple[Any, Tensor]]:
        """So many samples of a kind, as many of each class, with their labels, in parts."""
        key = (kind, most)
        if key not in self._labelled:
            few = _interleaved(self._first(kind, most))
            inputs, *_ = calibrated(self.op, self.trace, few)  # perhaps not of all
            sizes = [batch_size_of(self.op, part) for part in inputs]
            labels = torch.split(torch.cat([labels for _, labels in few])[: sum(sizes)], sizes)
            self._labelled[key] = list(zip(inputs, labels, strict=True))
        return self._labelled[key]

    def _first(self, kind: str, most: int, behind: int = 0) -> list[tuple[Any, Tensor]]:
        """The first samples of each class, as many of each as make up so many together; behind the first so many."""
        key = (kind, most, behind)
        if key not in self._few:
            sizes = [len(labels) for _, labels in self.batches[kind]]
            together = torch.cat([labels for _, labels in self.batches[kind]])
            start, each = (-(-number // len(set(together.tolist()))) for number in (behind, most))
            turns = _turns(together)
            wanted = torch.split((turns >= start) & (turns < start + each), sizes)
            self._few[key] = [
                (index_samples(inputs, places.nonzero()[:, 0], len(labels)), labels[places])
                for (inputs, labels), places in zip(self.batches[kind], wanted, strict=True)
                if bool(places.any())
            ]
        return self._few[key]

    @cached_property
    def trace(self) -> ModelTrace:
        """Of the model, on retained samples."""
        return ModelTrace.of(self.model, _interleaved(self._first("retain", FEW))[0][0], windows=True)

    def means(self, places: Mapping[str, str]) -> dict[str, Tensor]:
        """Layer -> mean over retained samples and positions of what the module in that place gives: (channels,)."""
        key = tuple(places.items())
        if key in self._means:
            return self._means[key]
        sums: dict[str, Tensor] = {}
        number = dict.fromkeys(places, 0)

        def add(layer: str, _: nn.Module, __: Any, output: Tensor) -> None:
            # By the layer: there are layer norms over the channels of maps that a convolution gives.
            axis = output.ndim - 1 if isinstance(self.model.get_submodule(layer), nn.Linear) else 1
            dims = [dim for dim in range(output.ndim) if dim != axis]
            sums[layer] = sums.get(layer, torch.zeros(())) + output.sum(dims, dtype=torch.float64)
            number[layer] += output.numel() // output.shape[axis]

        modules = {layer: self.model.get_submodule(place) for layer, place in places.items()}
        handles = [module.register_forward_hook(partial(add, layer)) for layer, module in modules.items()]
        with hooked(handles), frozen_eval(self.model):
            for inputs, _ in self._first("retain", MEANS):
                call(self.model, inputs)
        self._means[key] = {layer: (total / number[layer]).cpu() for layer, total in sums.items()}
        return self._means[key]


def _interleaved(batches: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    """One batch, its classes in turn, so that the first are as many of each; what cannot be joined stays as it is."""
    first, labels = batches[0]
    if not all(fits(first, inputs) for inputs, _ in batches):
        return batches
    whole = concat_batches([inputs for inputs, _ in batches], len(labels))
    labels = torch.cat([labels for _, labels in batches])
    order = _turns(labels).argsort(stable=True)
    return [(index_samples(whole, order, len(labels)), labels[order])]


def _turns(labels: Tensor) -> Tensor:
    """Of each sample, how many of its class come before it."""
    seen: Counter[int] = Counter()
    turns = []
    for label in labels.tolist():
        turns.append(seen[label])
        seen[label] += 1
    return torch.tensor(turns)
