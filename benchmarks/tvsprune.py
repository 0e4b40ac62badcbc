"""TVSPrune's loop of scoring and pruning, and its score of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from discedit import Edit, Scores, preset
from discedit.presets import Preset
from discedit.recipes.recipe import compose_edits


def ldiff(scores: Scores, threshold: float, *, reduction: str = "pairwise_min") -> dict[str, float]:
    """TVSPrune's LDIFF: to what extent a layer mixes components that tell classes apart with others that do not.

    The mean score of the components at or above the threshold minus the mean score of those below, as we read it: the
    abstract calls it a heuristic for how far a layer may be pruned, its formula is not confirmed. A layer in which one
    of the two kinds is missing is no mixture, and has 0.

    Args:
        scores: from `Preset.score`.
        threshold: the score from which a component counts as discriminative, in [0, 1].
        reduction: how a component's scores become one number, as in `Scores.reduce`.

    Returns:
        Layer name -> a number in [0, 1].

    Raises:
        ValueError: threshold outside [0, 1], or as `Scores.reduce`.

    Source: Murti, Narshana and Bhattacharyya, TVSPrune, ICLR 2023.
    """
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError(f"ldiff: threshold must be a number in [0, 1], got {threshold!r}.")
    mixtures = {}
    for layer, values in scores.reduce(reduction).items():
        high, low = values[values >= threshold], values[values < threshold]
        mixtures[layer] = float(high.mean() - low.mean()) if len(high) and len(low) else 0.0
    return mixtures


def tvsprune_iterative(
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    *,
    example_inputs: Any,
    accuracy: Callable[[nn.Module], float],
    floor: float,
    step: float = 0.025,
    algorithm: Preset | None = None,
    **overrides: Any,
) -> Edit:
    """IterTVSPrune: score, prune below a threshold, and score what is left, as long as the accuracy stays.

    A round prunes each layer below `amount` times its mean score. If the accuracy stays at or above the floor, the
    smaller model is scored again; if not, the round is dropped and `amount` lowered by `step`. It ends when `amount`
    reaches 0 or nothing is left below it. This is the loop of the published scripts, with their first amount of 0.5
    and their step; the abstract says only that TVSPrune is applied again and again. The scripts do not end where the
    accuracy stays and nothing new falls below the threshold; and what they have masked still counts in the mean score
    of its layer, with 0, while what is removed here does not.

    Args:
        model, example_inputs: as for `discedit.prune`.
        loader, num_classes: as for `discedit.collect_moments`; the loader is read once for each model that is scored.
        accuracy: gives the accuracy of a model, or any other number that must not fall.
        floor: what `accuracy` must give at least for a round to be kept.
        step: how much `amount` is lowered after a round that is dropped, above 0.
        algorithm: a variant of the preset "tvsprune", whose `amount` is the first; by default that preset.
        overrides: further arguments of `Preset.score`.

    Returns:
        One `Edit` for all rounds together; without components where no round was kept.

    Raises:
        ValueError: step is not above 0, the selection of `algorithm` is not "below", the model is below the floor
            before anything is pruned, or as `Preset.score` and `Preset.prune`.

    Source: Murti, Narshana and Bhattacharyya, TVSPrune, ICLR 2023.
    """
    op = "tvsprune_iterative"
    algorithm = preset("tvsprune") if algorithm is None else algorithm
    if algorithm.selection != "below":
        raise ValueError(f"{op}: algorithm must have the selection 'below', it has {algorithm.selection!r}.")
    if not isinstance(step, (int, float)) or not 0 < step < math.inf:
        raise ValueError(f"{op}: step must be a finite number above 0, got {step!r}.")
    before = accuracy(model)
    if not before >= floor:
        raise ValueError(f"{op}: floor must not be above the accuracy of the model, {before}, got {floor!r}.")
    scores = algorithm.score(model, loader, num_classes, **overrides)
    edits = [replace(algorithm, amount=0.0).prune(model, scores, example_inputs=example_inputs)]
    dropped = 0
    while (amount := algorithm.amount - dropped * step) > 1e-9:  # no sum, whose rounding would add a round
        edit = replace(algorithm, amount=amount).prune(edits[-1].model, scores, example_inputs=example_inputs)
        if not any(edit.recipe.components.values()):
            break
        if accuracy(edit.model) >= floor:
            edits.append(edit)
            scores = algorithm.score(edit.model, loader, num_classes, **overrides)
        else:
            dropped += 1
    edit = compose_edits(model, edits, inplace=False)
    edit.recipe.settings |= {
        "algorithm": "tvsprune_iterative",
        "floor": floor,
        "step": step,
        "rounds": len(edits) - 1,
    }
    return edit
