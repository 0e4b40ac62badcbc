"""An edit as data: recipes, and stacks of them."""

from discedit.recipes.operations import Operation
from discedit.recipes.recipe import Edit, Recipe, architecture_of
from discedit.recipes.stack import Stack

__all__ = ["Edit", "Operation", "Recipe", "Stack", "architecture_of"]
