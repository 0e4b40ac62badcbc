"""The per-class moments of one layer: what the ops pass between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassMoments:
    """Count, mean and central moment sums of one layer's statistic, per class and channel.

    Attributes:
        count: samples seen per class, shape (classes,), int64.
        mean: mean per class and channel, shape (classes, channels), float64; 0 for a class without samples.
        m2, m3, m4: sums over samples of (t - mean)^2, ^3, ^4, same shape, float64.

    Sums, not averages, so that states merge exactly (Chan, Golub and LeVeque 1979; Pebay 2008). Divide by ``count``
    for population moments.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor

    @classmethod
    def empty(cls, num_classes: int, channels: int, device: torch.device | str | None = None) -> ClassMoments:
        """The neutral element of merging: no samples in any class."""
        count = torch.zeros(num_classes, dtype=torch.int64, device=device)
        sums = (torch.zeros(num_classes, channels, dtype=torch.float64, device=device) for _ in range(4))
        return cls(count, *sums)

    @property
    def num_classes(self) -> int:
        return self.mean.shape[0]

    @property
    def channels(self) -> int:
        return self.mean.shape[1]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.count, self.mean, self.m2, self.m3, self.m4

    def clone(self) -> ClassMoments:
        return ClassMoments(*(tensor.clone() for tensor in self.tensors()))

    def to(self, device: torch.device | str) -> ClassMoments:
        """A copy on a device, also where that is its own."""
        return ClassMoments(*(tensor.to(device, copy=True) for tensor in self.tensors()))

    def copy_(self, other: ClassMoments) -> ClassMoments:
        """Overwrite this state with another of the same shape."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)
        return self
