"""Operations that silence components, attenuate them, or replace them by a mean: rows of a layer and of its norm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from discedit._forward import gives_zero, is_affine, why_not_plain
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
            name = bias_of(model, layer, norms.get(layer))
            if not name:
                behind = f" with its norm {norms[layer]!r}" if layer in norms else ""
                raise ValueError(
                    f"unlearn: around='mean' needs a bias that can carry the mean, that of layer {layer!r}{behind} is "
                    "None."
                )
            tensors[f"set.{len(operations)}"] = ((1 - factor) * means[layer][channels]).to(
                model.get_parameter(name).dtype
            )
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


def why_not_silenced(model: nn.Module, layer: str, norm: str | None, factor: float, around: str) -> str:
    """Why `silenced` would not do what it says for this layer; empty where it does."""
    if norm is None:
        return why_not_plain(model.get_submodule(layer))
    module = model.get_submodule(norm)
    if not isinstance(module, _BatchNorm) or module.running_mean is None or is_affine(module):
        return ""
    if factor == 0 and around == "zero" and gives_zero(module):
        return ""
    what = "the mean" if around == "mean" else "zero" if factor == 0 else f"{factor:g} times the output"
    return (
        f"the norm {norm!r} behind it is no affine map (it has an activation inside, say): its weights cannot "
        f"make it give {what}; erase directions instead (components='directions'), or take factor=0, around='zero'"
    )


def bias_of(model: nn.Module, layer: str, norm: str | None) -> str:
    """The tensor that can carry a constant added to the layer's output behind its norm; empty where there is none."""
    place = layer if norm is None else norm
    return f"{place}.bias" if getattr(model.get_submodule(place), "bias", None) is not None else ""
