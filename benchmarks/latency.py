"""Time of a forward pass before and after an edit."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks._common import paired_ratio, seconds
from discedit.model.forward import call, frozen_eval


def latency_ratio(
    before: nn.Module, after: nn.Module, x: Tensor, repeats: int = 15
) -> tuple[float, float, float, float]:
    """Forward passes of two models in turns, on the CPU, in eval mode and without gradients.

    Args:
        before, after: the models; their modes are left as they were.
        x: a batch of inputs.
        repeats: timed passes of each, at least 2, after one that is not timed.

    Returns:
        Median and spread (largest minus smallest quartile) of after / before in time, and the medians of both in
        seconds, before first.

    Raises:
        ValueError: repeats is below 2, or x is not on the CPU (a GPU's passes are not over when they return).
    """
    if not isinstance(repeats, int) or repeats < 2:
        raise ValueError(f"latency_ratio: repeats must be an integer of at least 2, got {repeats!r}.")
    if x.device.type != "cpu":
        raise ValueError(f"latency_ratio: x must be on the CPU, got one on {x.device}.")
    taken: dict[str, list[float]] = {"before": [], "after": []}

    def passes(model: nn.Module, times: list[float]) -> Callable[[], Any]:
        return lambda: times.append(seconds(lambda: call(model, x)))

    with frozen_eval(before), frozen_eval(after):
        ratio, spread = paired_ratio(passes(after, taken["after"]), passes(before, taken["before"]), repeats)
    # The first of each is the untimed one.
    return ratio, spread, statistics.median(taken["before"][1:]), statistics.median(taken["after"][1:])
