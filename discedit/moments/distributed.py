"""Data for several processes, every sample once."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from discedit.common import validation


class ShardSampler(Sampler[int]):
    """One process's share of a dataset: of blocks of samples, the blocks rank, rank + replicas, rank + 2 replicas, ...

    Every sample is in exactly one share. `torch.utils.data.DistributedSampler` makes shares of equal size: it repeats
    samples, or drops some.

    Args:
        dataset: anything with a length.
        rank, replicas: this process and their number; by default those of torch.distributed, where it is initialised,
            otherwise 0 and 1.
        block: samples that stay together, in their order. With the batch size, all processes together run the very
            batches that one process would run, so that their features are the same bits.

    Raises:
        TypeError: dataset has no length.
        ValueError: rank or replicas are no integers with 0 <= rank < replicas, or block is none of at least 1.

    >>> [list(ShardSampler(range(7), rank=rank, replicas=3)) for rank in range(3)]
    [[0, 3, 6], [1, 4], [2, 5]]
    >>> [list(ShardSampler(range(7), rank=rank, replicas=2, block=2)) for rank in range(2)]
    [[0, 1, 4, 5], [2, 3, 6]]
    """

    def __init__(self, dataset: Sized, *, rank: int | None = None, replicas: int | None = None, block: int = 1) -> None:
        op = "ShardSampler"
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"{op}: dataset must have a length, {type(dataset).__name__} has none.")
        running = dist.is_available() and dist.is_initialized()
        if replicas is None:
            replicas = dist.get_world_size() if running else 1
        if rank is None:
            rank = dist.get_rank() if running else 0
        self.replicas = validation.positive_integer(op, "replicas", replicas)
        self.block = validation.positive_integer(op, "block", block)
        found = validation.index(rank)
        if found is None or not 0 <= found < self.replicas:
            raise ValueError(f"{op}: rank must be an integer in 0..{self.replicas - 1}, got {rank!r}.")
        self.rank = found
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        for block in self._blocks():
            yield from block

    def __len__(self) -> int:
        return sum(len(block) for block in self._blocks())

    def _blocks(self) -> Iterator[range]:
        number = len(self.dataset)
        for start in range(self.rank * self.block, number, self.replicas * self.block):
            yield range(start, min(start + self.block, number))


def own_samples(loader: object) -> int | None:
    """How many samples of a loader, from the first, are no repetitions that fill up its share; None: all of them."""
    sampler = _distributed_sampler(loader)
    if sampler is None or sampler.drop_last:
        return None
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]


def dropped_samples(loader: object) -> int:
    """How many samples of the dataset a `DistributedSampler` gives to no process."""
    sampler = _distributed_sampler(loader)
    return 0 if sampler is None else max(0, len(sampler.dataset) - sampler.total_size)  # type: ignore[arg-type]


def _distributed_sampler(loader: object) -> DistributedSampler[object] | None:
    if not isinstance(loader, DataLoader):
        return None
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__:
            return sampler
    return None
