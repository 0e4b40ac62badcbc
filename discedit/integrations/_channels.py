"""One number per channel, from scores of any form."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from discedit.common import validation
from discedit.scoring.scores import OVER_CLASSES, Scores, over_classes


def per_channel(op: str, scores: Scores | Mapping[str, Tensor], reduction: str) -> dict[str, Tensor]:
    """Layer -> (channels,) float64 on the CPU; of a plain mapping as `of_layer`."""
    if isinstance(scores, Scores):
        return {layer: values.cpu() for layer, values in scores.reduce(reduction).items()}
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError(f"{op}: scores must be Scores or a mapping of layer names to tensors, got {scores!r:.60}.")
    return {layer: of_layer(op, f"scores[{layer!r}]", values, reduction) for layer, values in scores.items()}


def of_layer(op: str, argument: str, values: Tensor, reduction: str) -> Tensor:
    """(channels,) or (channels, classes) -> (channels,) float64 on the CPU, all finite."""
    validation.choice(op, "reduction", reduction, OVER_CLASSES)
    reduced = (
        validation.tensor(op, argument, values, (*validation.FLOATS, *validation.INTEGERS)).detach().cpu().double()
    )
    if values.ndim not in (1, 2):
        shape = validation.shape_of(values)
        raise ValueError(f"{op}: {argument} must have shape (channels,) or (channels, classes), got {shape}.")
    if values.ndim == 2:
        if bool(reduced.isnan().all()):
            raise ValueError(f"{op}: {argument} must hold numbers for at least one class, all of it is NaN.")
        reduced = over_classes(reduced, reduction)
    for channel in (~reduced.isfinite()).nonzero()[:, 0].tolist():
        raise ValueError(
            f"{op}: {argument} must be finite but for classes that are NaN everywhere, got {float(reduced[channel])} "
            f"for channel {channel}."
        )
    return reduced
