"""`prune`: structured pruning (DISCEDIT-SP), any budget, with repair in closed form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.common.warning import warn
from discedit.editing.attention_basis import balanced
from discedit.editing.divergence import measured_divergences
from discedit.editing.latency import latencies, measured_latencies
from discedit.graph.pruning_graph import INNER, KINDS, Components, Graph
from discedit.model.forward import outside_modes, running_examples
from discedit.model.sharded import unwrapped
from discedit.model.size import count_macs, count_parameters, macs_of_weights
from discedit.model.trace import ModelTrace
from discedit.moments.calibration import batch_norms, calibrated, kept_back
from discedit.moments.class_samples import class_samples, logits_of
from discedit.recipes.damage import ClassDamage
from discedit.recipes.divergences import DivergenceTable
from discedit.recipes.latencies import LatencyTable
from discedit.recipes.recipe import Edit, Recipe, compose_edits, copied, record
from discedit.repair import batchnorm
from discedit.repair.compensation import compensated
from discedit.repair.least_squares import repaired, take_back, warning_if_worse
from discedit.scoring.scores import Scores
from discedit.selection.budget import (
    AcrossLayers,
    Budget,
    Choice,
    Cost,
    MaxLatency,
    MaxParameters,
    Progress,
    Ratio,
    SizeBudget,
    Threshold,
    budget_across,
    budget_of,
    choose,
)
from discedit.selection.candidates import Candidates, check_scored, why_not_editable
from discedit.selection.divergence import MeasureDivergence, check_table
from discedit.selection.importance import (
    COMPONENTS,
    CRITERIA,
    OF_CONSUMERS,
    Random,
    check_criterion,
    check_scores,
    component_importances,
    kinds_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

OUTPUTS = "outputs"  # the kind of component that only `prune` has
REPAIRS = ("auto", "none", "mean", "batchnorm", "least_squares", "compensation")
SAMPLED = ("mean", "least_squares", "compensation")  # repairs of layers, on samples
SHARES = ("reconstruction", "combined")  # criteria that mean the same in every layer
# Criteria where each layer loses a share of its own, by repair (benchmarks/prune.md).
BEST_WITH = {
    "none": "energy",
    "mean": "energy",
    "batchnorm": "reconstruction",
    "compensation": "reconstruction",
    "least_squares": "l1",
}
WITHOUT_DATA = "l2"  # (benchmarks/prune.md, repair "none")
BEST_BY_DIVERGENCE = "l2"  # where trials say how much goes from each layer (benchmarks/prune.md)
MISSED = 1.1  # what a model may take longer than was asked, before there is a warning


DEFAULTS = {"criterion": "auto", "repair": "auto", "components": COMPONENTS, "ignore": ()}  # of others, None


class Further(TypedDict, total=False):
    """`protect`, and budgets by their names: ``macs=0.5`` is ``budget=MaxMacs(0.5)``."""

    protect: Mapping[int, float]
    ratio: float | Mapping[str, float]
    global_ratio: float
    threshold: float
    parameters: int | float
    macs: int | float
    latency: float


@outside_modes()
def prune(
    model: nn.Module,
    scores: Scores | Mapping[str, Tensor] | None = None,
    *,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    budget: Budget | None = None,
    criterion: str | Random = "auto",
    repair: str = "auto",
    components: str | Iterable[str] = COMPONENTS,
    layers: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    **further: Unpack[Further],
) -> Edit:
    """Remove components of a network; the result is a smaller, plain torch module, and the model is unchanged.

    The least important go with all that hangs on them. A removal must equal hiding the components from the layers that
    read them; layers where it does not stay whole, and `Edit.skipped` says why.

    Args:
        model: the model that `scores` came from.
        scores: from `discedit.score`; or importances, layer -> (rows of the layer,), higher = keep; or None.
        example_inputs: a tensor, or a tuple or dict of arguments, that the model can run on.
        data: batches for the criterion and the repair; labels serve `protect` alone.
        budget: `Ratio`, `GlobalRatio`, `Threshold`, `MaxParameters`, `MaxMacs`, `MaxLatency`; or one of ``ratio=0.3``,
            ``global_ratio=``, ``threshold=``, ``parameters=``, ``macs=`` and ``latency=`` in its place.
        criterion: of importance, "auto" or one of those in docs/pruning.md.
        repair: in closed form: "least_squares", "mean", "compensation", "batchnorm", "none"; "auto": the first with
            data, else "none".
        components: of "filters", "neurons", "heads", "stream" (channels to which several layers add), or "all" of
            these; of "qk", "vo" (dimensions within heads, which need data); and "outputs" (what the model gives beside
            its logits may lose channels).
        layers, ignore: names of layers to prune, by default all that can be; of layers to leave whole.
        protect: class -> how often its samples count in what is made of `data`, ``{3: 4.0}``; 1 for others.

    Returns:
        `Edit`. A target that cannot be met gives the smallest model that the limits allow, and a warning.

    Raises:
        ValueError: no budget or several; a value out of range; scores of another model; a layer in `layers` that
            cannot be pruned, or none that can; a criterion or repair without what it needs; a model that does not run.

    Source: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024 (criterion="min", repair="none"); others: docs/pruning.md.
    """
    options = _Options.of(
        example_inputs=example_inputs,
        data=data,
        budget=budget,
        criterion=criterion,
        repair=repair,
        components=components,
        layers=layers,
        ignore=ignore,
        **further,
    )
    return _in_steps(model, scores, options, 1, None)


@outside_modes()
def iterative_prune(
    model: nn.Module,
    scores: Scores | Mapping[str, Tensor] | None = None,
    *,
    example_inputs: Any,
    steps: int,
    rescore: Callable[[nn.Module], Scores | Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> Edit:
    """`prune` in several equal steps, each with its own choice and repair.

    Args:
        model, scores, example_inputs: as for `prune`.
        steps: how many, at least 1.
        rescore: scores of the model after each step but the last, e.g. ``lambda m: score(collect_moments(m, loader,
            10))``; by default those of the components that are left.
        options: further arguments of `prune`; the budget is that of all steps together.

    Returns:
        One `Edit` for all steps.

    Raises:
        ValueError: steps below 1, `rescore` with one step, or as `prune`.
    """
    op = "iterative_prune"
    steps = validation.positive_integer(op, "steps", steps)
    if rescore is not None:
        validation.instance(op, "rescore", rescore, Callable, "a function of a model")  # type: ignore[arg-type]
    if rescore is not None and steps == 1:
        raise ValueError(f"{op}: rescore needs steps above 1, got steps=1.")
    checked = _Options.of(example_inputs=example_inputs, **options)
    if steps > 1 and checked.inner:
        raise ValueError(f"{op}: components={checked.inner[0]!r} needs steps=1, got steps={steps}.")
    return _in_steps(model, scores, checked, steps, rescore)


@dataclass(frozen=True)
class _Options:
    """The arguments of `prune`, as they hold for one step."""

    example_inputs: Any
    data: Iterable[Any] | None
    budget: Budget
    criterion: str | Random | None  # None: the importances that the caller gave
    repair: str
    components: tuple[str, ...]
    layers: list[str] | None
    ignore: list[str]
    protect: Mapping[int, float] | None

    @classmethod
    def of(cls, **given: Any) -> _Options:
        """Each checked by itself; budgets also by their names."""
        known: dict[str, Any] = {field.name: given.pop(field.name, DEFAULTS.get(field.name)) for field in fields(cls)}
        if not isinstance(known["criterion"], Random):
            validation.choice("prune", "criterion", known["criterion"], ("auto", *CRITERIA))
        validation.choice("prune", "repair", known["repair"], REPAIRS)
        data, layers = known["data"], known["layers"]
        # It is read by the criterion, by the repair and in every step, and an iterator ends after the first.
        known["data"] = list(data) if isinstance(data, Iterator) else data
        known["budget"] = budget_of("prune", known["budget"], given)
        known["components"] = kinds_of("prune", known["components"], (*KINDS, *INNER, OUTPUTS))
        inner = [kind for kind in INNER if kind in known["components"]]
        if inner and data is None:
            raise ValueError(
                f"prune: components={inner[0]!r} needs data to find the basis in which dimensions of heads go, got "
                "data=None."
            )
        known["layers"] = None if layers is None else validation.names("prune", "layers", layers)
        known["ignore"] = validation.names("prune", "ignore", known["ignore"])
        _check_protection(known["protect"], known["data"])
        return cls(**known)

    def weighted(self, model: nn.Module) -> _Options:
        """With data of which each class has as many samples as it counts."""
        if self.protect is None or self.data is None:
            return self
        weights = torch.ones(logits_of("prune", model, self.example_inputs).shape[1], dtype=torch.float64)
        for cls, weight in self.protect.items():
            if not 0 <= cls < len(weights):
                raise ValueError(f"prune: protect must name classes in 0..{len(weights) - 1}, got {cls!r}.")
            weights[cls] = weight
        return replace(self, data=class_samples("prune", model, self.data, weights, self.protect))

    def settled(self, candidates: Candidates) -> _Options:
        """With what "auto" stands for, checked with what there is."""
        op = "prune"
        repair, criterion = self.repair, self.criterion
        if repair == "auto":
            repair = "none" if self.data is None else "least_squares"
        budget = self._settled_budget(repair)
        if isinstance(budget_across(budget), DivergenceTable):
            if criterion != "auto" or candidates.importances is not None:
                given = "importances as scores" if candidates.importances is not None else f"criterion={criterion!r}"
                raise ValueError(
                    f"{op}: criterion and importances must be left out where across is a DivergenceTable, which says "
                    f"what goes first, got {given}."
                )
            criterion = None
        elif candidates.scores is None:
            check_scores(op, criterion)
        if candidates.importances is not None:
            if criterion != "auto":
                raise ValueError(
                    f"{op}: criterion must be left out where scores are importances themselves, got {criterion!r}."
                )
            criterion = None
        elif criterion == "auto" and self.data is None:
            criterion = WITHOUT_DATA
        elif criterion == "auto":
            criterion = BEST_WITH[repair] if isinstance(budget, Ratio) else "reconstruction"
            if isinstance(budget_across(budget), MeasureDivergence):
                criterion = BEST_BY_DIVERGENCE
        if repair != "none" and self.data is None:
            raise ValueError(f"{op}: repair={repair!r} needs data to estimate statistics on, got data=None.")
        check_criterion(op, criterion, self.data)
        for argument, layer in (*budget.named(), *(("ignore", layer) for layer in self.ignore)):
            check_scored(op, argument, layer, candidates.widths)
        criterion = Random() if criterion == "random" else criterion
        return replace(self, repair=repair, criterion=criterion, budget=budget)

    def _settled_budget(self, repair: str) -> Budget:
        """With what layers compare by; by their importances it depends on these."""
        budget = self.budget
        across = budget_across(budget)
        if across == "divergence" or (across == "auto" and repair == "least_squares" and self.data is not None):
            across = MeasureDivergence()
        if isinstance(across, MeasureDivergence) and self.data is None:
            raise ValueError(f"prune: across={across!r} needs data to run trials on, got data=None.")
        return replace(budget, across=across) if isinstance(budget, AcrossLayers) else budget

    @property
    def inner(self) -> tuple[str, ...]:
        """Kinds of dimensions within heads."""
        return tuple(kind for kind in INNER if kind in self.components)

    @property
    def takes_samples(self) -> bool:
        """Whether something is estimated on samples."""
        estimates = self.repair in SAMPLED or self.criterion in OF_CONSUMERS
        return estimates or self.measures or bool(self.inner)

    @property
    def measures(self) -> bool:
        """Whether trials measure what layers are worth."""
        return isinstance(budget_across(self.budget), MeasureDivergence)


def _check_protection(protect: Any, data: Any) -> None:
    if protect is None:
        return
    if not isinstance(protect, Mapping) or not protect:
        raise ValueError(f"prune: protect must give classes a number above 0, got {protect!r}.")
    for cls, weight in protect.items():
        if validation.index(cls) is None or not validation.is_number(weight) or not 0 < weight < math.inf:
            raise ValueError(
                f"prune: protect must give class indices a finite number above 0, got {cls!r}: {weight!r}."
            )
    if data is None:
        raise ValueError("prune: protect needs data, of which samples count more or less, got data=None.")


class _Step(NamedTuple):
    edit: Edit
    choice: Choice


def _in_steps(
    model: nn.Module,
    scores: Scores | Mapping[str, Tensor] | None,
    options: _Options,
    steps: int,
    rescore: Callable[[nn.Module], Scores | Mapping[str, Tensor]] | None,
) -> Edit:
    """In equal parts of what is to go, each of what the one before has left."""
    validation.module("prune", model)
    current = model = unwrapped(model)
    budget, inputs = options.budget, options.example_inputs
    candidates = Candidates.of("prune", model, scores)
    if not options.inner:  # whose names are not known yet
        options.settled(candidates)
        candidates.chosen("prune", options.layers)
    with running_examples("prune"):
        macs = count_macs(model, inputs)
    options = options.weighted(model)
    size: float | None = count_parameters(model) if isinstance(budget, MaxParameters) else macs
    if isinstance(budget, MaxLatency):  # is known when the first step has measured it
        size = None
    done: list[_Step] = []
    for step in range(1, steps + 1):
        done.append(_once(current, candidates, options, Progress(step / steps, size, _lost(done))))
        current = done[-1].edit.model
        if isinstance(budget, MaxLatency) and (table := done[0].edit.latencies) is not None:
            size, options = table.whole, replace(options, budget=replace(budget, table=None))
        if step < steps and rescore is None:
            candidates = candidates.left(done[-1].edit)
        elif step < steps and rescore is not None:
            candidates = Candidates.of("prune", current, rescore(current))
            if candidates.importances is not None:  # a criterion of one's own holds for scores: these are it
                options = replace(options, criterion="auto")
    _warn_of_what_is_left(done, budget)
    edit = done[0].edit if steps == 1 else _joined(model, done, budget, rescore is not None)
    edit.macs_before, edit.macs_after = macs, count_macs(edit.model, inputs)
    if isinstance(budget, MaxLatency):
        _note_latency(model, edit, budget, inputs)
    return edit


def _note_latency(model: nn.Module, edit: Edit, budget: MaxLatency, inputs: Any) -> None:
    """What the edit's model takes in truth, with a warning where it is more than was asked for."""
    before, after = latencies(model, edit.model, inputs)
    edit.latency_before, edit.latency_after = before, after
    found = edit.recipe.settings["budget"]
    found["measured"] = after
    if found["met"] and after > MISSED * budget.target(before):
        warn(
            f"prune: latency: {budget.shown(budget.target(before))} asked of {budget.shown(before)}, "
            f"{budget.shown(after)} measured: the table said {budget.shown(found['reached'])}."
        )


