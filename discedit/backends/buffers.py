"""Tensors as the kernels take and leave them: contiguous memory, lent as DLPack capsules, outputs made by torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, but re-exported without saying so

from discedit.backends import reference
from discedit.backends.arguments import Rule
from discedit.common.state import State
from discedit.common.window import Window

# Bounds with kernels of their own; the CPU core compares one pair after the other by all others.
FAST = ("fisher", "minimax")


def lend(*tensors: Tensor) -> tuple[Any, ...]:
    """DLPack capsules: a tenth of the time that a tensor's own __dlpack__ takes, which counts in a pass over layers."""
    # DLPack lends memory as it is, without the sign of a view that torch has negated.
    return tuple(to_dlpack(tensor.resolve_neg()) for tensor in tensors)


def lend_optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else lend(tensor)[0]


def contiguous(state: State) -> tuple[Tensor, ...]:
    """The state's own tensors where they are contiguous, copies where they are not."""
    return tuple(tensor.contiguous() for tensor in state.tensors())


def in_place(state: State, write: Callable[[tuple[Tensor, ...]], None]) -> None:
    """Lets `write` change the state, whose memory may have any order."""
    arrays = contiguous(state)
    write(arrays)
    for source, target in zip(arrays, state.tensors(), strict=True):
        if source is not target:
            target.copy_(source)


def patch_outputs(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Mean and scatter of the patches of each channel, to be written to."""
    shape = x.shape[1], window.taps
    mean = torch.empty(*shape, dtype=torch.float64, device=x.device)
    return mean, torch.empty(*shape, window.taps, dtype=torch.float64, device=x.device)


def flat_laws(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> list[Tensor]:
    """Means (pairs, d) and covariances (pairs, d, d), contiguous, in float64."""
    pairs, d = mean1.shape[:-1].numel(), mean1.shape[-1]
    shapes = ((pairs, d), (pairs, d, d)) * 2
    laws = zip((mean1, cov1, mean2, cov2), shapes, strict=True)
    return [law.detach().double().reshape(shape).contiguous() for law, shape in laws]


def bound_of(laws: tuple[Tensor, ...], write: Callable[..., None]) -> Tensor:
    """What `write` leaves in its last array, one number for every pair of laws; the others are the laws."""
    out = torch.empty(laws[0].shape[:-1], dtype=torch.float64, device=laws[0].device)
    if out.numel():
        write(*lend(*flat_laws(*laws), out.view(-1)))
    return out


def with_first_token(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `pool` that knows all statistics but "cls" learns that one too: the mean of maps of one token."""

    @wraps(run)
    def pool(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor | None = None) -> Tensor:
        if out is None:
            shape = (len(statistics), x.shape[0], x.shape[channel_axis])
            out = torch.empty(shape, dtype=torch.float64, device=x.device)
        if "cls" not in statistics:
            return run(x, channel_axis, statistics, out)
        place = statistics.index("cls")
        others = statistics[:place] + statistics[place + 1 :]
        if others:
            planes = pool(x, channel_axis, others)
            out[:place], out[place + 1 :] = planes[:place], planes[place:]
        run(x[:, :1], channel_axis, ("mean",), out[place : place + 1])
        return out

    return pool


def with_published(run: Callable[[State, Rule, str], Any]) -> Callable[[State, Rule, str], Any]:
    """A comparison by "minimax" serves "minimax_published" too, which rises with it."""

    @wraps(run)
    def compare(moments: State, rule: Rule, witness: str) -> Any:
        if rule.name != "minimax_published":
            return run(moments, rule, witness)
        found = run(moments, Rule("minimax"), witness)
        if isinstance(found, Tensor):
            return reference.published(found)
        values, pairs = found
        return reference.published(values), pairs

    return compare
