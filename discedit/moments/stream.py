"""The batches of a loader, from any of them on, and whether they are those of an earlier run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import sha256
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from discedit.model.forward import map_tensors

EDGE = 64  # entries of a tensor, from its beginning, that its batch is known by


class Stream:
    """A loader's batches in their order, and a digest of those that were taken.

    Of a `DataLoader` over a dataset with indices, batches that are passed over are not loaded; nor of a loader that has
    a `batch_sampler`, and `with_batches(sampler)` to make another one.

    Args:
        op: what asks, for errors.
        loader: as for `collect_moments`.
        skip: batches to pass over, which an earlier run has taken.
        digest: of those.
    """

    def __init__(self, op: str, loader: Iterable[Any], skip: int = 0, digest: str = "") -> None:
        self.op, self.skip, self.expected = op, skip, digest
        self.taken = 0
        self._digests: list[str] = []  # of the first, of the first two, ...: workers draw ahead of what is taken
        self._hash = sha256()
        self._loader, self._drawn = loader, False
        remake = partial(remade, loader) if has_indices(loader) else getattr(loader, "with_batches", None)
        sampler = getattr(loader, "batch_sampler", None)
        if remake is not None and sampler is not None:
            self._loader, self._drawn = remake(_Drawn(self, sampler)), True

    @property
    def digest(self) -> str:
        return self._digests[self.taken - 1] if self.taken else ""

    def __iter__(self) -> Iterator[Any]:
        source = iter(self._loader)
        if not self._drawn:
            while self.taken < self.skip:
                try:
                    batch = next(source)
                except StopIteration:
                    self._too_short()
                self._note(_trace(batch))
                self.taken += 1
            self._compare()
        self.taken = self.skip
        for batch in source:
            if not self._drawn:
                self._note(_trace(batch))
            self.taken += 1
            yield batch

    def _note(self, trace: bytes) -> None:
        self._hash.update(trace)
        self._digests.append(self._hash.hexdigest())

    def _compare(self) -> None:
        if self.skip and self._digests[self.skip - 1] != self.expected:
            raise ValueError(
                f"{self.op}: loader must give the batches that it gave before the checkpoint, the first {self.skip} "
                f"are others: a sampler that shuffles needs a generator with a seed."
            )

    def _too_short(self) -> None:
        raise ValueError(
            f"{self.op}: loader must give the batches that it gave before the checkpoint, at least {self.skip}, it "
            f"ends after {len(self._digests)}."
        )


def has_indices(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether it is a DataLoader that draws batches of indices."""
    return (
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def remade(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    """The same loader with other batches of indices."""
    names = (
        "num_workers",
        "collate_fn",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
        "generator",
        "prefetch_factor",
    )
    return DataLoader(loader.dataset, batch_sampler=batches, **{name: getattr(loader, name) for name in names})


class _Drawn:
    """A batch sampler that notes what it draws, and gives what comes after the batches to pass over."""

    def __init__(self, stream: Stream, sampler: Any) -> None:
        self.stream, self.sampler = stream, sampler

    def __iter__(self) -> Iterator[Any]:
        stream = self.stream
        for indices in self.sampler:
            stream._note(repr(list(indices)).encode())
            if len(stream._digests) > stream.skip:
                yield indices
            elif len(stream._digests) == stream.skip:
                stream._compare()
        if len(stream._digests) < stream.skip:
            stream._too_short()

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.stream.skip)


def _trace(batch: Any) -> bytes:
    """What a batch is known by: shapes, types, labels and the first entries of every tensor."""
    found: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        few = tensor.detach().flatten() if tensor.ndim < 2 else tensor.detach().flatten()[:EDGE]
        found.append(f"{tuple(tensor.shape)} {tensor.dtype} {few.tolist()}")
        return tensor

    map_tensors(batch, note)
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if labels is not None and not isinstance(labels, Tensor):
        found.append(repr(torch.as_tensor(labels).tolist()))
    return "\n".join(found).encode()
