"""The smallest edit that forgets enough, or the largest that the other classes bear, by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from discedit.moments.forget_retain import ForgetRetainSplit
from discedit.recipes.recipe import Edit
from discedit.scoring.scores import Scores

FORGET = 0.05  # the target where there is data and nothing else says how much goes
LOOKED = 128  # samples to forget that every step of a search is judged by
FIRST, PRECISION = 0.02, 0.04  # where a search begins, and the share at which it ends


@dataclass(frozen=True)
class Problem:
    """What is to be forgotten, of which model, and what there is to do it with."""

    model: nn.Module
    scores: Scores
    forget: list[int]  # classes
    others: list[int]
    layers: list[str] | None  # that were asked for; None: the method's own choice
    data: ForgetRetainSplit | None
    example_inputs: Any
    targets: Mapping[str, float]  # "forget_accuracy" or "retain_drop" -> asked, in [0, 1]


def search(problem: Problem, first: Callable[[int], Edit], sizes: int, most: int, what: str) -> tuple[Edit, str]:
    """The edit that meets the targets, or comes nearest, and what is to be said of those that it misses.

    Of a target for what is forgotten the smallest edit, else the largest.

    Args:
        first: makes the edit of so many of `sizes` parts, at most `most`; `what` names the parts.
    """
    assert problem.data is not None
    data, targets = problem.data, problem.targets
    before = data.accuracy(problem.model, "retain") if "retain_drop" in targets else math.nan
    # A search comes back to counts that it has tried, and each costs an edit and passes over the samples.
    edit = cache(first)
    forgot = cache(lambda count: data.accuracy(edit(count).model, "forget", LOOKED))
    drop = cache(lambda count: before - data.accuracy(edit(count).model, "retain"))
    least = "forget_accuracy" in targets
    tried: set[int] = set()

    def beyond(count: int) -> bool:
        """Whether what is looked for is no larger than this; of the largest, whether it is smaller."""
        tried.add(count)
        return forgot(count) <= targets["forget_accuracy"] if least else drop(count) > targets["retain_drop"]

    # Doubled until it is passed, then bisected.
    low, high = 0, min(max(1, round(FIRST * sizes)), most)
    while not (found := beyond(high)) and high < most:
        low, high = high, min(2 * high, most)
    # No finer: each step costs an edit and passes over the samples.
    while found and high - low > max(1, PRECISION * high):
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    if least and not found:  # nothing forgets enough: what forgets most
        count = min(tried, key=lambda count: (forgot(count), count))
    else:
        count = high if least or not found else max(low, 1)
    tried.add(count)
    chosen, reached = edit(count), {name: (forgot if name == "forget_accuracy" else drop)(count) for name in targets}
    chosen.recipe.settings = {
        "targets": {
            name: {"asked": value, "reached": reached[name], "met": reached[name] <= value}
            for name, value in targets.items()
        },
        "count": count,
        "tried": {str(number): round(forgot(number), 4) for number in sorted(tried)},
        **chosen.recipe.settings,
    }
    missed = [
        f"{name} is {reached[name]:.4f}, which misses the target {value:g} by {reached[name] - value:.4f}"
        for name, value in targets.items()
        if reached[name] > value
    ]
    if not missed:
        return chosen, ""
    return chosen, (
        f"unlearn: of {len(tried)} edits of up to {max(tried)} {what} none meets the targets: {'; '.join(missed)}."
    )
