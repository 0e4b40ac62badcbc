"""The window of a convolution: which elements of a map each output reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Window(NamedTuple):
    """Pairs are (rows, columns), `padding` is (top, bottom, left, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def padded(self, x: Tensor) -> tuple[int, int]:
        """Size of the map with its padding."""
        top, bottom, left, right = self.padding
        return top + x.shape[2] + bottom, left + x.shape[3] + right

    def extent(self) -> tuple[int, int]:
        """Size of one patch, the gaps that dilation leaves included."""
        rows, columns = ((size - 1) * gap + 1 for size, gap in zip(self.kernel, self.dilation, strict=True))
        return rows, columns

    def outputs(self, x: Tensor) -> tuple[int, int]:
        """Size of the output map."""
        sizes = zip(self.padded(x), self.extent(), self.stride, strict=True)
        rows, columns = ((size - extent) // step + 1 for size, extent, step in sizes)
        return rows, columns
