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
from discedit._batches import call, device_of, first_tensor, map_tensors, moved, split, undisturbed
from discedit._measure import count_macs
from discedit._repair import repaired, samples_of
from discedit.recipe import Edit, Operation, Recipe, architecture_of
from discedit.scores import REDUCTIONS, Scores

REPAIRS = ("auto", "none", "mean", "batchnorm", "least_squares")


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
    (norms, the next layers' inputs), as torch-pruning's dependency graph finds it. Each removal is checked on
    `example_inputs`, in float64: it must be the same function as hiding the components from the layers that read them.
    Layers where it is not, and layers that share their channels with others (residual streams), are left whole;
    `Edit.skipped` names them and says why.

    Args:
        model: the model that `scores` came from; unchanged unless `inplace`.
        scores: from `discedit.score`.
        ratio: share of each layer's components to remove, in [0, 1).
        example_inputs: a tensor, or a tuple or dict of arguments, that the model can run on. Traces the graph and
            checks the removal: real or random inputs, since components that are silent on them pass unchecked.
        data: batches (labels are not used) for the repair.
        reduction: how a component's scores over classes become one number, see `Scores.reduce`.
        repair: what follows the removal, in closed form. "least_squares": the weights of the layers that read removed
            components, so that they give what they gave before from the components that are left. "mean": their biases
            alone, which then carry the mean of what was removed. Both take these layers in the order in which they
            run, on up to 1,024 samples of `data`; Conv2d (not in groups) and Linear, with a bias or a batch norm behind
            them; others are left as they are and named in the recipe's settings. "batchnorm": re-estimate the
            statistics of batch norms on all of `data`. "none". "auto": "batchnorm" when data is given and the model has
            batch norms, else "none".
        layers: names of the layers to prune, by default all in `scores` that can be.

    Returns:
        `Edit` with the smaller model, its recipe and a summary.

    Raises:
        ValueError: ratio outside [0, 1) or too small to remove anything, scores of another model, a layer that cannot
            be pruned named in `layers`, nothing that can be pruned, repair without data, a model that cannot be traced.

    Source: Murti and Bhattacharyya, DISCEDIT, NeurIPS 2024 (there with reduction="min" and no repair).
    """
    if not _checks.is_number(ratio) or not 0 <= ratio < 1:
        raise ValueError(f"prune: ratio must be a number in [0, 1), got {ratio!r}.")
    ratio = float(ratio)
    _checks.choice("prune", "reduction", reduction, REDUCTIONS)
    _checks.choice("prune", "repair", repair, REPAIRS)
    if repair not in ("auto", "none") and data is None:
        raise ValueError(f"prune: repair={repair!r} needs data to estimate statistics on, got data=None.")
    if repair == "auto":
        repair = "batchnorm" if data is not None and _batch_norms(model) else "none"
    chosen = check_layers("prune", model, scores, layers)
    reduced = scores.reduce(reduction)
    macs_before = count_macs(model, example_inputs)
    tracer = _Tracer(model, example_inputs)
    components: dict[str, list[int]] = {}
    skipped: dict[str, str] = {}
    for layer in chosen:
        why = why_not_editable(model, layer) or tracer.why_not(layer)
        if why:
            skipped[layer] = why
            continue
        # The guard keeps 0.3 * 10 from becoming 2 for want of one ulp.
        count = math.floor(ratio * len(reduced[layer]) * (1 + 1e-12))
        lowest = reduced[layer].argsort(stable=True)[: min(count, len(reduced[layer]) - 1)]
        components[layer] = sorted(lowest.tolist())
    if ratio > 0 and components and not any(components.values()):
        widest = max(len(reduced[layer]) for layer in components)
        raise ValueError(
            f"prune: ratio must be at least {1 / widest:.3g} to remove a component of the widest layer "
            f"({widest} components), got {ratio!r}."
        )
    readers = {layer: tracer.consumers({layer: channels}) for layer, channels in components.items()}
    operations, failed = _plan(model, example_inputs, components, tracer)
    skipped |= failed
    if layers is not None and skipped:
        layer, why = next(iter(skipped.items()))
        raise ValueError(f"prune: layer {layer!r} cannot be pruned: {why}.")
    components = {layer: channels for layer, channels in components.items() if layer not in failed}
    if not components:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in skipped.items())
        raise ValueError(f"prune: no layer can be pruned ({reasons}).")
    recipe = Recipe(
        edit="prune",
        settings={
            "ratio": ratio,
            "reduction": reduction,
            "repair": repair,
            **scores.settings,
        },
        components=components,
        architecture=architecture_of(model),
        operations=operations,
    )
    edit = recipe.apply(model)
    if repair == "batchnorm" and data is not None:
        _reestimate_batch_norms(edit, data)
    elif repair in ("mean", "least_squares") and data is not None:
        names = [name for layer in components for name, _ in readers[layer]]
        _repair(model, edit, names, scores.norms, data, weights=repair == "least_squares")
    result = edit.recipe.apply(model, inplace=True) if inplace else edit
    result.skipped = skipped
    result.widths = {layer: len(reduced[layer]) for layer in components}
    result.macs_before = macs_before
    result.macs_after = count_macs(result.model, example_inputs)
    return result


def check_layers(op: str, model: nn.Module, scores: Scores, layers: Iterable[str] | None) -> list[str]:
    """The layers asked for (or all scored ones), each known to both the scores and the model."""
    modules = dict(model.named_modules())
    chosen = list(scores) if layers is None else list(layers)
    for layer in chosen:
        if layer not in scores:
            raise ValueError(f"{op}: layers must name layers that scores holds, {layer!r} is none of {list(scores)}.")
        if layer not in modules:
            raise ValueError(f"{op}: scores must come from this model: it has no layer {layer!r}.")
        width = width_of(modules[layer])
        if width is not None and width != len(scores[layer]):
            raise ValueError(
                f"{op}: scores must come from this model: layer {layer!r} has {width} components, its scores "
                f"{len(scores[layer])}."
            )
    return chosen


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
        self.shadow = copy.deepcopy(model).requires_grad_(True).eval()
        inputs = moved(example_inputs, device_of(model))
        self.graph = torch_pruning.DependencyGraph()
        try:
            with torch.random.fork_rng([]), torch.enable_grad():
                self.graph.build_dependency(self.shadow, example_inputs=inputs)
        except Exception as error:
            raise ValueError(f"prune: torch-pruning cannot trace the model on example_inputs: {error}") from error
        self.names = {module: name for name, module in self.shadow.named_modules()}

    def group(self, layer: str, channels: list[int]) -> Any:
        module = self.shadow.get_submodule(layer)
        return self.graph.get_pruning_group(
            module, self.graph.get_pruner_of_module(module).prune_out_channels, channels
        )

    def why_not(self, layer: str) -> str:
        """Why this layer's components cannot go one by one; empty when they can, as far as the graph tells."""
        module = self.shadow.get_submodule(layer)
        if isinstance(module, _ConvNd) and module.groups > 1:
            return f"it is a convolution in {module.groups} groups"
        if module not in self.graph.module2node:
            return "torch-pruning's trace does not reach it"
        try:
            group = self.group(layer, [0])
        except Exception as error:
            return f"torch-pruning cannot follow its channels: {error}"
        sharing = []
        for dependency, channels in group:
            target = dependency.target.module
            if isinstance(target, nn.Parameter):
                return "its channels are tied to a parameter outside any layer"
            if isinstance(target, nn.GroupNorm):
                return "a group norm follows it, whose groups would change"
            depthwise = isinstance(target, _ConvNd) and target.groups == target.in_channels == target.out_channels > 1
            if isinstance(target, _ConvNd) and target.groups > 1 and not depthwise:
                return f"it feeds a convolution in {target.groups} groups"
            produces = self.graph.is_out_channel_pruning_fn(dependency.handler)
            if target is module and produces and list(channels) != [0]:
                return "its channels are split or folded further on, so that none can go alone"
            if target is not module and produces and width_of(target) is not None and not depthwise:
                sharing.append(self.names[target])
        if not sharing:
            return ""
        others = f" and {len(sharing) - 1} more layers" if len(sharing) > 1 else ""
        return f"it shares its channels with {min(sharing)}{others}"

    def consumers(self, components: dict[str, list[int]]) -> list[tuple[str, list[int]]]:
        """The layers that read the components, each with the input channels on which it reads them."""
        return [
            (self.names[dependency.target.module], list(channels))
            for layer, removed in components.items()
            if removed
            for dependency, channels in self.group(layer, removed)
            if self.graph.is_in_channel_pruning_fn(dependency.handler)
            and width_of(dependency.target.module) is not None
        ]

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


def _plan(
    model: nn.Module, example_inputs: Any, components: dict[str, list[int]], tracer: _Tracer
) -> tuple[list[Operation], dict[str, str]]:
    """The operations that remove the components, and the layers that must stay whole after all, with reasons.

    What the graph says is not taken on trust: a removal must be the same function as hiding the components from the
    layers that read them. Where it is not, each layer is tried by itself.
    """
    operations, problem = _trial(model, example_inputs, components, tracer)
    if not problem:
        return operations, {}
    failed = {}
    for layer, channels in components.items():
        if channels:
            alone = {layer: channels}
            why = _trial(model, example_inputs, alone, _Tracer(model, example_inputs))[1]
            if why:
                failed[layer] = why
    rest = {layer: channels for layer, channels in components.items() if layer not in failed}
    if failed:
        operations, problem = _trial(model, example_inputs, rest, _Tracer(model, example_inputs))
    if problem:
        raise ValueError(f"prune: these layers cannot be pruned together: {list(rest)}: {problem}.")
    return operations, failed


def _trial(
    model: nn.Module, example_inputs: Any, components: dict[str, list[int]], tracer: _Tracer
) -> tuple[list[Operation], str]:
    """The operations, and what is wrong with them; nothing is, when it is empty. Uses the tracer up."""
    consumers = tracer.consumers(components)
    try:
        operations = tracer.operations(components)
        smaller = Recipe("prune", {}, components, architecture_of(model), operations).apply(model).model
    except Exception as error:  # whatever torch-pruning makes of an operation that it does not know
        return [], f"torch-pruning cannot remove its channels: {error}"
    inputs = moved(example_inputs, device_of(model))
    wide = True
    try:
        _output(model, inputs, [], wide)
    except (RuntimeError, TypeError):  # a model that insists on its own type
        wide = False
    try:
        removed = _output(smaller, inputs, [], wide)
    except Exception as error:
        return [], f"the model does not run without its channels: {error}"
    try:
        hidden = _output(model, inputs, consumers, wide)
    except Exception as error:
        return [], f"its channels cannot be hidden from the layers that read them: {error}"
    if hidden is None or removed is None or hidden.shape != removed.shape:
        return [], "the model's output would change its shape"
    tolerance = 1e-9 if wide else 1e-2
    if not float((hidden - removed).abs().max()) <= tolerance * float(hidden.abs().max()) + 1e-12:
        return [], "removing its channels is not the same as hiding them from the layers that read them"
    return operations, ""


def _output(model: nn.Module, inputs: Any, hide: list[tuple[str, list[int]]], wide: bool) -> Tensor | None:
    """First output tensor of a copy of the model, with some input channels of some layers set to 0."""
    model = copy.deepcopy(model)
    if wide:
        model = model.double()
        inputs = map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    for layer, channels in hide:
        module = model.get_submodule(layer)
        module.register_forward_pre_hook(_hiding(channels, dim=-1 if isinstance(module, nn.Linear) else 1))
    with undisturbed(model):
        return first_tensor(call(model, inputs))


def _hiding(channels: list[int], dim: int) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index = torch.tensor(channels, device=args[0].device)
        return (args[0].index_fill(dim, index, 0), *args[1:])

    return hook


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


def _reestimate_batch_norms(edit: Edit, data: Iterable[Any]) -> None:
    """Averages each batch norm's statistics over `data`, in one pass, and adds to the recipe what does the same.

    Batch averages, weighted by samples. A batch of a single sample, which may have no variance, is left out.
    """
    norms = _batch_norms(edit.model)
    before = {
        f"{name}.{buffer}": getattr(module, buffer).clone()
        for name, module in norms.items()
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    momenta = {name: module.momentum for name, module in norms.items()}
    device = device_of(edit.model)
    index, seen = -1, 0
    with undisturbed(edit.model):
        for module in norms.values():
            module.reset_running_stats()
            module.train()
        try:
            for index, batch in enumerate(data):
                inputs, _ = split("prune", batch, index, device, labels_needed=False)
                samples = samples_of(inputs)
                if samples < 2:
                    continue
                seen += samples
                for module in norms.values():
                    module.momentum = samples / seen
                call(edit.model, inputs)
        finally:
            for name, module in norms.items():
                module.momentum = momenta[name]
    if not seen:
        raise ValueError(
            "prune: data must give at least one batch of two samples to re-estimate batch norms on, it gave "
            f"{index + 1} batches, none of them so large."
        )
    _record(edit, before, edit.model.state_dict())


def _repair(
    model: nn.Module, edit: Edit, names: list[str], norms: dict[str, str], data: Iterable[Any], *, weights: bool
) -> None:
    """Repairs the layers that read removed components, and adds to the recipe what does the same."""
    owners = {*names, *(norms[name] for name in names if name in norms)}
    state = edit.model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items() if name.rpartition(".")[0] in owners}
    result = repaired(model, edit.model, names, edit.recipe.components, norms, data, weights=weights)
    if result.skipped:
        edit.recipe.settings["unrepaired"] = result.skipped
    _record(edit, {name: before[name] for name in result.values}, result.values)


def _record(edit: Edit, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Adds to the recipe that these tensors were replaced."""
    for name, old in before.items():
        index = len(edit.recipe.operations)
        edit.recipe.tensors[f"set.{index}"] = after[name].detach().cpu().clone()
        edit.recipe.tensors[f"undo.{index}"] = old.cpu()
        edit.recipe.operations.append(Operation("set", name))
