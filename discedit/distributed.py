"""Data for several processes: the public name of `moments` for it."""

from discedit.moments.distributed import ShardSampler

__all__ = ["ShardSampler"]
