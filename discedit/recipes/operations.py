"""`Operation`: one elementary change of a model, as data: checked, made and taken back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from discedit.model import attention

KINDS = ("keep", "fill", "scale", "add", "set", "attribute")
WITH_VALUES = ("add", "set")  # kinds that write values of the recipe's own
FORWARD = "forward"  # among the attributes


@dataclass(frozen=True)
class Operation:
    """One elementary change.

    - kind "keep": keep `index` along `dim` of the tensor `target`, drop the rest.
    - kind "fill": write `value` at `index` along `dim` of the tensor `target`.
    - kind "scale": multiply by `value` what is at `index` along `dim` of the tensor `target`.
    - kind "add": add the recipe's own values to what is at `index` along `dim` of the tensor `target`.
    - kind "set": replace the tensor `target` by the recipe's own values.
    - kind "attribute": change the attribute `name` of the module `target` from `before` to `value`; "forward": what
      attention must be told to run with fewer heads, None for its class's own.
    """

    kind: str
    target: str
    dim: int = 0
    index: tuple[int, ...] = ()
    name: str = ""
    before: Any = None
    value: Any = None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class Slots:
    """Where each tensor of a model hangs; a tensor that hangs in several places changes in all of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first: dict[str, str] = {}  # name -> the first name of the same tensor
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}  # first name -> its module and name there, of each
        known: dict[int, str] = {}
        for name, tensor in named_tensors(model):
            self.first[name] = first = known.setdefault(id(tensor), name)
            owner, _, attribute = name.rpartition(".")
            self.places.setdefault(first, []).append((model.get_submodule(owner), attribute))

    def get(self, name: str) -> Tensor:
        module, attribute = self.places[self.first[name]][0]
        value: Tensor = getattr(module, attribute)
        return value

    @property
    def architecture(self) -> dict[str, list[int]]:
        """Shape of every parameter and buffer, by each of its names."""
        return {name: list(self.get(name).shape) for name in self.first}

    @property
    def parameters(self) -> int:
        """Number of parameters, each counted once."""
        tensors = map(self.get, self.places)
        return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))

    def put(self, name: str, value: Tensor) -> None:
        old = self.get(name)
        new: Tensor = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        for module, attribute in self.places[self.first[name]]:
            setattr(module, attribute, new)


def check_operations(
    what: str,
    operations: Iterable[Operation],
    architecture: Mapping[str, Sequence[int]],
    *,
    slots: Slots | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, list[int]]:
    """Refuses operations that make no sense for an architecture; gives the shapes that they leave.

    Args:
        what: begins the message of an error.
        slots: of a model of this architecture, or of what is left of it, which tells what are names of one tensor.
        tensors: "set.I": the values that operation I writes; None: they are not looked at.
    """
    first = {name: name if slots is None else slots.first.get(name, name) for name in architecture}
    shapes: dict[str, list[int]] = {}
    for name, shape in architecture.items():
        shapes.setdefault(first[name], list(shape))
    for i, operation in enumerate(operations):
        known = isinstance(operation.target, str) and operation.target in first
        now = shapes[first[operation.target]] if known else None
        why = _objection(operation, now)
        if not why and now is not None and tensors is not None and operation.kind in WITH_VALUES:
            why = _objection_to_values(operation, now, tensors.get(f"set.{i}"))
        if why:
            raise ValueError(f"{what}: operation {i} {why}.")
        if now is not None and operation.kind == "keep":
            now[operation.dim] = len(operation.index)
    return {name: shapes[first[name]] for name in architecture}


