"""The ops by the Triton kernels of `discedit.kernels`, imported when first used: Triton takes a while."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from discedit.backends import reference
from discedit.backends.arguments import Rule, label_range
from discedit.backends.buffers import contiguous, flat_laws, in_place, with_first_token, with_published
from discedit.common.state import State
from discedit.common.window import Window


@lru_cache(maxsize=1)
def triton_interprets() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors; for tests."""
    if importlib.util.find_spec("triton") is None:
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def _launch(module: str, name: str, *arguments: Any) -> Any:
    """Runs a launcher on the device of its first argument, which is not always the current one."""
    run = getattr(importlib.import_module(f"discedit.kernels.{module}"), name)
    # Triton reads a tensor's memory as it is, without the sign of a view that torch has negated.
    arguments = tuple(value.resolve_neg() if isinstance(value, Tensor) else value for value in arguments)
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return run(*arguments)


@with_first_token
def pool(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor) -> Tensor:
    planes: Tensor = _launch("pool", "pool", x, channel_axis, statistics, out)
    return planes


def class_moments(
    x: Tensor, channel_axis: int, statistics: tuple[str, ...], scale: float, labels: Tensor, state: State
) -> None:
    fold_moments(pool(x, channel_axis, statistics), scale, labels, state)


def fold_moments(pooled: Tensor, scale: float, labels: Tensor, state: State) -> None:
    if labels.device.type == "cpu":
        label_range("class_moments", labels, state.num_classes)
    kind, pooled = type(state), pooled.contiguous()
    in_place(state, lambda own: _launch("class_moments", "fold_moments", pooled, scale, labels, kind(*own)))


def patch_moments(x: Tensor, window: Window, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, scatter = _launch("patch_moments", "patch_moments", x, window, positions)
    return mean, scatter


def fisher_bound(*laws: Tensor) -> Tensor:
    return _bound("fisher", laws)


def minimax_bound(*laws: Tensor) -> Tensor:
    return _bound("minimax", laws)


def minimax_published_bound(*laws: Tensor) -> Tensor:
    return reference.published(_bound("minimax", laws))


def _bound(name: str, laws: tuple[Tensor, ...]) -> Tensor:
    bounds: Tensor = _launch("bounds", "bound", *flat_laws(*laws), name)
    return bounds.view(laws[0].shape[:-1])


@with_published
def pairwise_min(moments: State, rule: Rule, witness: str) -> tuple[Tensor, Tensor]:
    moments = type(moments)(*contiguous(moments))
    values, pairs = _launch("pairwise_min", "pairwise_min", moments, rule.name, witness)
    return values, pairs
