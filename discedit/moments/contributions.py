"""What the input channels of a layer contribute to its outputs: second moments, fidelities, factors that make up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-12  # added to the diagonal of correlation matrices
DEPENDENT = 1e-10  # share of a contribution's energy, below which what is new in it is rounding
SIMILARITIES = 2**24  # entries of similarity matrices in memory at once
TINY = 1e-300


@dataclass(frozen=True)
class Contributions:
    """Second moments of one layer, per sample and position: what fidelities are made of."""

    xx: Tensor
    yx: Tensor
    weight: Tensor
    yy: Tensor | None

    def with_output(self) -> Tensor:
        """E<Y_c, A_ci>: (outputs, channels)."""
        return (self.weight * self.yx).sum(2)

    def energy(self) -> Tensor:
        """E||Y_c||^2: (outputs,)."""
        return self.with_output().sum(1).clamp(min=0.0) if self.yy is None else self.yy

    def own(self) -> Tensor:
        """E||A_ci||^2: (outputs, channels)."""
        _, channels, taps = self.weight.shape
        blocks = self.xx
        if blocks.ndim == 2:
            blocks = blocks.view(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return torch.einsum("cik,ikl,cil->ci", self.weight, blocks, self.weight).clamp(min=0.0)

    def singletons(self) -> Tensor:
        """(outputs, channels)."""
        whole = self.energy()[:, None] * self.own()
        return torch.where(whole > TINY, self.with_output().square() / whole.clamp(min=TINY), 0.0).clamp(max=1.0)

    def similarity(self, outputs: slice) -> Tensor:
        """Q_c[i, j] = E<A_ci, A_cj>: (outputs, channels, channels)."""
        _, channels, taps = self.weight.shape
        weight = self.weight[outputs]
        if taps == 1:
            return weight * self.xx * weight.transpose(1, 2)
        half = torch.einsum("cik,ikjl->cijl", weight, self.xx.view(channels, taps, channels, taps))
        return torch.einsum("cijl,cjl->cij", half, weight)

    def chunks(self) -> Iterator[slice]:
        """Outputs whose similarities are in memory together."""
        outputs, channels, taps = self.weight.shape
        step = max(1, SIMILARITIES // (channels * channels * taps))
        for start in range(0, outputs, step):
            yield slice(start, start + step)

    def explained(self, kept: Tensor) -> Tensor:
        """How much of E||Y_c||^2 some channels give, each with its best factor: (outputs,)."""
        found = [torch.empty(0, dtype=torch.float64)]
        with_output = self.with_output()[:, kept]
        for outputs in self.chunks():
            b = with_output[outputs]
            found.append((b * solved(self.similarity(outputs)[:, kept[:, None], kept], b)).sum(1))
        return torch.cat(found)

    def compensation(self, kept: Tensor, ridge: float) -> Tensor:
        """The factors of the channels that are kept, in place of all: (outputs, kept channels)."""
        gone = torch.ones(self.weight.shape[1], dtype=torch.bool)
        gone[kept] = False
        parts = [torch.empty(0, len(kept), dtype=torch.float64)]
        for outputs in self.chunks():
            similarity = self.similarity(outputs)
            missing = similarity[:, kept][:, :, gone].sum(2)
            parts.append(1.0 + solved(similarity[:, kept[:, None], kept], missing, ridge))
        return torch.cat(parts)


class Growing:
    """Some outputs of a layer while channels are chosen: contributions with those of the chosen ones taken out."""

    def __init__(self, second: Contributions, outputs: slice) -> None:
        self.energy = second.energy()[outputs]
        self.left = second.similarity(outputs)
        self.own = self.left.diagonal(dim1=1, dim2=2).clone()
        self.b = second.with_output()[outputs].clone()

    def gains(self) -> Tensor:
        """What each channel would add to the fidelity, summed over outputs: (channels,)."""
        variance = self.left.diagonal(dim1=1, dim2=2)
        new = variance > DEPENDENT * self.own
        shares = self.b.square() / (variance * self.energy[:, None]).clamp(min=TINY)
        return torch.where(new & (self.energy > 0)[:, None], shares, 0.0).sum(0)

    def add(self, channel: int) -> None:
        variance = self.left[:, channel, channel]
        column = self.left[:, :, channel].clone()
        inverse = torch.where(variance > DEPENDENT * self.own[:, channel], 1.0 / variance.clamp(min=TINY), 0.0)
        scaled = column * inverse[:, None]
        self.b -= scaled * self.b[:, channel, None]
        self.left -= scaled[:, :, None] * column[:, None, :]


def solved(matrices: Tensor, right: Tensor, ridge: float = 0.0) -> Tensor:
    """matrices^-1 right, in the metric of correlations; what has no variance gets 0: (n, s, s) and (n, s) -> (n, s)."""
    if not bool(matrices.isfinite().all()):
        raise ValueError("second moments must be finite, found NaN or Inf.")
    own = matrices.diagonal(dim1=1, dim2=2)
    scale = torch.where(own > TINY, own.clamp(min=TINY).rsqrt(), 0.0)
    correlations = matrices * scale[:, :, None] * scale[:, None, :]
    correlations.diagonal(dim1=1, dim2=2)[:] = 1.0 + max(ridge, ROUNDING)
    right = right * scale
    extra = ROUNDING
    while True:
        factor, failed = torch.linalg.cholesky_ex(correlations)
        if not bool(failed.any()):
            return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0] * scale
        extra *= 10
        correlations.diagonal(dim1=1, dim2=2)[failed > 0] += extra
