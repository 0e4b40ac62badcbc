"""`Stack`: several edits on one model, added and taken away in any order, always exact."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit.common import files
from discedit.recipes.operations import (
    FORWARD,
    WITH_VALUES,
    Operation,
    Slots,
    attribute_of,
    check_attribute,
    check_operations,
    module_of,
)
from discedit.recipes.recipe import Edit, Recipe, architecture_of, check_architecture, copied

FILE = "stack.json"
SWITCHES = (FORWARD, "activation_relu_or_gelu")  # attributes that count nothing
# Which axis of its weight an attribute of a layer counts; the other way round in a transposed convolution.
AXES = {
    **dict.fromkeys(("out_features", "out_channels", "num_features", "num_channels", "num_embeddings"), 0),
    **dict.fromkeys(("in_features", "in_channels", "embedding_dim"), 1),
}

_Axis = tuple[str, int]  # a tensor, by the first of its names, and one of its dimensions


class Stack:
    """Edits of one model that can be added and taken away in any order.

    After each change `model` is made anew: a copy of the base, to which the recipes that are there are applied in the
    order in which they were pushed. So what is left after removals is bit for bit what pushing only that would give.

    Rows and columns are known by their numbers in the base: a recipe that was made on a pruned model keeps meaning the
    same rows when the pruning below it is removed (rows that come back are left as they were), and one made on the base
    and pushed onto a pruned model leaves out the rows that are gone (and has them back when the pruning is removed).

    Values that a recipe sets whole, as repairs do, stay fitted to the model on which the edit was made, and write over
    what lies below them: make repairs on ``stack.model``, and anew when that changes. Where such values no longer have
    the tensor's rows the change is refused. Training of ``stack.model`` by others is gone after the next change.

    Args:
        model: the base, which is copied.

    >>> from torch import nn
    >>> from discedit.recipes import Operation, Recipe, architecture_of
    >>> base = nn.Linear(2, 3)
    >>> def zero(*rows):
    ...     zeroed = Operation("fill", "bias", index=rows, value=0.0)
    ...     return Recipe("unlearn", {}, {}, architecture_of(base), [zeroed])
    >>> stack = Stack(base)
    >>> stack.push("cat", zero(0, 1))
    >>> stack.push("dog", zero(1, 2))
    >>> stack.remove("cat")
    >>> stack
    Stack(['dog'])
    >>> bool(stack.model.bias[0] == base.bias[0]), stack.model.bias[1:].tolist()
    (True, [0.0, 0.0])
    """

    def __init__(self, model: nn.Module) -> None:
        self._base = copied(model)
        self._change([])

    @property
    def model(self) -> nn.Module:
        """The base with all edits. A new object after each change; in the mode (train or eval) of the base."""
        return self._model

    @property
    def names(self) -> list[str]:
        """Names of the edits, in the order in which they are applied."""
        return [entry.name for entry in self._entries]

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Name -> recipe as it is applied now: to the model that those before it give, with what it takes to undo it.

        Applied to the base in this order they give `model`; undone in reverse order, the base.
        """
        return dict(zip(self.names, self._recipes, strict=True))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __repr__(self) -> str:
        return f"Stack({self.names})"

    def push(self, name: str, edit: Edit | Recipe) -> None:
        """Add an edit on top of the others.

        Args:
            name: to call it by; not yet in the stack.
            edit: what `prune` or `unlearn` gave, or its recipe; made on the base model, or on `model` as it is now. It
                is copied. Which of the two is read off the shapes; where the shapes are the same, so are the rows.

        Raises:
            TypeError: edit is neither.
            ValueError: the name is taken or empty; the recipe was made on another model or is not complete; it sets
                whole tensors that an edit below has cut; nothing would be left of a tensor. The stack is then
                unchanged.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"Stack.push: name must be a string that is not empty, got {name!r}.")
        if name in self:
            raise ValueError(f"Stack.push: name must not be in the stack yet, got {name!r}, which is in {self.names}.")
        recipe = edit.recipe if isinstance(edit, Edit) else edit
        if not isinstance(recipe, Recipe):
            raise TypeError(
                f"Stack.push: edit must be a discedit.Edit or a discedit.Recipe, got {type(edit).__name__}."
            )
        what = f"Stack.push: recipe of {name!r}"
        known, before, after = recipe.architecture, _Rows(self._base), self._rows
        if known not in (before.shapes(), after.shapes()):
            shapes = (known, before.shapes(), after.shapes())
            odd = next(n for n in [*known, *shapes[1]] if known.get(n) not in [shape.get(n) for shape in shapes[1:]])
            found = [shape.get(odd, "none (absent)") for shape in shapes]
            raise ValueError(
                f"{what} must be made on the base model or on stack.model as it is now; its tensor {odd!r} had shape "
                f"{found[0]}, in the base it has {found[1]}, in stack.model {found[2]}."
            )
        model, rows = (self._model, after) if known == after.shapes() else (self._base, before)
        entry = _Entry(name, _without_undo(recipe), rows)
        entry.check(what, self._base)
        for operation in recipe.operations:
            if operation.kind == "attribute":
                check_attribute(what, model, operation, operation.before)
        self._change([*self._entries, entry])

    def remove(self, name: str) -> None:
        """Take an edit away, wherever it lies; the others stay, in their order.

        Raises:
            ValueError: there is no such edit, or one above it cannot be without it: it sets a whole tensor that this
                one cuts, adds values to rows of which this one cuts a part, or changes an attribute that cannot be told
                anew. The message names it, and the stack is unchanged.
        """
        if name not in self:
            raise ValueError(f"Stack.remove: name must be one of {self.names}, got {name!r}.")
        self._change([entry for entry in self._entries if entry.name != name], f" without {name!r}")

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write stack.json and the recipes as they were pushed, each as `Recipe.save` does; returns stack.json's path.

        The base is not saved, nor what was removed from it. A stack that was saved there before is replaced; files that
        do not belong to it are left alone.
        """
        target = Path(folder) / FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        old = _listed(target)
        taken = [int(path.stem) for path in target.parent.glob("*.json") if path.stem.isdecimal()]
        first = max(taken, default=-1) + 1  # never over files to which a stack.json points
        entries = []
        for number, entry in enumerate(self._entries, start=first):
            path = entry.recipe.save(target.parent / f"{number:03d}.json")
            entries.append({"name": entry.name, "file": path.name, "rows": entry.rows.missing()})
        header = {
            "kind": "stack",
            "version": files.VERSION,
            "architecture": architecture_of(self._base),
            "entries": entries,
        }
        files.write_atomically(target, (json.dumps(header, indent=1) + "\n").encode())
        for file in old:
            for path in (target.with_name(file), target.with_name(file).with_suffix(".values.safetensors")):
                path.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: nn.Module) -> Stack:
        """Read what `save` wrote.

        Args:
            folder: given to `save`.
            model: the base; with the weights of that time `model` is the same bit for bit.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: one is damaged, or the model has another architecture.
        """
        target = Path(folder) / FILE
        if not target.is_file():
            raise FileNotFoundError(f"stack file {str(target)!r} does not exist.")
        header, damaged = files.load_json(target, "stack"), f"{str(target)!r} is damaged"
        stack = cls(model)
        expected = files.field(header, "architecture", dict, target)
        check_architecture(model, expected, "Stack.load: model must have the architecture of the stack's base")
        entries: list[_Entry] = []
        for fields in files.field(header, "entries", list, target):
            if not isinstance(fields, dict):
                raise ValueError(f"{damaged}: an entry must be an object, got {fields!r}.")
            name = files.field(fields, "name", str, target)
            if not name or name in [entry.name for entry in entries]:
                raise ValueError(f"{damaged}: names must differ and not be empty, got {name!r}.")
            recipe = Recipe.load(target.with_name(Path(files.field(fields, "file", str, target)).name))
            rows = _Rows(stack._base)
            rows.drop(files.field(fields, "rows", dict, target), damaged)
            if rows.shapes() != recipe.architecture:
                raise ValueError(f"{damaged}: the rows of {name!r} are not those of its recipe.")
            entries.append(_Entry(name, _without_undo(recipe), rows))
            entries[-1].check(f"{damaged}: recipe of {name!r}", stack._base)
        stack._change(entries)
        return stack

    def _change(self, entries: list[_Entry], situation: str = "") -> None:
        """All or nothing."""
        model, rows, recipes = copied(self._base), _Rows(self._base), []
        for entry in entries:
            try:
                recipe = _Translation(entry, rows, model).recipe
            except _Untranslatable as error:
                raise ValueError(
                    f"Stack: edit {entry.name!r} cannot be as it is{situation or ' on top of the others'}: {error}. "
                    "Remove it first, and make it anew on stack.model."
                ) from error
            recipes.append(recipe.apply(model, inplace=True).recipe)
        self._entries, self._model, self._recipes, self._rows = entries, model, recipes, rows


