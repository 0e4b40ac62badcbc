"""`repair_pruned`: the closed-form repair by itself, for what another tool has pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from discedit.common import validation
from discedit.graph.kept_channels import UNORDERED, masked_outputs, output_axis, outputs_left
from discedit.graph.network import is_depthwise
from discedit.model.forward import device_of, outside_modes
from discedit.model.sharded import unwrapped
from discedit.model.trace import ModelTrace, is_layer
from discedit.moments.calibration import calibrated, kept_back
from discedit.recipes.recipe import Edit, Recipe, architecture_of
from discedit.repair.least_squares import repaired, take_back, warning_if_worse

OP = "repair_pruned"
Rows = dict[str, list[int]]  # layer -> outputs of the original


@outside_modes()
def repair_pruned(
    original: nn.Module,
    pruned: nn.Module,
    data: Iterable[Any],
    *,
    kept: Mapping[str, Iterable[int] | Tensor] | None = None,
    inplace: bool = False,
) -> Edit:
    """Give what another tool has left of a network the weights that bring it closest to what the network gave.

    The least-squares repair of `discedit.prune`, checked on samples that it was not fitted to. Which outputs are
    left is found by the weights, which must be those of the original; where they were trained since, `kept` says it.
    Outputs that `torch.nn.utils.prune` has masked (all weights 0, masks made permanent) stay 0.

    Args:
        original: the network before pruning, unchanged.
        pruned: what is left of it: modules of the same names, with smaller or masked weights.
        data: batches (labels are not used) that both models run on.
        kept: layer -> indices of its outputs that are left, (outputs,) integers, ascending, such as
            ``DiscEditImportance.kept``; of other layers they are found.
        inplace: whether to change `pruned` itself, and not a copy.

    Returns:
        `Edit`: the repaired network; its recipe holds what was set, undoes it, and names in ``settings["removed"]``
        the outputs that were gone; `skipped` names layers that could not be repaired, or came out worse. A repair that
        brings outputs no closer gives a warning.

    Raises:
        TypeError: a model is no module, or `kept` no mapping.
        ValueError: modules of other names; a tensor that grew; nothing pruned; single weights masked; outputs that
            cannot be found; a `kept` that does not fit; a model that does not run on `data`, or gives other shapes.

    Source: W = W0 + (S_yx - W0 S_xx) (S_xx + r I)^-1 in order of execution, sums in float64: docs/pruning.md.
    """
    for argument, model in (("original", original), ("pruned", pruned)):
        validation.module(OP, model, argument)
    original, pruned = unwrapped(original), unwrapped(pruned)
    _check_parts(original, pruned)
    if inplace and _tensors_of(original) & _tensors_of(pruned):
        raise ValueError(
            f"{OP}: pruned must have tensors of its own to be changed in place, it shares some of original."
        )
    given = _checked(kept, original, pruned)
    masked = _masked(original, pruned)
    parts, trace, further = _on_data(original, data)
    _check_runs(trace, pruned, parts[0])
    readers = _readers(trace, pruned, masked)
    if not readers:
        raise ValueError(f"{OP}: pruned must have lost channels that layers read, every layer reads what it did.")
    removed = _removed(trace, pruned, given)
    settings = {"repair": "least_squares", "removed": removed, "masked": masked}
    edit = Recipe("repair", settings, {}, architecture_of(pruned), []).apply(pruned)
    fitted, held_out = kept_back(OP, parts, further)
    with warning_if_worse(OP, trace, edit.model, held_out, instead="none at all"):
        result = repaired(OP, edit.model, readers, removed, trace, fitted, weights=True, ablated=masked)
        take_back(OP, edit, result, removed, trace, held_out, ablated=masked)
    # In place only when all has gone well.
    edit = edit.recipe.apply(pruned, inplace=True) if inplace else edit
    edit.skipped = dict(edit.recipe.settings.get("unrepaired", {}))
    return edit


def _check_parts(original: nn.Module, pruned: nn.Module) -> None:
    """Modules and tensors of the same names, none larger than it was."""
    modules, others = dict(original.named_modules()), dict(pruned.named_modules())
    before, after = architecture_of(original), architecture_of(pruned)
    for what, one, other in (("modules", modules.keys(), others.keys()), ("tensors", before.keys(), after.keys())):
        for name in sorted(one ^ other, key=lambda name: (not name.endswith("_mask"), name)):
            helps = ": torch.nn.utils.prune.remove makes masks permanent" if name.endswith("_mask") else ""
            missing = "is missing" if name in one else "is none of these"
            raise ValueError(
                f"{OP}: pruned must have {what} of the names that original has, {name!r} {missing}{helps}."
            )
    for name, module in modules.items():
        if is_layer(module) != is_layer(others[name]):
            kinds = f"{name!r} is a {type(others[name]).__name__}, it was a {type(module).__name__}"
            raise ValueError(f"{OP}: pruned must have layers of the classes that original has, {kinds}.")
    for name, shape in before.items():
        if len(shape) != len(after[name]) or any(new > old for new, old in zip(after[name], shape, strict=True)):
            raise ValueError(
                f"{OP}: pruned must have tensors that are no larger than original's, {name!r} has shape "
                f"{tuple(after[name])}, it had {tuple(shape)}."
            )
    for name, layers in _layers(original, pruned).items():
        kernels = [tuple(module.weight.shape[2:]) for module in layers]
        if kernels[0] != kernels[1]:
            what = f"{name!r} has {kernels[1]}, it had {kernels[0]}"
            raise ValueError(f"{OP}: pruned must have kernels of the sizes that original has, {what}.")
    if device_of(original) != device_of(pruned):
        where = f"{device_of(pruned)}, original on {device_of(original)}"
        raise ValueError(f"{OP}: pruned must be on the device that original is on, it is on {where}.")


def _tensors_of(model: nn.Module) -> set[int]:
    """Where parameters and buffers lie in memory."""
    return {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}


def _layers(original: nn.Module, pruned: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {name: (module, pruned.get_submodule(name)) for name, module in original.named_modules() if is_layer(module)}


def _outputs(layers: tuple[Any, Any]) -> tuple[int, int]:
    """How many outputs a layer had, and has."""
    one, other = (module.weight.shape[output_axis(module)] for module in layers)
    return one, other


def _inputs(layer: Any) -> int:
    if output_axis(layer):
        return int(layer.weight.shape[0])
    return int(layer.weight.shape[1]) * getattr(layer, "groups", 1)


def _checked(kept: Mapping[str, Any] | None, original: nn.Module, pruned: nn.Module) -> Rows:
    """What the caller says of outputs that are left."""
    if kept is None:
        return {}
    validation.instance(OP, "kept", kept, Mapping, "a mapping of layer names to indices of outputs")
    layers, found = _layers(original, pruned), {}
    for name, given in kept.items():
        if name not in layers:
            raise ValueError(f"{OP}: kept must name convolutions and linear layers of the models, {name!r} is none.")
        indices = given.tolist() if isinstance(given, Tensor) else given
        indices = [validation.index(entry) for entry in indices] if isinstance(indices, Iterable) else [None]
        before, left = _outputs(layers[name])
        rule = f"{left} increasing indices in 0..{before - 1}, one for each output that is left"
        known = [-1, *(entry for entry in indices if entry is not None), before]
        rising = all(one < other for one, other in pairwise(known))
        if len(known) < len(indices) + 2 or len(indices) != left or not rising:
            raise ValueError(f"{OP}: kept[{name!r}] must be {rule}, got {given!r:.80}.")
        found[name] = known[1:-1]
    return found


def _masked(original: nn.Module, pruned: nn.Module) -> Rows:
    """Layer -> the outputs whose weights have all become 0."""
    found = {}
    for name, layers in _layers(original, pruned).items():
        if len(set(_outputs(layers))) > 1:
            continue
        rows, others = masked_outputs(layers)
        if others:
            raise ValueError(
                f"{OP}: pruned must have lost whole outputs, {others} single weights of {name!r} have become 0, which "
                "a repair would fill."
            )
        if rows:
            found[name] = rows
    return found


def _on_data(original: nn.Module, data: Iterable[Any]) -> tuple[list[Any], ModelTrace, Any]:
    try:
        return calibrated(OP, ModelTrace(original), data, further=True)
    except Exception as error:  # of the model, whatever it is, or of the data
        if str(error).startswith(f"{OP}: "):
            raise
        raise ValueError(f"{OP}: original must run on data, it raised {type(error).__name__}: {error}") from error


def _check_runs(trace: ModelTrace, pruned: nn.Module, inputs: Any) -> None:
    """Whether it runs the layers that the original does, and gives as many numbers."""
    try:
        now = ModelTrace.of(pruned, inputs)
    except Exception as error:  # of the model, whatever it is
        raise ValueError(f"{OP}: pruned must run on data, it raised {type(error).__name__}: {error}") from error
    then = ModelTrace.of(trace.model, inputs)
    for name, module in trace.model.named_modules():
        if is_layer(module) and then.runs.get(name) != now.runs.get(name):
            times = f"{now.runs.get(name, 0)} times, it did {then.runs.get(name, 0)} times"
            raise ValueError(f"{OP}: pruned must run the layers that original does, {name!r} runs {times}.")
    if then.outputs != now.outputs:
        raise ValueError(
            f"{OP}: pruned must give outputs of the shapes that original gives, {then.outputs}, got {now.outputs}."
        )


def _readers(trace: ModelTrace, pruned: nn.Module, masked: Rows) -> list[str]:
    """Layers that read fewer channels than they did, or some that are masked."""
    found = []
    for name, layers in _layers(trace.model, pruned).items():
        before, after = map(_inputs, layers)
        if after < before and not is_depthwise(layers[0]):  # which has the channels of the layer before it
            found.append(name)
    for name in masked:
        behind = [
            reader for reader in trace.consumers.get(name, ()) if not is_depthwise(trace.model.get_submodule(reader))
        ]
        names = trace.in_order(_layers(trace.model, pruned))
        later = names[names.index(name) + 1 :] if name in names else []
        found += behind or later[:1]
    return found


def _removed(trace: ModelTrace, pruned: nn.Module, kept: Rows) -> Rows:
    """Layer -> the outputs that it has lost, as far as they matter."""
    found = {}
    for name, layers in _layers(trace.model, pruned).items():
        before, left = _outputs(layers)
        if before == left:
            continue
        rows, why = kept.get(name, []), ""
        if name not in kept:
            norm = trace.norms.get(name)
            norms = (trace.model.get_submodule(norm), pruned.get_submodule(norm)) if norm else None
            rows, why = outputs_left(layers, norms, summed=name in trace.sums)
        if not why:
            found[name] = sorted(set(range(before)).difference(rows))
        elif not trace.why_not_read(name):  # others are never fitted: nobody asks which outputs they have
            helps = "" if why == UNORDERED else f": give their indices as kept={{{name!r}: [...]}}"
            raise ValueError(
                f"{OP}: pruned must show which outputs of its layers are left, {name!r} has {left} of {before}, and "
                f"{why}{helps}."
            )
    return found
