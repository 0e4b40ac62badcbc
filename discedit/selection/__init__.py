"""What goes: importances, budgets, rankings."""

from discedit.selection.budget import Budget, GlobalRatio, MaxLatency, MaxMacs, MaxParameters, Ratio, Threshold
from discedit.selection.divergence import MeasureDivergence
from discedit.selection.importance import Random, importances
from discedit.selection.ranking import AboveDeviations, Limit, MaxDamage, TopFraction, TopFractionOfEach, TopK

__all__ = [
    "AboveDeviations",
    "Budget",
    "GlobalRatio",
    "Limit",
    "MaxDamage",
    "MaxLatency",
    "MaxMacs",
    "MaxParameters",
    "MeasureDivergence",
    "Random",
    "Ratio",
    "Threshold",
    "TopFraction",
    "TopFractionOfEach",
    "TopK",
    "importances",
]