class _Rows:
    """Which of the base's rows a model still has, along every axis of every tensor.

    A tensor that hangs in several places has several names and one set of rows.
    """

    def __init__(self, base: nn.Module) -> None:
        self.first = Slots(base).first
        self.sizes = architecture_of(base)
        self.left: dict[_Axis, tuple[int, ...]] = {}  # where some are gone: numbers in the base of what is there

    def copy(self) -> _Rows:
        other = copy.copy(self)
        other.left = dict(self.left)
        return other

    def of(self, name: str, dim: int) -> Sequence[int]:
        """Numbers in the base of what is there, in order."""
        return self.left.get((self.first[name], dim), range(self.sizes[name][dim]))

    def shapes(self) -> dict[str, list[int]]:
        return {name: [len(self.of(name, dim)) for dim in range(len(size))] for name, size in self.sizes.items()}

    def positions(self, name: str, dim: int, rows: Iterable[int]) -> tuple[int, ...]:
        """Where these rows are now, without those that are gone."""
        position = {row: i for i, row in enumerate(self.of(name, dim))}
        return tuple(position[row] for row in rows if row in position)

    def keep(self, operation: Operation) -> None:
        """What a keep operation leaves."""
        rows = self.of(operation.target, operation.dim)
        self.left[self.first[operation.target], operation.dim] = tuple(rows[i] for i in operation.index)

    def missing(self) -> dict[str, dict[str, list[int]]]:
        """Tensor -> dimension -> rows that are gone, for a file."""
        found: dict[str, dict[str, list[int]]] = {}
        for (name, dim), rows in self.left.items():
            found.setdefault(name, {})[str(dim)] = sorted(set(range(self.sizes[name][dim])) - set(rows))
        return found

    def drop(self, missing: Mapping[str, Any], damaged: str) -> None:
        """Leave out what a file says is gone."""
        for name, axes in missing.items():
            dims = {str(dim): (dim, size) for dim, size in enumerate(self.sizes.get(name, ()))}
            for key, gone in axes.items() if isinstance(axes, dict) else [("", None)]:
                dim, size = dims.get(key, (0, 0))
                if not isinstance(gone, list) or not all(type(row) is int and 0 <= row < size for row in gone):
                    raise ValueError(
                        f"{damaged}: rows of tensor {name!r}, dimension {key!r}, must be a list of indices below "
                        f"{size}, got {gone!r}."
                    )
                left = tuple(sorted(set(range(size)) - set(gone)))
                if not left:
                    raise ValueError(f"{damaged}: it leaves no row of tensor {name!r}.")
                self.left[self.first[name], dim] = left


