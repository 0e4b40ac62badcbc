"""`prune` and `unlearn`: a selection, made as a recipe, and repaired."""

from discedit.editing.ablation import AblateComponents, LeastSquares, ModHiFiU
from discedit.editing.concept_erasure import EraseDirections

__all__ = ["AblateComponents", "EraseDirections", "LeastSquares", "ModHiFiU"]
