"""Checks of arguments that every room has. An error names the argument, the rule and the value."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shape_of(tensor: Tensor) -> str:
    """The shape as a user would type it."""
    return str(tuple(tensor.shape))


def quoted(values: Collection[str]) -> str:
    return ", ".join(repr(value) for value in values)


def choice(op: str, argument: str, value: str, allowed: Collection[str]) -> str:
    if not isinstance(value, str) or value not in allowed:  # what has no hash could not be looked for in a dict
        raise ValueError(f"{op}: {argument} must be one of {quoted(allowed)}, got {value!r}.")
    return value


def instance(op: str, argument: str, value: Any, kinds: type | tuple[type, ...], called: str) -> None:
    if not isinstance(value, kinds):
        raise TypeError(f"{op}: {argument} must be {called}, got {type(value).__name__}.")


def names(op: str, argument: str, value: Any) -> list[str]:
    """Names of layers, from whatever gives them; one string would give its letters."""
    found: list[Any] = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [None]
    if not all(isinstance(name, str) for name in found):
        raise TypeError(f"{op}: {argument} must be a list of names, got {value!r}.")
    return found


def batches(op: str, argument: str, value: Any) -> None:
    """What a loop takes: also a data set that has items by number and no iterator."""
    if not hasattr(value, "__iter__") and not hasattr(value, "__getitem__"):
        raise TypeError(f"{op}: {argument} must give batches, got {type(value).__name__}.")


def tensor(op: str, argument: str, value: Any, dtypes: Collection[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a torch.Tensor, got {type(value).__name__}.")
    if value.dtype not in dtypes:
        names = ", ".join(map(type_of, dtypes))
        raise ValueError(
            f"{op}: {argument} must be one of {names}, got {type_of(value.dtype)} (shape {shape_of(value)})."
        )
    return value


def type_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def index(value: Any) -> int | None:
    """The value as an int if it is an integer of any library (never a bool), else None."""
    if type(value) is int:  # also an integer that torch.compile leaves open, which operator.index would fix
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def positive_integer(op: str, argument: str, value: Any) -> int:
    number = index(value)
    if number is None or number < 1:
        raise ValueError(f"{op}: {argument} must be an integer of at least 1, got {value!r}.")
    return number


def is_number(value: Any) -> bool:
    """A real number of any library, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def at_least_zero(op: str, argument: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{op}: {argument} must be a finite number of at least 0, got {value!r}.")
    return float(value)


def alpha(op: str, value: Any, argument: str = "alpha") -> float:
    if not is_number(value) or not 0 < value < 1:
        raise ValueError(f"{op}: {argument} must be a probability above 0 and below 1, got {value!r}.")
    return float(value)


def classes(op: str, value: Any, num_classes: int) -> list[int]:
    """The classes of a group, in the order given: indices of any library, or those that a predicate holds for."""
    if callable(value) and not isinstance(value, Iterable):
        answers = [value(label) for label in range(num_classes)]
        for label, answer in enumerate(answers):
            if not isinstance(answer, bool):
                raise ValueError(f"{op}: classes as a predicate must give True or False, gave {answer!r} for {label}.")
        if not any(answers):
            raise ValueError(f"{op}: classes must hold for at least one label in 0..{num_classes - 1}, holds for none.")
        return [label for label, answer in enumerate(answers) if answer]
    if isinstance(value, (int, str)) or not isinstance(value, Iterable):
        raise ValueError(f"{op}: classes must be a list of class indices, or a predicate on them, got {value!r}.")
    indices: dict[int, None] = {}  # a set in the order given
    for cls in value:
        which = index(cls)
        if which is None or not 0 <= which < num_classes:
            raise ValueError(f"{op}: classes must be indices in 0..{num_classes - 1}, got {cls!r}.")
        indices[which] = None
    if not indices:
        raise ValueError(f"{op}: classes must name at least one class, it is empty.")
    return list(indices)


def module(op: str, model: Any, argument: str = "model") -> None:
    """What can be looked at and run: a module in Python that holds values."""
    if not isinstance(model, nn.Module):
        found = f"{type(model).__name__} {getattr(model, '__name__', '')}".strip()
        raise TypeError(f"{op}: {argument} must be a torch.nn.Module, got {found}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{op}: {argument} must be a module in Python, got a {type(model).__name__}: give the module that it was "
            "made of."
        )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        missing = is_lazy(value)
        if value.is_meta or missing:
            what = "has none yet: run it once" if missing else "is on the meta device: move it with to_empty"
            raise ValueError(f"{op}: {argument} must hold values, {name!r} {what}, and load its weights first.")