def _objection(operation: Operation, shape: list[int] | None) -> str:
    """Why an operation is none, or none on a tensor of this shape; None: there is no such tensor."""
    kind, dim, index = operation.kind, operation.dim, operation.index
    target: Any = operation.target  # of a file, perhaps
    if kind not in KINDS:
        return f"must be one of {', '.join(KINDS)}, got {kind!r}"
    if not isinstance(target, str):
        return f"must have a name for target, got {target!r}"
    if kind == "attribute":
        return _objection_to_attribute(operation)
    if shape is None:
        return f"must name a tensor of the model, got {target!r}"
    if kind == "set":
        return ""
    # By its very type: in a JSON file true and false would pass for 1 and 0.
    if type(dim) is not int or not 0 <= dim < len(shape):
        return f"must have a dim of {target!r}, a tensor of shape {shape}, got {dim!r}"
    if not all(type(i) is int and 0 <= i < shape[dim] for i in index) or list(index) != sorted(set(index)):
        return f"must have increasing indices in 0..{shape[dim] - 1}, got {list(index)!s:.80}"
    if kind == "keep" and shape[dim] and not index:
        return f"must leave something of {target!r}, it keeps no index"
    if kind in ("fill", "scale") and (
        isinstance(operation.value, bool) or not isinstance(operation.value, int | float)
    ):
        return f"must {kind} with a number, got {operation.value!r}"
    return ""


def _objection_to_attribute(operation: Operation) -> str:
    values = (operation.before, operation.value)
    if not isinstance(operation.name, str) or operation.name.startswith("_"):
        return "must name a public attribute"
    if operation.name == FORWARD:
        known = all(value is None or attention.is_spec(value) for value in values)
        return "" if known else f"must tell attention how to run, got {values[0]!r}, {values[1]!r}"
    if all(type(entry) is int for value in values for entry in (value if isinstance(value, list) else [value])):
        return ""
    return f"must change an integer or a list of integers, got {values[0]!r}, {values[1]!r}"


def _objection_to_values(operation: Operation, shape: list[int], values: Tensor | None) -> str:
    """What is added may be one number for a whole row or column."""
    if values is None:
        return f"lacks its values for tensor {operation.target!r}"
    written, found = list(shape), list(values.shape)
    if operation.kind == "add":
        written[operation.dim] = len(operation.index)
        if len(found) == len(written):
            found = [written[d] if n == 1 and d != operation.dim else n for d, n in enumerate(found)]
    if found == written:
        return ""
    return f"must have values of shape {written} for tensor {operation.target!r}, found shape {list(values.shape)}"


def check_possible(
    what: str, operations: Iterable[Operation], slots: Slots, tensors: Mapping[str, Tensor], *, undo: bool
) -> None:
    """Refuses what a model of the right architecture may still lack: attributes as expected, types that hold the
    numbers and, to undo, the values that were replaced."""
    modules = dict(slots.model.named_modules(remove_duplicate=False))
    for i, operation in enumerate(operations):
        target, name, value = operation.target, operation.name, operation.value
        if operation.kind == "attribute":
            if target not in modules:
                raise ValueError(f"{what}: the model has no module {target!r}.")
            expected, found = value if undo else operation.before, attribute_of(modules[target], name)
            if found != expected:
                must = f"must be {expected!r}, it is {found!r}"
                raise ValueError(f"{what}: attribute {name!r} of module {target!r} {must}.")
            continue
        dtype, saved = slots.get(target).dtype, tensors.get(f"undo.{i}")
        if undo and (saved is None or saved.dtype != dtype):
            found = "none" if saved is None else f"values of type {saved.dtype}"
            raise ValueError(f"{what}: to undo, tensor {target!r} ({dtype}) needs its values, found {found}.")
        if not undo and operation.kind in ("fill", "scale") and not _is_representable(value, dtype):
            raise ValueError(
                f"{what}: the number to {operation.kind} tensor {target!r} with must be in the range of its type "
                f"{dtype}, got {value!r:.40}."
            )


def _is_representable(value: float, dtype: torch.dtype) -> bool:
    """Whether a number of a file can be written to a tensor: JSON's have no limits."""
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if isinstance(value, float) and not math.isfinite(value):
        return dtype.is_floating_point
    return abs(value) <= limits.max


def attribute_of(module: nn.Module, name: str) -> Any:
    """A module's attribute, as recipes have it: a list for a tuple."""
    if name == FORWARD:
        return attention.forward_of(module)
    value = getattr(module, name, None)
    return list(value) if isinstance(value, tuple) else value


