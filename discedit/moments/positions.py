"""Sampled positions of a layer's output: which are looked at, and what the layer reads and gives there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 2**22  # entries of rows that are gathered at once: small enough for memory to be used again
ROWS_PER_UNKNOWN = 64  # inputs of a layer that are looked at, for each of its weights per output
LEAST_PER_UNKNOWN = 8  # where the following allows no more
WORK = 2e11  # rows x unknowns^2 of one layer


def sample_positions(rule: str, size: Sequence[int], number: int, seed: int, samples: int = 0) -> Tensor:
    """Flat positions of a map, drawn on the CPU: the same for the same arguments.

    Args:
        rule: "grid": one at random in each cell of a grid, the same in all samples. "shared": any, without repetition,
            the same in all samples. "per sample": others in each of `samples`; few of many may come twice.
        size: lengths of the axes of the map.
        number: at most so many.

    Returns:
        (positions,), or (samples, positions), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    places = math.prod(size)
    if rule == "shared":
        return torch.randperm(places, generator=generator)[:number]
    if rule == "per sample":
        # Without repetition where that could be frequent; of many places, to order them all would cost the most.
        if 8 * number > places:
            return torch.rand(samples, places, generator=generator).argsort(1)[:, :number]
        return torch.randint(places, (samples, number), generator=generator)
    cells = [math.isqrt(number)] * 2 if len(size) == 2 else [number]
    flat = torch.zeros(1, dtype=torch.int64)
    for length, most in zip(size, cells, strict=True):
        edges = torch.arange(min(most, length) + 1) * length // min(most, length)
        flat = flat[:, None] * length + edges[:-1]
        widths = (edges[1:] - edges[:-1]).expand(flat.shape)
        flat = (flat + (torch.rand(flat.shape, generator=generator) * widths).long()).flatten()
    return flat


class Positions:
    """What a layer reads and gives at some positions of its output: rows, float32 at least.

    Args:
        layer: Conv2d (not in groups, padded with zeros) or Linear.
        chosen: flat positions, int64, on the device of the maps: (positions,), the same in all samples, or (samples,
            positions); None: all.
    """

    def __init__(self, layer: nn.Module, chosen: Tensor | None) -> None:
        self.layer, self.chosen = layer, chosen
        self._pixels: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def drawn(cls, layer: nn.Module, output: Tensor, seed: int, parts: float = 1) -> Positions:
        """Of this output, as many as a least squares fit needs where all samples are so many times these.

        The same for the same layer and number of samples, whatever the number of its channels.
        """
        unknowns = unknowns_of(layer)
        rows = max(LEAST_PER_UNKNOWN * unknowns, min(ROWS_PER_UNKNOWN * unknowns, WORK / unknowns**2))
        samples, places, _ = flattened(layer, output).shape
        each = min(places, math.ceil(math.ceil(rows / parts) / samples))
        return cls(layer, sample_positions("per sample", (places,), each, seed, samples).to(output.device))

    def chunks(self, samples: int, places: int, entries: int) -> Iterator[slice]:
        """Samples whose rows, of so many positions each, have so many entries together."""
        step = max(1, entries // max(1, places * unknowns_of(self.layer)))
        return (slice(start, min(samples, start + step)) for start in range(0, samples, step))

    def outputs(self, output: Tensor) -> Tensor:
        """(samples x positions, outputs) of what the layer gives."""
        return self._rows(flattened(self.layer, output), self.chosen)

    def inputs(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """(samples x positions, inputs of one output) of what some of the samples let the layer read."""
        x, chosen = x[part], self.chosen
        if isinstance(self.layer, nn.Linear):
            flat = flattened(self.layer, x)
            return self._rows(flat, chosen if chosen is None or chosen.ndim == 1 else chosen[part])
        pixels, inside = self._pixels_of(x)
        if pixels.ndim == 2:
            patches = wide(x.flatten(2)[:, :, pixels.flatten()]).view(*x.shape[:2], *pixels.shape)
            patches = patches if inside is None else patches.mul_(inside.to(patches.dtype))
            return patches.transpose(1, 2).reshape(len(x) * len(pixels), -1)
        pixels = pixels[part] + torch.arange(len(x), device=x.device)[:, None, None] * (x.shape[2] * x.shape[3])
        # Channels last, so that what is gathered lies together.
        patches = wide(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(0, pixels.flatten()))
        patches = patches.view(*pixels.shape, x.shape[1])
        patches = patches if inside is None else patches.mul_(inside[part][..., None].to(patches.dtype))
        return patches.transpose(2, 3).reshape(pixels.shape[0] * pixels.shape[1], -1)

    @staticmethod
    def _rows(flat: Tensor, chosen: Tensor | None) -> Tensor:
        if chosen is not None and chosen.ndim == 1:
            flat = flat[:, chosen]
        elif chosen is not None:
            flat = flat.gather(1, chosen[:, :, None].expand(-1, -1, flat.shape[2]))
        return wide(flat.flatten(0, 1))

    def _pixels_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a convolution's patches, (positions, taps), perhaps of each sample: the flat pixels, those outside the map
        moved to its edge, and whether each lies in it (None: all do)."""
        size = tuple(x.shape[2:])
        if size not in self._pixels:
            layer: Any = self.layer
            left, right, top, bottom = padding_of(layer)
            spans = [gap * (taps - 1) + 1 for gap, taps in zip(layer.dilation, layer.kernel_size, strict=True)]
            height, width = (
                (length - span) // step + 1
                for length, span, step in zip(
                    (size[0] + top + bottom, size[1] + left + right), spans, layer.stride, strict=True
                )
            )
            chosen = torch.arange(height * width, device=x.device) if self.chosen is None else self.chosen
            starts = (chosen // width * layer.stride[0] - top, chosen % width * layer.stride[1] - left)
            down, across = (
                start[..., None] + gap * torch.arange(taps, device=x.device)
                for start, gap, taps in zip(starts, layer.dilation, layer.kernel_size, strict=True)
            )
            inside = ((down >= 0) & (down < size[0]))[..., :, None] & ((across >= 0) & (across < size[1]))[..., None, :]
            down, across = down.clamp(0, size[0] - 1), across.clamp(0, size[1] - 1)
            pixels = (down[..., :, None] * size[1] + across[..., None, :]).flatten(-2)
            padded = left or right or top or bottom
            self._pixels[size] = (pixels, inside.flatten(-2) if padded else None)
        return self._pixels[size]


def flattened(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads or gives as (samples, positions, channels), a view where there is one."""
    if isinstance(layer, nn.Linear):
        return x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    return x.flatten(2).transpose(1, 2)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.element_size() < 4 else x


def unknowns_of(layer: nn.Module) -> int:
    """Number of weights per output."""
    weight: Any = layer.weight
    return math.prod(weight.shape[1:])


def matrix_of(layer: nn.Module) -> Tensor:
    """Weights as (outputs, inputs), float32 at least."""
    weight: Any = layer.weight
    return wide(weight.detach().flatten(1))


def padding_of(layer: nn.Conv2d) -> list[int]:
    """As `functional.pad` takes it: last axis first."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2]
    down, across = (int(pad) for pad in layer.padding)
    return [across, across, down, down]
