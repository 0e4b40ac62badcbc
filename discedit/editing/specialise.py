"""`specialise`: a smaller network for some of the classes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.editing.prune import iterative_prune, prune
from discedit.model.forward import outside_modes, running_examples
from discedit.model.sharded import unwrapped
from discedit.model.size import count_macs
from discedit.model.trace import ModelTrace, components_in
from discedit.moments.class_samples import class_samples, logits_of
from discedit.moments.data_pass import asked_by
from discedit.recipes.divergences import DivergenceTable
from discedit.recipes.operations import Operation, Slots
from discedit.recipes.recipe import Edit, Recipe, architecture_of, compose_edits
from discedit.scoring.scores import Scores
from discedit.selection.budget import BUDGETS, budget_across, budget_of
from discedit.selection.candidates import why_not_editable

HEADS = ("remove", "mask")
BEST_BY_DIVERGENCE = "reconstruction"  # of few classes it loses less than norms (benchmarks/classes.md)
MASKED = -1e4  # the logit of a class that is left out: below all others, and finite in half precision
MEASURED = (
    "macs_after",
    "skipped",
    "divergences",
    "damage",
    "latency_before",
    "latency_after",
    "latencies",
)  # of an edit
COUNTS = ("num_classes", "num_labels")  # attributes of models that count the classes
OP = "specialise"


@outside_modes()
def specialise(
    model: nn.Module,
    scores: Scores | Mapping[str, Tensor] | None = None,
    *,
    classes: Sequence[int],
    example_inputs: Any,
    data: Iterable[Any],
    head: str = "remove",
    **options: Any,
) -> Edit:
    """Prune a network for some of its classes: what only the others need goes first.

    The rows of the other classes leave the head, and the rest is pruned on samples of these classes alone, so that
    criterion, divergence and repair see nothing else. The result is for inputs that are of one of these classes.

    Args:
        model: the model; it is unchanged.
        scores: of these classes alone, ``score(moments.of_classes(classes))``; importances; or None: as for `prune`.
        classes: at least two class indices, in the order in which the smaller head has them.
        example_inputs: as for `prune`.
        data: batches of all classes, or of some: samples of other classes are passed over. Without labels, the model's
            own predictions say what a sample is of.
        head: "remove": the logits are of `classes`, (samples, len(classes)); "mask": they are of all classes still,
            with -1e4 for the others.
        options: a budget and further arguments of `prune`, or of `iterative_prune` with `steps`. Without scores the
            criterion of budgets across layers is "reconstruction".

    Returns:
        One `Edit` for both, on the model given. Its `divergences` may be spent again, for the same classes.

    Raises:
        ValueError: unknown classes, fewer than two, or all; no samples of them; scores of other classes; a model whose
            head is not one layer that gives the logits, or to "mask" has no bias; or as `prune`.
    """
    validation.module(OP, model)
    validation.choice(OP, "head", head, HEADS)
    model = unwrapped(model)
    layer = _head_of(model, example_inputs)
    number = components_in(model.get_submodule(layer)) or 0
    chosen = validation.classes(OP, classes, number)
    if not 2 <= len(chosen) < number:
        raise ValueError(f"{OP}: classes must name at least two classes, and not all {number}, got {chosen}.")
    if isinstance(scores, Scores) and scores.num_classes != len(chosen):
        raise ValueError(
            f"{OP}: scores must be of the {len(chosen)} classes alone, score(moments.of_classes({chosen})), got scores "
            f"of {scores.num_classes}."
        )
    if head == "mask" and getattr(model.get_submodule(layer), "bias", None) is None:
        raise ValueError(f"{OP}: head='mask' needs a head with a bias, {layer!r} has none; head='remove' needs none.")
    with asked_by(OP, "prune"):
        named = {name: options.pop(name) for name in BUDGETS & options.keys()}
        budget = budget_of("prune", options.pop("budget", None), named)
    across = budget_across(budget)
    if scores is None and across and not isinstance(across, DivergenceTable):
        options.setdefault("criterion", BEST_BY_DIVERGENCE)
    narrowed = _narrowed(model, layer, chosen, example_inputs)
    weights = torch.zeros(number, dtype=torch.float64).index_fill(0, torch.tensor(chosen), 1.0)
    found = class_samples(OP, model, data, weights, chosen)
    samples = [(inputs, torch.tensor([chosen.index(label) for label in labels])) for inputs, labels in found]
    with asked_by(OP, "prune"):
        run = iterative_prune if "steps" in options else prune
        pruned = run(narrowed.model, scores, example_inputs=example_inputs, data=samples, budget=budget, **options)
    edit = compose_edits(model, [narrowed, pruned], inplace=False)
    edit.recipe.settings |= pruned.recipe.settings | {"head": head}
    if head == "mask":
        edit = _masked(edit.recipe, narrowed.recipe, layer, chosen).apply(model)
        pruned.damage = pruned.damage and pruned.damage.renumbered(chosen, number)
    for name in MEASURED:
        setattr(edit, name, getattr(pruned, name))
    edit.widths = {layer: number, **pruned.widths}
    edit.macs_before = count_macs(model, example_inputs)
    return edit


def _head_of(model: nn.Module, example_inputs: Any) -> str:
    """The layer whose rows are the classes."""
    with running_examples(OP):
        head = ModelTrace.of(model, example_inputs).head
    why = "there is none such" if head is None else why_not_editable(Slots(model), [head]).get(head)
    if head is None or why:
        where = "" if head is None else f" {head!r}"
        raise ValueError(f"{OP}: model must have one layer whose output are the logits; its head{where}: {why}.")
    return head


def _narrowed(model: nn.Module, layer: str, classes: list[int], example_inputs: Any) -> Edit:
    """The edit that leaves the rows of some classes in the head, in their order, which is tried."""
    module = model.get_submodule(layer)
    number = components_in(module)
    operations, tensors = [], {}
    kept = tuple(sorted(classes))
    order = torch.tensor([kept.index(cls) for cls in classes])
    for name, parameter in module.named_parameters(layer, recurse=False):
        operations.append(Operation("keep", name, index=kept))
        if list(kept) != classes:
            tensors[f"set.{len(operations)}"] = parameter.detach().cpu()[list(kept)][order]
            operations.append(Operation("set", name))
    names = [layer.rsplit(".", parts)[0] if parts else layer for parts in range(layer.count(".") + 1)]
    for name in dict.fromkeys([*names, ""]):
        owner = model.get_submodule(name)
        attributes = ("out_features", "out_channels") if name == layer else COUNTS
        operations += [
            Operation("attribute", name, name=attribute, before=number, value=len(classes))
            for attribute in attributes
            if type(vars(owner).get(attribute)) is int and vars(owner)[attribute] == number
        ]
    gone = [cls for cls in range(number or 0) if cls not in classes]
    settings = {"specialised": classes}
    edit = Recipe("prune", settings, {layer: gone}, architecture_of(model), operations, tensors).apply(model)
    edit.widths = {layer: number or 0}
    try:
        expected, found = (logits_of(OP, one, example_inputs) for one in (model, edit.model))
        expected = expected[:, classes]
        same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        why = f"its logits {'differ' if found.shape == expected.shape else f'have shape {list(found.shape)}'}"
    except Exception as error:  # what stands behind the head may count on its rows
        same, why = False, f"it raised {type(error).__name__}: {error}"
    if not same:
        raise ValueError(
            f"{OP}: model must give the logits of a class by its row of the head {layer!r} alone; with {len(classes)} "
            f"of {number} rows {why}."
        )
    return edit


def _masked(recipe: Recipe, narrowing: Recipe, layer: str, classes: list[int]) -> Recipe:
    """The same recipe with all rows in the head, those of other classes without weights and with a logit of their own.

    Args:
        narrowing: the part of it that takes rows from the head.
    """
    own = {f"{layer}.weight": 0.0, f"{layer}.bias": MASKED}
    [rest] = narrowing.components.values()
    counts = {(operation.target, operation.name) for operation in narrowing.operations if operation.kind == "attribute"}
    operations: list[Operation] = []
    tensors = {}
    for place, operation in enumerate(recipe.operations):
        values = recipe.tensors.get(f"set.{place}")
        of_head = operation.target in own
        if operation.kind == "attribute" and (operation.target, operation.name) in counts:
            continue
        if of_head and operation.kind == "keep" and operation.dim == 0:
            operation = Operation("fill", operation.target, index=tuple(rest), value=own[operation.target])
        elif of_head and operation.kind == "set" and values is not None:
            whole = values.new_full((len(classes) + len(rest), *values.shape[1:]), own[operation.target])
            whole[classes] = values
            values = whole
        if values is not None:
            tensors[f"set.{len(operations)}"] = values
        operations.append(operation)
    components = {name: rows for name, rows in recipe.components.items() if name != layer}
    return replace(recipe, components=components, operations=operations, tensors=tensors)
