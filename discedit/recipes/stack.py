"""`Stack`: several edits on one model, added and taken away in any order, always exact."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from discedit.common import files, validation
from discedit.recipes.recipe import Edit, Recipe, architecture_of, check_architecture, copied

FILE = "stack.json"


class Stack:
    """Edits of one model that can be added and taken away in any order.

    After each change `model` is made anew: a copy of the base, to which the recipes that are there are applied in the
    order in which they were pushed. So what is left after removals is bit for bit what pushing only that would give.

    An edit that removes components can go once the edits above it have gone, which were made for the smaller model.
    Values that a recipe sets whole, as repairs do, stay fitted to the model on which the edit was made, and write over
    what lies below them: make repairs on ``stack.model``, and anew when that changes. Training of ``stack.model`` by
    others is gone after the next change.

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
        validation.module("Stack", model)
        self._base = copied(model)
        self._change({})

    @property
    def model(self) -> nn.Module:
        """The base with all edits. A new object after each change; in the mode (train or eval) of the base."""
        return self._model

    @property
    def names(self) -> list[str]:
        """Names of the edits, in the order in which they are applied."""
        return list(self._pushed)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Name -> recipe, with what it takes to undo it here.

        Applied to the base in this order they give `model`; undone in reverse order, the base.
        """
        return dict(self._applied)

    def __len__(self) -> int:
        return len(self._pushed)

    def __contains__(self, name: object) -> bool:
        return name in self._pushed

    def __repr__(self) -> str:
        return f"Stack({self.names})"

    def push(self, name: str, edit: Edit | Recipe) -> None:
        """Add an edit on top of the others.

        Args:
            name: to call it by; not yet in the stack.
            edit: what `prune` or `unlearn` gave, or its recipe, which is copied; made on `model`, or on another model
                of its shapes.

        Raises:
            TypeError: edit is neither.
            ValueError: the name is taken or empty; the recipe was made for other shapes or is not complete. The stack
                is then unchanged.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"Stack.push: name must be a string that is not empty, got {name!r}.")
        if name in self:
            raise ValueError(f"Stack.push: name must not be in the stack yet, got {name!r}, which is in {self.names}.")
        validation.instance("Stack.push", "edit", edit, (Edit, Recipe), "a discedit.Edit or a discedit.Recipe")
        recipe = edit.recipe if isinstance(edit, Edit) else edit
        self._change({**self._pushed, name: copy.deepcopy(_without_undo(recipe))})

    def remove(self, name: str) -> None:
        """Take an edit away, wherever it lies; the others stay, in their order.

        Raises:
            ValueError: there is no such edit, or it removed components and one above it was made for the smaller
                model. The message names that one, and the stack is unchanged.
        """
        if name not in self:
            raise ValueError(f"Stack.remove: name must be one of {self.names}, got {name!r}.")
        self._change({other: recipe for other, recipe in self._pushed.items() if other != name}, without=name)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write stack.json and the recipes, each as `Recipe.save` does; returns stack.json's path.

        The base is not saved, nor what was removed from it. A stack that was saved there before is replaced; files that
        do not belong to it are left alone.
        """
        target = Path(folder) / FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        old = _recipe_files(target)
        taken = [int(path.stem) for path in target.parent.glob("*.json") if path.stem.isdecimal()]
        first = max(taken, default=-1) + 1  # never over files to which a stack.json points
        entries = []
        for number, (name, recipe) in enumerate(self._pushed.items(), start=first):
            path = recipe.save(target.parent / f"{number:03d}.json")
            entries.append({"name": name, "file": path.name})
        shapes = architecture_of(self._base)
        header = {"kind": "stack", "version": files.VERSION, "architecture": shapes, "entries": entries}
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
        expected = files.field(header, "architecture", dict, target)
        check_architecture(
            architecture_of(model), expected, "Stack.load: model must have the architecture of the stack's base"
        )
        recipes: dict[str, Recipe] = {}
        for fields in files.field(header, "entries", list, target):
            if not isinstance(fields, dict):
                raise ValueError(f"{damaged}: an entry must be an object, got {fields!r}.")
            name = files.field(fields, "name", str, target)
            if not name or name in recipes:
                raise ValueError(f"{damaged}: names must differ and not be empty, got {name!r}.")
            file = Path(files.field(fields, "file", str, target)).name
            recipes[name] = _without_undo(Recipe.load(target.with_name(file)))
        stack = cls(model)
        stack._change(recipes)
        return stack

    def _change(self, recipes: dict[str, Recipe], without: str = "") -> None:
        """All or nothing."""
        model, applied = copied(self._base), {}
        for name, recipe in recipes.items():
            try:
                applied[name] = recipe.apply(model, inplace=True).recipe
            except ValueError as error:
                where = f"without {without!r}" if without else "on top of the others"
                advice = "Remove it first, and make it" if without else "Make it"
                raise ValueError(
                    f"Stack: edit {name!r} cannot be {where}: {error} {advice} anew on stack.model."
                ) from error
        self._model, self._pushed, self._applied = model, recipes, applied


def _recipe_files(path: Path) -> list[str]:
    """Of a stack that was saved before, if there is one."""
    if not path.is_file():
        return []
    try:
        entries = files.load_json(path, "stack")["entries"]
        return [Path(entry["file"]).name for entry in entries if str(entry["file"]).endswith(".json")]
    except (ValueError, KeyError, TypeError):
        return []  # not one of ours: nothing of it is deleted


def _without_undo(recipe: Recipe) -> Recipe:
    """What it replaced in the model on which it was made is of no use for another one."""
    tensors = {name: value for name, value in recipe.tensors.items() if name.startswith("set.")}
    return replace(recipe, tensors=tensors)
