"""`Stack`: several edits on one model, added and taken away in any order, always exact."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit.common import files
from discedit.recipes.optimizers import watch
from discedit.recipes.recipe import (
    FORWARD,
    KINDS,
    WITH_VALUES,
    Edit,
    Operation,
    Recipe,
    architecture_of,
    attribute_of,
    check_architecture,
    copied,
    named_tensors,
)

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

    The stack holds a copy of the model as it was given, the base, and a list of recipes. After each change `model` is
    made anew: a copy of the base to which the recipes that are there have been applied, in the order in which they were
    pushed. Nothing is ever computed backwards. So after edits were removed, the model is bit for bit what pushing only
    the others would have given, also where edits write over each other's places.

    Rows and columns are known by their numbers in the base. A recipe that was made on another model of the stack is
    translated: one made on a pruned model keeps meaning the same rows when the pruning below it is removed (rows that
    come back are left as they were), and one made on the base and pushed onto a pruned model leaves out the rows that
    are gone (and has them back when the pruning is removed).

    Three things to know:

    - Values that a recipe sets whole, as repairs do, stay as they are. They were right for the model on which the edit
      was made: when an edit below it is removed they are no longer fitted to what is left, and a repair that was made
      on the base and pushed later writes over what edits below it wrote into the same tensors, zeros of an unlearning
      among them. Make repairs on ``stack.model``, and make them anew when what lies below them changes.
    - Where such values no longer have the tensor's shape, because another edit cuts it or no longer does, the change is
      refused and the stack stays as it was.
    - What is done to ``stack.model`` by others, such as training, is not part of the stack and gone after the next
      change. An optimizer over an earlier ``stack.model`` holds parameters that the present one does not have: build a
      new one.

    Args:
        model: the base. It is copied: neither is it ever changed, nor do later changes to it reach the stack.

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
        self._entries: list[_Entry] = []
        self._model, self._recipes = _built(self._base, [])
        watch(list(model.parameters()), model, self._model, "edited")

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
        rows = self._made_on(name, recipe)
        entry = _Entry(name, _without_undo(recipe), rows)
        _check_operations(entry)
        self._change([*self._entries, entry])

    def remove(self, name: str) -> None:
        """Take an edit away, wherever it lies; the others stay, in their order.

        Raises:
            ValueError: there is no such edit, or one above it cannot be without it: it sets a whole tensor that this
                one cuts, adds values to rows of which this one cuts a part, or changes an attribute that cannot be told
                anew. The message names both, and the stack is unchanged.
        """
        if name not in self:
            raise ValueError(f"Stack.remove: name must be one of {self.names}, got {name!r}.")
        self._change([entry for entry in self._entries if entry.name != name], gone=name)

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
        header = files.load_json(target, "stack")
        stack = cls(model)
        expected = files.field(header, "architecture", dict, target)
        check_architecture(model, expected, "Stack.load: model must have the architecture of the stack's base")
        entries: list[_Entry] = []
        for fields in files.field(header, "entries", list, target):
            if not isinstance(fields, dict):
                raise ValueError(f"{str(target)!r} is damaged: an entry must be an object, got {fields!r}.")
            name = files.field(fields, "name", str, target)
            if not name or name in [entry.name for entry in entries]:
                raise ValueError(f"{str(target)!r} is damaged: names must differ and not be empty, got {name!r}.")
            recipe = Recipe.load(target.with_name(Path(files.field(fields, "file", str, target)).name))
            rows = _Rows(stack._base)
            rows.cut(files.field(fields, "rows", dict, target), target)
            if rows.shapes() != recipe.architecture:
                raise ValueError(f"{str(target)!r} is damaged: the rows of {name!r} are not those of its recipe.")
            entries.append(_Entry(name, _without_undo(recipe), rows))
            _check_operations(entries[-1])
        stack._change(entries)
        return stack

    def _made_on(self, name: str, recipe: Recipe) -> _Rows:
        """The rows of the model on which a recipe was made."""
        base, now = _Rows(self._base), _Rows(self._base)
        for entry, applied in zip(self._entries, self._recipes, strict=True):
            for operation in applied.operations:
                if operation.kind == "keep":
                    now.keep(operation, entry.name)
        known, before, after = recipe.architecture, base.shapes(), now.shapes()
        if known == after:
            model, rows = self._model, now
        elif known == before:
            model, rows = self._base, base
        else:
            odd = [n for n in dict.fromkeys([*known, *before]) if known.get(n) != before.get(n)]
            odd = [n for n in odd if known.get(n) != after.get(n)] or odd
            shapes = [found.get(odd[0], "none (absent)") for found in (known, before, after)]
            raise ValueError(
                f"Stack.push: edit must be made on the base model or on stack.model as it is now; for {name!r} tensor "
                f"{odd[0]!r} had shape {shapes[0]}, in the base it has {shapes[1]}, in stack.model {shapes[2]}."
            )
        for operation in recipe.operations:
            if operation.kind == "attribute" and (found := _attribute(model, operation)) != operation.before:
                raise ValueError(
                    f"Stack.push: edit must be made on the base model or on stack.model as it is now; for {name!r} "
                    f"attribute {operation.name!r} of module {operation.target!r} was {operation.before!r}, it is "
                    f"{found!r}."
                )
        return rows

    def _change(self, entries: list[_Entry], gone: str | None = None) -> None:
        """All or nothing."""
        model, recipes = _built(self._base, entries, gone)
        watch(list(self._model.parameters()), self._model, model, "edited")
        self._entries, self._model, self._recipes = entries, model, recipes


class _Rows:
    """Which of the base's rows a model still has, along every axis of every tensor.

    A tensor that hangs in several places has several names and one set of rows.
    """

    def __init__(self, base: nn.Module) -> None:
        self.first: dict[str, str] = {}  # name -> the first of the same tensor's names
        self.names: dict[str, list[str]] = {}  # the first -> all of them
        self.sizes: dict[str, tuple[int, ...]] = {}
        known: dict[int, str] = {}
        for name, tensor in named_tensors(base):
            self.first[name] = known.setdefault(id(tensor), name)
            self.names.setdefault(self.first[name], []).append(name)
            self.sizes[name] = tuple(tensor.shape)
        self.left: dict[_Axis, tuple[int, ...]] = {}  # where some are gone
        self.taken: dict[_Axis, dict[int, str]] = {}  # row -> the edit that took it

    def copy(self) -> _Rows:
        other = copy.copy(self)
        other.left, other.taken = dict(self.left), {axis: dict(rows) for axis, rows in self.taken.items()}
        return other

    def axis(self, name: str, dim: int) -> _Axis:
        return self.first[name], dim

    def of(self, name: str, dim: int) -> Sequence[int]:
        """Numbers in the base of what is there, in order."""
        left = self.left.get(self.axis(name, dim))
        return range(self.sizes[name][dim]) if left is None else left

    def shape(self, name: str) -> list[int]:
        return [len(self.of(name, dim)) for dim in range(len(self.sizes[name]))]

    def shapes(self) -> dict[str, list[int]]:
        return {name: self.shape(name) for name in self.sizes}

    def places(self, name: str, dim: int, rows: Iterable[int]) -> list[int]:
        """Where these rows are now, without those that are gone."""
        place = {row: i for i, row in enumerate(self.of(name, dim))}
        return [place[row] for row in rows if row in place]

    def keep(self, operation: Operation, by: str) -> None:
        """What a keep operation leaves."""
        rows = self.of(operation.target, operation.dim)
        axis = self.axis(operation.target, operation.dim)
        self.left[axis] = tuple(rows[i] for i in operation.index)
        self.taken.setdefault(axis, {}).update(dict.fromkeys(set(rows) - set(self.left[axis]), by))

    def missing(self) -> dict[str, dict[str, list[int]]]:
        """Tensor -> dimension -> rows that are gone, for a file."""
        found: dict[str, dict[str, list[int]]] = {}
        for (name, dim), rows in self.left.items():
            found.setdefault(name, {})[str(dim)] = sorted(set(range(self.sizes[name][dim])) - set(rows))
        return found

    def cut(self, missing: Mapping[str, Any], path: Path) -> None:
        """What a file says is gone."""
        for name, axes in missing.items():
            for dim, gone in axes.items() if isinstance(axes, dict) else [("", None)]:
                size = self.sizes[name][int(dim)] if name in self.sizes and dim in _numbers(self.sizes[name]) else 0
                if not isinstance(gone, list) or not all(type(row) is int and 0 <= row < size for row in gone):
                    raise ValueError(
                        f"{str(path)!r} is damaged: rows of tensor {name!r}, dimension {dim!r}, must be a list of "
                        f"indices below {size}, got {gone!r}."
                    )
                left = tuple(sorted(set(range(size)) - set(gone)))
                if not left:
                    raise ValueError(f"{str(path)!r} is damaged: it leaves no row of tensor {name!r}.")
                self.left[self.axis(name, int(dim))] = left


@dataclass(frozen=True)
class _Entry:
    """An edit as it was pushed, and the rows of the model on which it was made."""

    name: str
    recipe: Recipe
    rows: _Rows


def _numbers(shape: Sequence[int]) -> list[str]:
    return [str(dim) for dim in range(len(shape))]


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
    return replace(
        recipe,
        settings=copy.deepcopy(recipe.settings),
        components={layer: list(rows) for layer, rows in recipe.components.items()},
        architecture={name: list(shape) for name, shape in recipe.architecture.items()},
        operations=list(recipe.operations),
        tensors={name: value.detach().clone() for name, value in recipe.tensors.items() if name.startswith("set.")},
    )


def _check_operations(entry: _Entry) -> None:
    """Refuses a recipe that does not fit the model on which it says it was made."""
    rows = entry.rows.copy()
    for i, operation in enumerate(entry.recipe.operations):
        what = f"Stack: recipe of {entry.name!r}: operation {i}"
        if operation.kind not in KINDS:
            raise ValueError(f"{what} must be one of {', '.join(KINDS)}, got {operation.kind!r}.")
        if operation.kind == "attribute":
            continue
        if operation.target not in rows.sizes:
            raise ValueError(f"{what} must name a tensor of the model, got {operation.target!r}.")
        shape = rows.shape(operation.target)
        expected = list(shape)
        if operation.kind != "set":
            if not 0 <= operation.dim < len(shape):
                raise ValueError(
                    f"{what} must have a dim of {operation.target!r} of shape {shape}, is {operation.dim}."
                )
            size, index = shape[operation.dim], operation.index
            if list(index) != sorted(set(index)) or not all(type(row) is int and 0 <= row < size for row in index):
                raise ValueError(f"{what} must have increasing indices in 0..{size - 1}, got {list(index)}.")
            expected[operation.dim] = len(index)
        if operation.kind == "keep":
            if size and not operation.index:
                raise ValueError(f"{what} must leave something of {operation.target!r}, it keeps no index.")
            rows.keep(operation, entry.name)
        if operation.kind in WITH_VALUES:
            values = entry.recipe.tensors.get(f"set.{i}")
            found = "none" if values is None else f"shape {list(values.shape)}"
            if values is None or not _fits(values, expected, exactly=operation.kind == "set"):
                raise ValueError(
                    f"{what} must have values of shape {expected} for {operation.target!r}, found {found}."
                )


def _fits(values: Tensor, shape: list[int], exactly: bool) -> bool:
    if exactly or values.ndim > len(shape):
        return list(values.shape) == shape
    return all(size in (1, asked) for size, asked in zip(reversed(values.shape), reversed(shape), strict=False))


def _built(base: nn.Module, entries: list[_Entry], gone: str | None = None) -> tuple[nn.Module, list[Recipe]]:
    """A new model with these edits, and the recipes that made it."""
    model = copied(base)
    now = _Rows(base)
    recipes = []
    for entry in entries:
        recipe = _Translation(entry, now, model, gone).recipe()
        recipes.append(recipe.apply(model, inplace=True).recipe)
    return model, recipes


class _Translation:
    """An edit in the numbers of the model to which it is applied now.

    Args:
        entry: the edit.
        now: rows of that model; becomes what the edit leaves of them.
        model: that model, unchanged.
        gone: the edit that has just been removed from below, if any.
    """

    def __init__(self, entry: _Entry, now: _Rows, model: nn.Module, gone: str | None) -> None:
        self.entry, self.now, self.model, self.gone = entry, now, model, gone
        self.made = entry.rows.copy()
        self.begin = (self.made.copy(), now.copy())
        self.operations: list[Operation] = []
        self.tensors: dict[str, Tensor] = {}

    def recipe(self) -> Recipe:
        old = self.entry.recipe
        architecture = architecture_of(self.model)
        for i, operation in enumerate(old.operations):
            if operation.kind == "keep":
                self._keep(operation)
            elif operation.kind == "set":
                self._set(operation, old.tensors[f"set.{i}"])
            elif operation.kind in ("fill", "scale", "add"):
                self._rows(operation, old.tensors.get(f"set.{i}"))
        attributes = [operation for operation in old.operations if operation.kind == "attribute"]
        for operation in attributes:  # when it is known what is left of each tensor
            self._attribute(operation)
        return Recipe(
            edit=old.edit,
            settings=copy.deepcopy(old.settings),
            components={layer: self._components(layer, rows) for layer, rows in old.components.items()},
            architecture=architecture,
            operations=self.operations,
            tensors=self.tensors,
        )

    def _keep(self, operation: Operation) -> None:
        target, dim = operation.target, operation.dim
        lost = set(self.made.of(target, dim))
        self.made.keep(operation, self.entry.name)
        lost -= set(self.made.of(target, dim))
        present = self.now.of(target, dim)
        index = tuple(i for i, row in enumerate(present) if row not in lost)
        if not index and present:
            others = self._takers((target, dim), set(self.made.of(target, dim)))
            raise ValueError(
                f"Stack: edit {self.entry.name!r} cannot go on top of {others}: nothing would be left of tensor "
                f"{target!r} along dimension {dim}, of which {others} took the rest. Make it on stack.model."
            )
        if len(index) < len(present):
            translated = replace(operation, index=index)
            self.operations.append(translated)
            self.now.keep(translated, self.entry.name)

    def _rows(self, operation: Operation, values: Tensor | None) -> None:
        target, dim = operation.target, operation.dim
        here = self.made.of(target, dim)
        rows = [here[i] for i in operation.index]
        index = self.now.places(target, dim, rows)
        if not index:
            return
        if operation.kind == "add" and values is not None:
            self.tensors[f"set.{len(self.operations)}"] = self._added(operation, values, rows)
        self.operations.append(replace(operation, index=tuple(index)))

    def _added(self, operation: Operation, values: Tensor, rows: list[int]) -> Tensor:
        """The values of an addition for what is there; the same for all where they are one number along an axis."""
        target = operation.target
        expected = self.made.shape(target)
        expected[operation.dim] = len(rows)
        values = values.reshape((1,) * (len(expected) - values.ndim) + tuple(values.shape))
        for dim, size in enumerate(expected):
            if values.shape[dim] != size:
                continue
            have = rows if dim == operation.dim else self.made.of(target, dim)
            present = set(self.now.of(target, dim))
            if dim != operation.dim and present - set(have):
                self._refuse_back(
                    f"adds to rows of tensor {target!r} values for {len(have)} of the {len(present)} entries that "
                    f"dimension {dim} then has"
                )
            chosen = [i for i, row in enumerate(have) if row in present]
            if len(chosen) < len(have):
                values = values.index_select(dim, torch.tensor(chosen, device=values.device))
        return values

    def _set(self, operation: Operation, values: Tensor) -> None:
        target = operation.target
        for dim in range(values.ndim):
            made, present = set(self.made.of(target, dim)), set(self.now.of(target, dim))
            if made - present:
                others = self._takers((target, dim), made - present)
                raise ValueError(
                    f"Stack: edit {self.entry.name!r} cannot go on top of {others}: it sets the whole tensor "
                    f"{target!r} to values of shape {list(values.shape)}, of which {others} left "
                    f"{self.now.shape(target)}. Make it on stack.model."
                )
            if present - made:
                self._refuse_back(
                    f"sets the whole tensor {target!r} to values of shape {list(values.shape)}, and the tensor then "
                    f"has shape {self.now.shape(target)}"
                )
        self.tensors[f"set.{len(self.operations)}"] = values.clone()
        self.operations.append(operation)

    def _attribute(self, operation: Operation) -> None:
        """A count follows the tensors that it counts."""
        found = _attribute(self.model, operation)
        if operation.name in SWITCHES:
            self.operations.append(replace(operation, before=found))
            return
        befores, values, present = (_entries(part) for part in (operation.before, operation.value, found))
        known = len(befores) == len(values) == len(present)
        new: list[int] = []
        for i, (before, value, here) in enumerate(zip(befores, values, present, strict=True) if known else ()):
            told = here if before == value else self._count(operation, i, before, value, here)
            if told is None:
                known = False
                break
            new.append(told)
        if not known:
            why = (
                f"changes attribute {operation.name!r} of module {operation.target!r} from {operation.before!r} to "
                f"{operation.value!r}, which is {found!r} then, and no tensor tells what it must become"
            )
            if self.gone is not None:
                self._refuse_back(why)
            others = _listing(self.now.taken[axis][row] for axis in self.now.taken for row in self.now.taken[axis])
            raise ValueError(
                f"Stack: edit {self.entry.name!r} cannot go on top of {others}: it {why}. Make it on stack.model."
            )
        if new != present:
            value = new if isinstance(operation.before, list) else new[0]
            self.operations.append(replace(operation, before=found, value=value))

    def _count(self, operation: Operation, entry: int, before: int, value: int, here: int) -> int | None:
        """What a number becomes: in proportion to the tensors that shrink in the same proportion in the recipe."""
        place = operation.target
        while True:
            axes = self._in_proportion(place, before, value)
            if axes:
                break
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
        found = []
        for (first, dim), rows in self.made.left.items():
            if place and not any(name.startswith(f"{place}.") for name in self.made.names[first]):
                continue
            size, left = len(self.begin[0].of(first, dim)), len(rows)
            if left < size and before * left == value * size:
                found.append((first, dim))
        return found

    def _own_axis(self, operation: Operation, entry: int) -> _Axis | None:
        """The axis of its module's weight that an attribute of torch's own layers counts."""
        weight = f"{operation.target}.weight"
        dim = entry if operation.name == "normalized_shape" else AXES.get(operation.name)
        if dim is None or weight not in self.now.first:
            return None
        module = self.model.get_submodule(operation.target)
        if isinstance(module, _ConvNd) and module.transposed:
            dim = 1 - dim
        return self.now.axis(weight, dim)

    def _components(self, layer: str, rows: list[int]) -> list[int]:
        weight = f"{layer}.weight"
        made, now = self.begin
        if weight not in made.sizes or not made.sizes[weight]:
            return list(rows)
        module = self.model.get_submodule(layer)
        dim = 1 if isinstance(module, _ConvNd) and module.transposed else 0
        here = made.of(weight, dim)
        return now.places(weight, dim, [here[row] for row in rows if row < len(here)])

    def _takers(self, axis: _Axis, rows: set[int]) -> str:
        """The edits that took rows of which this one speaks."""
        taken = self.now.taken.get(self.now.axis(*axis), {})
        return _listing(taken[row] for row in sorted(rows) if row in taken)

    def _refuse_back(self, why: str) -> NoReturn:
        below = "an edit that is no longer there" if self.gone is None else repr(self.gone)
        raise ValueError(
            f"Stack: edit {below} cannot be removed from under {self.entry.name!r}: {self.entry.name!r} {why}. Remove "
            f"{self.entry.name!r} first, and make it anew on what is left."
        )


def _listing(names: Iterable[str]) -> str:
    return " and ".join(repr(name) for name in dict.fromkeys(names)) or "the others"


def _entries(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _attribute(model: nn.Module, operation: Operation) -> Any:
    """What a module's attribute is now; a list for a tuple, as in recipes."""
    try:
        module = model.get_submodule(operation.target)
    except AttributeError as error:
        raise ValueError(f"Stack: a recipe changes module {operation.target!r}, which the model lacks.") from error
    return attribute_of(module, operation.name)
