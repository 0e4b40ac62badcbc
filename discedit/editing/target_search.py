"""The smallest edit that forgets enough, or the largest that the other classes bear, by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from discedit.moments.forget_retain import ForgetRetainSplit
from discedit.recipes.recipe import Edit
from discedit.scoring.scores import Scores

FORGET = 0.05  # the target where there is data and nothing else says how much goes
LOOKED = 128  # samples to forget that every step of a search is judged by
FIRST, PRECISION = 0.02, 0.04  # where a search begins, and the share at which it ends


@dataclass(frozen=True)
class Problem:
    """What is to be forgotten, of which model, and what there is to do it with.

    Attributes:
        forget, others: classes.
        layers: that were asked for; None: the method's own choice.
        data: samples of both kinds of classes.
        targets: "forget_accuracy" or "retain_drop" -> asked, in [0, 1].
    """

    model: nn.Module
    scores: Scores
    forget: list[int]
    others: list[int]
    layers: list[str] | None
    data: ForgetRetainSplit | None
    example_inputs: Any
    targets: Mapping[str, float]


class Plan(Protocol):
    """Edits of every size: the first so many of `sizes` parts, at most `most`; `what` names the parts."""

    what: str

    @property
    def sizes(self) -> int: ...

    @property
    def most(self) -> int: ...

    def first(self, count: int) -> Edit: ...


@dataclass(frozen=True)
class _Tried:
    """An edit, and what is known of it."""

    edit: Edit
    forget_accuracy: float
    retain_drop: float | None = None


class _Search:
    """Edits that were tried, by size; whether one is large enough."""

    def __init__(self, plan: Plan, model: nn.Module, data: ForgetRetainSplit, targets: Mapping[str, float]) -> None:
        self.plan, self.data, self.targets = plan, data, targets
        self.least = "forget_accuracy" in targets  # the smallest edit is looked for, else the largest
        self.before = data.accuracy(model, "retain") if "retain_drop" in targets else math.nan
        self.tried: dict[int, _Tried] = {}

    def look(self, count: int) -> _Tried:
        if count not in self.tried:
            edit = self.plan.first(count)
            forgot = self.data.accuracy(edit.model, "forget", LOOKED)
            self.tried[count] = _Tried(edit, forgot, None if self.least else self.drop(edit))
        return self.tried[count]

    def drop(self, edit: Edit) -> float:
        return self.before - self.data.accuracy(edit.model, "retain")

    def beyond(self, count: int) -> bool:
        """Whether what is looked for is no larger than this; of the largest, whether it is smaller."""
        found = self.look(count)
        if self.least:
            return found.forget_accuracy <= self.targets["forget_accuracy"]
        assert found.retain_drop is not None
        return found.retain_drop > self.targets["retain_drop"]

    def count(self) -> int:
        """The size that is looked for: doubled until it is passed, then bisected."""
        most = self.plan.most
        low, high = 0, min(max(1, round(FIRST * self.plan.sizes)), most)
        while not self.beyond(high) and high < most:
            low, high = high, min(2 * high, most)
        found = self.beyond(high)
        while found and high - low > max(1, PRECISION * high):
            middle = (low + high) // 2
            low, high = (low, middle) if self.beyond(middle) else (middle, high)
        if found and not self.least:
            return max(low, 1)
        if self.least and not found:  # nothing forgets enough: what forgets most
            return min(self.tried, key=lambda count: (self.tried[count].forget_accuracy, count))
        return high


def search(plan: Plan, model: nn.Module, data: ForgetRetainSplit, targets: Mapping[str, float]) -> tuple[Edit, str]:
    """The edit that meets the targets, or comes nearest, and what is to be said of those that it misses."""
    looking = _Search(plan, model, data, targets)
    count = looking.count()
    chosen, tried = looking.look(count), looking.tried
    reached: dict[str, float] = {"forget_accuracy": chosen.forget_accuracy}
    if "retain_drop" in targets:
        reached["retain_drop"] = looking.drop(chosen.edit) if chosen.retain_drop is None else chosen.retain_drop
    chosen.edit.recipe.settings = {
        "targets": {
            name: {"asked": value, "reached": reached[name], "met": reached[name] <= value}
            for name, value in targets.items()
        },
        "count": count,
        "tried": {str(number): round(tried[number].forget_accuracy, 4) for number in sorted(tried)},
        **chosen.edit.recipe.settings,
    }
    missed = [
        f"{name} is {reached[name]:.4f}, which misses the target {value:g} by {reached[name] - value:.4f}"
        for name, value in targets.items()
        if reached[name] > value
    ]
    if not missed:
        return chosen.edit, ""
    return chosen.edit, (
        f"unlearn: of {len(tried)} edits of up to {max(tried)} {plan.what} none meets the targets: {'; '.join(missed)}."
    )
