"""The scores in torch.nn.utils.prune: masks over channels that stack, are saved and are removed as its own are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, custom_from_mask

from discedit.common import validation
from discedit.integrations._channels import of_layer, per_channel
from discedit.model.trace import width_of
from discedit.scoring.scores import Scores


class DiscEditStructured(BasePruningMethod):
    """Masks the channels with the lowest scores among those that are not masked yet; of equal ones the first.

    `discedit_structured` applies it, with the scores in the parameter's shape as torch's ``importance_scores``.

    Args:
        amount: share of the channels that are not masked yet, in 0..1 and rounded to whole channels, or their number.
        dim: axis of the channels in the parameter.
    """

    PRUNING_TYPE = "structured"

    def __init__(self, amount: int | float, dim: int = 0) -> None:
        self.amount = _amount("DiscEditStructured", amount)
        self.dim = dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Mask of the parameter, or of its channels that are left, from their scores in its shape."""
        scores = t.movedim(self.dim, 0).flatten(1)[:, 0]
        number = self.amount if isinstance(self.amount, int) else round(self.amount * len(scores))
        if number > len(scores):
            raise ValueError(
                f"DiscEditStructured: amount must be at most the {len(scores)} channels that are left, got {number}."
            )
        return default_mask.index_fill(self.dim, scores.argsort(stable=True)[:number], 0)


def discedit_structured(
    module: nn.Module, name: str, amount: int | float, scores: Tensor, dim: int = 0, *, reduction: str = "max"
) -> nn.Module:
    """Mask the channels of a parameter that have the lowest scores, in place, as `prune.ln_structured` of torch does.

    Args:
        module, name: the parameter, such as (conv, "weight"), of at least two axes.
        amount: share of the channels that are not masked yet, in 0..1 and rounded to whole channels, or their number.
        scores: (channels,) or (channels, classes), such as ``scores["conv1"]``: of all channels, also masked ones. A
            class that is NaN everywhere is left out.
        dim: axis of the channels: 0 for what the layer produces, 1 for what it reads (of a transposed convolution the
            other way round), with the scores of the layer that produces it.
        reduction: over classes, "max", "mean" or "min".

    Returns:
        The module: ``weight`` is masked, ``weight_orig`` and ``weight_mask`` are in its state_dict.

    Raises:
        ValueError: no such parameter or axis, an amount out of range, scores that do not fit, or an unknown reduction.

    >>> import torch
    >>> conv = torch.nn.Conv2d(3, 4, 1)
    >>> module = discedit_structured(conv, "weight", 0.5, torch.tensor([0.9, 0.1, 0.3, 0.7]))
    >>> conv.weight_mask[:, 0, 0, 0]
    tensor([1., 0., 0., 1.])
    """
    op = "discedit_structured"
    values = of_layer(op, "scores", scores, reduction)
    parameter: Any = getattr(module, name, None)
    if not _is_parameter(module, name) or parameter.ndim < 2:
        raise ValueError(f"{op}: name must be a parameter of at least two axes, got {name!r} of {module}.")
    if not -parameter.ndim <= dim < parameter.ndim:
        raise ValueError(f"{op}: dim must be an axis of {name!r}, {validation.shape_of(parameter)}, got {dim}.")
    if values.shape != (parameter.shape[dim],):
        raise ValueError(
            f"{op}: scores must be one for each of the {parameter.shape[dim]} channels on axis {dim} of {name!r}, got "
            f"shape {validation.shape_of(values)}."
        )
    axes = [1] * parameter.ndim
    axes[dim] = -1
    spread = values.to(parameter.device).view(axes).expand_as(parameter)
    method = DiscEditStructured.apply(module, name, amount, dim, importance_scores=spread)  # type: ignore[no-untyped-call]
    # A container gives its mask the type of the scores, whose precision the parameter need not have.
    module.register_buffer(f"{name}_mask", getattr(module, f"{name}_mask").to(parameter.dtype))
    setattr(module, name, method.apply_mask(module))
    return module


