"""Mean and zero ablation of the components that tell a class from the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Any, ClassVar

from torch import Tensor, nn

from discedit.common import validation
from discedit.common.warning import warn
from discedit.editing.concept_erasure import check_scale
from discedit.editing.row_operations import AROUND, RowEdit, bias_of, why_not_scaled
from discedit.editing.target_search import FORGET, Problem, search
from discedit.graph.pruning_graph import Graph
from discedit.model.forward import call, device_of, first_tensor, frozen_eval, to_device
from discedit.recipes.operations import Slots
from discedit.recipes.recipe import Edit, Recipe, compose_edits
from discedit.repair.least_squares import Protected, output_error, output_of, repaired, take_back, warning_if_worse
from discedit.selection.candidates import Candidates, why_not_editable
from discedit.selection.ranking import (
    MEASURES,
    OF_DATA,
    SIGNS,
    Limit,
    MaxDamage,
    Ranking,
    TopFraction,
    TopK,
    rank,
    rank_by_fidelity,
    retain_damage,
)

Units = dict[str, list[tuple[int, ...]]]  # layer -> the rows of each component that may be chosen
KINDS = {"rows": ("filters", "neurons"), "heads": ("heads",)}
FRACTION = {"none": 0.06, "mean": 0.06, "least_squares": 0.08}  # by repair
MOST = 0.5  # of the components, in a search
CHECKED = 8  # samples of each kind on which what is ablated is looked at
SAME = 1e-6  # relative squared error of outputs that are the same but for rounding


@dataclass(frozen=True)
class LeastSquares:
    """The repair "least_squares" of `AblateComponents`, with its penalty.

    Args:
        protection: what samples of the classes to forget count, all together, beside the others, in the penalty for
            weights that give anything else on them than those without repair; 0 or more. Biases are fitted to the
            others alone: however large it is, what the repair "mean" does is done.

    Raises:
        ValueError: a protection that is not finite or below 0.
    """

    protection: float = 1.0

    def __post_init__(self) -> None:
        validation.at_least_zero("unlearn", "protection", self.protection)


@dataclass(frozen=True)
class AblateComponents:
    """Unlearning that makes the components that tell the classes to forget best give a constant.

    Args:
        limit: how many for each class: `TopFraction`, `TopFractionOfEach`, `TopK`, `AboveDeviations` or `MaxDamage`. By
            default the target ``forget_accuracy=0.05`` when data is given, else ``TopFraction(0.06)``; with the repair
            "mean" of 0.06, with "least_squares" of 0.08.
        by: what ranks them: "score"; "specific", the score minus the highest for a class that stays; or, on data, how
            much of what its consumers get a component gives alone on the class: "fidelity", and "contrast", that minus
            the same on classes that stay.
        sign: "up": only components more active for the class than for the rest; "any". Fidelities have none.
        components: "rows" (filters and neurons, by default of the last third of the layers) or "heads" of attention.
        scale, around: an output y behind the layer's norm becomes m + scale * (y - m), m its mean over 256 samples that
            stay ("mean") or 0 ("zero"); "auto": "mean" with data, where every layer has a bias that can carry it, and
            "zero" where that meets a target and the mean does not. `scale` is not 1.
        repair: of the layers behind, on samples that stay: "none", "mean" (biases), "least_squares" or `LeastSquares`.
        remove: also remove the zeroed components physically, where nothing shares them; needs `example_inputs`.

    Raises:
        ValueError, TypeError: a field out of its range; a sign for fidelities; `remove` unless zeroed.

    Source: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024 (`preset("discedit_u")`); the rest: docs/unlearning.md.
    """

    limit: Limit | None = None
    by: str = "score"
    sign: str = "up"
    components: str = "rows"
    scale: float | None = 0.0
    around: str = "auto"
    repair: str | LeastSquares = "none"
    remove: bool = False
    name: ClassVar[str] = "ablate_components"
    measures: ClassVar[tuple[str, ...]] = MEASURES

    def __post_init__(self) -> None:
        if self.limit is not None and not isinstance(self.limit, Limit):
            raise TypeError(
                "unlearn: limit must be a Limit such as TopFraction, TopK, AboveDeviations or MaxDamage, got "
                f"{self.limit!r}."
            )
        fields = {"by": self.measures, "sign": SIGNS, "components": KINDS, "around": ("auto", *AROUND)}
        for name, allowed in fields.items():
            validation.choice("unlearn", name, getattr(self, name), allowed)
        if not isinstance(self.repair, LeastSquares):
            validation.choice("unlearn", "repair", self.repair, FRACTION)
        if self.scale is not None:
            check_scale(self.scale)
        if self.by in OF_DATA and self.sign != "up":
            raise ValueError(f"unlearn: sign must not be given with by={self.by!r}, which has none, got {self.sign!r}.")
        if self.remove and (self.scale or self.around == "mean"):
            raise ValueError(
                f"unlearn: remove needs scale=0 and around='zero', got scale={self.scale!r}, around={self.around!r}."
            )

    @property
    def repair_name(self) -> str:
        return "least_squares" if isinstance(self.repair, LeastSquares) else self.repair

    @property
    def protection(self) -> float:
        return float(self.repair.protection if isinstance(self.repair, LeastSquares) else LeastSquares.protection)

    def scale_for(self, model: nn.Module) -> float:
        return float(self.scale or 0.0)

    def apply(self, problem: Problem) -> tuple[Edit, str]:
        """The edit, and what is to be said of targets that it misses."""
        self._check_given(problem)
        if self.limit is None and not problem.targets and problem.data is not None and self.repair_name == "none":
            problem = replace(problem, targets={"forget_accuracy": FORGET})
        plan = self._plan(problem)
        missed = ""
        if problem.targets:
            edit, missed = plan.search()
            around = (self.around, plan.method.around)
            if missed and around == ("auto", "mean") and "forget_accuracy" in problem.targets:
                # Zeros disturb more: what the means of small networks leave, they may not.
                other, of_other = replace(plan, method=replace(plan.method, around="zero")).search()
                if not of_other:
                    edit, missed = other, ""
        else:
            limit = self.limit or TopFraction(FRACTION[self.repair_name])
            damage = retain_damage(problem.scores, plan.units, problem.others) if isinstance(limit, MaxDamage) else {}
            chosen = [limit.select(ranking, damage) for ranking in plan.rankings]
            _report_nothing(problem.forget, chosen, limit)
            edit = plan.edited(chosen)
            value = int(limit.value) if isinstance(limit, TopK) else float(limit.value)
            edit.recipe.settings = {limit.name: value, **edit.recipe.settings}
        return (_without(problem.model, edit, problem.example_inputs) if self.remove else edit), missed

    def _check_given(self, problem: Problem) -> None:
        if self.limit is not None and problem.targets:
            given = ", ".join(f"{name}={value!r}" for name, value in problem.targets.items())
            raise ValueError(f"unlearn: a limit and targets cannot be given together, got {self.limit} and {given}.")
        needs = {
            f"by={self.by!r}": self.by in OF_DATA,
            f"repair={self.repair_name!r}": self.repair_name != "none",
            "around='mean'": self.around == "mean",
        }
        for name, needed in needs.items():
            if needed and problem.data is None:
                raise ValueError(f"unlearn: {name} needs data, labelled batches of all classes, got data=None.")
        heads = self.components == "heads" and self.by not in OF_DATA
        for name, needed in (("remove=True", self.remove), ("components='heads'", heads)):
            if needed and problem.example_inputs is None:
                raise ValueError(f"unlearn: {name} needs example_inputs, got None.")
        if not problem.others and (self.by == "specific" or isinstance(self.limit, MaxDamage)):
            raise ValueError(f"unlearn: classes must leave at least one class with samples, got {problem.forget}.")

    def _plan(self, problem: Problem) -> _Plan:
        model, data, norms = problem.model, problem.data, problem.scores.norms
        scale, around = self.scale_for(model), self.around
        inputs, graph = problem.example_inputs, None
        if self.components == "heads" or self.by in OF_DATA:
            if inputs is None:
                assert data is not None
                inputs = data.labelled("forget", 2)[0][0]
            graph = Graph("unlearn", model, inputs)
        known = "zero" if around == "auto" else around
        units = editable_units(problem, graph, KINDS[self.components], scale, known)
        if self.by in OF_DATA:
            assert graph is not None
            assert data is not None
            rankings, unread = rank_by_fidelity(model, graph, units, data, self.by)
            if unread and problem.layers is not None:
                layer, why = next(iter(unread.items()))
                raise ValueError(f"unlearn: layer {layer!r} cannot be ranked by={self.by!r}: {why}.")
            units = {layer: parts for layer, parts in units.items() if layer not in unread}
        else:
            rankings = _rankings(problem, units, self.by, self.sign)
        if around == "auto":
            ran = {} if data is None or self.remove else data.trace.runs
            carried = all(
                layer in ran
                and bias_of(model, layer, norms.get(layer))
                and not why_not_scaled(model, layer, norms.get(layer), scale, "mean")
                for layer in units
            )
            around = "mean" if carried else "zero"
        settled = replace(self, scale=scale, around=around)
        return _Plan(replace(problem, example_inputs=inputs), units, rankings, settled)


@dataclass(frozen=True)
class ModHiFiU(AblateComponents):
    """ModHiFi-U: components of highest fidelity on the class to forget give zero, or are negated.

    Its fields are those of `AblateComponents`, with other defaults.

    Args:
        by: "fidelity", or "contrast", which is not from there.
        scale: None: -1 where the model has a layer norm, else 0.

    Source: Kashyap, Murti, Nayak, Narshana and Bhattacharyya, ModHiFi, NeurIPS 2025, there a given share of the last
    layers.
    """

    by: str = "fidelity"
    scale: float | None = None
    around: str = "zero"
    name = "modhifi"
    measures = OF_DATA

    def scale_for(self, model: nn.Module) -> float:
        if self.scale is not None:
            return float(self.scale)
        return -1.0 if any(isinstance(module, nn.LayerNorm) for module in model.modules()) else 0.0


@dataclass(frozen=True)
class _Plan:
    """Everything about an edit but how many components go."""

    problem: Problem
    units: Units
    rankings: list[Ranking]  # of each class to forget
    method: AblateComponents  # with what "auto" and None stand for

    def search(self) -> tuple[Edit, str]:
        """The edit of as many components for each class as the targets take."""
        sizes = self.rankings[0].sizes
        most = min(max(len(ranking.places) for ranking in self.rankings), max(1, math.floor(MOST * sizes)))

        def first(count: int) -> Edit:
            return self.edited([ranking.places[:count] for ranking in self.rankings])

        return search(self.problem, first, sizes, most, "components per class")

    def edited(self, chosen: Iterable[list[tuple[str, int]]]) -> Edit:
        """The edit of these components, those of each class together; layers where it does not hold are left alone."""
        problem, data = self.problem, self.problem.data
        picked: dict[str, set[int]] = {layer: set() for layer in self.units}
        for places in chosen:
            for layer, part in places:
                picked[layer].update(self.units[layer][part])
        rows = {layer: sorted(found) for layer, found in picked.items() if found}
        model, scores, scale, means = problem.model, problem.scores, float(self.method.scale or 0.0), self._means()
        batches = [] if problem.example_inputs is None else [to_device(problem.example_inputs, device_of(model))]
        if data is not None:
            batches = data.last(CHECKED)
        skipped: dict[str, str] = {}
        # Without the layers where it did not hold it is made anew, since those behind them now read something else.
        while rows:
            made = RowEdit(model, scores.norms, rows, scale, means)
            edit = made.recipe(self._settings()).apply(model)
            if self.method.repair_name != "none":
                self._repair(edit, rows)
            edit.widths = {layer: len(scores[layer]) for layer in rows}
            wrong = made.wrong(edit.model, batches)
            if not wrong:
                edit.skipped = skipped
                return edit
            skipped |= wrong
            rows = {layer: found for layer, found in rows.items() if layer not in wrong}
        layer, why = next(iter(skipped.items()))
        raise ValueError(f"unlearn: layer {layer!r} cannot be edited: {why}.")

    def _means(self) -> Mapping[str, Tensor] | None:
        if self.method.around != "mean":
            return None
        assert self.problem.data is not None
        means = self.problem.data.means({layer: self.problem.scores.norms.get(layer, layer) for layer in self.units})
        for layer, mean in means.items():
            if not bool(mean.isfinite().all()):
                raise ValueError(f"unlearn: data must give finite feature maps, the mean of {layer!r} is NaN or Inf.")
        return means

    def _settings(self) -> dict[str, Any]:
        method = self.method
        settings: dict[str, Any] = {"classes": self.problem.forget, "method": method.name}
        settings |= {name: getattr(method, name) for name in ("by", "sign", "components")}
        settings |= {"layers": list(self.units), "scale": float(method.scale or 0.0), "around": method.around}
        settings["repair"] = method.repair_name
        if method.repair_name == "least_squares":
            settings["protection"] = method.protection
        return settings | self.problem.scores.settings

    def _repair(self, edit: Edit, rows: Mapping[str, list[int]]) -> None:
        op, data = "unlearn", self.problem.data
        assert data is not None
        retain, held_out = data.kept_back("retain")
        forget = data.parts("forget")
        head, repair = data.trace.head, self.method.repair_name
        reached = list(dropwhile(lambda name: name not in rows, data.trace.runs))
        fitted = (nn.Conv2d, nn.Linear)
        behind = [name for name in reached[1:] if name != head and isinstance(edit.model.get_submodule(name), fitted)]
        if not behind:
            why = f"only the head is behind {reached[0]!r}" if reached else f"none of {list(rows)} runs on data"
            warn(f"{op}: repair={repair!r} finds nothing to repair: {why}.")
            return
        weights = repair == "least_squares"
        with warning_if_worse(op, data.trace, edit.model, held_out):
            result = repaired(
                op,
                edit.model,
                behind,
                {},
                data.trace,
                retain,
                weights=weights,
                ablated=rows,
                protected=Protected(forget, self.method.protection) if weights else Protected(),
                ignore=() if head is None else (head,),
            )
            take_back(op, edit, result, {}, data.trace, held_out, ablated=rows)


def editable_units(problem: Problem, graph: Graph | None, kinds: Iterable[str], scale: float, around: str) -> Units:
    """Layer -> the rows of each component that may be chosen: all rows, or with a graph what it finds of some kinds."""
    model, scores = problem.model, problem.scores
    widths = {layer: len(scores[layer]) for layer in scores}
    chosen = list(dict.fromkeys(Candidates.of("unlearn", model, scores).chosen("unlearn", problem.layers)))
    fixed, reasons = why_not_editable(Slots(model), chosen), {}
    for layer in chosen:
        why = fixed.get(layer) or why_not_scaled(model, layer, scores.norms.get(layer), scale, around)
        if around == "mean" and problem.data is not None and layer not in problem.data.trace.runs:
            why = why or "it does not run on data, so that it has no mean"
        if why:
            reasons[layer] = why
    units: Units = {layer: [(row,) for row in range(widths[layer])] for layer in chosen if layer not in reasons}
    if graph is not None:
        found, unfit = graph.find(units, kinds)
        reasons |= unfit
        units = {layer: [tuple(rows) for rows in parts.rows] for layer, parts in found.items()}
    if problem.layers is None:
        # The last third, where features belong to classes (docs/unlearning.md).
        units = dict(list(units.items())[-math.ceil(len(units) / 3) :])
    elif reasons:
        layer, why = next((layer, reasons[layer]) for layer in chosen if layer in reasons)
        raise ValueError(f"unlearn: layer {layer!r} cannot be edited: {why}.")
    if not units:
        why = f" ({'; '.join(f'{layer}: {why}' for layer, why in reasons.items())})" if reasons else ", it is empty"
        raise ValueError(f"unlearn: layers must name at least one layer that can be edited{why}.")
    return units


def _rankings(problem: Problem, units: Units, by: str, sign: str) -> list[Ranking]:
    found = []
    for cls in problem.forget:
        ranking = rank(problem.scores, units, cls, problem.others, by=by, sign=sign)
        if not ranking.places:
            more = "more active for it than for the rest " if sign == "up" else ""
            raise ValueError(f"unlearn: no component of the chosen layers {more}tells class {cls} from the rest.")
        found.append(ranking)
    return found


def _report_nothing(forget: list[int], chosen: list[list[tuple[str, int]]], limit: Limit) -> None:
    """No silent no-op."""
    empty = [cls for cls, places in zip(forget, chosen, strict=True) if not places]
    message = f"unlearn: {limit.name}={limit.value!r} leaves no component to edit for the classes {empty}."
    if len(empty) == len(forget):
        raise ValueError(message)
    if empty:
        warn(message)


def _without(model: nn.Module, edit: Edit, example_inputs: Any) -> Edit:
    """The edit, and the zeroed components removed, where they can be; why the others stay is in `Edit.skipped`."""
    graph = Graph("unlearn", edit.model, example_inputs)
    gone = edit.recipe.components
    found, skipped = graph.find(list(gone), ["filters", "neurons", "heads"])
    chosen: dict[str, list[int]] = {}
    for layer, parts in found.items():
        whole = [i for i, rows in enumerate(parts.rows) if set(rows) <= set(gone[layer])]
        if len(whole) == len(parts.rows):
            skipped[layer] = "all its components are zeroed, and one must stay"
        elif whole:
            chosen[layer] = whole
        else:
            skipped[layer] = f"its {parts.kind} are zeroed in part only"
    operations, failed = graph.plan(chosen)
    skipped |= failed
    chosen = {layer: parts for layer, parts in chosen.items() if layer not in failed}
    if not chosen:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in skipped.items())
        raise ValueError(f"unlearn: remove must find a zeroed component that can be removed ({reasons}).")
    rows = {layer: sorted(r for i in parts for r in found[layer].rows[i]) for layer, parts in chosen.items()}
    smaller = Recipe("prune", {}, rows, graph.network.slots.architecture, operations).apply(edit.model)
    smaller.widths = {layer: edit.widths[layer] for layer in rows}
    inputs = graph.network.inputs
    with frozen_eval(edit.model):
        expected = first_tensor(call(edit.model, inputs))
    if not output_error(expected, output_of(smaller.model, inputs)) <= SAME:
        raise ValueError(
            "unlearn: remove must not change what the zeroed model gives; here zeroed components still give "
            "something behind their activation, which is not 0 at 0."
        )
    graph.warn_of_unseen(chosen)
    both = compose_edits(model, [edit, smaller], inplace=False)
    both.recipe.settings["removed"] = {layer: len(parts) for layer, parts in rows.items()}
    kept = {layer: f"zeroed, not removed: {why}" for layer, why in skipped.items() if layer in gone}
    both.skipped = edit.skipped | kept
    return both
