"""Running a model over batches of any usual form without leaving a trace in it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from discedit.backends import arguments
from discedit.common import validation
from discedit.model.functional import LayersCalled
from discedit.model.sharded import identity

Note = TypeVar("Note")

_CACHES = ("past_key_values", "past_key_value", "cache_params")  # state for the next call, whose shape follows heads
_DEPTH = 16  # how far nests of outputs are looked into


def device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Works inside `torch.inference_mode` as outside: what is made there has no versions, by which changes in place are
    seen, and could never be trained."""
    # Where there is none, nothing: leaving inference mode turns gradients on, which the caller may have turned off.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def outside_modes() -> Iterator[None]:
    """Outside autocast as well: in its products, closed forms would lose their digits."""
    with outside_inference_mode(), without_autocast():
        yield


def version_of(tensor: Tensor) -> int | None:
    """A number that rises with every change in place; None where torch keeps none (a part of the model that runs in
    inference mode)."""
    return None if tensor.is_inference() else tensor._version


class TensorNotes(Generic[Note]):
    """Something known of each of some tensors, until it is changed in place.

    A distributed tensor and its local one are the same here. None is kept alive: a pass must not hold every map.
    """

    def __init__(self) -> None:
        self._notes: MutableMapping[Tensor, tuple[int, Note]] = WeakIdKeyDictionary()  # in the order of the notes

    def note(self, tensor: Tensor, what: Note) -> None:
        self.forget(tensor)
        local = identity(tensor)
        if (version := version_of(local)) is not None:
            self._notes[local] = version, what

    def of(self, tensor: Tensor) -> Note | None:
        local = identity(tensor)
        version, what = self._notes.get(local, (None, None))
        return what if version is not None and version == version_of(local) else None

    def items(self) -> list[tuple[Tensor, Note]]:
        return [(tensor, what) for tensor, (_, what) in self._notes.items()]

    def forget(self, tensor: Tensor) -> None:
        self._notes.pop(identity(tensor), None)


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[LayersCalled]:
    """Eval mode without gradients inside, nothing compiled, layers called where functions take their weights; modes,
    buffers and random state as they were outside."""
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    # Of the model's device alone: by default `fork_rng` copies the state of every GPU.
    devices = [device] if device.type == "cuda" else []
    kept = _buffers_of(module for module, _ in modes)
    # Hooks, by which everything here is found out, are not seen by code that was compiled without them.
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    try:
        with torch.random.fork_rng(devices), outside_inference_mode(), torch.no_grad(), eager:
            model.eval()
            with LayersCalled(model) as calls:
                yield calls
    finally:
        for module, name, buffer, version, value in kept:
            # First the very tensor, which the module may have replaced, then the values, which it may have written to.
            if name in module._buffers:
                module._buffers[name] = buffer
            if version_of(buffer) != version or buffer.shape != value.shape:
                with torch.no_grad():
                    if buffer.shape != value.shape:  # not all kinds of tensors can be resized
                        buffer.resize_(value.shape)
                    buffer.copy_(value)
        # Through train(), parents first, because some modules do work there; then the flags, whatever that left.
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:
            module.training = mode


