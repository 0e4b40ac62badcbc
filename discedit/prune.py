"""`prune`: structured pruning by discriminative power (DISCEDIT-SP)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from discedit import _checks
from discedit._batches import call, device_of, first_tensor, moved, split, undisturbed
from discedit._measure import count_macs
from discedit.recipe import Edit, Operation, Recipe, architecture_of
from discedit.scores import REDUCTIONS, Scores

REPAIRS = ("auto", "none", "batchnorm")


def prune(
    model: nn.Module,
    scores: Scores,
    *,
    ratio: float,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    reduction: str = "max",
    repair: str = "auto",
    layers: Iterable[str] | None = None,
    inplace: bool = False,
) -> Edit:
    """Remove the components that tell classes apart least; the result is a smaller, plain torch module.

    In each layer, floor(ratio x components) of those with the lowest scores go, with everything that hangs on them
    (norms, the next layers' inputs), as torch-pruning's dependency graph finds it. Layers that share their channels
    with others (residual streams) are left whole; `Edit.skipped` names them and says why.

    Args:
        model: the model that `scores` came from; unchanged unless `inplace`.
        scores: from `discedit.score`.
        ratio: share of each layer's components to remove, in [0, 1).
        example_inputs: a tensor, or a tuple or dict of arguments, that the model can run on. Traces the graph.
        data: batches (labels are not used) for the repair.
        reduction: how a component's scores over classes become one number, see `Scores.reduce`.
        repair: what follows the removal. "batchnorm": re-estimate the statistics of batch norms on `data`. "none".
            "auto": "batchnorm" when data is given and the model has batch norms, else "none".
        layers: names of the layers to prune, by default all in `scores` that can be.

    Returns:
        `Edit` with the smaller model, its recipe and a summary.

    Raises:
        ValueError: ratio outside [0, 1) or too small to remove anything, scores of another model, a layer that cannot
            be pruned named in `layers`, nothing that can be pruned, repair without data.

    Source: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024 (there with reduction="min" and no repair).
    """
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio < 1:
        raise ValueError(f"prune: ratio must be a number in [0, 1), got {ratio!r}.")
    _checks.choice("prune", "reduction", reduction, REDUCTIONS)
    _checks.choice("prune", "repair", repair, REPAIRS)
    if repair == "batchnorm" and data is None:
        raise ValueError("prune: repair='batchnorm' needs data to estimate statistics on, got data=None.")
    if repair == "auto":
        repair = "batchnorm" if data is not None and _batch_norms(model) else "none"
    chosen = check_layers("prune", model, scores, layers)
    reduced = scores.reduce(reduction)
    tracer = _Tracer(model, example_inputs)
    components: dict[str, list[int]] = {}
    skipped: dict[str, str] = {}
    for layer in chosen:
        why = tracer.why_not(layer)
        if why:
            if layers is not None:
                raise ValueError(f"prune: layer {layer!r} cannot be pruned: {why}.")
            skipped[layer] = why
            continue
        # The guard keeps 0.3 * 10 from becoming 2 for want of one ulp.
        count = math.floor(ratio * len(reduced[layer]) * (1 + 1e-12))
        lowest = reduced[layer].argsort(stable=True)[: min(count, len(reduced[layer]) - 1)]
        components[layer] = sorted(lowest.tolist())
    if not components:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in skipped.items())
        raise ValueError(f"prune: no layer can be pruned ({reasons}).")
    if ratio > 0 and not any(components.values()):
        widest = max(len(reduced[layer]) for layer in components)
        raise ValueError(
            f"prune: ratio must be at least {1 / widest:.3g} to remove a component of the widest layer "
            f"({widest} components), got {ratio!r}."
        )
    recipe = Recipe(
        edit="prune",
        settings={
            "ratio": ratio,
            "reduction": reduction,
            "repair": repair,
            "bound": scores.bound,
            "witness": scores.witness,
            "statistic": scores.statistic,
        },
        components=components,
        architecture=architecture_of(model),
        operations=tracer.operations(components),
    )
    edit = recipe.apply(model)
    _check_runs(model, edit.model, example_inputs)
    if repair == "batchnorm" and data is not None:
        edit.recipe.operations.extend(_reestimate_batch_norms(edit, data))
    result = edit.recipe.apply(model, inplace=True) if inplace else edit
    result.skipped = skipped
    result.widths = {layer: len(reduced[layer]) for layer in components}
    result.macs_before = tracer.macs
    result.macs_after = count_macs(result.model, example_inputs)
    return result


def check_layers(op: str, model: nn.Module, scores: Scores, layers: Iterable[str] | None) -> list[str]:
    """The layers asked for, each known to both the scores and the model with the same number of components."""
    modules = dict(model.named_modules())
    chosen = list(scores) if layers is None else list(layers)
    for layer in chosen:
        if layer not in scores:
            raise ValueError(f"{op}: layers must name layers that scores holds, {layer!r} is none of {list(scores)}.")
        if layer not in modules:
            raise ValueError(f"{op}: scores must come from this model: it has no layer {layer!r}.")
        width = width_of(modules[layer])
        if width != len(scores[layer]):
            raise ValueError(
                f"{op}: scores must come from this model: layer {layer!r} has {width} components, its scores "
                f"{len(scores[layer])}."
            )
    return chosen


def width_of(module: nn.Module) -> int | None:
    """Number of components of a layer that can be edited, else None."""
    if isinstance(module, _ConvNd):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else None


class _Tracer:
    """What removing a channel drags along, found by torch-pruning on a copy of the model.

    The copy's tensors then hold their own flat indices instead of weights: after the removal, what is left in them says
    exactly which entries a recipe must keep, whatever torch-pruning did to get there.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.macs = count_macs(model, example_inputs)
        self.shadow = copy.deepcopy(model).requires_grad_(True).eval()
        inputs = moved(example_inputs, device_of(model))
        self.graph = torch_pruning.DependencyGraph()
        with torch.random.fork_rng([]), torch.enable_grad():
            self.graph.build_dependency(self.shadow, example_inputs=inputs)
        self.names = {module: name for name, module in self.shadow.named_modules()}

    def group(self, layer: str, channels: list[int]) -> Any:
        module = self.shadow.get_submodule(layer)
        return self.graph.get_pruning_group(
            module, self.graph.get_pruner_of_module(module).prune_out_channels, channels
        )

    def why_not(self, layer: str) -> str:
        """Why this layer's components cannot go one by one; empty when they can."""
        module = self.shadow.get_submodule(layer)
        if isinstance(module, _ConvNd) and module.groups > 1:
            return f"it is a convolution in {module.groups} groups"
        if module not in self.graph.module2node:
            return "torch-pruning's trace does not reach it"
        sharing = []
        for dependency, _ in self.group(layer, [0]):
            target = dependency.target.module
            if isinstance(target, nn.Parameter):
                return "its channels are tied to a parameter outside any layer"
            produces = self.graph.is_out_channel_pruning_fn(dependency.handler)
            depthwise = isinstance(target, _ConvNd) and target.groups == target.in_channels > 1
            if target is not module and produces and width_of(target) is not None and not depthwise:
                sharing.append(self.names[target])
        if not sharing:
            return ""
        others = f" and {len(sharing) - 1} more layers" if len(sharing) > 1 else ""
        return f"it shares its channels with {min(sharing)}{others}"

    def operations(self, components: dict[str, list[int]]) -> list[Operation]:
        """Removes the components from the copy and reads off what that changed."""
        tensors = dict([*self.shadow.named_parameters(), *self.shadow.named_buffers()])
        tags = {}
        for name, tensor in tensors.items():
            if tensor.ndim:
                tags[name] = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
                tensor.data = tags[name].clone()
        attributes = {name: _sizes(module) for name, module in self.shadow.named_modules()}
        for layer, channels in components.items():
            if channels:
                self.group(layer, channels).prune()
        operations: list[Operation] = []
        for name, left in [*self.shadow.named_parameters(), *self.shadow.named_buffers()]:
            if name in tags and left.shape != tags[name].shape:
                operations += _kept(name, tags[name], left.detach())
        for name, module in self.shadow.named_modules():
            for attribute, value in _sizes(module).items():
                before = attributes[name].get(attribute)
                if value != before:
                    operations.append(Operation("attribute", name, name=attribute, before=before, value=value))
        return operations


def _sizes(module: nn.Module) -> dict[str, Any]:
    """A module's public integer attributes and tuples of them: its widths among them."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            found[name] = value
        elif isinstance(value, tuple) and value and all(type(entry) is int for entry in value):
            found[name] = list(value)
    return found


def _kept(name: str, tags: Tensor, left: Tensor) -> list[Operation]:
    """The `keep` operations that turn the whole tensor of flat indices into what is left of it."""
    operations = []
    expected = tags
    for dim in range(tags.ndim):
        if left.shape[dim] == tags.shape[dim]:
            continue
        line = left
        for other in reversed(range(tags.ndim)):
            if other != dim:
                line = line.select(other, 0)
        stride = tags.stride(dim)
        index = (line.long() // stride) % tags.shape[dim]
        expected = expected.index_select(dim, index)
        operations.append(Operation("keep", name, dim=dim, index=tuple(index.tolist())))
    if expected.shape != left.shape or not torch.equal(expected, left):
        raise ValueError(f"prune: what must go from tensor {name!r} is no set of rows or columns; it is not supported.")
    return operations


def _check_runs(model: nn.Module, smaller: nn.Module, example_inputs: Any) -> None:
    shapes = []
    for candidate in (model, smaller):
        with undisturbed(candidate):
            output = first_tensor(call(candidate, moved(example_inputs, device_of(candidate))))
        shapes.append(None if output is None else tuple(output.shape))
    if shapes[0] != shapes[1]:
        raise ValueError(f"prune: the pruned model must give outputs of shape {shapes[0]}, it gives {shapes[1]}.")


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


def _reestimate_batch_norms(edit: Edit, data: Iterable[Any]) -> list[Operation]:
    """Averages each batch norm's statistics over `data`, in one pass; returns the operations that do the same.

    Batch averages, each batch with the same weight, as with momentum=None.
    """
    norms = _batch_norms(edit.model)
    before = {
        f"{name}.{buffer}": getattr(module, buffer).clone()
        for name, module in norms.items()
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    momenta = {name: module.momentum for name, module in norms.items()}
    index = -1
    with undisturbed(edit.model):
        for module in norms.values():
            module.reset_running_stats()
            module.momentum = None
            module.train()
        try:
            for index, batch in enumerate(data):
                inputs, _ = split("prune", batch, index, device_of(edit.model), labels_needed=False)
                call(edit.model, inputs)
        finally:
            for name, module in norms.items():
                module.momentum = momenta[name]
    if index < 0:
        raise ValueError("prune: data must give at least one batch to re-estimate batch norms on, it gave none.")
    operations = []
    first = len(edit.recipe.operations)
    for offset, (name, old) in enumerate(before.items()):
        owner, _, buffer = name.rpartition(".")
        edit.recipe.tensors[f"set.{first + offset}"] = getattr(norms[owner], buffer).detach().cpu().clone()
        edit.recipe.tensors[f"undo.{first + offset}"] = old.cpu()
        operations.append(Operation("set", name))
    return operations