def prune_model(
    model: nn.Module,
    scores: Scores | Mapping[str, Tensor],
    amount: int | float | Mapping[str, int | float],
    *,
    layers: Iterable[str] | None = None,
    reduction: str = "max",
    norms: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Mask the channels with the lowest scores in every layer, in place: their weights, biases and norms.

    What is behind the norm is then 0, as if the channel were removed. Masks made before stay, and the channels that
    they ablate count as gone.

    Args:
        model: has the layers that the scores name: convolutions and linear layers.
        scores: `Scores`, or a mapping of layer names to tensors (channels,) or (channels, classes).
        amount: of each layer as for `discedit_structured`, or layer -> amount; layers not named there stay as they are.
        layers: those to mask, by default all with scores and an amount.
        reduction: over classes, as in `Scores.reduce`.
        norms: layer -> the norm that its output goes into, by default those that `Scores` knows.

    Returns:
        Layer -> indices of all channels whose weights are masked now, int64, ascending.

    Raises:
        ValueError: an unknown layer or one without an amount, scores that do not fit it, or as `discedit_structured`.
            Nothing is masked then.
    """
    op = "prune_model"
    values = per_channel(op, scores, reduction)
    norms = (scores.norms if isinstance(scores, Scores) else {}) if norms is None else norms
    amounts = dict(amount) if isinstance(amount, Mapping) else dict.fromkeys(values, amount)
    chosen = list(dict.fromkeys(amounts if layers is None else layers))
    modules = dict(model.named_modules())
    for layer in chosen:
        if layer not in values or layer not in amounts:
            missing = "scores" if layer not in values else "amount"
            raise ValueError(f"{op}: layers must have scores and an amount, {layer!r} has no {missing}.")
        number = _amount(op, amounts[layer])
        width = width_of(modules[layer]) if layer in modules else None
        if width != len(values[layer]):
            has = "is no convolution or linear layer of the model" if width is None else f"has {width} channels"
            raise ValueError(f"{op}: scores must fit the layers, {layer!r} {has}, it has {len(values[layer])} scores.")
        if not _is_parameter(modules[layer], "weight"):
            raise ValueError(f"{op}: layers must have weights that are parameters, that of {layer!r} is computed.")
        left = int(_active(modules[layer]).sum())
        if isinstance(number, int) and number > left:
            raise ValueError(f"{op}: amount must be at most the {left} channels that {layer!r} has left, got {number}.")
        if layer in norms and norms[layer] not in modules:
            raise ValueError(f"{op}: norms must name modules of the model, got {norms[layer]!r} for {layer!r}.")
        for name in ("weight", "bias") if layer in norms else ():
            own = getattr(modules[norms[layer]], name, None)
            if own is not None and len(own) != width:
                raise ValueError(
                    f"{op}: norms must be as wide as their layers, {norms[layer]!r} has {len(own)} channels, {layer!r} "
                    f"has {width}."
                )
    return {
        layer: _mask(modules[layer], modules[norms[layer]] if layer in norms else None, amounts[layer], values[layer])
        for layer in chosen
    }


def _mask(module: nn.Module, norm: nn.Module | None, amount: int | float, scores: Tensor) -> Tensor:
    """The channels of a layer that are masked then."""
    discedit_structured(module, "weight", amount, scores, _output_axis(module))
    active = _active(module)
    for owner, name in ((module, "bias"), (norm, "weight"), (norm, "bias")):
        own = getattr(owner, name, None)
        if own is not None:
            custom_from_mask(owner, name, active.to(own.dtype))  # type: ignore[no-untyped-call]
    return (~active).nonzero()[:, 0].cpu()


def _output_axis(module: nn.Module) -> int:
    """Axis of the weight that a layer's channels are on."""
    return 1 if getattr(module, "transposed", False) else 0


def _is_parameter(module: nn.Module, name: str) -> bool:
    """Of the module itself, masked or not; not what a parametrization computes."""
    return isinstance(module._parameters.get(name, module._parameters.get(f"{name}_orig")), nn.Parameter)


def _active(module: Any) -> Tensor:
    """(channels,): whether any weight of a channel is not masked."""
    mask: Tensor = module.weight_mask if hasattr(module, "weight_mask") else torch.ones_like(module.weight)
    return mask.movedim(_output_axis(module), 0).flatten(1).any(1)


def _amount(op: str, value: Any) -> int | float:
    number = validation.index(value)
    if number is not None and number >= 0:
        return number
    if not validation.is_number(value) or isinstance(value, int) or not 0 <= value <= 1:
        raise ValueError(f"{op}: amount must be a share in 0..1 or a number of channels, got {value!r}.")
    return float(value)
