"""How sure a score is: the public names of `scoring` for it."""

from discedit.scoring.uncertainty import jackknife, separation, shrink, standard_error

__all__ = ["jackknife", "separation", "shrink", "standard_error"]
