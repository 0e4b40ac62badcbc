"""`Recipe`: an edit as data. Saved, inspected, applied to a fresh model, undone bit for bit. No pickle, no code."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from discedit.common import files
from discedit.model import attention
from discedit.model.forward import outside_inference_mode
from discedit.model.sharded import unwrapped
from discedit.model.size import count_parameters
from discedit.recipes.optimizers import RESTORED, OptimizerT, carried, parameters_of, watch

KINDS = ("keep", "fill", "scale", "add", "set", "attribute")
FORWARD = "forward"  # among the attributes
WITH_VALUES = ("add", "set")  # kinds that write values of the recipe's own


@dataclass(frozen=True)
class Operation:
    """One elementary change.

    - kind "keep": keep `index` along `dim` of the tensor `target`, drop the rest.
    - kind "fill": write `value` at `index` along `dim` of the tensor `target`.
    - kind "scale": multiply by `value` what is at `index` along `dim` of the tensor `target`.
    - kind "add": add the recipe's own values to what is at `index` along `dim` of the tensor `target`.
    - kind "set": replace the tensor `target` by the recipe's own values.
    - kind "attribute": change the attribute `name` of the module `target` from `before` to `value`; "forward": what
      attention must be told to run with fewer heads, None for its class's own.
    """

    kind: str
    target: str
    dim: int = 0
    index: tuple[int, ...] = ()
    name: str = ""
    before: Any = None
    value: Any = None


@dataclass
class Recipe:
    """An edit of a model, with what it takes to undo it.

    Attributes:
        edit: "prune" or "unlearn".
        settings: the arguments that led to it, for the reader.
        components: layer name -> the channels that were removed or silenced; none where directions were erased.
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

    @outside_inference_mode
    def apply(self, model: nn.Module, *, inplace: bool = False) -> Edit:
        """Make this edit to a model of the same architecture.

        Args:
            model: not changed unless `inplace`.

        Returns:
            `Edit`; its recipe can undo the edit of *this* model, whose weights may differ from the first one's. The
            copy carries no gradients. The step of an optimizer that still holds the old parameters is a RuntimeError
            (of a copied model only where the copy has gradients and the optimizer finds none): `Edit.optimizer`.

        Raises:
            ValueError: a parameter or buffer is missing, unknown or of another shape. The model is then unchanged.
        """
        source = model = unwrapped(model)
        check_architecture(model, self.architecture, "Recipe: this recipe was made for another architecture")
        self._check_possible(model, undo=False)
        before = dict(source.named_parameters())
        parameters_before = count_parameters(model)
        if not inplace:
            model = copied(source)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.startswith("set.")}
        with _all_or_nothing(model, needed=inplace) as (slots, changes):
            for i, operation in enumerate(self.operations):
                changes.begin(operation)
                undo = _apply(model, slots, operation, tensors, i)
                if undo is not None:
                    tensors[f"undo.{i}"] = undo.cpu()
        recipe = Recipe(self.edit, self.settings, self.components, self.architecture, self.operations, tensors)
        edit = Edit(model, recipe, parameters_before, count_parameters(model))
        for name, parameter in before.items():
            edit._names[parameter] = name
        watch(before.values(), source, model, "pruned" if self.edit == "prune" else "edited")
        return edit

    @outside_inference_mode
    def undo(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Give an edited model its removed and replaced values back, bit for bit.

        Args:
            model: a model with this edit applied; not changed unless `inplace`.

        Raises:
            ValueError: the model's shapes are not those that this edit leaves.
        """
        model = unwrapped(model)
        check_architecture(model, self.edited_architecture(), "Recipe: this model does not carry this recipe's edit")
        self._check_possible(model, undo=True)
        source = model
        before = list(source.parameters())
        if not inplace:
            model = copied(source)
        with _all_or_nothing(model, needed=inplace) as (slots, changes):
            for i, operation in reversed(list(enumerate(self.operations))):
                changes.begin(operation)
                _undo(model, slots, operation, self.tensors, i)
        watch(before, source, model, RESTORED)
        return model

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
        architecture = files.field(header, "architecture", dict, target)
        operations = [
            _operation(entry, architecture, i, target)
            for i, entry in enumerate(files.field(header, "operations", list, target))
        ]
        settings = files.field(header, "settings", dict, target)
        components = files.field(header, "components", dict, target)
        for name, lists in (("components", components), ("directions", settings.get("directions", {}))):
            if not isinstance(lists, dict) or not all(isinstance(numbers, list) for numbers in lists.values()):
                raise ValueError(
                    f"recipe file {str(target)!r} is damaged: {name} must be lists by layer, got {lists!r}."
                )
        return cls(
            files.field(header, "edit", str, target),
            settings,
            components,
            architecture,
            operations,
            tensors,
        )

    def _check_possible(self, model: nn.Module, *, undo: bool) -> None:
        """Refuses before anything has changed."""
        slots = _Slots(model)
        shapes: dict[int, list[int]] = {}  # as the operations so far leave them, by identity
        for i, operation in enumerate(self.operations):
            if operation.kind == "attribute":
                _attribute_owner(model, operation, operation.value if undo else operation.before)
                continue
            tensor = slots.get(operation.target)
            values = self.tensors.get(f"undo.{i}" if undo else f"set.{i}")
            if undo and (values is None or values.dtype != tensor.dtype):
                found = "none" if values is None else f"values of type {values.dtype}"
                raise ValueError(
                    f"Recipe: to undo, tensor {operation.target!r} ({tensor.dtype}) needs its values, found {found}."
                )
            if not undo and operation.kind in WITH_VALUES and values is None:
                raise ValueError(f"Recipe: the values for tensor {operation.target!r} are missing from the recipe.")
            if not undo and operation.kind in ("fill", "scale") and not _representable(operation.value, tensor.dtype):
                raise ValueError(
                    f"Recipe: the number to {operation.kind} tensor {operation.target!r} with must be in the range of "
                    f"its type {tensor.dtype}, got {operation.value!r:.40}."
                )
            shape = shapes.setdefault(id(tensor), list(tensor.shape))
            if operation.kind == "keep":
                shape[operation.dim] = len(operation.index)
            if not undo and operation.kind in WITH_VALUES and values is not None:
                written = list(shape)
                if operation.kind == "add":
                    written[operation.dim] = len(operation.index)
                if not _fits(operation, list(values.shape), written):
                    raise ValueError(
                        f"Recipe: the values for tensor {operation.target!r} must have shape {written}, they have "
                        f"{list(values.shape)}."
                    )

    def edited_architecture(self) -> dict[str, list[int]]:
        """Tensor name -> shape, of the model after the edit."""
        shapes = {name: list(shape) for name, shape in self.architecture.items()}
        for operation in self.operations:
            if operation.kind == "keep":
                shapes[operation.target][operation.dim] = len(operation.index)
        return shapes


@dataclass
class Edit:
    """What `prune` and `unlearn` return.

    Attributes:
        model: the edited model.
        recipe: the edit as data: save it, apply it elsewhere, undo it.
        parameters_before, parameters_after: number of parameters.
        macs_before, macs_after: multiply-accumulates of one forward pass on the example inputs; None if not measured.
        skipped: layer name -> why it was left alone.
        widths: layer name -> number of its components before the edit.
    """

    model: nn.Module
    recipe: Recipe
    parameters_before: int
    parameters_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
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
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Edit.optimizer: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}."
            )
        held = parameters_of(optimizer)
        unknown = sum(parameter not in self._names for parameter in held)
        if unknown:
            raise ValueError(
                "Edit.optimizer: optimizer must hold parameters of the model before the edit, "
                f"{unknown} of its {len(held)} are not in it."
            )
        present = dict(self.model.named_parameters(remove_duplicate=False))
        # By identity: an operation may call a tensor that hangs in several places by another name.
        cuts: dict[int, list[tuple[int, Tensor]]] = {}
        for operation in self.recipe.operations:
            if operation.kind == "keep" and operation.target in present:
                index = torch.tensor(operation.index, dtype=torch.int64)
                cuts.setdefault(id(present[operation.target]), []).append((operation.dim, index))
        parameters, kept = [], []
        for old in held:
            name = self._names[old]
            new = present.get(name)
            cut = cuts.get(id(new), [])
            shape = list(old.shape)
            for dim, index in cut:
                shape[dim] = len(index)
            if new is None or list(new.shape) != shape:
                found = "gone" if new is None else f"of shape {list(new.shape)} instead of {shape}"
                raise ValueError(
                    f"Edit.optimizer: edit.model must be as the edit left it, its parameter {name!r} is {found}."
                )
            parameters.append(new)
            kept.append(cut)
        return carried(optimizer, parameters, kept)

    def summary(self) -> str:
        """A table of what went from each layer, and what it cost."""
        directions = self.recipe.settings.get("directions", {})
        verb = "removed" if self.recipe.edit == "prune" else "directions" if directions else "silenced"
        names = [*self.recipe.components, *directions, *self.skipped]
        width = max((len(name) for name in names), default=5)
        lines = [f"{'layer':{width}}  {verb:>12}"]
        for layer, channels in self.recipe.components.items():
            of = f" of {self.widths[layer]}" if layer in self.widths else ""
            lines.append(f"{layer:{width}}  {f'{len(channels)}{of}':>12}")
        lines += [f"{layer:{width}}  {len(bounds):>12}" for layer, bounds in directions.items()]
        lines += [f"{layer:{width}}  {'-':>12}  {why}" for layer, why in self.skipped.items()]
        lines.append(f"parameters: {_change(self.parameters_before, self.parameters_after)}")
        if self.macs_before is not None and self.macs_after is not None:
            lines.append(f"multiply-accumulates: {_change(self.macs_before, self.macs_after)}")
        return "\n".join(lines)


def copied(model: nn.Module) -> nn.Module:
    """A copy without gradients: those were the whole model's, and `watch` takes them for a sign of training."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = None
    return model


def reduced(model: nn.Module, operations: list[Operation]) -> nn.Module:
    """A copy of a model with operations that only remove; it shares the parameters that stay whole."""
    Recipe("prune", {}, {}, architecture_of(model), operations)._check_possible(model, undo=False)
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    slots = _Slots(model)
    for i, operation in enumerate(operations):
        _apply(model, slots, operation, {}, i)
    return model


def _change(before: int, after: int) -> str:
    share = f" ({100 * (before - after) / before:.1f} % less)" if after != before and before else ""
    return f"{before:,} -> {after:,}{share}"


def joined(model: nn.Module, edits: list[Edit], inplace: bool) -> Edit:
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


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def check_architecture(model: nn.Module, expected: dict[str, list[int]], what: str) -> None:
    """Raises a ValueError, which says `what`, unless the model's tensors have these shapes."""
    found = architecture_of(model)
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{what}: tensor {name!r} must have shape {expected.get(name, 'none (absent)')}, the model's "
                f"has {found.get(name, 'none (absent)')}."
            )