@dataclass(frozen=True)
class _Entry:
    """An edit as it was pushed, and the rows of the model on which it was made."""

    name: str
    recipe: Recipe
    rows: _Rows

    def check(self, what: str, base: nn.Module) -> None:
        """Refuses a recipe that does not fit the model on which it says it was made."""
        recipe = self.recipe
        check_operations(what, recipe.operations, recipe.architecture, slots=Slots(base), tensors=recipe.tensors)


def _listed(path: Path) -> list[str]:
    """The recipe files of a stack that was saved before, if there is one."""
    if not path.is_file():
        return []
    try:
        entries = files.load_json(path, "stack")["entries"]
        return [Path(entry["file"]).name for entry in entries if str(entry["file"]).endswith(".json")]
    except (ValueError, KeyError, TypeError):
        return []  # not one of ours: nothing of it is deleted


def _without_undo(recipe: Recipe) -> Recipe:
    """A copy that shares nothing; what it replaced in the model on which it was made is of no use here."""
    tensors = {name: value for name, value in recipe.tensors.items() if name.startswith("set.")}
    return copy.deepcopy(replace(recipe, tensors=tensors))


class _Untranslatable(ValueError):
    """Why an edit has no meaning for another model than that on which it was made."""


class _Translation:
    """An edit in the numbers of the model to which it is applied now.

    Args:
        entry: the edit.
        now: rows of that model; becomes what the edit leaves of them.
        model: that model, unchanged.
    """

    def __init__(self, entry: _Entry, now: _Rows, model: nn.Module) -> None:
        self.now, self.model = now, model
        self.made = entry.rows.copy()  # rows of the model on which it was made, as far as it has come
        self.begin = (self.made.copy(), now.copy())
        self.operations: list[Operation] = []
        self.tensors: dict[str, Tensor] = {}
        architecture, old = architecture_of(model), entry.recipe
        for i, operation in enumerate(old.operations):
            if operation.kind == "keep":
                self._keep(operation)
            elif operation.kind != "attribute":
                self._write(operation, old.tensors.get(f"set.{i}"))
        for operation in old.operations:
            if operation.kind == "attribute":  # now that it is known what is left of each tensor
                self._attribute(operation)
        self.recipe = replace(
            old,
            settings=copy.deepcopy(old.settings),
            components={layer: self._components(layer, rows) for layer, rows in old.components.items()},
            architecture=architecture,
            operations=self.operations,
            tensors=self.tensors,
        )

    def _keep(self, operation: Operation) -> None:
        target, dim = operation.target, operation.dim
        lost = set(self.made.of(target, dim))
        self.made.keep(operation)
        lost -= set(self.made.of(target, dim))
        present = self.now.of(target, dim)
        index = tuple(i for i, row in enumerate(present) if row not in lost)
        if not index and present:
            raise _Untranslatable(f"nothing would be left of tensor {target!r} along dimension {dim}")
        if len(index) < len(present):
            self.operations.append(replace(operation, index=index))
            self.now.keep(self.operations[-1])

    def _write(self, operation: Operation, values: Tensor | None) -> None:
        target, dim = operation.target, operation.dim
        if operation.kind != "set":
            here = self.made.of(target, dim)
            rows = [here[i] for i in operation.index]
            operation = replace(operation, index=self.now.positions(target, dim, rows))
            if not operation.index:
                return
        if operation.kind in WITH_VALUES:
            assert values is not None
            have = [self.made.of(target, axis) for axis in range(len(self.made.sizes[target]))]
            if operation.kind == "add":
                have[dim] = rows
            self.tensors[f"set.{len(self.operations)}"] = self._values(operation, values, have)
        self.operations.append(operation)

    def _values(self, operation: Operation, values: Tensor, have: list[Sequence[int]]) -> Tensor:
        """A recipe's own values for the rows that are there; `have`: the rows that they are for, along each axis."""
        for dim, rows in enumerate(have):
            if values.shape[dim] != len(rows):
                continue  # one number for all
            present = set(self.now.of(operation.target, dim))
            is_own = operation.kind == "add" and dim == operation.dim  # other rows than these stay as they are
            if (operation.kind == "set" and set(rows) - present) or (not is_own and present - set(rows)):
                raise _Untranslatable(
                    f"it {operation.kind}s values of shape {list(values.shape)} for the whole of tensor "
                    f"{operation.target!r} along dimension {dim}, which has other rows there now"
                )
            chosen = [i for i, row in enumerate(rows) if row in present]
            values = values.index_select(dim, torch.tensor(chosen, device=values.device))
        return values

    def _attribute(self, operation: Operation) -> None:
        """A count follows the tensors that it counts."""
        found = attribute_of(module_of("Stack", self.model, operation), operation.name)
        value = operation.value
        if operation.name not in SWITCHES:
            before, after, here = (v if isinstance(v, list) else [v] for v in (operation.before, value, found))
            known = len(before) == len(after) == len(here)
            each = enumerate(zip(before, after, here, strict=True)) if known else ()
            counts = [self._count(operation, i, *numbers) for i, numbers in each]
            if not known or None in counts:
                raise _Untranslatable(
                    f"it changes attribute {operation.name!r} of module {operation.target!r} from {operation.before!r} "
                    f"to {value!r}, which is {found!r} now, and no tensor tells what it must become"
                )
            value = counts if isinstance(value, list) else counts[0]
        if value != found or operation.name in SWITCHES:
            self.operations.append(replace(operation, before=found, value=value))

    def _count(self, operation: Operation, entry: int, before: int, value: int, here: int) -> int | None:
        """What a number becomes: in proportion to the tensors that shrink in the same proportion in the recipe."""
        if before == value:
            return here
        place = operation.target
        while not (axes := self._in_proportion(place, before, value)):
            if not place or here == before:
                return value if here == before else None
            place = place.rpartition(".")[0]
        own = self._own_axis(operation, entry)
        results = set()
        for axis in [own] if own in axes else axes:
            size, left = len(self.begin[1].of(*axis)), len(self.now.of(*axis))
            results.add(here * left // size if size and here * left % size == 0 else None)
        return results.pop() if len(results) == 1 else None

    def _in_proportion(self, place: str, before: int, value: int) -> list[_Axis]:
        """The axes of tensors in a module that the recipe cuts from `before` to `value`, or in the same proportion."""
        inside = {first for name, first in self.made.first.items() if not place or name.startswith(f"{place}.")}
        sizes = {axis: len(self.begin[0].of(*axis)) for axis in self.made.left if axis[0] in inside}
        return [
            axis
            for axis, size in sizes.items()
            if len(self.made.left[axis]) < size and before * len(self.made.left[axis]) == value * size
        ]

    def _own_axis(self, operation: Operation, entry: int) -> _Axis | None:
        """The axis of its module's weight that an attribute of torch's own layers counts."""
        weight = f"{operation.target}.weight"
        dim = entry if operation.name == "normalized_shape" else AXES.get(operation.name)
        if dim is None or weight not in self.now.first:
            return None
        return self.now.first[weight], 1 - dim if self._is_transposed(operation.target) else dim

    def _is_transposed(self, layer: str) -> bool:
        module = self.model.get_submodule(layer)
        return isinstance(module, _ConvNd) and module.transposed

    def _components(self, layer: str, rows: list[int]) -> list[int]:
        weight = f"{layer}.weight"
        made, now = self.begin
        if not made.sizes.get(weight):
            return list(rows)
        dim = int(self._is_transposed(layer))
        here = made.of(weight, dim)
        return list(now.positions(weight, dim, [here[row] for row in rows if row < len(here)]))
