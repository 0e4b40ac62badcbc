"""The per-class moments of one layer: what the ops pass between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_STATISTICS = 8


def triangle(dimension: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the lower triangle, row by row: (0, 0), (1, 0), (1, 1), (2, 0), ..."""
    rows, columns = torch.tril_indices(dimension, dimension)
    return rows, columns


@dataclass(frozen=True)
class _State(ABC):
    """What both kinds share. The last two axes of all but ``count`` are classes and channels."""

    count: Tensor
    mean: Tensor

    axes: ClassVar[int]  # of `mean`, whose shape gives that of all others

    @property
    def num_classes(self) -> int:
        return self.mean.shape[-2]

    @property
    def channels(self) -> int:
        return self.mean.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""

    @staticmethod
    @abstractmethod
    def shapes(*mean: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name and in the order of `tensors`, from the axes of the mean."""

    def named(self) -> dict[str, Tensor]:
        return dict(zip(self.shapes(*self.mean.shape), self.tensors(), strict=True))

    @classmethod
    def with_mean(cls, mean: Iterable[int], device: torch.device | str | None) -> Self:
        """The empty state whose mean has this shape."""
        count, *sums = cls.shapes(*mean).values()
        return cls(
            torch.zeros(count, dtype=torch.int64, device=device),
            *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in sums),
        )

    def clone(self) -> Self:
        return type(self)(*(tensor.clone() for tensor in self.tensors()))

    def to(self, device: torch.device | str) -> Self:
        """A copy on a device, also where that is its own."""
        return type(self)(*(tensor.to(device, copy=True) for tensor in self.tensors()))

    def copy_(self, other: Self) -> Self:
        """Overwrite this state with another of the same shape."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)
        return self


@dataclass(frozen=True)
class ClassMoments(_State):
    """Count, mean and central moment sums of one layer's statistic, per class and channel.

    Attributes:
        count: samples seen per class, shape (classes,), int64.
        mean: mean per class and channel, shape (classes, channels), float64; 0 for a class without samples.
        m2, m3, m4: sums over samples of (t - mean)^2, ^3, ^4, same shape, float64.

    Sums, not averages, so that states merge exactly (Chan, Golub and LeVeque 1979; Pebay 2008). Divide by ``count``
    for population moments.
    """

    m2: Tensor
    m3: Tensor
    m4: Tensor

    axes: ClassVar[int] = 2

    @staticmethod
    def shapes(*mean: int) -> dict[str, tuple[int, ...]]:
        return {"count": mean[:1], "mean": mean, "m2": mean, "m3": mean, "m4": mean}

    @classmethod
    def empty(cls, num_classes: int, channels: int, device: torch.device | str | None = None) -> ClassMoments:
        """The neutral element of merging: no samples in any class."""
        return cls.with_mean((num_classes, channels), device)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.count, self.mean, self.m2, self.m3, self.m4


@dataclass(frozen=True)
class VectorMoments(_State):
    """Count, mean vector and scatter matrix of several statistics of one layer, per class and channel.

    Attributes:
        count: samples seen per class, shape (classes,), int64.
        mean: mean vector, shape (d, classes, channels), 1 <= d <= 8, float64; 0 for a class without samples.
        scatter: sums over samples of (t_i - mean_i) (t_j - mean_j), shape (d (d + 1) / 2, classes, channels), float64:
            the lower triangle, row by row, (i, j) = (0, 0), (1, 0), (1, 1), (2, 0), ...

    Sums, not averages, so that states merge exactly (Chan, Golub and LeVeque 1979). `covariance` divides.
    """

    scatter: Tensor

    axes: ClassVar[int] = 3

    @staticmethod
    def shapes(*mean: int) -> dict[str, tuple[int, ...]]:
        dimension, *plane = mean
        return {"count": mean[1:2], "mean": mean, "scatter": (dimension * (dimension + 1) // 2, *plane)}

    @classmethod
    def empty(
        cls, dimension: int, num_classes: int, channels: int, device: torch.device | str | None = None
    ) -> VectorMoments:
        """The neutral element of merging: no samples in any class."""
        return cls.with_mean((dimension, num_classes, channels), device)

    @property
    def dimension(self) -> int:
        return self.mean.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.count, self.mean, self.scatter

    def covariance(self) -> Tensor:
        """Population covariance matrices, shape (classes, channels, d, d), float64; 0 for a class without samples."""
        rows, columns = triangle(self.dimension)
        full = self.scatter.new_empty(self.dimension, *self.mean.shape)
        average = self.scatter / self.count.clamp(min=1)[:, None]
        full[rows, columns] = average
        full[columns, rows] = average
        covariance = full.permute(2, 3, 0, 1)
        return torch.where((self.count > 0)[:, None, None, None], covariance, 0.0)


State = ClassMoments | VectorMoments
