"""`unlearn`: class unlearning by editing what discriminates the class (DISCEDIT-U)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from discedit.common import validation
from discedit.common.warning import warn
from discedit.editing.ablation import AblateComponents, ModHiFiU
from discedit.editing.concept_erasure import EraseDirections, erasable_layers
from discedit.editing.target_search import Problem
from discedit.model.forward import outside_modes
from discedit.model.sharded import unwrapped
from discedit.moments.forget_retain import ForgetRetainSplit
from discedit.recipes.recipe import Edit
from discedit.scoring.scores import Scores
from discedit.selection.candidates import Candidates

METHODS = {"erase_directions": EraseDirections, "ablate_components": AblateComponents, "modhifi": ModHiFiU}


@outside_modes()
def unlearn(
    model: nn.Module,
    scores: Scores,
    *,
    classes: Sequence[int] | Callable[[int], bool],
    method: str | EraseDirections | AblateComponents = "auto",
    forget_accuracy: float | None = None,
    retain_drop: float | None = None,
    layers: Iterable[str] | None = None,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
) -> Edit:
    """Edit what tells the given classes from the rest, so that the model no longer recognises them.

    No guarantee of privacy: what the model learned from the class may still be found in it (docs/evaluation.md). The
    model is unchanged; ``edit.recipe.apply(model, inplace=True)`` changes it.

    Args:
        model: the model that `scores` came from.
        scores: from `discedit.score`.
        classes: class indices to forget, or a predicate on them, such as ``lambda label: label >= 5``.
        method: `EraseDirections`, `AblateComponents` or `ModHiFiU`, or its name ("erase_directions",
            "ablate_components", "modhifi"). "auto": directions are erased when data is given and there is a layer that
            they can be erased from, else components are ablated.
        forget_accuracy, retain_drop: targets in [0, 1], one or both, for the accuracy on `data` of the classes to
            forget and for what the others lose, each a mean over classes. The smallest edit that forgets so much is
            searched for; with `retain_drop` alone the largest that loses no more. One that is missed gives a warning.
        layers: names of layers to edit; by default the method's own choice.
        data: labelled batches of all classes. Held in memory are up to 4,096 samples of the classes that stay and 1,024
            of those to forget.
        example_inputs: as for `discedit.prune`, for heads and removal.

    Returns:
        `Edit`. Layers that, when run, do not give what the recipe says are left alone, and `Edit.skipped` names them.

    Raises:
        ValueError: unknown classes or classes without samples, scores of another model, nothing to choose from, a
            target out of range, or a method without the data or inputs that it needs.

    Source: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024.
    """
    op = "unlearn"
    validation.module(op, model)
    model = unwrapped(model)
    validation.instance(op, "scores", scores, Scores, "a discedit.Scores")
    forget = _checked_classes(scores, classes)
    others = [cls for cls in range(scores.num_classes) if cls not in forget and int(scores.counts[cls])]
    chosen = _method(method)
    targets = _targets(forget_accuracy=forget_accuracy, retain_drop=retain_drop)
    if data is None and targets:
        raise ValueError(f"{op}: targets need data, labelled batches of all classes, got data=None.")
    if data is not None and not others:
        raise ValueError(f"{op}: classes must leave at least one class with samples, got {forget}.")
    samples = None if data is None else ForgetRetainSplit(op, model, data, forget, scores.num_classes)
    asked = None if layers is None else list(dict.fromkeys(validation.names(op, "layers", layers)))
    problem = Problem(model, scores, forget, others, asked, samples, example_inputs, targets)
    if isinstance(chosen, EraseDirections) or (chosen is None and data is not None):
        Candidates.of(op, model, scores).chosen(op, None)
    if chosen is None:
        # Directions first: they forget more for what the other classes lose (benchmarks/unlearn.md).
        able = [] if samples is None else erasable_layers(problem)[0]
        edit, missed = EraseDirections().erase(problem, able) if able else AblateComponents().apply(problem)
    else:
        edit, missed = chosen.apply(problem)
    if missed:
        warn(missed)
    return edit


def _method(method: Any) -> EraseDirections | AblateComponents | None:
    """None for "auto"."""
    if isinstance(method, (EraseDirections, AblateComponents)):
        return method
    validation.choice("unlearn", "method", method, ("auto", *METHODS))
    return None if method == "auto" else METHODS[method]()


def _targets(**given: float | None) -> dict[str, float]:
    targets = {name: value for name, value in given.items() if value is not None}
    for name, value in targets.items():
        if not validation.is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"unlearn: {name} must be a number in [0, 1], got {value!r}.")
    return {name: float(value) for name, value in targets.items()}


def _checked_classes(scores: Scores, classes: Any) -> list[int]:
    forget = validation.classes("unlearn", classes, scores.num_classes)
    for cls in forget:
        if int(scores.counts[cls]) == 0:
            raise ValueError(f"unlearn: class {cls} has no sample in scores, so nothing is known to tell it apart.")
    if int((scores.counts > 0).sum()) < 2:
        raise ValueError("unlearn: scores must hold samples of at least two classes.")
    return forget
