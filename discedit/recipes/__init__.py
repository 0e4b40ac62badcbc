"""An edit as data: recipes, and stacks of them."""

from discedit.recipes.recipe import Edit, Operation, Recipe, architecture_of
from discedit.recipes.stack import Stack

__all__ = ["Edit", "Operation", "Recipe", "Stack", "architecture_of"]