class _Slots:
    """Where each tensor of a model hangs; a tensor that hangs in several places changes in all of them."""

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        by_identity: dict[int, list[tuple[nn.Module, str]]] = {}
        for name, tensor in named_tensors(model):
            owner, _, attribute = name.rpartition(".")
            shared = by_identity.setdefault(id(tensor), [])
            shared.append((model.get_submodule(owner), attribute))
            self.places[name] = shared

    def get(self, name: str) -> Tensor:
        module, attribute = self.places[name][0]
        value: Tensor = getattr(module, attribute)
        return value

    def put(self, name: str, value: Tensor) -> None:
        old = self.get(name)
        new: Tensor = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        for module, attribute in self.places[name]:
            setattr(module, attribute, new)


class _Changes:
    """What operations have changed so far, to be put back: the very tensors, and their values."""

    def __init__(self, model: nn.Module, slots: _Slots, needed: bool) -> None:
        self.model, self.slots, self.needed = model, slots, needed
        self.backs: list[Callable[[], None]] = []

    def begin(self, operation: Operation) -> None:
        """Takes down what an operation is about to change."""
        if not self.needed:
            return
        if operation.kind == "attribute":
            module = self.model.get_submodule(operation.target)
            self.backs.append(partial(_set, module, operation.name, attribute_of(module, operation.name)))
            return
        tensor = self.slots.get(operation.target)
        if operation.kind == "keep":  # leaves the tensor alone and puts another one in its place
            for module, name in self.slots.places[operation.target]:
                self.backs.append(partial(setattr, module, name, tensor))
            return
        index = _index(operation, tensor)
        whole = operation.kind == "set"
        old = tensor.detach().clone() if whole else tensor.detach().index_select(operation.dim, index)

        @torch.no_grad()
        def back() -> None:
            if whole:
                tensor.copy_(old)
            else:
                tensor.index_copy_(operation.dim, index, old)

        self.backs.append(back)

    def take_back(self) -> None:
        for back in reversed(self.backs):
            back()


