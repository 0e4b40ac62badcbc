"""`unlearn`: class unlearning by editing what discriminates the class (DISCEDIT-U)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.editing.ablation import AROUND, bias_of, silenced, unsilenced, why_not_silenced
from discedit.editing.concept_erasure import erased
from discedit.editing.prune import check_layers, record, why_not_editable
from discedit.graph.pruning_graph import Graph, unseen_message
from discedit.model.forward import call, device_of, first_tensor, moved, outside_modes, undisturbed
from discedit.model.sharded import unwrapped
from discedit.model.trace import is_layer
from discedit.moments.calibration import SAMPLES
from discedit.moments.forget_retain import Classified
from discedit.recipes.recipe import Edit, Recipe, architecture_of, copied, joined
from discedit.repair.least_squares import Outputs, repaired, take_back
from discedit.scoring.scores import Scores
from discedit.selection import ranking as _selection
from discedit.selection.relevance import rank_by_fidelity

METHODS = ("discedit", "modhifi")
REPAIRS = ("none", "mean", "least_squares")
TARGETS = ("forget_accuracy", "retain_drop")
COMPONENTS = ("auto", "directions", "rows", "heads")
KINDS = {"rows": ("filters", "neurons"), "heads": ("heads",)}
FRACTION = {"none": 0.06, "mean": 0.06, "least_squares": 0.08}  # by repair
FORGET = 0.05  # the target where there is data and nothing to repair
# Shares of the layers, from the last, that directions are erased from: by default, and at most in a search.
READERS, SEARCHED_READERS = 0.1, 1 / 3
LEAST_READERS = 2
# Samples that directions are found on: of each class to forget, of the others, of these for each feature of a layer.
EACH, REST, PER_FEATURE = 128, 256, 2
LOOKED = 128  # samples to forget that every step of a search is judged by
PROTECTION = 1.0
CHECKED = 8  # samples of each kind on which what is silenced is looked at
FIRST, MOST, PRECISION = 0.02, 0.5, 0.04  # of a search: where it begins, and shares at which it ends


@outside_modes
def unlearn(
    model: nn.Module,
    scores: Scores,
    *,
    classes: Sequence[int] | Callable[[int], bool],
    method: str = "discedit",
    fraction: float | None = None,
    top: int | None = None,
    deviations: float | None = None,
    damage: float | None = None,
    forget_accuracy: float | None = None,
    retain_drop: float | None = None,
    by: str | None = None,
    sign: str = "up",
    layers: Iterable[str] | None = None,
    components: str = "auto",
    factor: float | None = None,
    around: str = "auto",
    repair: str = "none",
    protection: float = PROTECTION,
    data: Iterable[Any] | None = None,
    remove: bool = False,
    example_inputs: Any = None,
    inplace: bool = False,
) -> Edit:
    """Edit the components that tell the given classes from the rest, so that the model no longer recognises them.

    With `data`, directions are erased from what the last layers read, the head among them: those in which the class
    differs most from the others, and around their mean, so that these layers get what they are used to. Without, the
    filters and neurons with the highest scores for the class give zero from then on.

    Neither is a guarantee of privacy: what the model learned from the class may still be found in what is left of it
    (docs/evaluation.md).

    Args:
        model: the model that `scores` came from; unchanged unless `inplace`.
        scores: from `discedit.score`.
        classes: class indices to forget, or a predicate on them, such as ``lambda label: label >= 5``.
        method: "discedit"; "modhifi": the rows or heads of highest fidelity on the class to forget give zero, or are
            negated where the model has layer norms. It stands for ``by="fidelity"``, ``around="zero"`` and its own
            `factor`, each unless given, and needs `data`.

        fraction: share of the chosen layers' rows or heads to edit for each class, in (0, 1); at least one goes. At
            most one of these limits is given. By default the target ``forget_accuracy=0.05`` when data is given, else a
            fraction of 0.06; with the repair "least_squares", which a search would do at every step, one of 0.08.
            Directions are erased from all the chosen layers.
        top: so many rows or heads of each layer.
        deviations: those that lie more than so many standard deviations above the mean of their layer.
        damage: as many as carry together no more than this share, in (0, 1), of what tells the other classes apart:
            the mean over these of the scores for those that a component is more active for.
        forget_accuracy, retain_drop: targets in [0, 1], one or both, for the accuracy on `data` of the classes to
            forget (of up to 128 samples) and for what the others lose, each a mean over classes. The smallest edit that
            forgets so much is searched for, by forward passes alone; with `retain_drop` alone the largest that loses
            no more. The size of an edit is its number of rows or heads, or for directions of layers, the last first. A
            target that is missed gives a warning, and ``recipe.settings["targets"]`` says by how much.

        components: "directions": of each layer, in what it reads at one position (channels of a feature map, features
            of a token), one for each class: u = (S_f + S_r)^-1 (m_f - m_r), at which the Fisher bound between the
            class and the others is attained. Means m and covariances S are those of 128 samples of the class and of 256
            that stay, or twice as many as the widest layer has inputs, up to 1,024. The difference of the means is
            taken out of the weights along u; after that no linear function of what the layer reads has another mean
            for the class. Needs `data`.
            "rows": filters and neurons. They are ranked together by their score for the class, and the highest are
            silenced; several classes each get their own ranking. "heads": heads of attention, which are edited as a
            whole by their rows of the values, found on `example_inputs`. "auto": directions where there is data and no
            argument that speaks of rows (`layers`, a limit, `by`, `sign`, `around`, `repair`, `remove` or `method`),
            else rows.
        by: what ranks rows and heads. "score" (the default); "specific": the score minus the highest that the component
            has for a class that stays. By samples in `data`, up to 1,024 of each kind, where one component can be told
            from another (no channels of a residual stream): "fidelity" (the default of "modhifi"), in [0, 1]: how much
            of what the layers that read the component give it gives alone, with the best factor, on samples of the
            class; "contrast": that minus the same on samples of the classes that stay.
        sign: "up": only components more active for the class than for the rest; "any". Fidelities have none.
        layers: names of layers to choose from; by default the last third of those scored that can be edited, where
            features are specific to classes. For directions, layers that read: any convolution (not in groups) and
            linear layer with a bias, or a batch norm behind, the head too. By default the last tenth of them, at least
            two, since more lowers what the others keep; with targets, up to the last third.

        factor: what a component's output is multiplied by: 0 (it is zeroed, or erased), between 0 and 1 (attenuated),
            -1 (negated). By default 0; with "modhifi" -1 where the model has a layer norm.
        around: of rows and heads. "mean": an output y behind the layer's norm becomes m + factor * (y - m), where m is
            its mean over 256 samples of `data`, as many of each class that stays: with factor=0 the component gives m,
            whatever it sees, and the layers behind it get what they are used to. "zero": m = 0. "auto": "mean" when
            data is given and every chosen layer has a bias, of its own or its norm's, that can carry m, else "zero";
            and where no edit around the mean meets a target of forgetting that one around zero meets. With "modhifi"
            "zero".
        repair: of rows and heads. "none"; "least_squares": every layer behind the first edited one, but the head, gets
            new weights, so that it gives what it gave before on samples of the classes that stay; `protection` keeps
            it from learning back what the class needs: less is lost for the same forgetting, at some passes over
            `data`. "mean": biases alone. As in `prune`, a layer's repair that gives more error than none on other
            samples that stay is taken back.
        protection: what samples of the classes to forget count, all together, beside the others, in the penalty for
            weights that give anything else on them than those without repair; 0 or more. Biases are fitted to the
            others alone: however large it is, what the repair "mean" does is done.
        data: labelled batches of all classes for directions, targets, repair and `around`. Held in memory are up to
            4,096 samples of the classes that stay and 1,024 of those to forget, as many of each class; repairs use up
            to 1,024 of each kind.
        remove: also remove the zeroed filters, neurons or heads physically, where nothing else shares them; needs
            `example_inputs`. What stays zeroed is in `Edit.skipped`.
        example_inputs: as for `prune`. Fidelities take two samples of `data` where none are given.

    Returns:
        `Edit` with the edited model, its recipe and a summary. Layers that, when run, do not give what the recipe says
        are left as they were, and `Edit.skipped` names them. Where no target was given and more than 5 % of the
        samples to forget are still named rightly, there is a warning.

    Raises:
        ValueError: unknown classes or classes without samples, several limits or one out of range, scores of another
            model, no component to choose from, arguments that do not go together, or one without the data or inputs
            that it needs.

    Sources: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024 (there the top components of each layer, of any sign, are
    masked: `preset("discedit_u")`). Directions are erased as by LEACE (Belrose et al., NeurIPS 2023), there from
    features, here from weights. "modhifi": ModHiFi-U (Kashyap, Murti, Nayak, Narshana and Bhattacharyya, ModHiFi,
    NeurIPS 2025), there a given share of the last layers; "contrast" is not from there. The repair is that of `prune`,
    with the second moments of the forgotten classes as penalty.
    """
    op = "unlearn"
    validation.module(op, model)
    model = unwrapped(model)
    forget = _checked_classes(scores, classes)
    others = [cls for cls in range(scores.num_classes) if cls not in forget and int(scores.counts[cls])]
    limit = _limit(fraction, top, deviations, damage, forget_accuracy, retain_drop)
    validation.choice(op, "method", method, METHODS)
    of_rows = {
        limit[0]: limit[0] in _selection.LIMITS,
        "by": by not in (None, "score"),
        "sign": sign != "up",
        "around": around not in ("auto", "mean"),
        "repair": repair != "none",
        "remove": remove,
        "method": method != "discedit",
    }
    if by is None:
        by = "fidelity" if method == "modhifi" else "score"
    if factor is None:
        normed = any(isinstance(module, nn.LayerNorm) for module in model.modules())
        factor = -1.0 if method == "modhifi" and normed else 0.0
    if method == "modhifi" and around == "auto":
        around = "zero"
    _check_options(
        limit,
        of_rows,
        method=method,
        components=components,
        by=by,
        sign=sign,
        factor=factor,
        around=around,
        repair=repair,
        protection=protection,
        data=data,
        remove=remove,
        example_inputs=example_inputs,
    )
    if not others and (by == "specific" or data is not None or limit[0] == "damage"):
        raise ValueError(f"{op}: classes must leave at least one class with samples, got {forget}.")
    targets = {name: float(v) for name, v in zip(TARGETS, (forget_accuracy, retain_drop), strict=True) if v is not None}
    samples = None if data is None else Classified(op, model, data, forget, scores.num_classes)
    readers: list[str] = []
    undecided = components == "auto" and layers is None and around == "auto" and not any(of_rows.values())
    if samples is not None and (components == "directions" or undecided):
        check_layers(op, model, scores, None)
        share = SEARCHED_READERS if targets else READERS
        readers = _readers(model, layers, share, samples, named=components == "directions")
    if readers:
        assert samples is not None
        erasure = _Erasure(model, forget, readers, float(factor), samples)
        if targets:
            edit, missed = _searched(erasure, targets)
        else:
            edit, missed = erasure.whole()
        if missed:
            warnings.warn(missed, stacklevel=3)
        if inplace:
            made, edit = edit, edit.recipe.apply(model, inplace=True)
            edit.skipped = made.skipped
        return edit
    components = "heads" if components == "heads" else "rows"
    if limit[0] == "default":
        limit = ("forget_accuracy", FORGET) if data is not None and repair == "none" else ("fraction", FRACTION[repair])
    if limit[0] == "forget_accuracy":
        targets["forget_accuracy"] = limit[1]
    graph = None
    if components == "heads" or by in _selection.OF_DATA:
        if example_inputs is None:
            assert samples is not None
            example_inputs = samples.labelled("forget", 2)[0][0]
        graph = Graph(op, model, example_inputs)
    able = partial(_why_not_silenced, model, scores, float(factor))
    units = _units(model, scores, layers, graph, KINDS[components], partial(able, around=around))
    if by in _selection.OF_DATA:
        assert graph is not None
        assert samples is not None
        rankings, unread = rank_by_fidelity(model, graph, units, samples, by)
        if unread and layers is not None:
            layer, why = next(iter(unread.items()))
            raise ValueError(f"{op}: layer {layer!r} cannot be ranked by={by!r}: {why}.")
        units = {layer: parts for layer, parts in units.items() if layer not in unread}
    else:
        rankings = _rankings(scores, units, forget, others, by, sign)
    automatic = around == "auto"
    if automatic:
        can = data is not None and not remove
        can = can and all(bias_of(model, layer, scores.norms.get(layer)) for layer in units)
        can = can and not any(able(layer, around="mean") for layer in units)
        around = "mean" if can else "zero"
    plan = _Plan(
        model=model,
        scores=scores,
        forget=forget,
        units=units,
        rankings=rankings,
        factor=float(factor),
        around=around,
        repair=repair,
        protection=float(protection),
        data=samples,
        settings={"method": method, "by": by, "sign": sign, "components": components},
        example_inputs=example_inputs,
    )
    if targets:
        edit, missed = _searched(plan, targets)
        if missed and automatic and plan.around == "mean" and "forget_accuracy" in targets:
            # Zeros disturb more: what the means of small networks leave, they may not.
            other, of_other = _searched(replace(plan, around="zero"), targets)
            if not of_other:
                edit, missed = other, ""
        if missed:
            warnings.warn(missed, stacklevel=3)
    else:
        name, value = limit
        parts = _selection.retain_damage(scores, units, others) if name == "damage" else {}
        chosen = [_selection.taken(ranking, name, value, parts) for ranking in plan.rankings]
        _report_nothing(forget, chosen, name, value)
        edit = plan.edited(chosen)
        edit.recipe.settings = {name: int(value) if name == "top" else float(value), **edit.recipe.settings}
    skipped = edit.skipped
    if remove:
        edit, kept = _without(model, edit, example_inputs)
        skipped = skipped | kept
    if inplace:
        made, edit = edit, edit.recipe.apply(model, inplace=True)
        edit.widths = made.widths
    edit.skipped = skipped
    return edit


def _check_options(
    limit: tuple[str, float],
    of_rows: Mapping[str, bool],
    *,
    method: str,
    components: str,
    by: str,
    sign: str,
    factor: float,
    around: str,
    repair: str,
    protection: float,
    data: Any,
    remove: bool,
    example_inputs: Any,
) -> None:
    """Whether each argument is allowed, and has what it needs; `of_rows` tells which of those on rows are given."""
    op = "unlearn"
    validation.choice(op, "by", by, _selection.MEASURES)
    validation.choice(op, "sign", sign, _selection.SIGNS)
    validation.choice(op, "components", components, COMPONENTS)
    validation.choice(op, "around", around, ("auto", *AROUND))
    validation.choice(op, "repair", repair, REPAIRS)
    for name, value in (("factor", factor), ("protection", protection)):
        if not validation.is_number(value) or not math.isfinite(value) or (name == "protection" and value < 0):
            least = " of at least 0" if name == "protection" else ""
            raise ValueError(f"{op}: {name} must be a finite number{least}, got {value!r}.")
    if factor == 1:
        raise ValueError(f"{op}: factor must not be 1, which changes nothing, got {factor!r}.")
    of_data = by in _selection.OF_DATA
    if method == "modhifi" and not of_data:
        raise ValueError(f"{op}: by must be 'fidelity' or 'contrast' with method='modhifi', got {by!r}.")
    if of_data and sign != "up":
        raise ValueError(f"{op}: sign must not be given with by={by!r}, which has none, got {sign!r}.")
    directions = components == "directions"
    foreign = [name for name, given in of_rows.items() if given]
    if directions and foreign:
        raise ValueError(
            f"{op}: components='directions' takes no argument that speaks of rows, got one for {', '.join(foreign)}."
        )
    needs = {
        "components='directions'": directions,
        "method='modhifi'": method == "modhifi",
        f"by={by!r}": of_data,
        "targets": limit[0] in TARGETS,
        f"repair={repair!r}": repair != "none",
        "around='mean'": around == "mean",
    }
    for name, needed in needs.items():
        if needed and data is None:
            raise ValueError(f"{op}: {name} needs data, labelled batches of all classes, got data=None.")
    if remove and (factor or around == "mean"):
        raise ValueError(f"{op}: remove needs factor=0 and around='zero', got factor={factor!r}, around={around!r}.")
    for name, needed in (("remove=True", remove), ("components='heads'", components == "heads" and not of_data)):
        if needed and example_inputs is None:
            raise ValueError(f"{op}: {name} needs example_inputs, got None.")


def _readers(
    model: nn.Module, layers: Iterable[str] | None, share: float, data: Classified, *, named: bool
) -> list[str]:
    """The layers that directions are to be erased from, in the order in which they run.

    Args:
        layers: asked for; otherwise `share` of those that can be edited, the last.
        named: whether directions were asked for; otherwise there may be none.
    """
    trace = data.trace
    known = {name: module for name, module in model.named_modules() if is_layer(module)}
    reasons = {}
    for name in dict.fromkeys([*trace.in_order(known), *known]):
        why = why_not_editable(model, name) or trace.why_not_fitted(name)
        if not why and known[name].weight.shape[1] <= len(data.forget):
            why = f"it has {known[name].weight.shape[1]} inputs, of which nothing would be left"
        reasons[name] = why or trace.why_not_erased(name)
    able = [name for name, why in reasons.items() if not why]
    if layers is None:
        able = able[-max(LEAST_READERS, math.ceil(share * len(able))) :]
    else:
        chosen = list(dict.fromkeys(layers))
        for name in chosen:
            if name not in able:
                why = reasons.get(name, "the model has no convolution or linear layer of that name")
                raise ValueError(f"unlearn: layer {name!r} cannot be edited: {why}.")
        able = [name for name in able if name in chosen]
    if not able and named:
        why = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why) or "there is none"
        raise ValueError(f"unlearn: layers must name at least one layer that can be edited ({why}).")
    return able


@dataclass(frozen=True)
class _Erasure:
    """Directions to be erased from what layers read."""

    model: nn.Module
    forget: list[int]
    layers: list[str]
    factor: float
    data: Classified

    @property
    def sizes(self) -> int:
        return len(self.layers)

    @property
    def most(self) -> int:
        return len(self.layers)

    what = "layers"

    def first(self, count: int) -> Edit:
        """From so many layers, the last of them."""
        return self._edited(self.layers[len(self.layers) - count :])[0]

    def whole(self) -> tuple[Edit, str]:
        """From all layers; and what is to be said if that is not enough."""
        edit, left = self._edited(self.layers)
        edit.recipe.settings = {"forget_accuracy": left, **edit.recipe.settings}
        if left <= FORGET:
            return edit, ""
        return edit, (
            f"unlearn: {100 * left:.1f} % of the samples to forget are still named rightly, more than {100 * FORGET:g} "
            f"%; more layers, or components='rows' with a target, may do better."
        )

    def _edited(self, layers: list[str]) -> tuple[Edit, float]:
        trial = copied(self.model)
        widest = max(self.model.get_parameter(f"{layer}.weight").shape[1] for layer in self.layers)
        number = {"retain": max(REST, PER_FEATURE * widest), "forget": EACH * len(self.forget)}
        parts = [part for kind, most in number.items() for part in self.data.labelled(kind, min(most, SAMPLES))]
        made = erased(trial, layers, self.data.trace, parts, self.forget, self.factor)
        if not made.operations:
            layer, why = next(iter(made.skipped.items()))
            raise ValueError(f"unlearn: layer {layer!r} cannot be edited: {why}.")
        recipe = Recipe(
            edit="unlearn",
            settings={
                "classes": self.forget,
                "components": "directions",
                "layers": [layer for layer in layers if layer not in made.skipped],
                "factor": self.factor,
                "around": "mean",
                "directions": made.bounds,
            },
            components={},
            architecture=architecture_of(self.model),
            operations=made.operations,
            tensors=made.tensors,
        )
        edit = recipe.apply(self.model)
        edit.skipped = made.skipped
        return edit, made.forgotten


@dataclass(frozen=True)
class _Plan:
    """Everything about an edit but how many components go."""

    model: nn.Module
    scores: Scores
    forget: list[int]
    units: dict[str, list[tuple[int, ...]]]
    rankings: list[_selection.Ranking]  # of each class to forget
    factor: float
    around: str
    repair: str
    protection: float
    data: Classified | None
    settings: dict[str, Any]
    example_inputs: Any

    what = "components per class"

    @property
    def sizes(self) -> int:
        return self.rankings[0].sizes

    @property
    def most(self) -> int:
        return min(max(len(ranking.places) for ranking in self.rankings), max(1, math.floor(MOST * self.sizes)))

    def first(self, count: int) -> Edit:
        """The edit of so many components for each class."""
        return self.edited([ranking.places[:count] for ranking in self.rankings])

    def edited(self, chosen: Iterable[list[tuple[str, int]]]) -> Edit:
        """The edit of these components, those of each class together."""
        picked: dict[str, set[int]] = {layer: set() for layer in self.units}
        for places in chosen:
            for layer, part in places:
                picked[layer].update(self.units[layer][part])
        rows = {layer: sorted(found) for layer, found in picked.items() if found}
        skipped: dict[str, str] = {}
        while True:
            edit = self._made(rows)
            wrong = self._unsilenced(edit.model, rows)
            if not wrong:
                edit.skipped = skipped
                return edit
            skipped |= wrong
            rows = {layer: found for layer, found in rows.items() if layer not in wrong}
            if not rows:
                layer, why = next(iter(skipped.items()))
                raise ValueError(f"unlearn: layer {layer!r} cannot be edited: {why}.")

    def _means(self) -> Mapping[str, Tensor] | None:
        if self.around != "mean":
            return None
        assert self.data is not None
        means = self.data.means({layer: self.scores.norms.get(layer, layer) for layer in self.units})
        for layer, mean in means.items():
            if not bool(mean.isfinite().all()):
                raise ValueError(f"unlearn: data must give finite feature maps, the mean of {layer!r} is NaN or Inf.")
        return means

    def _unsilenced(self, edited: nn.Module, rows: Mapping[str, list[int]]) -> dict[str, str]:
        """Layers of the edited model that do not give what the recipe says, with reasons."""
        batches = [] if self.example_inputs is None else [moved(self.example_inputs, device_of(edited))]
        if self.data is not None:
            batches = self.data.last(CHECKED)
        norms = {layer: norm for layer, norm in self.scores.norms.items() if layer in rows}
        return unsilenced(self.model, edited, norms, rows, self.factor, self._means(), batches)

    def _made(self, rows: dict[str, list[int]]) -> Edit:
        means = self._means()
        operations, tensors = silenced(self.model, self.scores.norms, rows, self.factor, means)
        edit = Recipe(
            edit="unlearn",
            settings={
                "classes": self.forget,
                **self.settings,
                "layers": list(self.units),
                "factor": self.factor,
                "around": self.around,
                "repair": self.repair,
                **({"protection": self.protection} if self.repair == "least_squares" else {}),
                **self.scores.settings,
            },
            components=rows,
            architecture=architecture_of(self.model),
            operations=operations,
            tensors=tensors,
        ).apply(self.model)
        if self.repair != "none":
            self._repair(edit, rows)
        edit.widths = {layer: len(self.scores[layer]) for layer in rows}
        return edit

    def _repair(self, edit: Edit, rows: Mapping[str, list[int]]) -> None:
        assert self.data is not None
        retain, held_out = self.data.kept_back("retain")
        forget = self.data.parts("forget")
        trace = self.data.trace
        order, head = list(trace.runs), trace.head
        first = next(i for i, name in enumerate(order) if name in rows)
        behind = [
            name
            for name in order[first + 1 :]
            if name != head and isinstance(edit.model.get_submodule(name), (nn.Conv2d, nn.Linear))
        ]
        if not behind:
            warnings.warn(
                f"unlearn: repair={self.repair!r} finds nothing to repair: only the head is behind {order[first]!r}.",
                stacklevel=6,
            )
            return
        outputs = Outputs(self.model, held_out)
        unrepaired = outputs.error(edit.model)
        result = repaired(
            "unlearn",
            self.model,
            edit.model,
            behind,
            {},
            trace,
            retain,
            weights=self.repair == "least_squares",
            silenced=rows,
            protected=forget if self.repair == "least_squares" else (),
            protection=self.protection,
            ignore=() if head is None else (head,),
        )
        take_back("unlearn", self.model, edit.model, result, {}, trace, held_out, silenced=rows)
        if result.skipped:
            edit.recipe.settings["unrepaired"] = result.skipped
        record(edit, result.before, result.values)
        outputs.warn_if_worse("unlearn", unrepaired, outputs.error(edit.model), stacklevel=6)


def _limit(*values: Any) -> tuple[str, float]:
    """The name and value of the one limit that is given; of targets, the first."""
    names = (*_selection.LIMITS, *TARGETS)
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    limits = [name for name in given if name not in TARGETS]
    if len(limits) > 1 or (limits and len(given) > 1):
        found = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"unlearn: at most one of {', '.join(_selection.LIMITS)} or the targets {' and '.join(TARGETS)} may be "
            f"given, got {found}."
        )
    for name, value in given.items():
        if name not in TARGETS:
            _selection.check_limit("unlearn", name, value)
        elif not validation.is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"unlearn: {name} must be a number in [0, 1], got {value!r}.")
    return next(iter(given.items()), ("default", 0.0))


def _checked_classes(scores: Scores, classes: Any) -> list[int]:
    forget = validation.classes("unlearn", classes, scores.num_classes)
    for cls in forget:
        if int(scores.counts[cls]) == 0:
            raise ValueError(f"unlearn: class {cls} has no sample in scores, so nothing is known to tell it apart.")
    if int((scores.counts > 0).sum()) < 2:
        raise ValueError("unlearn: scores must hold samples of at least two classes.")
    return forget


def _why_not_silenced(model: nn.Module, scores: Scores, factor: float, layer: str, around: str) -> str:
    return why_not_silenced(model, layer, scores.norms.get(layer), factor, "zero" if around == "auto" else around)


def _units(
    model: nn.Module,
    scores: Scores,
    layers: Iterable[str] | None,
    graph: Graph | None,
    kinds: Iterable[str],
    why_not: Callable[[str], str],
) -> dict[str, list[tuple[int, ...]]]:
    """Layer -> the rows of each component that may be chosen: all rows, or with a graph what it finds of some kinds."""
    chosen = list(dict.fromkeys(check_layers("unlearn", model, scores, layers)))
    reasons = {layer: why for layer in chosen if (why := why_not_editable(model, layer) or why_not(layer))}
    units: dict[str, list[tuple[int, ...]]] = {
        layer: [(row,) for row in range(len(scores[layer]))] for layer in chosen if layer not in reasons
    }
    if graph is not None:
        found, unfit = graph.find(units, kinds)
        reasons |= unfit
        units = {layer: [tuple(rows) for rows in parts.rows] for layer, parts in found.items()}
    if layers is None:
        order = list(units)
        units = {layer: units[layer] for layer in order[len(order) - math.ceil(len(order) / 3) :]}
    elif len(units) < len(chosen):
        layer, why = next(((layer, reasons[layer]) for layer in chosen if layer in reasons), ("", ""))
        raise ValueError(f"unlearn: layer {layer!r} cannot be edited: {why}.")
    if not units:
        why = f" ({'; '.join(f'{layer}: {why}' for layer, why in reasons.items())})" if reasons else ", it is empty"
        raise ValueError(f"unlearn: layers must name at least one layer that can be edited{why}.")
    return units


def _rankings(
    scores: Scores, units: dict[str, list[tuple[int, ...]]], forget: list[int], others: list[int], by: str, sign: str
) -> list[_selection.Ranking]:
    found = []
    for cls in forget:
        ranking = _selection.rank(scores, units, cls, others, by=by, sign=sign)
        if not ranking.places:
            more = "more active for it than for the rest " if sign == "up" else ""
            raise ValueError(f"unlearn: no component of the chosen layers {more}tells class {cls} from the rest.")
        found.append(ranking)
    return found


def _report_nothing(forget: list[int], chosen: list[list[tuple[str, int]]], name: str, value: float) -> None:
    """No silent no-op."""
    empty = [cls for cls, places in zip(forget, chosen, strict=True) if not places]
    if len(empty) == len(forget):
        raise ValueError(f"unlearn: {name}={value!r} leaves no component to edit for the classes {empty}.")
    if empty:
        warnings.warn(f"unlearn: {name}={value!r} leaves no component to edit for the classes {empty}.", stacklevel=4)


@dataclass(frozen=True)
class _Tried:
    """An edit of so many components for each class, and what is known of it."""

    edit: Edit
    forget_accuracy: float
    retain_drop: float | None = None


def _searched(plan: _Plan | _Erasure, asked: dict[str, float]) -> tuple[Edit, str]:
    """The smallest edit that forgets enough; without that target, the largest that the others bear.

    And what is to be said of targets that it misses.
    """
    assert plan.data is not None
    data = plan.data
    least = "forget_accuracy" in asked
    before = data.accuracy(plan.model, "retain") if "retain_drop" in asked else math.nan
    tried: dict[int, _Tried] = {}

    def look(count: int) -> _Tried:
        if count not in tried:
            edit = plan.first(count)
            forgot = data.accuracy(edit.model, "forget", LOOKED)
            tried[count] = _Tried(edit, forgot, None if least else before - data.accuracy(edit.model, "retain"))
        return tried[count]

    def beyond(count: int) -> bool:
        """Whether what is looked for is no larger than this; of the largest, whether it is smaller."""
        found = look(count)
        if least:
            return found.forget_accuracy <= asked["forget_accuracy"]
        assert found.retain_drop is not None
        return found.retain_drop > asked["retain_drop"]

    most = plan.most
    low, high = 0, min(max(1, round(FIRST * plan.sizes)), most)
    while not beyond(high) and high < most:
        low, high = high, min(2 * high, most)
    found = beyond(high)
    while found and high - low > max(1, PRECISION * high):
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    count = high
    if found and not least:
        count = max(low, 1)
    elif least and not found:  # nothing forgets enough: what forgets most
        count = min(tried, key=lambda count: (tried[count].forget_accuracy, count))
    chosen = look(count)
    reached: dict[str, float] = {"forget_accuracy": chosen.forget_accuracy}
    if "retain_drop" in asked:
        drop = chosen.retain_drop
        reached["retain_drop"] = before - data.accuracy(chosen.edit.model, "retain") if drop is None else drop
    missed = [
        f"{name} is {reached[name]:.4f}, which misses the target {value:g} by {reached[name] - value:.4f}"
        for name, value in asked.items()
        if reached[name] > value
    ]
    chosen.edit.recipe.settings = {
        "targets": {
            name: {"asked": value, "reached": reached[name], "met": reached[name] <= value}
            for name, value in asked.items()
        },
        "count": count,
        "tried": {str(number): round(tried[number].forget_accuracy, 4) for number in sorted(tried)},
        **chosen.edit.recipe.settings,
    }
    if not missed:
        return chosen.edit, ""
    return chosen.edit, (
        f"unlearn: of {len(tried)} edits of up to {max(tried)} {plan.what} none meets the targets: {'; '.join(missed)}."
    )


def _without(model: nn.Module, edit: Edit, example_inputs: Any) -> tuple[Edit, dict[str, str]]:
    """The edit, and the zeroed components removed, where they can be; and why the others stay."""
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
    smaller = Recipe("prune", {}, rows, architecture_of(edit.model), operations).apply(edit.model)
    smaller.widths = {layer: edit.widths[layer] for layer in rows}
    _same_function(edit.model, smaller.model, example_inputs)
    if unseen := graph.unseen(chosen):
        warnings.warn(unseen_message("unlearn", unseen), stacklevel=4)
    both = joined(model, [edit, smaller], inplace=False)
    both.recipe.settings["removed"] = {layer: len(parts) for layer, parts in rows.items()}
    return both, {layer: f"zeroed, not removed: {why}" for layer, why in skipped.items() if layer in gone}


def _same_function(zeroed: nn.Module, smaller: nn.Module, example_inputs: Any) -> None:
    device = device_of(zeroed)
    with torch.no_grad():
        before, after = (_logits(part, example_inputs, device) for part in (zeroed, smaller))
    if not float((before - after).abs().max()) <= 1e-3 * float(before.abs().max()) + 1e-6:
        raise ValueError(
            "unlearn: remove must not change what the zeroed model gives; here zeroed components still give "
            "something behind their activation, which is not 0 at 0."
        )


def _logits(model: nn.Module, inputs: Any, device: torch.device) -> Tensor:
    with undisturbed(model):
        output = first_tensor(call(model, moved(inputs, device)))
    assert output is not None
    return output
