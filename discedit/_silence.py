"""Operations that silence components, attenuate them, or replace them by a mean: rows of a layer and of its norm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit.recipe import Operation

AROUND = ("zero", "mean")


def silenced(
    model: nn.Module,
    norms: Mapping[str, str],
    rows: Mapping[str, list[int]],
    factor: float,
    means: Mapping[str, Tensor] | None,
) -> tuple[list[Operation], dict[str, Tensor]]:
    """What makes y, the output of some rows behind the layer's norm, m + factor * (y - m); and the values it writes.

    Args:
        norms: layer -> the norm that its output goes straight into.
        means: layer -> m, one for each row of the layer; 0 where None.

    Raises:
        ValueError: a layer whose output cannot be edited so.
    """
    operations: list[Operation] = []
    tensors: dict[str, Tensor] = {}
    for layer, channels in rows.items():
        index = tuple(channels)
        for name, dim in _rows_of(model, layer, norms.get(layer), factor):
            kind = "scale" if factor else "fill"
            operations.append(Operation(kind, name, dim=dim, index=index, value=factor))
        if means is not None:
            name, values = _shift(model, layer, norms.get(layer), (1 - factor) * means[layer][channels])
            tensors[f"set.{len(operations)}"] = values
            operations.append(Operation("add", name, index=index))
    return operations, tensors


def _rows_of(model: nn.Module, layer: str, norm: str | None, factor: float) -> list[tuple[str, int]]:
    """The tensors whose rows are multiplied, each with the axis of the rows."""
    module = model.get_submodule(layer)
    rows = 0
    if isinstance(module, _ConvNd) and module.transposed:
        rows = 1
        if module.groups > 1:
            raise ValueError(f"unlearn: layer {layer!r} is a transposed convolution in groups, which is not supported.")
    own = [(f"{layer}.weight", rows), (f"{layer}.bias", 0)]
    present = dict([*model.named_parameters(), *model.named_buffers()])
    if norm is None:
        targets = own
    elif f"{norm}.weight" in present:
        of_norm = [(f"{norm}.weight", 0), (f"{norm}.bias", 0)]
        # The norm's alone do it. Zeros in the layer leave nothing behind that a new norm could bring back.
        targets = of_norm if factor else own + of_norm
    elif isinstance(model.get_submodule(norm), (nn.GroupNorm, nn.LayerNorm)):
        raise ValueError(
            f"unlearn: layer {layer!r} cannot be silenced: {norm!r} behind it mixes channels and has no weights."
        )
    else:  # such a norm gives factor times as much for factor times the input around factor times the mean
        targets = [*own, (f"{norm}.running_mean", 0)]
    return [(name, dim) for name, dim in targets if name in present]


def _shift(model: nn.Module, layer: str, norm: str | None, values: Tensor) -> tuple[str, Tensor]:
    """The tensor that carries a constant added to an output behind its norm, and what is added to it."""
    place = model.get_submodule(norm if norm is not None else layer)
    if getattr(place, "bias", None) is not None:
        return f"{norm if norm is not None else layer}.bias", values.to(place.bias.dtype)
    raise ValueError(
        f"unlearn: around='mean' needs a bias that can carry the mean, layer {layer!r} has none"
        f"{'' if norm is None else f', nor has {norm!r} behind it'}."
    )
