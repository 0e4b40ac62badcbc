"""What an edit did beside its operations, in its recipe."""

from __future__ import annotations

from torch import Tensor

from discedit.recipes.operations import Operation
from discedit.recipes.recipe import Edit


def record(edit: Edit, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Adds to the recipe that these tensors were replaced."""
    for name, old in before.items():
        index = len(edit.recipe.operations)
        edit.recipe.tensors[f"set.{index}"] = after[name].detach().cpu().clone()
        edit.recipe.tensors[f"undo.{index}"] = old.cpu()
        edit.recipe.operations.append(Operation("set", name))