@contextmanager
def _all_or_nothing(model: nn.Module, *, needed: bool) -> Iterator[tuple[_Slots, _Changes]]:
    """Where something fails in the middle (memory that ends, an interrupt), the model is what it was; a copy, which
    nobody has seen, need not be."""
    slots = _Slots(model)
    changes = _Changes(model, slots, needed)
    try:
        yield slots, changes
    except BaseException:
        changes.take_back()
        raise


def _index(operation: Operation, tensor: Tensor) -> Tensor:
    return torch.tensor(operation.index, dtype=torch.int64, device=tensor.device)


def _fits(operation: Operation, shape: list[int], written: list[int]) -> bool:
    """Whether values of a shape can be written; what is added may be one number for a whole row or column."""
    if operation.kind == "add" and len(shape) == len(written):
        shape = [written[d] if n == 1 and d != operation.dim else n for d, n in enumerate(shape)]
    return shape == written


def _representable(value: float, dtype: torch.dtype) -> bool:
    """Whether a number of a file can be written to a tensor: JSON's have no limits."""
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if isinstance(value, float) and not math.isfinite(value):
        return dtype.is_floating_point
    return abs(value) <= limits.max


def _dropped(operation: Operation, size: int) -> list[int]:
    return sorted(set(range(size)) - set(operation.index))


