"""Erasure in closed form: what a layer reads no longer differs, on average, between classes to forget and the others.

The directions are those at which the Fisher bound of the layer's whole input is attained (nearly: a ridge steadies
them, and several classes share one covariance); taking the difference of the means out of the weights along them is the
oblique projection of LEACE (Belrose et al., "LEACE: Perfect linear concept erasure in closed form", NeurIPS 2023).
Layers are taken in the order in which they run, each on what those edited before it now give, all in one forward pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.editing.target_search import FORGET, Problem, search
from discedit.model.forward import call, first_tensor, frozen_eval, hooked
from discedit.model.functional import LayersCalled
from discedit.model.layers import as_its_class, input_of
from discedit.model.trace import ModelTrace, is_layer
from discedit.moments.calibration import SAMPLES, beginnings
from discedit.moments.covariances import OTHERS, GroupSums
from discedit.ops import fisher_bound
from discedit.recipes.operations import Operation, Slots
from discedit.recipes.recipe import Edit, Recipe, architecture_of, copied
from discedit.repair.lockstep import Pause, in_lockstep
from discedit.selection.candidates import why_not_editable

RIDGE = 1e-2  # of the mean variance: a few hundred samples know little of the directions that hardly vary
LEAST_DIFFERENCE = 1e-6
MISSED = 0.1  # of what an erasure is to change, where the rounding of the weights may leave so much
# Shares of the layers, from the last, that directions are erased from: by default, and at most in a search.
LAYERS, SEARCHED_LAYERS = 0.1, 1 / 3
LEAST_LAYERS = 2
# Samples that directions are found on: of each class to forget, of the others, of these for each feature of a layer.
EACH, REST, PER_FEATURE = 128, 256, 2


@dataclass
class Erased:
    """What an erasure did."""

    operations: list[Operation] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # "set.I", for a recipe
    # Layer -> Fisher bound on the total variation distance between each class and the others, along the direction that
    # is erased from what the layer reads, before it is.
    bounds: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # layers left as they were: their type has too few digits
    forgotten: float = 1.0  # share of the samples to forget that are still named rightly, a mean over classes

    @torch.no_grad()
    def add(self, name: str, tensor: Tensor, values: Tensor) -> None:
        """Adds to a tensor, as the recipe's operation will."""
        values = values.to(tensor.dtype)
        self.tensors[f"set.{len(self.operations)}"] = values.cpu()
        self.operations.append(Operation("add", name, index=tuple(range(len(tensor)))))
        tensor += values


def erased(
    edited: nn.Module,
    layers: Sequence[str],
    trace: ModelTrace,
    parts: Sequence[tuple[Any, Tensor]],
    classes: Sequence[int],
    scale: float,
) -> Erased:
    """Erases directions from what layers of `edited` read, in place.

    Args:
        trace: of the model before the edit.
        parts: inputs with labels. Samples of other classes are those that stay.
    """
    result = Erased()
    trace = trace.of_copy(edited)
    sums = {layer: GroupSums(len(classes)) for layer in layers}
    # Each part of the samples runs in a thread of its own, over the same hooks.
    place = threading.local()
    forgets = [int(labels[0]) in classes for _, labels in parts]
    places: dict[int, set[str]] = {}
    for kind in (True, False):
        those = [part for part, forget in enumerate(forgets) if forget is kind]
        places |= zip(those, beginnings(trace, layers, [len(parts[part][1]) for part in those]), strict=True)
    first = [labels for part, (_, labels) in enumerate(parts) if places[part].issuperset(layers)]
    number = _of_classes(torch.cat(first), classes)
    if not bool(number.all()):
        cls = classes[int(number.argmin())]
        raise ValueError(f"unlearn: data must hold samples of every class to forget, it holds none of class {cls}.")
    right, ran = torch.zeros(2, len(classes), dtype=torch.float64)

    def enter(layer: str, module: nn.Module, arguments: Any) -> None:
        if layer in sums:  # a part that begins late finds the first layers edited
            sums[layer].add(module, arguments[0], place.groups, len(parts), place.seed)
            place.pause(layer)

    def run(inputs: Any, labels: Tensor, seed: int, pause: Pause) -> None:
        place.seed, place.pause, place.groups = seed, pause, torch.full_like(labels, OTHERS)
        for i, cls in enumerate(classes):
            place.groups[labels == cls] = i
        with torch.no_grad(), LayersCalled(edited):  # this thread has modes of its own
            logits = first_tensor(call(edited, inputs))
        if logits is None or logits.ndim != 2:
            found = "none" if logits is None else f"shape {validation.shape_of(logits)}"
            raise ValueError(f"unlearn: model must give logits (samples, classes) to erase directions, got {found}.")
        right.add_(_of_classes(labels[logits.argmax(1).cpu() == labels], classes))
        ran.add_(_of_classes(labels, classes))

    handles = [edited.get_submodule(layer).register_forward_pre_hook(partial(enter, layer)) for layer in layers]
    works = [partial(run, inputs, labels, seed) for seed, (inputs, labels) in enumerate(parts)]
    with hooked(handles), frozen_eval(edited):
        edit = partial(_edit, trace, scale=scale, result=result)
        in_lockstep("unlearn", works, lambda layer: edit(layer, sums.pop(layer)), lambda i, layer: layer in places[i])
    result.forgotten = float((right / ran).mean())
    return result


