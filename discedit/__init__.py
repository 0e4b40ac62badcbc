"""Find the components of a trained network that tell classes apart, and prune or unlearn with them.

Forward passes only: no gradients, no loss, no training set.

    moments = discedit.collect_moments(model, loader, num_classes=10)
    scores = discedit.score(moments)
    smaller = discedit.prune(model, scores, ratio=0.3, example_inputs=x, data=loader).model
    forgetful = discedit.unlearn(model, scores, classes=[3]).model
"""

from importlib.metadata import version as _version

from discedit import huggingface, ops, presets, uncertainty
from discedit._importance import importances
from discedit.collect import collect_blocks, collect_moments
from discedit.evaluate import Evaluation, evaluate
from discedit.moments import Moments
from discedit.presets import preset
from discedit.prune import prune
from discedit.recipe import Edit, Recipe
from discedit.report import report
from discedit.scores import Scores, score
from discedit.stack import Stack
from discedit.unlearn import unlearn

__version__ = _version("discedit")
__all__ = [
    "Edit",
    "Evaluation",
    "Moments",
    "Recipe",
    "Scores",
    "Stack",
    "collect_blocks",
    "collect_moments",
    "evaluate",
    "huggingface",
    "importances",
    "ops",
    "preset",
    "presets",
    "prune",
    "report",
    "score",
    "uncertainty",
    "unlearn",
]
