"""`prune`: structured pruning (DISCEDIT-SP), any budget, with repair in closed form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.graph.pruning_graph import KINDS, Components, Graph, unseen_message
from discedit.model.forward import call, device_of, outside_modes, split, undisturbed
from discedit.model.sharded import unwrapped
from discedit.model.size import count_macs, count_parameters, macs_of_weights
from discedit.model.trace import ModelTrace, components_in, width_of
from discedit.moments.calibration import batch_norms, calibrated, kept_back, samples_of
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import Edit, Recipe, architecture_of, joined
from discedit.repair.compensation import compensated
from discedit.repair.least_squares import Outputs, repaired, take_back
from discedit.scoring.scores import REDUCTIONS, Scores
from discedit.selection.budget import BUDGETS, NORMALISATIONS, Choice, Cost, Limits, choose, normalised, share_of
from discedit.selection.importance import CRITERIA, GIVEN, OF_READERS, Unscored, kinds_of, of_components

REPAIRS = ("auto", "none", "mean", "batchnorm", "least_squares", "compensation")
IN_ORDER = ("mean", "least_squares")  # repairs that take one layer after the other
METHODS = ("discedit", "modhifi")
OF_SCORES = (*REDUCTIONS, "combined")  # criteria that need scores
ACROSS = ("global_ratio", "parameters", "macs")  # budgets that compare importances of different layers
SHARES = ("reconstruction", "combined")  # criteria that mean the same in every layer
# Criteria where each layer loses a share of its own, by repair (benchmarks/prune.md).
BEST_WITH = {
    "none": "energy",
    "mean": "energy",
    "batchnorm": "reconstruction",
    "compensation": "reconstruction",
    "least_squares": "l1",
}


@outside_modes
def prune(
    model: nn.Module,
    scores: Scores | Mapping[str, Tensor] | None = None,
    *,
    example_inputs: Any,
    ratio: float | Mapping[str, float] | None = None,
    global_ratio: float | None = None,
    threshold: float | None = None,
    parameters: int | float | None = None,
    macs: int | float | None = None,
    across: str = "auto",
    round_to: int = 1,
    floor: int | Mapping[str, int] = 1,
    method: str = "discedit",
    criterion: str = "auto",
    repair: str = "auto",
    data: Iterable[Any] | None = None,
    layers: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    components: str | Iterable[str] = ("filters", "neurons", "heads"),
    keep_outputs: bool = True,
    steps: int = 1,
    rescore: Callable[[nn.Module], Scores | Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    inplace: bool = False,
) -> Edit:
    """Remove components of a network; the result is a smaller, plain torch module.

    The least important components go, with everything that hangs on them (norms, depthwise convolutions, gates, the
    next layers' inputs), as torch-pruning's dependency graph finds it. Each removal is checked on `example_inputs`, in
    float64: it must be the same function as hiding the components from the layers that read them (and from norms over
    them, which then normalise what is left).
    Layers where it is not are left whole; `Edit.skipped` names them and says why. So are layers whose channels the
    model gives out, beside its logits or in train mode. Branches that run in train mode alone shrink at their inputs;
    modules that do not run on `example_inputs` at all, and may read what was removed, are named in a warning.

    Args:
        model: the model that `scores` came from; unchanged unless `inplace`.
        scores: from `discedit.score`; or importances of one's own, layer -> (rows of the layer,), higher = keep, which
            are then the criterion; or None for criteria that need no scores, and so no labels.
        example_inputs: a tensor, or a tuple or dict of arguments, that the model can run on. Shows what hangs on what
            and checks the removal: real or random inputs, since components that are silent on them pass unchecked.

        ratio: at least this share of each layer's components goes, in [0, 1), but one stays; of heads, the nearest
            number; or layer -> share (others stay whole). Exactly one of these five budgets is given.
        global_ratio: share of all components together.
        threshold: components that are less important than this go.
        parameters: how many parameters may be left: an integer, or a share in (0, 1).
        macs: the same for multiply-accumulates of a forward pass on `example_inputs`.
        across: how importances of different layers compare under `global_ratio`, `parameters` and `macs`: "rank" (each
            layer loses the same share), "mean" or "max" (divided by the layer's), "none" (as they are; so always under
            `threshold`). "auto": "none" for "reconstruction" and "combined", which are shares of what a layer's readers
            get, unless a layer cannot be judged so; else "rank".
        round_to: the number of components that stay in a layer is a multiple of this, or the layer stays whole.
        floor: components that stay in each layer at least, or layer -> components.

        method: what "auto" stands for in `criterion` and `repair`. "discedit": as said there. "modhifi": "fidelity" and
            "compensation", which need `data`, but no labels and no scores (ModHiFi-P).
        criterion: of importance. Of the scores over classes "max", "mean" or "min" (DISCEDIT-SP as published), over
            pairs of classes "pairwise_min" (WitnessPrune, TVSPrune) or "pairwise_mean"; of the weights that give a
            component "l1", "l2"; "random"; or, on `data`, of what the layers that read it lose: "energy" (the variance
            that it adds to their outputs), "reconstruction" (what of that the other components cannot make up for),
            "combined" (the same, where an output counts by how well it tells the class that it tells best), or
            "fidelity" (the share of an output's variance that it gives alone, scaled in the best way, in the mean over
            outputs: `discedit.fidelity.singleton_fidelity`). "auto": the importances given as `scores`; without data
            "l1"; under `ratio` what benchmarks/prune.md shows to be best with the repair ("least_squares": "l1";
            "batchnorm" and "compensation": "reconstruction"; "mean" and "none": "energy"); under the other budgets
            "reconstruction".
        repair: what follows the removal, without gradients or labels. "least_squares": every layer after the first
            removal gets new weights, so that it gives what it gave before, or what makes the sum right to which it is
            added; in the order in which they run, each on what those before it now give. "mean": the same for biases
            alone, which then carry the mean of what was removed. "compensation": what a reader makes of each channel
            that stays is scaled, for each output by the factor that makes up best for those that went
            (`discedit.fidelity.compensation`, around the mean); then statistics of batch norms change by as much as
            those of the smaller network differ from the whole one's on all of `data`. These three look at up to 1,024
            samples of `data`; Conv2d (not in groups) and Linear, with a bias or a batch norm behind them; others that
            read removed components are named in the recipe's settings ("unrepaired"). So are layers whose repair is
            taken back since it gives more squared error than none (1.25 times, or two standard errors above it) on
            samples that it was not fitted to: up to 128 behind those 1,024, else the last eighth of them.
            "batchnorm": the statistics of batch norms, on all of `data`. "none". "auto": "least_squares" when data is
            given, else "none".
        data: batches (labels are not used) for the criterion and the repair.

        layers: names of the layers to prune, by default all in `scores` that can be.
        ignore: names of layers to leave whole.
        components: one or several of: "filters" of convolutions; "neurons" of linear layers; "heads" of attention, with
            their rows of query, key and value and all else that belongs to them; "stream", channels to which several
            layers add (residual streams), which all lose the same; or "all". Layers whose outputs are multiplied
            (squeeze and excitation, gates) lose the same filters or neurons; convolutions in groups, and group norms,
            lose whole groups. Heads go by the layer of the values or the one that holds all three (or an
            `nn.MultiheadAttention`), other components by the first of their layers that runs, and count by the mean
            over their rows there.
        keep_outputs: whether all that the model gives keeps its shape; otherwise what stands beside the logits (or the
            first tensor), such as feature maps, loses the channels that its layers lose.
        steps: in how many equal steps to get there, each with its own choice and repair.
        rescore: scores of the model after each step but the last, e.g. ``lambda m: score(collect_moments(m, loader,
            10))``; by default those of the components that are left.
        seed: of the criterion "random".

    Returns:
        `Edit` with the smaller model, its recipe and a summary. A target that cannot be met gives the smallest model
        that the limits allow, a warning, and how close it came in ``recipe.settings["budget"]``.

    Raises:
        ValueError: no budget, several, or one out of range or too small to remove anything; scores of another model; a
            layer that cannot be pruned named in `layers`; nothing that can be pruned; a criterion or repair without the
            data or scores that it needs; an unknown kind in `components`; a model that does not run on
            `example_inputs`.

    Sources: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024 (criterion="min", repair="none"). Least squares for what
    reads a pruned layer: He, Zhang and Sun, ICCV 2017. "reconstruction": Hassibi and Stork, NIPS 1992, for groups of
    weights. "modhifi": Kashyap, Murti, Nayak, Narshana and Bhattacharyya, ModHiFi, NeurIPS 2025.
    """
    validation.module("prune", model)
    model = unwrapped(model)
    if scores is None:
        scores = Unscored.of(model, example_inputs)
    options = _Options(
        example_inputs=example_inputs,
        budget={
            name: value
            for name, value in zip(BUDGETS, (ratio, global_ratio, threshold, parameters, macs), strict=True)
            if value is not None
        },
        across=across,
        round_to=round_to,
        floor=floor,
        method=method,
        criterion=criterion,
        repair=repair,
        data=list(data) if isinstance(data, Iterator) else data,
        layers=None if layers is None else list(layers),
        ignore=list(ignore),
        kinds=kinds_of("prune", components),
        keep_outputs=keep_outputs,
        seed=seed,
    ).checked(scores)
    steps = validation.positive_integer("prune", "steps", steps)
    if rescore is not None and steps == 1:
        raise ValueError("prune: rescore needs steps above 1, got steps=1.")
    check_layers("prune", model, scores, options.layers)
    try:
        macs_before = count_macs(model, example_inputs)
    except Exception as error:  # of the model, whatever it is
        raise ValueError(
            f"prune: example_inputs must be a tensor, or a tuple or dict of arguments, that the model can run on; it "
            f"raised {type(error).__name__}: {error}"
        ) from error
    made = _in_steps(model, scores, options, steps, rescore)
    macs_after = count_macs(made.model, example_inputs)  # all that can fail comes before the model is changed
    edit = made.recipe.apply(model, inplace=True) if inplace else made
    edit.skipped, edit.widths = made.skipped, made.widths
    edit.macs_before, edit.macs_after = macs_before, macs_after
    return edit


@dataclass(frozen=True)
class _Options:
    """The arguments of `prune`, as they hold for one step."""

    example_inputs: Any
    budget: dict[str, Any]  # one
    across: str
    round_to: int
    floor: int | Mapping[str, int]
    method: str
    criterion: str
    repair: str
    data: Iterable[Any] | None
    layers: list[str] | None
    ignore: list[str]
    kinds: tuple[str, ...]
    keep_outputs: bool
    seed: int

    def checked(self, scores: Scores | Mapping[str, Tensor]) -> _Options:
        """With what "auto" stands for.

        Raises:
            ValueError: options that are unknown or do not go together.
        """
        op = "prune"
        if len(self.budget) != 1:
            found = ", ".join(f"{name}={value!r}" for name, value in self.budget.items()) or "none of them"
            raise ValueError(f"{op}: exactly one of {', '.join(BUDGETS)} must be given, got {found}.")
        _check_budget(self.budget)
        validation.choice(op, "across", self.across, ("auto", *NORMALISATIONS))
        validation.choice(op, "criterion", self.criterion, ("auto", *CRITERIA))
        validation.choice(op, "repair", self.repair, REPAIRS)
        repair, criterion = self.repair, self.criterion
        modhifi = validation.choice(op, "method", self.method, METHODS) == "modhifi"
        if modhifi and self.data is None:
            raise ValueError(f"{op}: method='modhifi' needs data to estimate fidelities on, got data=None.")
        if repair == "auto":
            repair = "compensation" if modhifi else "none" if self.data is None else "least_squares"
        if criterion == "auto" and modhifi and isinstance(scores, (Scores, Unscored)):
            criterion = "fidelity"
        if isinstance(scores, Unscored) and criterion in OF_SCORES:
            raise ValueError(f"{op}: criterion={criterion!r} needs scores, got scores=None.")
        if not isinstance(scores, (Scores, Unscored)):
            if criterion != "auto":
                raise ValueError(
                    f"{op}: criterion must be left out where scores are importances themselves, got {criterion!r}."
                )
            for layer, values in scores.items():
                if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 1:
                    what = f"a {type(values).__name__}"
                    if isinstance(values, Tensor):
                        what = f"shape {validation.shape_of(values)} of {values.dtype}"
                    raise ValueError(
                        f"{op}: scores must be Scores, or one floating-point number for each row of a layer, layer "
                        f"{layer!r} has {what}."
                    )
            criterion = GIVEN
        elif criterion == "auto" and self.data is None:
            criterion = "l1"
        elif criterion == "auto":
            criterion = BEST_WITH[repair] if "ratio" in self.budget else "reconstruction"
        for name, value in (("repair", repair), ("criterion", criterion)):
            if self.data is None and value in (*REPAIRS[2:], *OF_READERS):
                raise ValueError(f"{op}: {name}={value!r} needs data to estimate statistics on, got data=None.")
        return replace(self, repair=repair, criterion=criterion)

    def floors(self, layers: Iterable[str]) -> Mapping[str, int]:
        if isinstance(self.floor, Mapping):
            return self.floor
        return dict.fromkeys(layers, validation.positive_integer("prune", "floor", self.floor))


def _check_budget(budget: Mapping[str, Any]) -> None:
    """Whether it is in range, on numbers that do not matter."""
    [(name, value)] = budget.items()
    layers = list(value) if isinstance(value, Mapping) else []
    dummy = {layer: torch.zeros(2, dtype=torch.float64) for layer in layers or ["a layer"]}
    cost = Cost({layer: [("weight", 0, 1)] for layer in dummy}, {"weight": (2 * len(dummy),)}, {"weight": 2.0}, 0.0)
    choose(dummy, cost=cost, limits=Limits(), **{name: value})


@dataclass
class _Step:
    """An edit, the choice that it made, what each layer had, how much of it it has lost, and what did not run."""

    edit: Edit
    choice: Choice
    found: dict[str, Components]
    lost: dict[str, int]
    unseen: dict[str, list[str]]  # modules that did not run and may read what was removed, with the layers it is from


def _once(model: nn.Module, scores: Scores | Mapping[str, Tensor], options: _Options) -> _Step:
    op = "prune"
    known = check_layers(op, model, scores, options.layers)
    for layer in options.ignore:
        if layer not in scores:
            raise ValueError(f"{op}: ignore must name layers that scores holds, {layer!r} is none of {list(scores)}.")
    chosen = [layer for layer in known if layer not in options.ignore]
    graph = Graph(op, model, options.example_inputs, keep_outputs=options.keep_outputs)
    skipped = {layer: why for layer in chosen if (why := why_not_cut(model, layer))}
    found, unfit = graph.find([layer for layer in chosen if layer not in skipped], options.kinds)
    skipped |= unfit
    if not {"parameters", "macs"}.isdisjoint(options.budget):
        skipped |= (uncut := graph.uncuttable(found))
        found = {layer: parts for layer, parts in found.items() if layer not in uncut}
    inputs: Any = None
    further: Any = None
    trace = ModelTrace(model)
    in_order, compensates = options.repair in IN_ORDER, options.repair == "compensation"
    if options.data is not None and (in_order or compensates or options.criterion in OF_READERS):
        inputs, trace, further = calibrated(op, model, options.data, further=in_order or compensates)
    values, instead = of_components(model, scores, options.criterion, graph, found, inputs, trace, options.seed)
    if options.across == "auto":
        options = replace(options, across="none" if options.criterion in SHARES and not instead else "rank")
    if "threshold" in options.budget:  # of another criterion's importances it would mean something else
        for layer, why in instead.items():
            skipped[layer] = f"{options.criterion!r} cannot judge it, because {why}"
        found = {layer: parts for layer, parts in found.items() if layer not in instead}
        instead = {}
    while True:
        if options.layers is not None and skipped:
            layer, why = next(iter(skipped.items()))
            raise ValueError(f"{op}: layer {layer!r} cannot be pruned: {why}.")
        if not found:
            reasons = "; ".join(f"{layer}: {why}" for layer, why in skipped.items())
            helps = "stream" not in options.kinds and graph.find(unfit, KINDS)[0]
            more = " With components='all', channels to which several layers add go as well." if helps else ""
            raise ValueError(f"{op}: no layer can be pruned ({reasons}).{more}")
        choice = _choice(model, graph, found, {layer: values[layer] for layer in found}, scores, options)
        operations, failed = graph.plan(choice.removed)
        skipped |= {layer: why for layer, why in failed.items() if layer in chosen}
        if not failed.keys() & found.keys():
            break
        found = {layer: parts for layer, parts in found.items() if layer not in failed}
    rows = {layer: sorted(r for i in choice.removed[layer] for r in parts.rows[i]) for layer, parts in found.items()}
    edit = Recipe(
        edit="prune",
        settings=_described(scores, options, choice, instead),
        components=rows,
        architecture=architecture_of(model),
        operations=operations,
    ).apply(model)
    outputs: Outputs | None = None
    if (in_order or compensates) and any(choice.removed.values()):
        readers, producers = dict(graph.consumers(choice.removed)), graph.producers(choice.removed)
        parts, held_out = kept_back(op, inputs, further)
        outputs = Outputs(model, held_out)
        unrepaired = outputs.error(edit.model)
        if compensates:
            result = compensated(model, edit.model, readers, producers, trace, parts)
        else:
            weights = options.repair == "least_squares"
            result = repaired(op, model, edit.model, readers, producers, trace, parts, weights=weights)
        take_back(op, model, edit.model, result, producers, trace, held_out, sums=not compensates)
        if result.skipped:
            edit.recipe.settings["unrepaired"] = result.skipped
        record(edit, result.before, result.values)
    if options.repair == "batchnorm" and options.data is not None:
        _reestimate_batch_norms(edit, options.data)
    elif compensates and options.data is not None and batch_norms(edit.model):
        _adapt_batch_norms(edit, model, options.data)
    if outputs is not None:
        outputs.warn_if_worse(op, unrepaired, outputs.error(edit.model), stacklevel=5)
    edit.skipped = {layer: skipped[layer] for layer in chosen if layer in skipped}
    edit.widths = {layer: len(scores[layer]) for layer in rows}
    return _Step(
        edit,
        choice,
        found,
        {layer: len(gone) for layer, gone in choice.removed.items()},
        graph.unseen(choice.removed),
    )


def _choice(
    model: nn.Module,
    graph: Graph,
    found: Mapping[str, Components],
    values: dict[str, Tensor],
    scores: Scores | Mapping[str, Tensor],
    options: _Options,
) -> Choice:
    """What goes. Of a mapping, what holds for layers that cannot be pruned does not matter."""
    [(name, budget)] = options.budget.items()
    floors = options.floors(values)
    for argument, mapping in (("ratio", budget), ("floor", floors)):
        for layer in mapping if isinstance(mapping, Mapping) else ():
            if layer not in scores:
                raise ValueError(f"prune: {argument} must name layers that scores holds, {layer!r} is none of them.")
    if isinstance(budget, Mapping):
        budget = {layer: share for layer, share in budget.items() if layer in values}
    limits = Limits({layer: least for layer, least in floors.items() if layer in values}, options.round_to)
    cost = None
    if name in ("parameters", "macs"):
        shapes = {tensor: tuple(parameter.shape) for tensor, parameter in model.named_parameters()}
        of_weights, fixed = macs_of_weights(model, options.example_inputs)
        footprints = {layer: [place for place in graph.footprint(layer) if place[0] in shapes] for layer in values}
        cost = Cost(footprints, shapes, of_weights, fixed)
    if name in ACROSS:
        values = normalised(values, options.across)
    return choose(values, cost=cost, limits=limits, few=_heads(found), **{name: budget})


def _heads(found: Mapping[str, Components]) -> set[str]:
    return {layer for layer, components in found.items() if components.kind == "heads"}


def _report(steps: list[_Step], options: _Options) -> None:
    """No silent no-op: an error or a warning where nothing goes, or less than was asked for."""
    [(name, budget)] = options.budget.items()
    last = steps[-1].choice
    gone = any(any(step.lost.values()) for step in steps)
    asked = any(budget.values()) if isinstance(budget, Mapping) else budget
    if (not last.met and name != "ratio") or (asked and not gone):
        warnings.warn(f"prune: {last.message}", stacklevel=5)
    unseen: dict[str, set[str]] = {}
    for step in steps:
        for module, layers in step.unseen.items():
            unseen.setdefault(module, set()).update(layers)
    if unseen:
        warnings.warn(unseen_message("prune", unseen), stacklevel=5)


def _described(
    scores: Scores | Mapping[str, Tensor], options: _Options, choice: Choice, instead: dict[str, str]
) -> dict[str, Any]:
    """The settings of a recipe, as JSON has them."""
    [(name, budget)] = options.budget.items()
    described: dict[str, Any] = {
        name: _plain(budget),
        "method": options.method,
        "criterion": options.criterion,
        "repair": options.repair,
        "components": list(options.kinds),
        "budget": {"asked": choice.asked, "reached": choice.reached, "met": choice.met},
    }
    if name in ACROSS:
        described["across"] = options.across
    if not options.keep_outputs:
        described["keep_outputs"] = False
    if options.criterion == "random":
        described["seed"] = options.seed
    if instead:
        described["judged by l2"] = instead
    return {**described, **scores.settings} if isinstance(scores, Scores) else described


def _plain(budget: Any) -> Any:
    return dict(budget) if isinstance(budget, Mapping) else budget


def _in_steps(
    model: nn.Module,
    scores: Scores | Mapping[str, Tensor],
    options: _Options,
    steps: int,
    rescore: Callable[[nn.Module], Scores | Mapping[str, Tensor]] | None,
) -> Edit:
    """In equal parts of what is to go, each of what the one before has left."""
    [(name, budget)] = options.budget.items()
    asked = options.criterion if isinstance(scores, (Scores, Unscored)) else "auto"
    whole = 0
    if name in ("parameters", "macs"):
        whole = count_parameters(model) if name == "parameters" else count_macs(model, options.example_inputs)
        budget = math.floor(budget * whole) if isinstance(budget, float) else budget
    done: list[_Step] = []
    current = model
    for step in range(1, steps + 1):
        share = step / steps
        part: Any = budget
        if whole and budget < whole:
            part = round(whole - (whole - budget) * share)
        elif name == "ratio" and done:
            part = _ratios(budget, share, done[0].found, _lost(done))
        elif name == "ratio" and not isinstance(budget, Mapping):
            part = budget * share
        elif name == "ratio":
            part = {layer: ratio * share for layer, ratio in budget.items()}
        elif name == "global_ratio" and done:
            had, lost = sum(len(parts.rows) for parts in done[0].found.values()), sum(_lost(done).values())
            part = max(0, share_of(budget * share, had) - lost) / (had - lost)
        elif name == "global_ratio":
            part = budget * share
        done.append(_once(current, scores, replace(options, budget={name: part})))
        current = done[-1].edit.model
        if step < steps:
            scores = _left(scores, done[-1].edit) if rescore is None else rescore(current)
            known = isinstance(scores, (Scores, Unscored))
            options = replace(options, criterion=asked if known else "auto").checked(scores)
    _report(done, options)
    if steps == 1:
        done[0].edit.recipe.settings[name] = _plain(options.budget[name])
        return done[0].edit
    edit = joined(model, [step.edit for step in done], inplace=False)
    last = done[-1].choice
    edit.recipe.settings |= {name: _plain(options.budget[name]), "steps": steps, "rescored": rescore is not None}
    if whole:
        edit.recipe.settings["budget"] = done[-1].edit.recipe.settings["budget"]
    else:
        reached = sum(_lost(done).values())
        edit.recipe.settings["budget"] = {
            "asked": reached - last.reached + last.asked,
            "reached": reached,
            "met": last.met,
        }
    for notes in ("unrepaired", "judged by l2"):
        found = {k: v for step in done for k, v in step.edit.recipe.settings.get(notes, {}).items()}
        if found:
            edit.recipe.settings[notes] = found
    return edit


def _lost(done: list[_Step]) -> dict[str, int]:
    """How many components each layer has lost in these steps."""
    return {layer: sum(step.lost.get(layer, 0) for step in done) for layer in done[0].found}


def _ratios(budget: Any, share: float, found: Mapping[str, Components], lost: Mapping[str, int]) -> dict[str, float]:
    """The shares of what is left in each layer that make up this share of the whole budget."""
    shares, heads = {}, _heads(found)
    for layer, components in found.items():
        ratio, whole = budget.get(layer, 0.0) if isinstance(budget, Mapping) else budget, len(components.rows)
        asked = share_of(ratio * share, whole, few=layer in heads)
        shares[layer] = max(0, asked - lost[layer]) / (whole - lost[layer])
    return shares


def _left(scores: Scores | Mapping[str, Tensor], edit: Edit) -> Scores | Mapping[str, Tensor]:
    """The scores of the components that an edit has left."""
    kept = {}
    for operation in edit.recipe.operations:
        layer, _, tensor = operation.target.rpartition(".")
        heads, _, projection = layer.rpartition(".")
        if operation.kind == "keep" and projection == "out_proj" and heads in scores and operation.dim == 1:
            kept[heads] = torch.tensor(operation.index)
        if operation.kind == "keep" and layer in scores and tensor == "weight":
            transposed = getattr(edit.model.get_submodule(layer), "transposed", False)
            if operation.dim == int(transposed):
                kept[layer] = torch.tensor(operation.index)
    if isinstance(scores, Scores):
        return scores.select(kept)
    left = {
        layer: values[kept[layer].to(values.device)] if layer in kept else values for layer, values in scores.items()
    }
    return Unscored(left) if isinstance(scores, Unscored) else left


def check_layers(op: str, model: nn.Module, scores: Mapping[str, Tensor], layers: Iterable[str] | None) -> list[str]:
    """The layers asked for (or all scored ones), each known to both the scores and the model."""
    modules = dict(model.named_modules())
    chosen = list(scores) if layers is None else list(layers)
    for layer in chosen:
        if layer not in scores:
            raise ValueError(f"{op}: layers must name layers that scores holds, {layer!r} is none of {list(scores)}.")
        if layer not in modules:
            raise ValueError(f"{op}: scores must come from this model: it has no layer {layer!r}.")
        width = components_in(modules[layer])
        if width is not None and width != len(scores[layer]):
            raise ValueError(
                f"{op}: scores must come from this model: layer {layer!r} has {width} components, its scores "
                f"{len(scores[layer])}."
            )
    return chosen


def why_not_cut(model: nn.Module, layer: str) -> str:
    """Why a layer cannot lose components; empty when it can, as far as itself goes."""
    multihead = isinstance(model.get_submodule(layer), nn.MultiheadAttention)
    return "" if multihead else why_not_editable(model, layer)


def why_not_editable(model: nn.Module, layer: str) -> str:
    """Why a layer's weights cannot be edited by rows; empty when they can."""
    module = model.get_submodule(layer)
    if width_of(module) is None:
        return f"it is a {type(module).__name__}; only convolutions and linear layers can be edited"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed (parametrized or masked) and must be made a plain parameter first"
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for parameter in module.parameters(recurse=False):
        if len(places[id(parameter)]) > 1:
            return f"its parameters are shared: {', '.join(places[id(parameter)])} are one tensor"
    return ""


def _reestimate_batch_norms(edit: Edit, data: Iterable[Any]) -> None:
    """Takes the statistics of batch norms from `data`, and adds to the recipe what does the same."""
    after = _estimated(edit.model, data)
    state = edit.model.state_dict()
    before = {name: state[name].clone() for name in after}
    edit.model.load_state_dict(after, strict=False)
    record(edit, before, after)


def _adapt_batch_norms(edit: Edit, model: nn.Module, data: Iterable[Any]) -> None:
    """Changes the statistics of batch norms by as much as those on `data` differ from those of the model before.

    Means by the difference, variances by the ratio, so that what sets `data` apart from what the network was trained on
    (as augmentation does) changes nothing.
    """
    kept = {op.target: op.index for op in edit.recipe.operations if op.kind == "keep"}
    whole, smaller = _estimated(model, data), _estimated(edit.model, data)
    state, first = edit.model.state_dict(), model.state_dict()
    before, after = {}, {}
    for name in batch_norms(edit.model):
        for buffer in (f"{name}.running_mean", f"{name}.running_var"):
            index = torch.tensor(kept.get(buffer, range(len(first[buffer]))), device=first[buffer].device)
            known, then, now = first[buffer][index], whole[buffer][index], smaller[buffer]
            if buffer.endswith("mean"):
                adapted = known + (now - then)
            else:
                adapted = torch.where(then > 0, now * known / then.clamp(min=torch.finfo(then.dtype).tiny), now)
            before[buffer], after[buffer] = state[buffer].clone(), adapted
    edit.model.load_state_dict(after, strict=False)
    record(edit, before, after)


def _estimated(model: nn.Module, data: Iterable[Any]) -> dict[str, Tensor]:
    """Statistics of batch norms by name, averaged over `data` in one pass; the model is afterwards what it was.

    Batch averages, weighted by samples. A batch of a single sample, which may have no variance, is left out.
    """
    norms = batch_norms(model)
    buffers = {
        f"{name}.{buffer}": getattr(module, buffer)
        for name, module in norms.items()
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    momenta = {name: module.momentum for name, module in norms.items()}
    device = device_of(model)
    index, seen = -1, 0
    with undisturbed(model):
        try:
            for module in norms.values():
                module.reset_running_stats()
                module.train()
            for index, batch in enumerate(data):
                inputs, _ = split("prune", batch, index, device, labels_needed=False)
                samples = samples_of("prune", inputs)
                if samples < 2:
                    continue
                seen += samples
                for module in norms.values():
                    module.momentum = samples / seen
                call(model, inputs)
            found = {name: tensor.clone() for name, tensor in buffers.items()}
            wrong = next((name for name, tensor in found.items() if not bool(tensor.isfinite().all())), None)
            if wrong is not None and seen:
                raise ValueError(f"prune: data must give finite feature maps, {wrong!r} would hold NaN or Inf.")
        finally:
            for name, module in norms.items():
                module.momentum = momenta[name]
            for name, tensor in buffers.items():
                tensor.copy_(before[name])
    if not seen:
        raise ValueError(
            "prune: data must give at least one batch of two samples to re-estimate batch norms on, it gave "
            f"{index + 1} batches, none of them so large."
        )
    return found


def record(edit: Edit, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Adds to the recipe that these tensors were replaced."""
    for name, old in before.items():
        index = len(edit.recipe.operations)
        edit.recipe.tensors[f"set.{index}"] = after[name].detach().cpu().clone()
        edit.recipe.tensors[f"undo.{index}"] = old.cpu()
        edit.recipe.operations.append(Operation("set", name))
