"""What an edit does to the answers of a classifier, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from discedit.common.tables import format_table

if TYPE_CHECKING:
    from typing_extensions import Self

MOST_ROWS = 20  # classes of a table


@dataclass(frozen=True, eq=False)
class ClassDamage:
    """Answers before and after an edit: a mean over all classes hides what single ones lose.

    Without labels a sample's class is the answer before, which then counts as right.

    Attributes:
        samples: (classes,), int64.
        right_before, right_after: (classes,), int64: samples that are answered rightly.
        changed: (classes,), int64: samples whose answer is another one, be it right or wrong.
    """

    samples: Tensor
    right_before: Tensor
    right_after: Tensor
    changed: Tensor

    @classmethod
    def of(cls, before: Tensor, after: Tensor, labels: Tensor | None = None) -> Self:
        """From logits of the same samples, both (samples, classes), and where known their labels, (samples,)."""
        old, new = before.argmax(1).cpu(), after.argmax(1).cpu()
        own = old if labels is None else labels.cpu()

        def count(which: Tensor) -> Tensor:
            return torch.bincount(own[which], minlength=before.shape[1])

        everything = torch.ones_like(own, dtype=torch.bool)
        return cls(count(everything), count(old == own), count(new == own), count(new != old))

    def merged(self, other: Self) -> Self:
        """Of the samples of both."""
        mine, theirs = vars(self), vars(other)
        return type(self)(**{name: mine[name] + theirs[name] for name in mine})

    def renumbered(self, classes: Sequence[int], number: int) -> Self:
        """With the class at place i as class ``classes[i]`` of so many; the others have no samples."""
        places = torch.tensor(classes)
        found = {name: values.new_zeros(number).index_copy(0, places, values) for name, values in vars(self).items()}
        return type(self)(**found)

    @property
    def loss(self) -> Tensor:
        """Share of each class's samples that are answered rightly before, less the same after: (classes,), float64, NaN
        without samples."""
        return (self.right_before - self.right_after).double() / self.samples.double()

    @property
    def spread(self) -> float:
        """Standard deviation of `loss` over the classes that have samples."""
        seen = self.loss[self.samples > 0]
        return float(seen.std(correction=0)) if len(seen) else 0.0

    @property
    def worst_first(self) -> list[int]:
        """The classes that have samples, in the order of what they lose."""
        order = self.loss.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
        return [cls for cls in order if self.samples[cls]]

    @property
    def worst_class(self) -> int:
        """The class that loses most."""
        return self.worst_first[0]

    @property
    def flips(self) -> float:
        """Share of all samples whose answer changes."""
        return float(self.changed.sum()) / max(1, int(self.samples.sum()))

    def __str__(self) -> str:
        worst, total = self.worst_class, int(self.samples.sum())
        lost = int(self.right_before[worst] - self.right_after[worst])
        most = f"class {worst} loses most, {lost} of {int(self.samples[worst])}" if lost > 0 else "no class loses any"
        return f"answers that change: {int(self.changed.sum()):,} of {total:,} ({100 * self.flips:.1f} %); {most}"

    def summary(self, names: Sequence[str] = ()) -> str:
        """A table of the classes that lose most, with their names where given."""
        rows = [["class", "samples", "right before", "right after", "changed"]]
        numbers = (self.samples, self.right_before, self.right_after, self.changed)
        rows += [
            [names[cls] if names else str(cls), *(str(int(number[cls])) for number in numbers)]
            for cls in self.worst_first[:MOST_ROWS]
        ]
        return f"{format_table(rows)}\n{self}"
