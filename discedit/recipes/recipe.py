"""`Recipe`: an edit as data. Saved, inspected, applied to a fresh model, undone bit for bit. No pickle, no code."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from discedit.common import files
from discedit.common.tables import format_table
from discedit.model.forward import outside_inference_mode
from discedit.model.sharded import unwrapped
from discedit.recipes.damage import ClassDamage
from discedit.recipes.divergences import DivergenceTable
from discedit.recipes.latencies import LatencyTable
from discedit.recipes.operations import (
    WITH_VALUES,
    Operation,
    Slots,
    all_or_nothing,
    apply_operation,
    check_operations,
    check_possible,
    named_tensors,
    undo_operation,
)
from discedit.recipes.optimizers import OptimizerT, carried


@dataclass
class Recipe:
    """An edit of a model, with what it takes to undo it.

    Attributes:
        edit: "prune", "unlearn" or "repair".
        settings: the arguments that led to it, for the reader.
        components: layer name -> the channels that were removed or ablated; none where directions were erased.
        architecture: tensor name -> shape, of the model before the edit.
        operations: what is done, in order.
        tensors: "set.I" the values that operation I writes, "undo.I" those that it replaced.
    """

    edit: str
    settings: dict[str, Any]
    components: dict[str, list[int]]
    architecture: dict[str, list[int]]
    operations: list[Operation]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @outside_inference_mode()
    def apply(self, model: nn.Module, *, inplace: bool = False) -> Edit:
        """Make this edit to a model of the same architecture.

        Args:
            model: not changed unless `inplace`.

        Returns:
            `Edit`; its recipe can undo the edit of *this* model, whose weights may differ from the first one's. The
            copy carries no gradients. An optimizer that was built before holds parameters that a removal replaced:
            `Edit.optimizer` makes it over.

        Raises:
            ValueError: a parameter or buffer is missing, unknown or of another shape. The model is then unchanged.
        """
        source = unwrapped(model)
        model = source if inplace else copied(source)
        slots = Slots(model)
        check_architecture(
            slots.architecture, self.architecture, "Recipe: this recipe was made for another architecture"
        )
        check_operations("Recipe", self.operations, self.architecture, slots=slots, tensors=self.tensors)
        check_possible("Recipe", self.operations, slots, self.tensors, undo=False)
        # Of the model as it was given: an optimizer may hold them, and a removal in place replaces them.
        before = dict(source.named_parameters())
        parameters_before = slots.parameters
        # Not what was replaced in another model: this one's values are noted anew.
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.startswith("set.")}
        with all_or_nothing(slots, needed=inplace) as announce:
            for i, operation in enumerate(self.operations):
                announce(operation)
                undo = apply_operation(slots, operation, tensors.get(f"set.{i}"))
                if undo is not None:
                    tensors[f"undo.{i}"] = undo.cpu()
        recipe = replace(self, operations=list(self.operations), tensors=tensors)  # to which a repair may add
        edit = Edit(model, recipe, parameters_before, slots.parameters)
        for name, parameter in before.items():
            edit._names[parameter] = name
        return edit

    @outside_inference_mode()
    def undo(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Give an edited model its removed and replaced values back, bit for bit.

        Args:
            model: a model with this edit applied; not changed unless `inplace`.

        Raises:
            ValueError: the model's shapes are not those that this edit leaves.
        """
        model = unwrapped(model)
        slots = Slots(model if inplace else copied(model))
        edited = check_operations("Recipe", self.operations, self.architecture, slots=slots)
        check_architecture(slots.architecture, edited, "Recipe: this model does not carry this recipe's edit")
        check_possible("Recipe", self.operations, slots, self.tensors, undo=True)
        with all_or_nothing(slots, needed=inplace) as announce:
            for i, operation in reversed(list(enumerate(self.operations))):
                announce(operation)
                undo_operation(slots, operation, self.tensors.get(f"undo.{i}"))
        return slots.model

    def edited_architecture(self) -> dict[str, list[int]]:
        """Tensor name -> shape, of the model after the edit."""
        return check_operations("Recipe", self.operations, self.architecture)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write NAME.json (what is done, readable) and NAME.values.safetensors; returns the JSON file's path."""
        target = _json_path(path)
        data = format_tensors({name: tensor.contiguous() for name, tensor in self.tensors.items()})
        values = target.with_suffix(".values.safetensors")
        header = {
            "kind": "recipe",
            "version": files.VERSION,
            "edit": self.edit,
            "settings": self.settings,
            "components": self.components,
            "architecture": self.architecture,
            "operations": [_compact(operation) for operation in self.operations],
            "tensors": {"file": values.name, "sha256": hashlib.sha256(data).hexdigest()},
        }
        # Values first: a JSON file never points at values that are not there yet.
        files.write_atomically(values, data)
        files.write_atomically(target, (json.dumps(header, indent=1) + "\n").encode())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: one is damaged, cut short or foreign.
        """
        target = _json_path(path)
        if not target.is_file():
            raise FileNotFoundError(f"recipe file {str(target)!r} does not exist.")
        header = files.load_json(target, "recipe")
        pointer = files.field(header, "tensors", dict, target)
        # The name alone: a path in a file from elsewhere must not lead out of the folder.
        values = target.with_name(Path(files.field(pointer, "file", str, target)).name)
        if not values.is_file():
            raise FileNotFoundError(
                f"recipe file {str(target)!r} needs {values.name!r} beside it, which does not exist."
            )
        data = values.read_bytes()
        if hashlib.sha256(data).hexdigest() != pointer.get("sha256"):
            raise ValueError(
                f"recipe values {str(values)!r} are damaged or belong to another recipe: checksum differs."
            )
        try:
            tensors = parse_tensors(data)
        except SafetensorError as error:
            raise ValueError(f"recipe values {str(values)!r} are no safetensors file: {error}") from error
        damaged = f"recipe file {str(target)!r} is damaged"
        architecture = files.field(header, "architecture", dict, target)
        if not all(isinstance(shape, list) and all(type(n) is int for n in shape) for shape in architecture.values()):
            raise ValueError(f"{damaged}: architecture must hold lists of integers.")
        entries = files.field(header, "operations", list, target)
        operations = [_operation(entry, f"{damaged}: operation {i}") for i, entry in enumerate(entries)]
        check_operations(damaged, operations, architecture)
        settings = files.field(header, "settings", dict, target)
        components = files.field(header, "components", dict, target)
        for name, lists in (("components", components), ("directions", settings.get("directions", {}))):
            if not isinstance(lists, dict) or not all(isinstance(numbers, list) for numbers in lists.values()):
                raise ValueError(f"{damaged}: {name} must be lists by layer, got {lists!r}.")
        return cls(files.field(header, "edit", str, target), settings, components, architecture, operations, tensors)


@dataclass
class Edit:
    """What `prune`, `unlearn` and `repair_pruned` return.

    Attributes:
        model: the edited model.
        recipe: the edit as data: save it, apply it elsewhere, undo it.
        parameters_before, parameters_after: number of parameters.
        macs_before, macs_after: multiply-accumulates of one forward pass on the example inputs; None if not measured.
        skipped: layer name -> why it was left alone.
        widths: layer name -> number of its components before the edit.
        divergences: what `prune` spent its budget by, where layers compare so; else, and of several steps, None.
        damage: what `prune` did to the answers of each class, on up to 128 samples that its repair was not fitted to;
            None without such a repair, and of several steps. On data of one's own: `class_damage`.
        latency_before, latency_after: milliseconds of a forward pass on the example inputs, measured in turns under
            `MaxLatency`; else None.
        latencies: what `MaxLatency` was spent by; else, and of several steps, None.
    """

    model: nn.Module
    recipe: Recipe
    parameters_before: int
    parameters_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    divergences: DivergenceTable | None = None
    damage: ClassDamage | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    latencies: LatencyTable | None = None
    # Parameter before the edit -> its name. Weak: an edit keeps no old model alive.
    _names: WeakTensorKeyDictionary = field(
        default_factory=WeakTensorKeyDictionary, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: all but the old parameters, which are objects of this process."""
        return {name: value for name, value in vars(self).items() if name != "_names"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _names=WeakTensorKeyDictionary())

    def optimizer(self, optimizer: OptimizerT) -> OptimizerT:
        """The optimizer of the model before the edit, made over for the edited model.

        A new one of the same class with the same parameter groups, over the edited model's parameters. State that has
        its parameter's shape (momentum, running averages) keeps the entries that the parameter kept; step counts are
        copied. Parameters that the optimizer did not hold stay out. To be called after a step, since gradients are
        not carried over.

        A learning-rate scheduler goes on with `scheduler.optimizer = edit.optimizer(optimizer)`.

        Args:
            optimizer: built over parameters of the model before the edit, and unchanged. torch's own (SGD, Adam, AdamW
                and others), or one whose constructor takes its `defaults` by name.

        Raises:
            TypeError: optimizer is none.
            ValueError: it holds parameters that the model did not have, or state of another form (LBFGS, Adafactor), or
                the edited model was changed after the edit.
        """
        return carried(optimizer, self._names, self.model, self.recipe.operations)

    def summary(self) -> str:
        """A table of what went from each layer, and what it cost."""
        directions = self.recipe.settings.get("directions", {})
        verb = "removed" if self.recipe.edit == "prune" else "directions" if directions else "ablated"
        rows = [("layer", verb, "")]
        for layer, channels in self.recipe.components.items():
            of = f" of {self.widths[layer]}" if layer in self.widths else ""
            rows.append((layer, f"{len(channels)}{of}", ""))
        rows += [(layer, str(len(bounds)), "") for layer, bounds in directions.items()]
        rows += [(layer, "-", why) for layer, why in self.skipped.items()]
        lines = [format_table(rows, left=(0, 2))]
        lines.append(f"parameters: {_change(self.parameters_before, self.parameters_after)}")
        if self.macs_before is not None and self.macs_after is not None:
            lines.append(f"multiply-accumulates: {_change(self.macs_before, self.macs_after)}")
        if self.damage is not None:
            lines.append(str(self.damage))
        if self.latency_before is not None and self.latency_after is not None:
            change = 1 - self.latency_after / self.latency_before
            lines.append(
                f"latency: {self.latency_before:.3g} -> {self.latency_after:.3g} ms ({100 * change:.1f} % less)"
            )
        return "\n".join(lines)


