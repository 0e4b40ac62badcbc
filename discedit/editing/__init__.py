"""`prune` and `unlearn`: a selection, made as a recipe, and repaired."""