def _of_classes(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """How many samples there are of each."""
    return torch.stack([(labels == cls).sum() for cls in classes])


def _edit(trace: ModelTrace, name: str, sums: GroupSums, scale: float, result: Erased) -> None:
    """Takes the directions out of one layer's weights, around the mean of the samples that stay."""
    *forget, (mean, covariance) = sums.moments()
    if not all(bool(m.isfinite().all() and c.isfinite().all()) for m, c in (*forget, (mean, covariance))):
        raise ValueError(f"unlearn: data must give finite feature maps, what {name!r} reads holds NaN or Inf.")
    differences = torch.stack([m - mean for m, _ in forget], dim=1)  # (channels, classes)
    within = torch.stack([c for _, c in forget]).mean(0) + covariance
    variance = float(within.diagonal().mean())
    eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    # Where nothing varies, any ridge makes the system solvable: the direction is that of the difference.
    directions = torch.linalg.solve(within + (RIDGE * variance if variance > 0 else 1.0) * eye, differences)
    between = differences.T @ directions
    # In squares of standard deviations. A difference that is rounding, as behind what was just erased, is none.
    least = {"atol": LEAST_DIFFERENCE, "rtol": 1e-10, "hermitian": True}
    projected = torch.linalg.pinv((between + between.T) / 2, **least) @ directions.T
    layer: Any = trace.model.get_submodule(name)
    weight = layer.weight.detach().double()
    moved = (1 - scale) * torch.einsum("oi...,ic->oc...", weight, differences)  # what the layer makes of them
    change = -torch.einsum("oc...,ci->oi...", moved, projected)
    lost = torch.einsum("oc...,c->o...", moved, projected @ mean)
    bias = lost.flatten(1).sum(1) if lost.ndim > 1 else lost  # padding counts as what else is read
    new = (weight + change).to(layer.weight.dtype).double()
    if why := _why_not_erased(layer, weight, new, differences @ (projected @ differences), scale):
        result.skipped[name] = why
        return
    result.bounds[name] = _bounds(directions.T, forget, (mean, covariance))
    result.add(f"{name}.weight", layer.weight, change)
    if layer.bias is not None:
        result.add(f"{name}.bias", layer.bias, bias)
        return
    norm: Any = trace.bias_norm(name)
    # Not the norm's bias: so the means are, but for padding, those that it would find on the classes that stay.
    result.add(f"{trace.norms[name]}.running_mean", norm.running_mean, -bias)


def _why_not_erased(layer: nn.Module, old: Tensor, new: Tensor, differences: Tensor, scale: float) -> str:
    """Why a layer with new weights does not give scale times as much for differences (channels, classes) of what it
    reads, in any mixture at any place; empty where it does."""
    x = input_of(layer).double()
    if isinstance(layer, nn.Conv2d):
        x = torch.einsum("skhw,ck->schw", x[:, :1].expand(-1, differences.shape[1], -1, -1), differences)
    else:
        x = x[:, :1] * differences.sum(1)
    spread = {"weight": old.abs(), "bias": None}, x.abs()
    before, after = (as_its_class(layer, {"weight": weight, "bias": None}, x) for weight in (old, new))
    missed, due = float((after - scale * before).norm()), float((1 - scale) * before.norm())
    rounding = torch.finfo(torch.float32).eps * float(as_its_class(layer, *spread).norm())
    if missed <= max(MISSED * abs(due), 4 * rounding):
        return ""
    kind = str(layer.weight.dtype).removeprefix("torch.")
    share = f"{100 * missed / abs(due):.0f} %" if due else "all"
    return (
        f"its weights, in {kind}, miss what erasing is to change by {share}; make it in a type of more digits "
        "(model.float()), or leave the layer out"
    )


def _bounds(directions: Tensor, forget: list[tuple[Tensor, Tensor]], others: tuple[Tensor, Tensor]) -> list[float]:
    """The Fisher bound of each class against the others, along the direction (a row) that is erased for it."""

    def along(means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
        return (directions * means).sum(1, keepdim=True), directions[:, None] @ covariances @ directions[:, :, None]

    means, covariances = (torch.stack(moments) for moments in zip(*forget, strict=True))
    found = fisher_bound(*along(means, covariances), *along(*others))
    return [round(bound, 4) for bound in found.tolist()]


@dataclass(frozen=True)
class EraseDirections:
    """Unlearning that takes out of layers' weights the directions in which the classes to forget differ most.

    Of each layer, in what it reads at one position (channels of a feature map, features of a token), one direction for
    each class: u = (S_f + S_r)^-1 (m_f - m_r), at which the Fisher bound between the class and the others is attained.
    Means m and covariances S are those of 128 samples of the class and of 256 that stay, or twice as many as the widest
    layer has inputs, up to 1,024. The difference of the means is taken out of the weights along u, around the mean of
    the samples that stay; after that no linear function of what the layer reads has another mean for the class.

    Layers are any convolution (not in groups) and linear layer with a bias, or a batch norm behind, the head too. By
    default the last tenth of them, at least two, since more lowers what the others keep; with targets up to the last
    third: the size of an edit is its number of layers.

    Args:
        scale: what is left of each direction: 0 (erased), between 0 and 1 (attenuated), -1 (negated); not 1.

    Raises:
        ValueError: a scale that is not finite, or 1.

    Source: LEACE (Belrose et al., NeurIPS 2023), there from features, here from weights.
    """

    scale: float = 0.0
    name: ClassVar[str] = "erase_directions"

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def apply(self, problem: Problem) -> tuple[Edit, str]:
        """The edit, and what is to be said if it does not forget enough."""
        if problem.data is None:
            raise ValueError(
                "unlearn: EraseDirections needs data, labelled batches of all classes, got data=None; AblateComponents "
                "needs none."
            )
        layers, reasons = erasable_layers(problem)
        if not layers:
            why = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "there is none"
            raise ValueError(f"unlearn: layers must name at least one layer that can be edited ({why}).")
        return self.erase(problem, layers)

    def erase(self, problem: Problem, layers: list[str]) -> tuple[Edit, str]:
        """`apply` with what `erasable_layers` gives."""
        if problem.targets:
            number = len(layers)
            return search(problem, lambda n: self._edited(problem, layers, n)[0], number, number, "layers")
        edit, left = self._edited(problem, layers, len(layers))
        edit.recipe.settings = {"forget_accuracy": left, **edit.recipe.settings}
        if left <= FORGET:
            return edit, ""
        return edit, (
            f"unlearn: {100 * left:.1f} % of the samples to forget are still named rightly, more than {100 * FORGET:g} "
            f"%; more layers, or method=AblateComponents() with a target, may do better."
        )

    def _edited(self, problem: Problem, able: list[str], number: int) -> tuple[Edit, float]:
        """From the last so many of the layers; and the share of the samples to forget that are still named rightly."""
        model, forget, data = problem.model, problem.forget, problem.data
        assert data is not None
        widest = max(model.get_parameter(f"{layer}.weight").shape[1] for layer in able)
        samples = {"retain": max(REST, PER_FEATURE * widest), "forget": EACH * len(forget)}
        parts = [part for kind, most in samples.items() for part in data.labelled(kind, min(most, SAMPLES))]
        layers = able[len(able) - number :]
        made = erased(copied(model), layers, data.trace, parts, forget, float(self.scale))
        if not made.operations:
            layer, why = next(iter(made.skipped.items()))
            raise ValueError(f"unlearn: layer {layer!r} cannot be edited: {why}.")
        settings = {
            "classes": forget,
            "method": self.name,
            "layers": [layer for layer in layers if layer not in made.skipped],
            "scale": float(self.scale),
            "around": "mean",
            "directions": made.bounds,
        }
        recipe = Recipe("unlearn", settings, {}, architecture_of(model), made.operations, made.tensors)
        edit = recipe.apply(model)
        edit.skipped = made.skipped
        return edit, made.forgotten


def check_scale(scale: Any) -> None:
    if not validation.is_number(scale) or not math.isfinite(scale):
        raise ValueError(f"unlearn: scale must be a finite number, got {scale!r}.")
    if scale == 1:
        raise ValueError(f"unlearn: scale must not be 1, which changes nothing, got {scale!r}.")


def erasable_layers(problem: Problem) -> tuple[list[str], dict[str, str]]:
    """The layers that directions are to be erased from, in the order in which they run; and why not from others."""
    model, data = problem.model, problem.data
    assert data is not None
    trace = data.trace
    known = {name: module for name, module in model.named_modules() if is_layer(module)}
    fixed, reasons = why_not_editable(Slots(model), known), {}
    for name in dict.fromkeys([*trace.in_order(known), *known]):
        why = fixed.get(name) or trace.why_not_fitted(name)
        if not why and known[name].weight.shape[1] <= len(problem.forget):
            why = f"it has {known[name].weight.shape[1]} inputs, of which nothing would be left"
        reasons[name] = why or trace.why_not_erased(name)
    able = [name for name, why in reasons.items() if not why]
    if problem.layers is None:
        share = SEARCHED_LAYERS if problem.targets else LAYERS
        able = able[-max(LEAST_LAYERS, math.ceil(share * len(able))) :]
    else:
        for name in problem.layers:
            if name not in able:
                why = reasons.get(name, "the model has no convolution or linear layer of that name")
                raise ValueError(f"unlearn: layer {name!r} cannot be edited: {why}.")
        able = [name for name in able if name in problem.layers]
    return able, {name: why for name, why in reasons.items() if why}
