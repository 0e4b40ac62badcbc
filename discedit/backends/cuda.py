"""The ops on tensors of an NVIDIA GPU, by the compiled kernels `discedit._cuda`. Nothing waits for the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discedit.backends import extensions, reference
from discedit.backends.arguments import Rule
from discedit.backends.buffers import (
    bound_of,
    contiguous,
    in_place,
    lend,
    lend_optional,
    patch_outputs,
    with_first_token,
    with_published,
)
from discedit.common.state import State
from discedit.common.window import Window

UNSORTED = 4096  # samples up to which a class's members are found by looking at every label


def _kernels() -> Any:
    return extensions.cuda_module()[0]


def _stream(device: torch.device) -> int:
    # The one on which torch has queued what makes the tensors, so that nobody waits for it.
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _scratch(size: int, device: torch.device) -> Any:
    """Working memory of so many float64, from torch's own allocator."""
    return lend(torch.empty(size, dtype=torch.float64, device=device))[0] if size else None


@with_first_token
def pool(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor) -> Tensor:
    scratch = _scratch(_kernels().pool_scratch(*lend(x), channel_axis, statistics), x.device)
    data, target = lend(x, out)
    _kernels().pool(data, channel_axis, statistics, target, scratch, _stream(x.device))
    return out


def class_moments(
    x: Tensor, channel_axis: int, statistics: tuple[str, ...], scale: float, labels: Tensor, state: State
) -> None:
    fold_moments(pool(x, channel_axis, statistics), scale, labels, state)


def fold_moments(pooled: Tensor, scale: float, labels: Tensor, state: State) -> None:
    # Stable, so that each class is summed in the order of the batch: the same bits in every run.
    order = lend_optional(torch.sort(labels, stable=True).indices if len(labels) > UNSORTED else None)
    data, classes = lend(pooled.contiguous(), labels)
    stream = _stream(labels.device)
    in_place(state, lambda own: _kernels().fold_moments(data, scale, classes, order, lend(*own), stream))


def merge_moments(into: State, other: State) -> None:
    others, stream = lend(*contiguous(other)), _stream(into.device)
    in_place(into, lambda own: _kernels().merge_moments(lend(*own), others, stream))


def patch_moments(x: Tensor, window: Window, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, scatter = patch_outputs(x, window)
    count = None if positions is None else len(positions)
    scratch = _scratch(_kernels().patch_moments_scratch(*lend(x), *window, count), x.device)
    arrays = lend_optional(positions), *lend(mean, scatter), scratch
    _kernels().patch_moments(*lend(x), *window, *arrays, _stream(x.device))
    return mean, scatter


def fisher_bound(*laws: Tensor) -> Tensor:
    return bound_of(laws, lambda *arrays: _kernels().bound("fisher", *arrays, _stream(laws[0].device)))


def minimax_bound(*laws: Tensor) -> Tensor:
    return bound_of(laws, lambda *arrays: _kernels().bound("minimax", *arrays, _stream(laws[0].device)))


def minimax_published_bound(*laws: Tensor) -> Tensor:
    return reference.published(minimax_bound(*laws))


@with_published
def one_vs_rest(moments: State, rule: Rule, witness: str) -> Tensor:
    arrays, device = contiguous(moments), moments.device
    out = torch.empty(moments.channels, moments.num_classes, dtype=torch.float64, device=device)
    scratch = _scratch(_kernels().one_vs_rest_scratch(lend(*arrays)), device)
    _kernels().one_vs_rest(lend(*arrays), rule.name, witness, *lend(out), scratch, _stream(device))
    return out


@with_published
def pairwise_min(moments: State, rule: Rule, witness: str) -> tuple[Tensor, Tensor]:
    arrays, device = contiguous(moments), moments.device
    values = torch.empty(moments.channels, dtype=torch.float64, device=device)
    pairs = torch.empty(moments.channels, 2, dtype=torch.int64, device=device)
    scratch = _scratch(_kernels().pairwise_min_scratch(lend(*arrays)), device)
    _kernels().pairwise_min(lend(*arrays), rule.name, witness, *lend(values, pairs), scratch, _stream(device))
    return values, pairs
