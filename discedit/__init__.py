"""Find the components of a trained network that tell classes apart, and prune or unlearn with them.

Forward passes only: no gradients, no loss, no training set.

    moments = discedit.collect_moments(model, loader, num_classes=10)
    scores = discedit.score(moments)
    smaller = discedit.prune(model, scores, ratio=0.3, example_inputs=x, data=loader).model
    forgetful = discedit.unlearn(model, scores, classes=[3]).model
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from types import ModuleType as _Module

from discedit import fidelity, ops, presets, uncertainty
from discedit.editing import AblateComponents, EraseDirections, LeastSquares, ModHiFiU
from discedit.editing.prune import iterative_prune, prune
from discedit.editing.repair_pruned import repair_pruned
from discedit.editing.specialise import specialise
from discedit.editing.unlearn import unlearn
from discedit.evaluation.class_damage import class_damage
from discedit.evaluation.evaluate import Evaluation, evaluate
from discedit.moments.collect import collect_blocks, collect_moments
from discedit.moments.moments import Moments
from discedit.presets import preset
from discedit.recipes.damage import ClassDamage
from discedit.recipes.divergences import DivergenceTable
from discedit.recipes.latencies import LatencyTable
from discedit.recipes.recipe import Edit, Recipe
from discedit.recipes.stack import Stack
from discedit.reporting.report import report
from discedit.scoring.scores import Scores, score
from discedit.selection import (
    AboveDeviations,
    GlobalRatio,
    MaxDamage,
    MaxLatency,
    MaxMacs,
    MaxParameters,
    MeasureDivergence,
    Random,
    Ratio,
    Threshold,
    TopFraction,
    TopFractionOfEach,
    TopK,
    importances,
)

__version__ = _version("discedit")
__all__ = [
    "AblateComponents",
    "AboveDeviations",
    "ClassDamage",
    "DivergenceTable",
    "Edit",
    "EraseDirections",
    "Evaluation",
    "GlobalRatio",
    "LatencyTable",
    "LeastSquares",
    "MaxDamage",
    "MaxLatency",
    "MaxMacs",
    "MaxParameters",
    "MeasureDivergence",
    "ModHiFiU",
    "Moments",
    "Random",
    "Ratio",
    "Recipe",
    "Scores",
    "Stack",
    "Threshold",
    "TopFraction",
    "TopFractionOfEach",
    "TopK",
    "class_damage",
    "collect_blocks",
    "collect_moments",
    "evaluate",
    "fidelity",
    "huggingface",
    "importances",
    "iterative_prune",
    "ops",
    "preset",
    "presets",
    "prune",
    "repair_pruned",
    "report",
    "score",
    "specialise",
    "uncertainty",
    "unlearn",
]

_ELSEWHERE = {"huggingface": "discedit.huggingface", "reference": "discedit.backends.reference"}


def __getattr__(name: str) -> _Module:
    """Modules that most programs never need, imported when they are asked for."""
    if name in _ELSEWHERE:
        return _import_module(_ELSEWHERE[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
