"""One pass over the data: moments per class and component."""

from discedit.moments.collect import collect_blocks, collect_moments
from discedit.moments.moments import Moments, Scale, Statistic

__all__ = ["Moments", "Scale", "Statistic", "collect_blocks", "collect_moments"]