def copied(model: nn.Module) -> nn.Module:
    """A copy without gradients, which were the whole model's."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = None
    return model


def reduced(model: nn.Module, operations: list[Operation]) -> nn.Module:
    """A copy of a model with operations that only remove; it shares the parameters that stay whole."""
    # `deepcopy` takes what is in its memo for copied: each trial of a removal would else copy all weights.
    slots = Slots(copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}))
    check_operations("Recipe", operations, slots.architecture, slots=slots)
    check_possible("Recipe", operations, slots, {}, undo=False)
    for operation in operations:
        apply_operation(slots, operation, None)
    return slots.model


def _change(before: int, after: int) -> str:
    share = f" ({100 * (before - after) / before:.1f} % less)" if after != before and before else ""
    return f"{before:,} -> {after:,}{share}"


def compose_edits(model: nn.Module, edits: list[Edit], inplace: bool) -> Edit:
    """One edit that does what these, made one after the other, did.

    Recipes look at a module's attributes before they change anything, so each is changed once, at the end.
    """
    operations: list[Operation] = []
    attributes: dict[tuple[str, str], Operation] = {}
    tensors: dict[str, Tensor] = {}
    gone: dict[str, set[int]] = {}
    left: dict[str, list[int]] = {}
    for edit in edits:
        for i, operation in enumerate(edit.recipe.operations):
            if operation.kind == "attribute":
                key = (operation.target, operation.name)
                attributes[key] = replace(operation, before=attributes.get(key, operation).before)
                continue
            if operation.kind in WITH_VALUES:
                tensors[f"set.{len(operations)}"] = edit.recipe.tensors[f"set.{i}"]
            operations.append(operation)
        for layer, channels in edit.recipe.components.items():
            numbers = left.setdefault(layer, list(range(edit.widths[layer])))
            gone.setdefault(layer, set()).update(numbers[channel] for channel in channels)
            if edit.recipe.edit == "prune":  # what is left has new numbers in the next edit
                left[layer] = [number for number in numbers if number not in gone[layer]]
    first = edits[0]
    skipped = {layer: why for edit in edits for layer, why in edit.skipped.items() if not gone.get(layer)}
    recipe = Recipe(
        edit=first.recipe.edit,
        settings={name: value for name, value in first.recipe.settings.items() if name != "ratio"},
        components={layer: sorted(channels) for layer, channels in gone.items() if layer not in skipped},
        architecture=architecture_of(model),
        operations=[*operations, *attributes.values()],
        tensors=tensors,
    )
    joined = recipe.apply(model, inplace=inplace)
    joined.skipped = skipped
    joined.widths = {layer: width for edit in reversed(edits) for layer, width in edit.widths.items()}
    joined.macs_before, joined.macs_after = first.macs_before, edits[-1].macs_after
    return joined


def architecture_of(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter and buffer by name."""
    return {name: list(tensor.shape) for name, tensor in named_tensors(model)}


