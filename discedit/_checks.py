"""Input checks shared by every layer. An error names the argument, the rule and the value."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from discedit._state import ClassMoments

STATISTICS = ("mean",)
WITNESSES = ("linear", "quadratic")
BOUNDS = ("fisher", "minimax")
LAYOUTS = ("auto", "nchw", "tokens")
MAX_DIMENSION = 32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shape_of(tensor: Tensor) -> str:
    """The shape as a user would type it."""
    return str(tuple(tensor.shape))


def quoted(values: Collection[str]) -> str:
    return ", ".join(repr(value) for value in values)


def choice(op: str, argument: str, value: str, allowed: Collection[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{op}: {argument} must be one of {quoted(allowed)}, got {value!r}.")
    return value


def tensor(op: str, argument: str, value: Any, dtypes: Collection[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a torch.Tensor, got {type(value).__name__}.")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {argument} must be one of {names}, got {found} (shape {shape_of(value)}).")
    return value


def index(value: Any) -> int | None:
    """The value as an int if it is an integer of any library (never a bool), else None."""
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


def state(op: str, argument: str, moments: Any) -> ClassMoments:
    """A state whose five tensors fit together."""
    if not isinstance(moments, ClassMoments):
        raise TypeError(f"{op}: {argument} must be a ClassMoments, got {type(moments).__name__}.")
    shape = moments.mean.shape
    fits = moments.mean.ndim == 2 and moments.count.shape == shape[:1] and moments.count.dtype == torch.int64
    for part in moments.tensors()[1:]:
        fits = fits and part.shape == shape and part.dtype == torch.float64 and part.device == moments.count.device
    if not fits:
        found = ", ".join(f"{shape_of(part)} {str(part.dtype).removeprefix('torch.')}" for part in moments.tensors())
        raise ValueError(
            f"{op}: {argument} must hold count (classes,) int64 and mean, m2, m3, m4 (classes, channels) float64 on "
            f"one device, it holds {found}."
        )
    return moments


def feature_map(op: str, x: Any, layout: str) -> tuple[Tensor, int]:
    """The checked feature map, detached, and the axis of its channels."""
    tensor(op, "x", x, FLOATS)
    choice(op, "layout", layout, LAYOUTS)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must have at least a sample and a channel axis, got shape {shape_of(x)}.")
    if layout == "auto" and x.ndim == 3:
        raise ValueError(
            f"{op}: layout must be named for a map with 3 axes, 'nchw' for (samples, channels, length) or 'tokens' for "
            f"(samples, tokens, channels): x has shape {shape_of(x)}."
        )
    axis = x.ndim - 1 if layout == "tokens" else 1
    if x.shape[0] and x.shape[axis] and x.numel() == 0:
        raise ValueError(f"{op}: x must have at least one element per map to average, got shape {shape_of(x)}.")
    feature: Tensor = x
    return feature.detach(), axis


def labels(op: str, value: Any, x: Tensor, num_classes: int) -> Tensor:
    """Checked class indices: int64, contiguous, on x's device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: labels must be a torch.Tensor of class indices, got {type(value).__name__}.")
    if value.dtype not in INTEGERS:
        raise ValueError(
            f"{op}: labels must be integers (class indices), got {str(value.dtype).removeprefix('torch.')} "
            f"(shape {shape_of(value)})."
        )
    if value.ndim != 1 or value.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: labels must hold one class index per sample: x has {x.shape[0]} samples (shape {shape_of(x)}), "
            f"labels has shape {shape_of(value)}."
        )
    value = value.detach().to(torch.int64)
    wrong = (value < 0) | (value >= num_classes)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{op}: labels must lie in 0..{num_classes - 1} (num_classes={num_classes}), found {int(value[position])} "
            f"at position {position}."
        )
    checked: Tensor = value.to(x.device).contiguous()
    return checked


def law_pairs(op: str, mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> int:
    """Checks the four arguments of a bound and returns the dimension d."""
    given = {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}
    for argument, value in given.items():
        tensor(op, argument, value, (torch.float32, torch.float64))
        if value.dtype != mean1.dtype or value.device != mean1.device:
            raise ValueError(
                f"{op}: {argument} must have the type and device of mean1: mean1 is {mean1.dtype} on {mean1.device}, "
                f"{argument} is {value.dtype} on {value.device}."
            )
    d = mean1.shape[-1] if mean1.ndim else 0
    shapes = ", ".join(f"{argument} {shape_of(value)}" for argument, value in given.items())
    if not 1 <= d <= MAX_DIMENSION:
        raise ValueError(f"{op}: the last axis of mean1 must be d in 1..{MAX_DIMENSION}, got {shapes}.")
    batch = mean1.shape[:-1]
    if mean2.shape != mean1.shape or cov1.shape != (*batch, d, d) or cov2.shape != cov1.shape:
        raise ValueError(f"{op}: means must have shape (..., d) and covariances (..., d, d), got {shapes}.")
    return int(d)