def _once(model: nn.Module, candidates: Candidates, options: _Options, progress: Progress) -> _Step:
    op, whole = "prune", model
    model = copied(model) if options.inner else model  # to which the basis of heads is written
    graph = Graph(op, model, options.example_inputs, keep_outputs=OUTPUTS not in options.components)
    inside, unfit = graph.look_inside(options.inner) if options.inner else ({}, {})
    candidates = candidates.beside({**inside, **dict.fromkeys(unfit, 0)})
    options = options.settled(candidates)
    chosen, found, skipped = _found(candidates, options, graph, unfit)
    inputs: Any = None
    further: Any = None
    trace = ModelTrace(model)
    if options.data is not None and options.takes_samples:
        inputs, trace, further = calibrated(op, trace, options.data, further=options.repair in SAMPLED)
    values: dict[str, Tensor] = {}
    unjudged: dict[str, str] = {}
    if not isinstance(budget_across(options.budget), DivergenceTable):
        layers = {layer: parts for layer, parts in found.items() if layer not in inside}
        values, unjudged = component_importances(candidates, options.criterion, graph, layers, inputs, trace)
    inner = [layer for layer in found if layer in inside]
    basis = balanced(op, graph, inner, inputs or (), around_mean=options.repair != "none")
    graph.write(basis.tensors(inner))
    values |= basis.importances
    options, values, failed = _compared(options, graph, found, values, unjudged, (inputs, further, trace))
    skipped |= {layer: why for layer, why in failed.items() if layer in chosen}
    found = {layer: parts for layer, parts in found.items() if layer not in failed}
    if isinstance(options.budget, Threshold):  # of another criterion's importances it would mean something else
        for layer, why in unjudged.items():
            skipped[layer] = f"{options.criterion!r} cannot judge it, because {why}"
        found = {layer: parts for layer, parts in found.items() if layer not in unjudged}
        unjudged = {}
    while True:
        # The trial of a removal may refuse layers; then what goes is chosen anew among the others, which must meet
        # the budget without them.
        _check_some(graph, found, skipped, options)
        choice = _chosen(graph, {layer: values[layer] for layer in found}, found, options, progress)
        operations, failed = graph.plan(choice.removed)
        skipped |= {layer: why for layer, why in failed.items() if layer in chosen}
        if not failed.keys() & found.keys():
            break
        found = {layer: parts for layer, parts in found.items() if layer not in failed}
    rows = {layer: sorted(r for i in choice.removed[layer] for r in parts.rows[i]) for layer, parts in found.items()}
    settings = _described(candidates, options, choice, unjudged)
    moved = [name for name in basis.parts if choice.removed.get(name)]
    graph.write(basis.tensors(moved))  # where nothing goes, all stays as it was
    changes, tensors = basis.operations(moved)
    recipe = Recipe("prune", settings, rows, graph.network.slots.architecture, [*changes, *operations], tensors)
    edit = recipe.apply(whole)
    _repair(edit, graph, choice, options, (inputs, further, trace))
    edit.skipped = {layer: skipped[layer] for layer in chosen if layer in skipped}
    edit.widths = {layer: candidates.widths[layer] for layer in rows}
    across = budget_across(options.budget)
    edit.divergences = across if isinstance(across, DivergenceTable) else None
    edit.latencies = options.budget.table if isinstance(options.budget, MaxLatency) else None
    graph.warn_of_unseen(choice.removed)
    return _Step(edit, choice)