def _attribute_owner(model: nn.Module, operation: Operation, expected: Any) -> nn.Module:
    try:
        module = model.get_submodule(operation.target)
    except AttributeError as error:
        raise ValueError(f"Recipe: the model has no module {operation.target!r}.") from error
    found = attribute_of(module, operation.name)
    if found != expected:
        raise ValueError(
            f"Recipe: attribute {operation.name!r} of module {operation.target!r} must be {expected!r}, "
            f"it is {found!r}."
        )
    return module


def _set_attribute(model: nn.Module, operation: Operation, expected: Any, value: Any) -> None:
    _set(_attribute_owner(model, operation, expected), operation.name, value)


def attribute_of(module: nn.Module, name: str) -> Any:
    """A module's attribute, as recipes have it: a list for a tuple."""
    if name == FORWARD:
        return attention.forward_of(module)
    value = getattr(module, name, None)
    return list(value) if isinstance(value, tuple) else value


def _set(module: nn.Module, name: str, value: Any) -> None:
    if name == FORWARD:
        attention.set_forward(module, value)
    else:
        setattr(module, name, tuple(value) if isinstance(getattr(module, name), tuple) else value)


@torch.no_grad()
def _apply(
    model: nn.Module, slots: _Slots, operation: Operation, tensors: dict[str, Tensor], position: int
) -> Tensor | None:
    """Do one operation, known to be possible; returns what it overwrote."""
    if operation.kind == "attribute":
        _set_attribute(model, operation, operation.before, operation.value)
        return None
    tensor = slots.get(operation.target)
    if operation.kind == "keep":
        dropped = torch.tensor(_dropped(operation, tensor.shape[operation.dim]), device=tensor.device)
        undo = tensor.detach().index_select(operation.dim, dropped.long())
        slots.put(operation.target, tensor.detach().index_select(operation.dim, _index(operation, tensor)))
        return undo
    if operation.kind in ("fill", "scale", "add"):
        index = _index(operation, tensor)
        undo = tensor.detach().index_select(operation.dim, index)
        if operation.kind == "fill":
            value = float(operation.value) if tensor.is_floating_point() else operation.value
            tensor.index_fill_(operation.dim, index, value)
        elif operation.kind == "scale":
            tensor.index_copy_(operation.dim, index, undo * operation.value)
        else:
            tensor.index_copy_(operation.dim, index, undo + tensors[f"set.{position}"].to(undo))
        return undo
    undo = tensor.detach().clone()
    tensor.copy_(tensors[f"set.{position}"])
    return undo