def _set_attribute(module: nn.Module, name: str, value: Any) -> None:
    if name == FORWARD:
        attention.set_forward(module, value)
    else:
        setattr(module, name, tuple(value) if isinstance(getattr(module, name), tuple) else value)


def _index(operation: Operation, tensor: Tensor) -> Tensor:
    return torch.tensor(operation.index, dtype=torch.int64, device=tensor.device)


def _dropped(operation: Operation, size: int, device: torch.device) -> Tensor:
    return torch.tensor(sorted(set(range(size)) - set(operation.index)), dtype=torch.int64, device=device)


def _read(operation: Operation, tensor: Tensor) -> Tensor:
    """A copy of what an operation writes over."""
    if operation.kind == "set":
        return tensor.detach().clone()
    return tensor.detach().index_select(operation.dim, _index(operation, tensor))


@torch.no_grad()
def _write(operation: Operation, tensor: Tensor, values: Tensor) -> None:
    if operation.kind == "set":
        tensor.copy_(values)
    else:
        tensor.index_copy_(operation.dim, _index(operation, tensor), values)


@torch.no_grad()
def apply_operation(slots: Slots, operation: Operation, values: Tensor | None) -> Tensor | None:
    """Make one change, known to be possible; gives what it wrote over or dropped.

    Args:
        values: of an operation that writes its own.
    """
    if operation.kind == "attribute":
        _set_attribute(slots.model.get_submodule(operation.target), operation.name, operation.value)
        return None
    tensor, dim = slots.get(operation.target), operation.dim
    if operation.kind == "keep":
        dropped = tensor.detach().index_select(dim, _dropped(operation, tensor.shape[dim], tensor.device))
        slots.put(operation.target, _read(operation, tensor))
        return dropped
    old = _read(operation, tensor)
    if operation.kind == "fill":
        value = float(operation.value) if tensor.is_floating_point() else operation.value
        tensor.index_fill_(dim, _index(operation, tensor), value)
    elif operation.kind == "scale":
        _write(operation, tensor, old * operation.value)
    else:
        assert values is not None
        _write(operation, tensor, old + values.to(old) if operation.kind == "add" else values)
    return old


@torch.no_grad()
def undo_operation(slots: Slots, operation: Operation, saved: Tensor | None) -> None:
    """Take one change back, known to be possible.

    Args:
        saved: what `apply_operation` gave.
    """
    if operation.kind == "attribute":
        _set_attribute(slots.model.get_submodule(operation.target), operation.name, operation.before)
        return
    assert saved is not None
    tensor, dim = slots.get(operation.target), operation.dim
    saved = saved.to(tensor.device)
    if operation.kind != "keep":
        _write(operation, tensor, saved)
        return
    shape = list(tensor.shape)
    shape[dim] += saved.shape[dim]
    whole = tensor.new_empty(shape)
    whole.index_copy_(dim, _index(operation, tensor), tensor.detach())
    whole.index_copy_(dim, _dropped(operation, shape[dim], tensor.device), saved)
    slots.put(operation.target, whole)


@contextmanager
def all_or_nothing(slots: Slots, *, needed: bool) -> Iterator[Callable[[Operation], None]]:
    """Where something fails in the middle (memory that ends, an interrupt), the model is what it was: the very tensors,
    and their values. A copy, which nobody has seen, need not be. Gives what each operation is announced to."""
    backs: list[Callable[[], object]] = []

    def announce(operation: Operation) -> None:
        if not needed:
            return
        if operation.kind == "attribute":
            module = slots.model.get_submodule(operation.target)
            backs.append(partial(_set_attribute, module, operation.name, attribute_of(module, operation.name)))
            return
        tensor = slots.get(operation.target)
        if operation.kind == "keep":  # leaves the tensor alone and puts another one in its place
            places = slots.places[slots.first[operation.target]]
            backs.extend(partial(setattr, module, name, tensor) for module, name in places)
        else:
            backs.append(partial(_write, operation, tensor, _read(operation, tensor)))

    try:
        yield announce
    except BaseException:
        for back in reversed(backs):
            back()
        raise
