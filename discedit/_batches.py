"""Running a model over batches of any usual form without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from discedit import _checks


def device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; mode and random state as they were outside."""
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        # Through train(), parents first, because some modules do work there; then the flags, whatever that left.
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:
            module.training = mode


def split(op: str, batch: Any, index: int, device: torch.device, *, labels_needed: bool) -> tuple[Any, Any]:
    """Inputs on the model's device, and labels (None where there are none and none are needed).

    A pair is always (inputs, labels).
    """
    inputs: Any
    labels: Any = None
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
    elif not labels_needed and isinstance(batch, (tuple, list)) and len(batch) == 1:
        inputs = batch[0]
    elif not labels_needed and isinstance(batch, (Tensor, Mapping)):
        inputs = batch
    else:
        raise ValueError(f"{op}: loader must give (inputs, labels) pairs, batch {index} is a {type(batch).__name__}.")
    return moved(inputs, device), labels


def checked_labels(op: str, given: Any, num_classes: int, index: int) -> Tensor:
    """The labels as a tensor whose type and range are right; an error names the batch."""
    try:
        classes = torch.as_tensor(given)
        if classes.ndim != 1:
            raise ValueError(f"labels must hold one class index per sample, got shape {_checks.shape_of(classes)}.")
        classes = _checks.labels(op, classes, classes)
        _checks.label_range(op, classes, num_classes)
        return classes
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{op}: batch {index}: {error}") from error


def map_tensors(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples and dicts (lists become tuples), with the function applied to every tensor in it."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: map_tensors(value, function) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(map_tensors(value, function) for value in inputs)
    return inputs


def chosen(inputs: Any, index: Tensor, samples: int) -> Any:
    """The same nest for some of the samples; what has no sample axis stays as it is."""
    return map_tensors(inputs, lambda t: t[index.to(t.device)] if t.ndim and len(t) == samples else t)


class Quota:
    """The first samples of each class: how many more of each are wanted; of classes that are not named, none."""

    def __init__(self, of_class: Mapping[int, int]) -> None:
        self._left = dict(of_class)

    def take(self, labels: Tensor) -> Tensor:
        """Places of the samples that are wanted, in order, on the CPU; they count from then on."""
        places = []
        for place, label in enumerate(labels.tolist()):
            if self._left.get(label, 0) > 0:
                self._left[label] -= 1
                places.append(place)
        return torch.tensor(places, dtype=torch.int64)

    def full(self) -> bool:
        return not any(self._left.values())


def moved(inputs: Any, device: torch.device) -> Any:
    """On a GPU without waiting for the copy, which its stream waits for; on the CPU nobody else would."""
    return map_tensors(inputs, lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))


def call(model: nn.Module, inputs: Any) -> Any:
    """The module itself is called, never its forward, so that wrappers and hooks work."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of a module's output: itself, its `logits`, or the first of a tuple or mapping."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None
