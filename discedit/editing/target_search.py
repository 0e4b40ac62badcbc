"""The smallest edit that forgets enough, or the largest that the other classes bear, by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


class _Search:
    """Edits that were tried, by size, and what each reached; arguments as for `search`."""

    def __init__(self, problem: Problem, first: Callable[[int], Edit], sizes: int, most: int) -> None:
        assert problem.data is not None
        self.data, self.targets = problem.data, problem.targets
        self.first, self.sizes, self.most = first, sizes, most
        self.least = "forget_accuracy" in self.targets  # the smallest edit is looked for, else the largest
        self.before = self.data.accuracy(problem.model, "retain") if "retain_drop" in self.targets else math.nan
        self.tried: dict[int, Edit] = {}
        self.forget_accuracy: dict[int, float] = {}
        self.retain_drop: dict[int, float] = {}

    def drop(self, count: int) -> float:
        if count not in self.retain_drop:
            self.retain_drop[count] = self.before - self.data.accuracy(self.tried[count].model, "retain")
        return self.retain_drop[count]

    def beyond(self, count: int) -> bool:
        """Whether what is looked for is no larger than this; of the largest, whether it is smaller."""
        if count not in self.tried:
            self.tried[count] = self.first(count)
            self.forget_accuracy[count] = self.data.accuracy(self.tried[count].model, "forget", LOOKED)
        if self.least:
            return self.forget_accuracy[count] <= self.targets["forget_accuracy"]
        return self.drop(count) > self.targets["retain_drop"]

    def count(self) -> int:
        """The size that is looked for: doubled until it is passed, then bisected."""
        low, high = 0, min(max(1, round(FIRST * self.sizes)), self.most)
        while not self.beyond(high) and high < self.most:
            low, high = high, min(2 * high, self.most)
        found = self.beyond(high)
        while found and high - low > max(1, PRECISION * high):
            middle = (low + high) // 2
            low, high = (low, middle) if self.beyond(middle) else (middle, high)
        if found and not self.least:
            high = max(low, 1)
            self.beyond(high)
        if self.least and not found:  # nothing forgets enough: what forgets most
            return min(self.tried, key=lambda count: (self.forget_accuracy[count], count))
        return high


def search(problem: Problem, first: Callable[[int], Edit], sizes: int, most: int, what: str) -> tuple[Edit, str]:
    """The edit that meets the targets, or comes nearest, and what is to be said of those that it misses.

    Args:
        first: makes the edit of so many of `sizes` parts, at most `most`; `what` names the parts.
    """
    looking, targets = _Search(problem, first, sizes, most), problem.targets
    count = looking.count()
    edit, tried = looking.tried[count], looking.forget_accuracy
    reached = {"forget_accuracy": tried[count]}
    if "retain_drop" in targets:
        reached["retain_drop"] = looking.drop(count)
    edit.recipe.settings = {
        "targets": {
            name: {"asked": value, "reached": reached[name], "met": reached[name] <= value}
            for name, value in targets.items()
        },
        "count": count,
        "tried": {str(number): round(tried[number], 4) for number in sorted(tried)},
        **edit.recipe.settings,
    }
    missed = [
        f"{name} is {reached[name]:.4f}, which misses the target {value:g} by {reached[name] - value:.4f}"
        for name, value in targets.items()
        if reached[name] > value
    ]
    if not missed:
        return edit, ""
    return (
        edit,
        f"unlearn: of {len(tried)} edits of up to {max(tried)} {what} none meets the targets: {'; '.join(missed)}.",
    )