def _found(
    candidates: Candidates, options: _Options, graph: Graph, unfit: Mapping[str, str]
) -> tuple[list[str], dict[str, Components], dict[str, str]]:
    """The layers to look at, the components of those that have some, and why others have none.

    Args:
        unfit: attention whose heads cannot lose dimensions, with the reason.
    """
    known = candidates.chosen("prune", options.layers)
    # Scores leave the head out; without them it would be a candidate, and its components are the classes.
    whole = [*options.ignore, *([graph.trace.head] if candidates.unscored and options.layers is None else [])]
    chosen = [layer for layer in known if layer not in whole]
    skipped = {layer: unfit[layer] for layer in chosen if layer in unfit}
    layers = (layer for layer in chosen if layer not in skipped and layer not in graph.inner)
    edited = (layer for layer in layers if not isinstance(graph.model.get_submodule(layer), nn.MultiheadAttention))
    skipped |= why_not_editable(graph.network.slots, edited)
    found, without = graph.find([layer for layer in chosen if layer not in skipped], options.components)
    return chosen, found, skipped | without


def _compared(
    options: _Options,
    graph: Graph,
    found: Mapping[str, Components],
    importances: dict[str, Tensor],
    unjudged: Mapping[str, str],
    calibration: tuple[Any, Any, ModelTrace],
) -> tuple[_Options, dict[str, Tensor], dict[str, str]]:
    """With what layers compare by; the importances, which a table has; and layers that must then stay whole."""
    budget, across = options.budget, budget_across(options.budget)
    if not isinstance(budget, AcrossLayers):
        return options, importances, {}
    failed: dict[str, str] = {}
    if isinstance(budget, MaxLatency):
        budget, failed = _with_latencies(budget, graph, found, options.example_inputs)
        found = {layer: parts for layer, parts in found.items() if layer not in failed}
    if across == "auto":
        across = "none" if options.criterion in SHARES and not unjudged else "rank"
    if isinstance(across, MeasureDivergence):
        # What cannot go is not worth a trial.
        _, why = graph.plan({layer: range(len(parts.rows) // 2) for layer, parts in found.items()})
        failed |= why
        settings = {"criterion": _criterion_of(options), "components": list(options.components)}
        left = {layer: parts for layer, parts in found.items() if layer not in failed}
        across = measured_divergences("prune", across, graph, left, importances, calibration, settings)
    elif isinstance(across, DivergenceTable):
        failed |= {layer: "the table of divergences does not have it" for layer in found if layer not in across}
    if isinstance(across, DivergenceTable):
        sizes = {layer: len(parts.rows) for layer, parts in found.items() if layer not in failed}
        check_table("prune", across, graph.network.slots.architecture, sizes)
        importances = {layer: across[layer].importances for layer in sizes}
    return replace(options, budget=replace(budget, across=across)), importances, failed


def _with_latencies(
    budget: MaxLatency, graph: Graph, found: Mapping[str, Components], inputs: Any
) -> tuple[MaxLatency, dict[str, str]]:
    """With a table of this model, and the layers that it does not hold, with reasons."""
    table, architecture = budget.table, graph.network.slots.architecture
    if table is None:
        table, failed = measured_latencies("prune", graph, found, inputs, progress=budget.progress)
        return replace(budget, table=table), failed
    if table.architecture != architecture:
        raise ValueError(f"prune: table must be of this model, {table!r} is of one with other shapes.")
    for layer in table.layers.keys() & found.keys():
        if table.layers[layer][-1] >= len(found[layer].rows):
            raise ValueError(f"prune: table must be of the same components, layer {layer!r} has others.")
    return budget, {layer: "the table of latencies does not have it" for layer in found if layer not in table.layers}


def _check_some(graph: Graph, found: Mapping[str, Components], skipped: Mapping[str, str], options: _Options) -> None:
    if options.layers is not None and skipped:
        layer, why = next(iter(skipped.items()))
        raise ValueError(f"prune: layer {layer!r} cannot be pruned: {why}.")
    if not found:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in skipped.items())
        helps = "stream" not in options.components and graph.find(skipped, KINDS)[0]
        more = " With components='all', channels to which several layers add go as well." if helps else ""
        raise ValueError(f"prune: no layer can be pruned ({reasons}).{more}")


def _chosen(
    graph: Graph, values: dict[str, Tensor], found: Mapping[str, Components], options: _Options, progress: Progress
) -> Choice:
    """What goes."""
    cost: Cost | LatencyTable | None = None
    if isinstance(options.budget, MaxLatency):
        cost = options.budget.table
    elif isinstance(options.budget, SizeBudget):
        shapes: dict[str, tuple[int, ...]] = {
            tensor: tuple(parameter.shape) for tensor, parameter in graph.model.named_parameters()
        }
        macs, others = macs_of_weights(graph.model, options.example_inputs)
        footprints = graph.footprints_of(values, shapes, macs)
        cost = Cost(footprints, shapes, macs, others)
    heads = {layer for layer, components in found.items() if components.kind == "heads"}
    return choose(values, options.budget, cost=cost, few=heads, progress=progress)


def _repair(
    edit: Edit, graph: Graph, choice: Choice, options: _Options, calibration: tuple[Any, Any, ModelTrace]
) -> None:
    """Makes up for what went, in the edit's model and recipe."""
    if options.repair == "batchnorm" and options.data is not None:
        record(edit, *batchnorm.reestimated(edit.model, options.data))
    if options.repair not in SAMPLED or not any(choice.removed.values()):
        return
    op, compensates = "prune", options.repair == "compensation"
    inputs, further, trace = calibration
    readers, producers = dict(graph.consumers(choice.removed)), graph.producers(choice.removed)
    readers |= {name: [] for name in graph.behind_queries(choice.removed) if name not in readers}
    parts, held_out = kept_back(op, inputs, further)
    with warning_if_worse(op, trace, edit.model, held_out) as outputs:
        if compensates:
            result = compensated(edit.model, readers, producers, trace, parts)
        else:
            weights = options.repair == "least_squares"
            result = repaired(op, edit.model, readers, producers, trace, parts, weights=weights)
        take_back(op, edit, result, producers, trace, held_out, sums=not compensates)
        if compensates and options.data is not None and batch_norms(edit.model):
            kept = {change.target: change.index for change in edit.recipe.operations if change.kind == "keep"}
            record(edit, *batchnorm.adapted(edit.model, trace.model, kept, options.data))
    before, after = outputs
    if before is not None and after is not None and before.ndim == 2 and before.shape == after.shape:
        edit.damage = ClassDamage.of(before, after)


def _lost(done: list[_Step]) -> dict[str, int]:
    """How many components each layer has lost in these steps."""
    lost: Counter[str] = Counter()
    for step in done:
        lost.update({layer: len(gone) for layer, gone in step.choice.removed.items()})
    return lost


def _warn_of_what_is_left(steps: list[_Step], budget: Budget) -> None:
    """No silent no-op: a warning where nothing goes, or less than was asked for."""
    last = steps[-1].choice
    if (not last.met and not isinstance(budget, Ratio)) or (budget.asks() and not any(_lost(steps).values())):
        warn(f"prune: {last.message}")


def _described(candidates: Candidates, options: _Options, choice: Choice, unjudged: dict[str, str]) -> dict[str, Any]:
    """The settings of a recipe, as JSON has them."""
    budget, criterion = options.budget, options.criterion
    described: dict[str, Any] = {
        **_named(budget),
        "criterion": _criterion_of(options),
        "repair": options.repair,
        "components": list(options.components),
        "budget": {"asked": choice.asked, "reached": choice.reached, "met": choice.met},
    }
    if across := budget_across(budget):
        described["across"] = across if isinstance(across, str) else "divergence"
    if isinstance(criterion, Random):
        described["seed"] = criterion.seed
    if options.protect:
        described["protect"] = {str(cls): float(weight) for cls, weight in options.protect.items()}
    if unjudged:
        described["ranked_by_l2"] = unjudged
    return described if candidates.scores is None else {**described, **candidates.scores.settings}


def _criterion_of(options: _Options) -> str:
    criterion = options.criterion
    if isinstance(across := budget_across(options.budget), DivergenceTable):
        return str(across.settings["criterion"])
    return "random" if isinstance(criterion, Random) else "given" if criterion is None else criterion


def _named(budget: Budget) -> dict[str, Any]:
    return {budget.name: dict(budget.value) if isinstance(budget.value, Mapping) else budget.value}


def _joined(model: nn.Module, done: list[_Step], budget: Budget, rescored: bool) -> Edit:
    """One edit for all steps."""
    edit = compose_edits(model, [step.edit for step in done], inplace=False)
    last = done[-1].choice
    settings = edit.recipe.settings
    settings |= {"steps": len(done), "rescored": rescored, "budget": done[-1].edit.recipe.settings["budget"]}
    settings |= _named(budget)
    if not isinstance(budget, SizeBudget):
        reached = sum(_lost(done).values())
        settings["budget"] = {"asked": reached - last.reached + last.asked, "reached": reached, "met": last.met}
    for notes in ("unrepaired", "ranked_by_l2"):
        found = {k: v for step in done for k, v in step.edit.recipe.settings.get(notes, {}).items()}
        if found:
            settings[notes] = found
    return edit
