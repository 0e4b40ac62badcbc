"""The processes of a torch.distributed group: what they tell each other, as tensors, never as pickle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from discedit.common import files

WORLD = "world"
NOTHING, MORE, FAILED = 0, 1, 2  # what a process says of its next batch


# The last work, kept until the next has ended. Whoever lets go of a work last frees its tensors, which takes Python's
# lock. Were that gloo's thread when the main one ends the group, it would wait for the main one, which holds the lock
# and waits for gloo's (seen with torch 2.13, where a script ends with a model in DistributedDataParallel).
_last: list[dist.Work] = []


class OtherFailed(RuntimeError):
    """What a process raises because another one did."""


class States(Protocol):
    """What merges, and goes into bytes and back."""

    def contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]: ...
    def from_contents(self, header: dict[str, Any], tensors: dict[str, Tensor], path: str, /) -> Any: ...
    def merge(self, other: Any, /) -> Any: ...


class Group:
    """The processes that share a pass; without one, this process alone.

    Args:
        op: what asks, for errors.
        group: "world", a process group, or None.

    Raises:
        RuntimeError: torch.distributed is not initialised. ValueError: something else, or a group that this process is
        not in.
    """

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

    @property
    def alone(self) -> bool:
        """No group was given. A group of one talks to itself, which shows that its engine works."""
        return self._group is None

    def agree(self, word: int) -> list[int]:
        """One number of every process, in rank order."""
        if self.alone:
            return [word]
        return [int(number) for number in self._gathered(torch.tensor([word], device=self._device))]

    def gather(self, data: bytes) -> list[bytes]:
        """Every process's bytes, in rank order."""
        if self.alone:
            return [data]
        sizes = self.agree(len(data))
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8, device=self._device)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        parts = self._gathered(padded)
        return [part[:size].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def exchange(self, data: bytes) -> Iterator[bytes]:
        """Every process's bytes, in rank order, one at a time, when all have said that they are done.

        To be taken to the end: each is sent when the one before has been.

        Raises:
            RuntimeError: another process has failed.
        """
        if self.alone:
            yield data
            return
        self.check(self.agree(NOTHING))
        for rank, size in enumerate(self.agree(len(data))):
            mine = rank == self.rank
            sent = torch.empty(size, dtype=torch.uint8, device=self._device)
            if mine:
                sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            self._answer(dist.broadcast, sent, group_src=rank)
            yield data if mine else sent.cpu().numpy().tobytes()

    def total(self, kind: str, mine: States, total: States) -> None:
        """Merges every process's states into `total`, in rank order; one of another process is in memory at a time.

        Args:
            kind: of the files that such states are kept in.

        Raises:
            RuntimeError: another process has failed. ValueError: states that do not merge.
        """
        refused: ValueError | None = None
        for rank, data in enumerate(self.exchange(files.to_bytes(kind, *mine.contents(), sealed=False))):
            try:
                total.merge(mine.from_contents(*files.from_bytes(data, kind, f"rank {rank}"), f"rank {rank}"))
            except ValueError as error:  # the others still wait for the rest
                refused = refused or error
        if refused is not None:
            raise refused

    def check(self, words: list[int]) -> None:
        """After `agree`.

        Raises:
            RuntimeError: another process has failed; the message holds its error.
        """
        if FAILED not in words:
            return
        errors = self.gather(b"")
        rank = words.index(FAILED)
        raise OtherFailed(f"{self.op}: process {rank} of {self.size} failed: {errors[rank].decode(errors='replace')}")

    def fail(self, error: BaseException) -> None:
        """Tells the others, wherever they meet next, that this process has failed."""
        if not self.alone:
            self.agree(FAILED)
            self.gather(f"{type(error).__name__}: {error}".encode())

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._answer(dist.all_gather, parts, mine)
        return parts

    def _answer(self, operation: Callable[..., dist.Work], *tensors: Any, **options: int) -> None:
        """Runs it to its end."""
        try:
            work = operation(*tensors, **options, group=self._group, async_op=True)
            try:
                work.wait()
            finally:
                _last[:] = [work]
        except RuntimeError as error:  # a process died, or the group's timeout is over
            raise OtherFailed(
                f"{self.op}: another process of {self.size} is gone or does not answer: {error}"
            ) from error


def pack(inputs: Any) -> bytes:
    """A nest of tensors, tuples, lists, dicts and what JSON has."""
    tensors: dict[str, Tensor] = {}

    def write(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors[str(len(tensors))] = part
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(part, Mapping):
            return {"dict": {name: write(value) for name, value in part.items()}}
        if isinstance(part, (tuple, list)):
            return {"tuple": [write(value) for value in part]}
        return {"value": part}

    return files.to_bytes("batch", {"nest": write(inputs)}, tensors, sealed=False)


def unpack(data: bytes) -> Any:
    """What `pack` made; lists become tuples."""
    header, tensors = files.from_bytes(data, "batch", "of another process")

    def read(part: Any) -> Any:
        ((kind, value),) = part.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {name: read(inner) for name, inner in value.items()}
        return tuple(map(read, value)) if kind == "tuple" else value

    return read(header["nest"])
