"""The ops on CPU tensors, by the compiled core `discedit._cpu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from discedit.backends import extensions
from discedit.backends.arguments import Rule
from discedit.backends.buffers import (
    FAST,
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


def _core() -> Any:
    return extensions.cpu_module()[0]


@with_first_token
def pool(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor) -> Tensor:
    data, target = lend(x, out)
    _core().pool(data, channel_axis, statistics, target, get_num_threads())
    return out


def class_moments(
    x: Tensor, channel_axis: int, statistics: tuple[str, ...], scale: float, labels: Tensor, state: State
) -> None:
    if "cls" in statistics and len(statistics) > 1:
        fold_moments(pool(x, channel_axis, statistics), scale, labels, state)
        return
    if "cls" in statistics:
        x, statistics = x[:, :1], ("mean",)
    run, (data, classes) = _core().class_moments, lend(x, labels)
    threads = get_num_threads()
    in_place(state, lambda own: run(data, channel_axis, statistics, scale, classes, lend(*own), threads))


def fold_moments(pooled: Tensor, scale: float, labels: Tensor, state: State) -> None:
    data, classes = lend(pooled, labels)
    in_place(state, lambda own: _core().fold_moments(data, scale, classes, lend(*own), get_num_threads()))


def merge_moments(into: State, other: State) -> None:
    others = lend(*contiguous(other))
    in_place(into, lambda own: _core().merge_moments(lend(*own), others, get_num_threads()))


def patch_moments(x: Tensor, window: Window, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, scatter = patch_outputs(x, window)
    arrays = lend_optional(positions), *lend(mean, scatter)
    _core().patch_moments(*lend(x), *window, *arrays, get_num_threads())
    return mean, scatter


def fisher_bound(*laws: Tensor) -> Tensor:
    return bound_of(laws, lambda *arrays: _core().bound("fisher", *arrays, get_num_threads()))


def minimax_bound(*laws: Tensor) -> Tensor:
    return bound_of(laws, lambda *arrays: _core().bound("minimax", *arrays, get_num_threads()))


def minimax_published_bound(*laws: Tensor) -> Tensor:
    return _member(Rule("minimax_published"), laws)


def hellinger_bound(*laws: Tensor) -> Tensor:
    return _member(Rule("hellinger"), laws)


def robust_bound(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, radius: Tensor, rho: float) -> Tensor:
    return _member(Rule("robust", rho=rho), (mean1, cov1, mean2, cov2), radius.contiguous().view(-1))


def _member(rule: Rule, laws: tuple[Tensor, ...], radius: Tensor | None = None) -> Tensor:
    def write(*arrays: Any) -> None:
        *given, out = arrays
        _core().member(rule, *given, lend_optional(radius), out, get_num_threads())

    return bound_of(laws, write)


def witness_bound(mean1: Tensor, second1: Tensor, mean2: Tensor, second2: Tensor, published: bool) -> Tensor:
    out = torch.empty(mean1.shape, dtype=torch.float64)
    moments = [moment.detach().double().contiguous() for moment in (mean1, second1, mean2, second2)]
    _core().witness(published, *lend(*moments, out), get_num_threads())
    return out


def one_vs_rest(moments: State, rule: Rule, witness: str) -> Tensor:
    out = torch.empty(moments.channels, moments.num_classes, dtype=torch.float64)
    if rule.name not in FAST:
        return _compare(moments, rule, witness, "with_rest", out)
    _core().one_vs_rest(lend(*contiguous(moments)), rule.name, witness, *lend(out), get_num_threads())
    return out


def one_vs_one(moments: State, rule: Rule, witness: str) -> Tensor:
    out = torch.empty(moments.channels, moments.num_classes, moments.num_classes, dtype=torch.float64)
    return _compare(moments, rule, witness, "all_pairs", out)


def pairwise_mean(moments: State, rule: Rule, witness: str) -> Tensor:
    return _compare(moments, rule, witness, "mean", torch.empty(moments.channels, dtype=torch.float64))


@with_published
def pairwise_min(moments: State, rule: Rule, witness: str) -> tuple[Tensor, Tensor]:
    values = torch.empty(moments.channels, dtype=torch.float64)
    pairs = torch.empty(moments.channels, 2, dtype=torch.int64)
    if rule.name not in FAST:
        return _compare(moments, rule, witness, "least", values, pairs), pairs
    _core().pairwise_min(lend(*contiguous(moments)), rule.name, witness, *lend(values, pairs), get_num_threads())
    return values, pairs


def _compare(
    moments: State, rule: Rule, witness: str, comparison: str, out: Tensor, pairs: Tensor | None = None
) -> Tensor:
    arrays = *lend(out), lend_optional(pairs)
    _core().one_vs_one(lend(*contiguous(moments)), rule, witness, comparison, *arrays, get_num_threads())
    return out
