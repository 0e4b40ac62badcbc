"""`unlearn`: class unlearning by zeroing what discriminates the class (DISCEDIT-U)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit import _checks
from discedit.prune import check_layers, why_not_editable
from discedit.recipe import Edit, Operation, Recipe, architecture_of
from discedit.scores import Scores

SIGNS = ("up", "any")


def unlearn(
    model: nn.Module,
    scores: Scores,
    *,
    classes: Sequence[int] | Callable[[int], bool],
    fraction: float = 0.06,
    sign: str = "up",
    layers: Iterable[str] | None = None,
    inplace: bool = False,
) -> Edit:
    """Zero the components that tell the given classes from the rest, so that the model no longer recognises them.

    Components of all chosen layers are ranked together by their score for the class, and the highest are zeroed:
    weights and bias of the layer, and of the batch norm behind it. Several classes each get their own ranking.

    Zeroing components is no guarantee of privacy: what the model learned from the class may still be found in what is
    left of it.

    Args:
        model: the model that `scores` came from; unchanged unless `inplace`.
        scores: from `discedit.score`.
        classes: class indices to forget.
        fraction: share of the chosen layers' components to zero for each class, in (0, 1); at least one goes.
        sign: "up": only components more active for the class than for the rest; "any".
        layers: names of layers to choose from; by default the last third of those scored that can be edited, where
            features are specific to classes.

    Returns:
        `Edit` with the edited model, its recipe and a summary.

    Raises:
        ValueError: unknown classes or classes without samples, fraction outside (0, 1), scores of another model, or no
            component to choose from.

    Source: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024 (there the top components of each layer, of any sign).
    """
    forget = _checked_classes(scores, classes)
    if not _checks.is_number(fraction) or not 0 < fraction < 1:
        raise ValueError(f"unlearn: fraction must be a number in (0, 1), got {fraction!r}.")
    fraction = float(fraction)
    _checks.choice("unlearn", "sign", sign, SIGNS)
    chosen = check_layers("unlearn", model, scores, layers)
    reasons = {layer: why for layer in chosen if (why := why_not_editable(model, layer))}
    if layers is None:
        order = [layer for layer in chosen if layer not in reasons]
        chosen = order[len(order) - math.ceil(len(order) / 3) :]
    elif reasons:
        layer, why = next(iter(reasons.items()))
        raise ValueError(f"unlearn: layer {layer!r} cannot be edited: {why}.")
    if not chosen:
        why = f" ({'; '.join(f'{layer}: {why}' for layer, why in reasons.items())})" if reasons else ", it is empty"
        raise ValueError(f"unlearn: layers must name at least one layer that can be edited{why}.")
    components: dict[str, set[int]] = {layer: set() for layer in chosen}
    for cls in forget:
        for layer, channel in _top(scores, chosen, cls, fraction, sign):
            components[layer].add(channel)
    picked = {layer: sorted(channels) for layer, channels in components.items() if channels}
    recipe = Recipe(
        edit="unlearn",
        settings={
            "classes": forget,
            "fraction": fraction,
            "sign": sign,
            "layers": chosen,
            **scores.settings,
        },
        components=picked,
        architecture=architecture_of(model),
        operations=_zeroing(model, scores, picked),
    )
    edit = recipe.apply(model, inplace=inplace)
    edit.widths = {layer: len(scores[layer]) for layer in picked}
    return edit


def _checked_classes(scores: Scores, classes: Any) -> list[int]:
    forget = _checks.classes("unlearn", classes, scores.num_classes)
    for cls in forget:
        if int(scores.counts[cls]) == 0:
            raise ValueError(f"unlearn: class {cls} has no sample in scores, so nothing is known to tell it apart.")
    if int((scores.counts > 0).sum()) < 2:
        raise ValueError("unlearn: scores must hold samples of at least two classes.")
    return forget


def _top(scores: Scores, layers: list[str], cls: int, fraction: float, sign: str) -> list[tuple[str, int]]:
    """The (layer, channel) pairs with the highest scores for the class, over all layers together."""
    places = [(layer, channel) for layer in layers for channel in range(len(scores[layer]))]
    values = torch.cat([scores[layer][:, cls].cpu() for layer in layers]).nan_to_num(-1.0)
    if sign == "up":
        active: Tensor = torch.cat([scores.direction[layer][:, cls].cpu() for layer in layers]) > 0
        values = torch.where(active, values, -1.0)
    count = max(1, math.floor(fraction * len(places) * (1 + 1e-12)))
    best = [int(i) for i in values.argsort(descending=True, stable=True)[:count] if values[i] > 0]
    if not best:
        more = "more active for it than for the rest " if sign == "up" else ""
        raise ValueError(f"unlearn: no component of the chosen layers {more}tells class {cls} from the rest.")
    return [places[i] for i in best]


def _zeroing(model: nn.Module, scores: Scores, components: dict[str, list[int]]) -> list[Operation]:
    present = dict([*model.named_parameters(), *model.named_buffers()])
    operations = []
    for layer, channels in components.items():
        module = model.get_submodule(layer)
        rows = 0
        if isinstance(module, _ConvNd) and module.transposed:
            rows = 1
            if module.groups > 1:
                raise ValueError(
                    f"unlearn: layer {layer!r} is a transposed convolution in groups, which is not supported."
                )
        targets = [(f"{layer}.weight", rows), (f"{layer}.bias", 0)]
        norm = scores.norms.get(layer)
        if norm is not None:
            after = model.get_submodule(norm)
            if f"{norm}.weight" in present:
                targets += [(f"{norm}.weight", 0), (f"{norm}.bias", 0)]
            elif isinstance(after, (nn.GroupNorm, nn.LayerNorm)):
                raise ValueError(
                    f"unlearn: layer {layer!r} cannot be silenced: {norm!r} behind it mixes channels and has no "
                    "weights."
                )
            else:  # such a norm gives 0 for a zero input around a zero mean
                targets += [(f"{norm}.running_mean", 0)]
        operations += [
            Operation("fill", name, dim=dim, index=tuple(channels), value=0.0)
            for name, dim in targets
            if name in present
        ]
    return operations