def check_architecture(found: dict[str, list[int]], expected: dict[str, list[int]], what: str) -> None:
    """Raises a ValueError, which says `what`, unless a model's tensors have the shapes that are expected."""
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{what}: tensor {name!r} must have shape {expected.get(name, 'none (absent)')}, the model's "
                f"has {found.get(name, 'none (absent)')}."
            )


def _json_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target if target.suffix == ".json" else target.with_name(target.name + ".json")


def _compact(operation: Operation) -> dict[str, Any]:
    defaults = asdict(Operation("", ""))
    return {
        key: value for key, value in asdict(operation).items() if key in ("kind", "target") or value != defaults[key]
    }


def _operation(entry: Any, what: str) -> Operation:
    """An operation from JSON."""
    if not isinstance(entry, dict) or not {"kind", "target"} <= entry.keys() <= set(Operation.__dataclass_fields__):
        raise ValueError(f"{what} must be an object with kind and target, got {entry!r}.")
    index = entry.get("index", [])
    if not isinstance(index, list):
        raise ValueError(f"{what} must have a list of indices, got {index!r}.")
    return Operation(**{**entry, "index": tuple(index)})


def record(edit: Edit, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Adds to an edit's recipe that these tensors were replaced in its model."""
    for name, old in before.items():
        index = len(edit.recipe.operations)
        edit.recipe.tensors[f"set.{index}"] = after[name].detach().cpu().clone()
        edit.recipe.tensors[f"undo.{index}"] = old.cpu()
        edit.recipe.operations.append(Operation("set", name))