@torch.no_grad()
def _undo(model: nn.Module, slots: _Slots, operation: Operation, tensors: dict[str, Tensor], position: int) -> None:
    """Take one operation back, known to be possible."""
    if operation.kind == "attribute":
        _set_attribute(model, operation, operation.value, operation.before)
        return
    tensor = slots.get(operation.target)
    saved = tensors[f"undo.{position}"].to(tensor.device)
    if operation.kind == "keep":
        size = tensor.shape[operation.dim] + saved.shape[operation.dim]
        shape = list(tensor.shape)
        shape[operation.dim] = size
        whole = tensor.new_empty(shape)
        whole.index_copy_(operation.dim, _index(operation, tensor), tensor.detach())
        dropped = torch.tensor(_dropped(operation, size), dtype=torch.int64, device=tensor.device)
        whole.index_copy_(operation.dim, dropped, saved)
        slots.put(operation.target, whole)
    elif operation.kind in ("fill", "scale", "add"):
        tensor.index_copy_(operation.dim, _index(operation, tensor), saved)
    else:
        tensor.copy_(saved)


def _json_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target if target.suffix == ".json" else target.with_name(target.name + ".json")


def _compact(operation: Operation) -> dict[str, Any]:
    defaults = Operation("", "")
    return {
        key: value
        for key, value in asdict(operation).items()
        if key in ("kind", "target") or value != getattr(defaults, key)
    }


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(entry) is int for entry in value))


def _operation(entry: Any, architecture: dict[str, Any], position: int, path: Path) -> Operation:
    """An operation from JSON, refused unless it makes sense for the architecture."""

    def refuse(why: str) -> ValueError:
        return ValueError(f"recipe file {str(path)!r} is damaged: operation {position} {why}.")

    if not isinstance(entry, dict) or not {"kind", "target"} <= entry.keys() <= set(Operation.__dataclass_fields__):
        raise refuse(f"must be an object with kind and target, got {entry!r}")
    if not isinstance(entry.get("index", []), list):
        raise refuse(f"must have a list of indices, got {entry['index']!r}")
    operation = Operation(**{**entry, "index": tuple(entry.get("index", ()))})
    if operation.kind not in KINDS:
        raise refuse(f"has the unknown kind {operation.kind!r}")
    if not isinstance(operation.target, str):
        raise refuse(f"must have a name for target, got {operation.target!r}")
    if operation.kind == "attribute":
        if not isinstance(operation.name, str) or operation.name.startswith("_"):
            raise refuse("must name a public attribute")
        if operation.name == FORWARD:
            if any(value is not None and not attention.is_spec(value) for value in (operation.before, operation.value)):
                raise refuse(f"must tell attention how to run, got {operation.before!r}, {operation.value!r}")
        elif not _is_size(operation.before) or not _is_size(operation.value):
            raise refuse(f"must change an integer or a list of integers, got {operation.before!r}, {operation.value!r}")
        return operation
    shape = architecture.get(operation.target)
    if not isinstance(shape, list):
        raise refuse(f"names the unknown tensor {operation.target!r}")
    if operation.kind in ("keep", "fill", "scale", "add"):
        if type(operation.dim) is not int or not 0 <= operation.dim < len(shape):
            raise refuse(f"has dim {operation.dim!r} for a tensor of shape {shape}")
        size = shape[operation.dim]
        if type(size) is not int:
            raise refuse(f"is on a tensor whose shape must be integers, got {shape}")
        inside = all(type(i) is int and 0 <= i < size for i in operation.index)
        if not inside or list(operation.index) != sorted(set(operation.index)):
            raise refuse(f"must have increasing indices in 0..{size - 1}")
    if operation.kind in ("fill", "scale") and type(operation.value) not in (int, float):
        raise refuse(f"must {operation.kind} with a number, got {operation.value!r}")
    return operation