def _buffers_of(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor, int | None, Tensor]]:
    """Each with its version and a copy. Some modules learn in eval mode, too: observers of quantisation, caches,
    codebooks. Running statistics of norms do not change there, and are what closed forms set on purpose."""
    return [
        (module, name, buffer, version_of(buffer), buffer.detach().clone())
        for module in modules
        if not isinstance(module, _NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that were set are removed afterwards, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unpack_batch(
    op: str, batch: Any, index: int, device: torch.device, *, labels_needed: bool, argument: str = "loader"
) -> tuple[Any, Any]:
    """Inputs on the model's device, and labels (None where there are none and none are needed).

    A pair is always (inputs, labels). `argument` is what gave the batch, for errors.
    """
    inputs: Any
    labels: Any = None
    # As transformers' collators give them: labels among the arguments of the model, which would make a loss of them.
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
        found = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            found += f" with {validation.quoted([str(key) for key in batch])}"
        elif isinstance(batch, (tuple, list)):
            found += f" of {len(batch)}"
        raise ValueError(
            f"{op}: {argument} must give (inputs, labels) pairs, or dicts of arguments with 'labels', batch {index} is "
            f"{found}."
        )
    return to_device(inputs, device), labels


def checked_labels(op: str, given: Any, num_classes: int, index: int) -> Tensor:
    """The labels as a tensor whose type and range are right; an error names the batch."""
    what = f"{op}: batch {index}: labels must hold one class index (an integer) per sample"
    if isinstance(given, Mapping):
        raise ValueError(f"{what}, got a {type(given).__name__} with {validation.quoted([str(key) for key in given])}.")
    first = given[0] if isinstance(given, (list, tuple)) and given else None
    if isinstance(given, str) or isinstance(first, (str, bytes, Mapping)):
        shown = repr(given if isinstance(given, str) else first)
        raise ValueError(f"{what}, got a {type(given).__name__} that begins with {shown[:60]}.")
    try:
        classes = torch.as_tensor(given)
        if classes.ndim != 1:
            raise ValueError(f"labels must hold one class index per sample, got shape {validation.shape_of(classes)}.")
        classes = arguments.labels(op, classes, classes)
        arguments.label_range(op, classes, num_classes)
        return classes
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{op}: batch {index}: {str(error).removeprefix(f'{op}: ')}") from error


def map_tensors(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same nest of tuples and dicts (lists become tuples), with the function applied to every tensor in it."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: map_tensors(value, function) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(map_tensors(value, function) for value in inputs)
    return inputs


def index_samples(inputs: Any, index: Tensor | slice, samples: int) -> Any:
    """The same nest for some of the samples; what has no sample axis stays as it is."""

    def taken(x: Tensor) -> Tensor:
        return x[index if isinstance(index, slice) else index.to(x.device)]

    return map_tensors(inputs, lambda x: taken(x) if x.ndim and len(x) == samples else x)


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


def to_device(inputs: Any, device: torch.device) -> Any:
    """On a GPU without waiting for the copy, which its stream waits for; on the CPU nobody else would."""
    return map_tensors(inputs, lambda tensor: _plain(tensor).to(device, non_blocking=device.type == "cuda"))


def _plain(tensor: Tensor) -> Tensor:
    """The tensor itself: a subclass that only carries something along (an image's kind, a path) would hand it on to
    everything that is made of it. Subclasses with a memory of their own (distributed ones) stay what they are."""
    if tensor.is_inference():
        tensor = tensor.clone()
    own_memory = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return tensor if type(tensor) is Tensor or own_memory else tensor.as_subclass(Tensor)


def call(model: nn.Module, inputs: Any) -> Any:
    """The module itself is called, never its forward, so that wrappers and hooks work."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def running_examples(op: str) -> Iterator[None]:
    """What a model raises on the example inputs is an error of theirs."""
    try:
        yield
    except Exception as error:  # of the model, whatever it is
        raise ValueError(
            f"{op}: example_inputs must be a tensor, or a tuple or dict of arguments, that the model can run on; it "
            f"raised {type(error).__name__}: {error}"
        ) from error


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of a module's output: itself, its `logits`, or the first of a tuple or mapping."""
    if isinstance(output, Tensor):
        return output
    # By its name in outputs of transformers: the first entry there may be a loss.
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def samples_in(inputs: Any) -> int:
    """Size of the first axis of the first tensor; 0 where there is none."""
    first = first_tensor(inputs)
    return len(first) if first is not None and first.ndim else 0


def tensors_in(
    output: Any, place: str = "output", seen: set[int] | None = None, depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """All tensors in what a model gives, however nested, each with where it stands there."""
    seen = set() if seen is None else seen
    if isinstance(output, Tensor):
        yield place, output
        return
    if output is None or isinstance(output, (str, bytes, int, float, complex, type, nn.Module)):
        return
    # Objects may hold each other in a circle.
    if id(output) in seen or depth > _DEPTH:
        return
    seen.add(id(output))
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(output, Mapping):
        parts = [(f"{place}[{key!r}]", value) for key, value in output.items() if key not in _CACHES]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts = [(f"{place}.{name}", value) for name, value in zip(output._fields, output, strict=True)]
    elif isinstance(output, (list, tuple, set, frozenset)):
        parts = [(f"{place}[{index}]", value) for index, value in enumerate(output)]
    elif dataclasses.is_dataclass(output):
        parts = [(f"{place}.{f.name}", getattr(output, f.name, None)) for f in dataclasses.fields(output)]
    elif hasattr(output, "__dict__"):
        parts = [(f"{place}.{name}", value) for name, value in vars(output).items()]
    for inner, value in parts:
        if inner.rpartition(".")[2] not in _CACHES:
            yield from tensors_in(value, inner, seen, depth + 1)
