"""What a torch user could write in place of our ops, and the feature maps that both are measured on.

Needs torch alone, so that it runs on any machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CLASSES = 10
STATISTICS: dict[str, tuple[str, ...]] = {
    "mean": ("mean",),
    "l2": ("l2",),
    "mean+rms+absmax": ("mean", "rms", "absmax"),
}
LAYOUTS = ("NCHW", "channels_last", "tokens")
# (channels, height, width) of maps of ResNet-50 at 224 x 224, and the convolution that reads each: kernel, stride,
# padding.
PATCHES = {
    "56x56x64, 3x3": ((64, 56, 56), (3, 1, 1)),
    "28x28x128, 3x3": ((128, 28, 28), (3, 1, 1)),
    "14x14x256, 3x3": ((256, 14, 14), (3, 1, 1)),
    "7x7x512, 3x3": ((512, 7, 7), (3, 1, 1)),
    "56x56x64, 1x1": ((64, 56, 56), (1, 1, 0)),
    "224x224x3, 7x7 stride 2": ((3, 224, 224), (7, 2, 3)),
}


def feature_map(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0, device: str | torch.device = "cpu"
) -> tuple[Tensor, str]:
    """A map, drawn on the device, and what `ops` calls its layout."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device).add_(0.5).to(dtype)
    if layout == "tokens":
        return x.flatten(2).transpose(1, 2).contiguous(), "tokens"
    if layout == "channels_last":
        x = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(shape)
    return x, "nchw"


def pooling(x: Tensor, layout: str, names: tuple[str, ...]) -> dict[str, Callable[[], list[Tensor]]]:
    """Ways to these statistics: reductions in the map's type or in float32, or a product with ones, which runs on the
    matrix kernels."""
    flat = x if layout == "tokens" else x.flatten(2)
    axis = 1 if layout == "tokens" else 2
    length = flat.shape[axis]
    ones = torch.ones(length, dtype=x.dtype, device=x.device)

    def total(values: Tensor) -> Tensor:
        return ones @ values if layout == "tokens" else values @ ones

    def reduced(values: Tensor) -> list[Tensor]:
        by = {
            "mean": lambda: values.mean(axis),
            "l2": lambda: torch.linalg.vector_norm(values, dim=axis),
            "rms": lambda: torch.linalg.vector_norm(values, dim=axis) / length**0.5,
            "absmax": lambda: torch.linalg.vector_norm(values, ord=torch.inf, dim=axis),
        }
        return [by[name]() for name in names]

    def with_products() -> list[Tensor]:
        by = {
            "mean": lambda: total(flat) / length,
            "l2": lambda: total(flat * flat).sqrt(),
            "rms": lambda: (total(flat * flat) / length).sqrt(),
            "absmax": lambda: flat.abs().amax(axis),
        }
        return [by[name]() for name in names]

    ways = {"reduce": lambda: reduced(flat), "matmul with ones": with_products}
    if x.dtype != torch.float32:
        ways["float(), reduce"] = lambda: reduced(flat.float())
    return ways


def sums_per_class(pooled: list[Tensor], labels: Tensor) -> list[Tensor]:
    """Sums of powers per class (one statistic) or of products (several), by index_add: small beside the reduction."""
    wide = [values.double() for values in pooled]
    features = (
        [wide[0] ** p for p in (1, 2, 3, 4)]
        if len(wide) == 1
        else wide + [wide[i] * wide[j] for i in range(len(wide)) for j in range(i + 1)]
    )
    return [f.new_zeros(CLASSES, f.shape[1]).index_add_(0, labels, f) for f in features]


def patch_moments(x: Tensor, kernel: int, stride: int, padding: int) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Ways to mean and scatter of each channel's patches, in float32."""

    def patches() -> Tensor:
        maps = x.float().contiguous().flatten(0, 1)[:, None]
        columns = torch.nn.functional.unfold(maps, kernel, padding=padding, stride=stride)
        return columns.view(*x.shape[:2], *columns.shape[1:])

    def raw() -> tuple[Tensor, Tensor]:
        p = patches()
        mean = p.mean((0, 3))
        count = len(p) * p.shape[3]
        return mean, (p @ p.mT).sum(0) - count * mean[:, :, None] * mean[:, None, :]

    def centred() -> tuple[Tensor, Tensor]:
        p = patches()
        mean = p.mean((0, 3))
        deviation = p - mean[:, :, None]
        return mean, (deviation @ deviation.mT).sum(0)

    return {"raw products": raw, "centred": centred}
