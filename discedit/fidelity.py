"""Which channels of a layer are enough for what reads them: the public names of `moments` and `selection` for it."""

from discedit.moments.second_moments import InputMoments, OutputMoments, SecondMoments, collect_second_moments
from discedit.selection.fidelity import compensation, greedy, singleton_fidelity, subset_fidelity, top_k

__all__ = [
    "InputMoments",
    "OutputMoments",
    "SecondMoments",
    "collect_second_moments",
    "compensation",
    "greedy",
    "singleton_fidelity",
    "subset_fidelity",
    "top_k",
]
