"""What the kernels' launchers share: sizes of tiles, and the views that they can read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MOST_AXES = 3
# Products and sums may fuse: said aloud, because the default of Triton 3.9 warns and that of 3.10 will differ.
COMPILE = {"enable_fp_fusion": True}


def power_of_two(value: int) -> int:
    """The least power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class Layout:
    """A feature map: samples x channels maps of `elements` elements.

    Attributes:
        sizes, strides: the pooled axes, neighbours fused, outermost (largest stride) first; always `MOST_AXES`, filled
            up with axes of size 1 in front.
        axes: how many of them count.
    """

    samples: int
    channels: int
    elements: int
    sample_stride: int
    channel_stride: int
    axes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def channels_are_neighbours(self) -> bool:
        return self.channel_stride == 1 and self.channels > 1 and self.strides[-1] != 1


def layout_of(x: Tensor, channel_axis: int) -> Layout:
    """How the maps of a view lie in memory.

    Raises:
        ValueError: the pooled axes do not fuse into `MOST_AXES`.
    """
    axes = [axis for axis in range(1, x.ndim) if axis != channel_axis and x.shape[axis] > 1]
    fused: list[tuple[int, int]] = []
    strides = x.stride()
    for axis in sorted(axes, key=lambda axis: -strides[axis]):
        size, stride = x.shape[axis], strides[axis]
        if fused and fused[-1][1] == size * stride:
            fused[-1] = (fused[-1][0] * size, stride)
        else:
            fused.append((size, stride))
    if len(fused) > MOST_AXES:
        raise ValueError(
            f"pool: x must have at most {MOST_AXES} pooled axes that do not lie behind each other in memory, got "
            f"{len(fused)} for shape {tuple(x.shape)} and strides {strides}."
        )
    elements = 1
    for size, _ in fused:
        elements *= size
    filled = [(1, 1)] * (MOST_AXES - len(fused)) + fused
    return Layout(
        x.shape[0],
        x.shape[channel_axis],
        elements,
        x.stride(0),
        x.stride(channel_axis),
        max(1, len(fused)),
        tuple(size for size, _ in filled),
        tuple(stride for _, stride in filled),
    )
