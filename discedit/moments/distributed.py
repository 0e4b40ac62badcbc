"""Processes that share a pass: what they tell each other, as tensors, and data of which each reads its share."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from discedit.common import validation
from discedit.model.forward import map_tensors

WORLD = "world"
NOTHING, MORE, FAILED = 0, 1, 2  # what a process says of its next batch
MOST_WAITED = 1.0  # seconds for an engine that keeps tensors, as none does that is known


class OtherFailed(RuntimeError):
    """What a process raises because another one did."""


class Group:
    """The processes that share a pass ("world" or a process group); without one (None), this process alone."""

    def __init__(self, op: str, group: Any) -> None:
        self.op = op
        self.rank, self.size, self._group = 0, 1, None
        if group is None:
            return
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(f"{op}: torch.distributed must be initialised first.")
        if group == WORLD:
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f'{op}: group must be "world", a torch.distributed process group or None, got {group!r}.')
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Tells the others, wherever they meet next, that this process has failed."""
        if isinstance(error, Exception) and not isinstance(error, OtherFailed) and not self.alone:
            self.agree(FAILED)
            list(self.gather(f"{type(error).__name__}: {error}".encode()))

    @property
    def alone(self) -> bool:
        """No group was given. A group of one talks to itself, which shows that its engine works."""
        return self._group is None

    def agree(self, word: int) -> list[int]:
        """One number of every process, in rank order."""
        if self.alone:
            return [word]
        words = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        self._answer(dist.all_gather, words, torch.tensor([word], device=self._device))
        found: list[int] = torch.cat(words).tolist()  # one wait for the device, not one for each process
        return found

    def gather(self, data: bytes) -> Iterator[bytes]:
        """Every process's bytes, in rank order; to be taken to the end: each is sent when the one before has been."""
        if self.alone:
            yield data
            return
        for rank, size in enumerate(self.agree(len(data))):
            sent = torch.empty(size, dtype=torch.uint8, device=self._device)
            if rank == self.rank and size:
                # In a bytearray: torch warns of a tensor over memory that must not be written to.
                sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            if size:
                self._answer(dist.broadcast, sent, group_src=rank)
            yield sent.cpu().numpy().tobytes()

    def exchange(self, data: bytes) -> Iterator[bytes]:
        """`gather` when all have said that they are done."""
        self.check(self.agree(NOTHING))
        yield from self.gather(data)

    def check(self, words: list[int]) -> None:
        """After `agree`: raises where another process has failed, with its error."""
        if FAILED not in words:
            return
        errors = list(self.gather(b""))
        rank = words.index(FAILED)
        raise OtherFailed(f"{self.op}: process {rank} of {self.size} failed: {errors[rank].decode(errors='replace')}")

    def first(self, words: list[int], inputs: Any) -> Any:
        """What the first process that has a batch gives as its inputs."""
        giver, file = words.index(MORE), io.BytesIO()
        if giver == self.rank:
            torch.save(map_tensors(inputs, lambda x: x.cpu().clone()), file)  # not all that a view is of
        packed = list(self.gather(file.getvalue()))[giver]
        return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)

    def _answer(self, operation: Callable[..., dist.Work], *given: Tensor | list[Tensor], **options: int) -> None:
        """Runs it to its end, and until nobody else holds the tensors.

        Gloo's thread lets go of them a moment after that end, for which it takes Python's lock. Were the main thread to
        end the group in that moment, as the end of a script with a model in DistributedDataParallel does, it would wait
        for gloo's and hold the lock, both for ever (seen with torch 2.13).
        """
        tensors = [tensor for one in given for tensor in (one if isinstance(one, list) else [one])]
        before = _owners(tensors)
        try:
            work = operation(*given, **options, group=self._group, async_op=True)
            try:
                work.wait()
            finally:
                del work
                end = time.monotonic() + MOST_WAITED
                while self._device.type == "cpu" and _owners(tensors) != before and time.monotonic() < end:
                    time.sleep(0)  # gives the lock away
        except RuntimeError as error:  # a process died, or the group's timeout is over
            raise OtherFailed(
                f"{self.op}: another process of {self.size} is gone or does not answer: {error}"
            ) from error


def _owners(tensors: Iterable[Tensor]) -> list[int]:
    """How many hold each tensor: the first number falls just before the lock is taken, the other when it was."""
    # The former is private to torch: without it the latter alone must do.
    return [number for x in tensors for number in (getattr(x, "_use_count", int)(), sys.getrefcount(x))]


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
        # A subclass that draws in another way need not repeat or drop what torch's own does.
        if isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__:
            return sampler
    return None
