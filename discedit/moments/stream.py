"""The batches of a loader, from any of them on, and whether they are those of an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from io import BytesIO
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from discedit.model.forward import map_tensors
from discedit.moments.checkpoint import Progress

EDGE = 64  # entries of a tensor, from its beginning, that its batch is known by


class Stream:
    """A loader's batches in their order, from those on that an earlier run has not taken.

    A loader with `state_dict` and `load_state_dict` (torchdata's `StatefulDataLoader`) is put where it was. Of a
    `DataLoader` over a dataset with indices, batches that are passed over are not loaded. A digest of what was taken
    tells of all but the first whether they give the same batches again: others, or fewer, are a ValueError.
    """

    def __init__(self, op: str, loader: Iterable[Any], progress: Progress) -> None:
        self.op, self.skip, self.expected = op, progress.batches, progress.digest
        self.taken = progress.batches
        self._digests: list[str] = []  # of the first, of the first two, ...: workers draw ahead of what is taken
        self._hash = sha256()
        self._loader = loader
        self._state: Any = loader if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") else None
        self._put = False
        if self._state is not None and progress.loader is not None:
            self._put = True
            self._state.load_state_dict(torch.load(BytesIO(progress.loader.numpy().tobytes()), weights_only=True))

    def describe(self, progress: Progress) -> None:
        """Notes where the loader stands."""
        # A loader that was put back by its own state has not shown the batches before.
        progress.digest = self._digests[self.taken - 1] if self.taken and not self._put else ""
        if self._state is not None:
            file = BytesIO()
            torch.save(self._state.state_dict(), file)
            progress.loader = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def __iter__(self) -> Iterator[Any]:
        if has_indices(self._loader):
            batches: Iterable[Any] = remade(self._loader, _Drawn(self, self._loader.batch_sampler))
        else:
            batches = self._loader if self._put else self.rest(self._loader, _trace)
        for batch in batches:
            self.taken += 1
            yield batch

    def rest(self, source: Iterable[Any], mark: Callable[[Any], bytes]) -> Iterator[Any]:
        """What comes behind that which the earlier run has taken, each known by its mark."""
        items = iter(source)
        for item in islice(items, self.skip):
            self._note(mark(item))
        rule = f"{self.op}: loader must give the batches that it gave before the checkpoint,"
        if len(self._digests) < self.skip:
            raise ValueError(f"{rule} at least {self.skip}, it ends after {len(self._digests)}.")
        if self.skip and self.expected and self._digests[-1] != self.expected:
            raise ValueError(
                f"{rule} the first {self.skip} are others: a sampler that shuffles needs a generator with a seed."
            )
        for item in items:
            self._note(mark(item))
            yield item

    def _note(self, mark: bytes) -> None:
        self._hash.update(mark)
        self._digests.append(self._hash.hexdigest())


def has_indices(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether it is a DataLoader that draws batches of indices."""
    return (
        # A subclass may make its batches in another way.
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def remade(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    """The same loader with other batches of indices."""
    names = "num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context generator prefetch_factor"
    return DataLoader(loader.dataset, batch_sampler=batches, **{name: getattr(loader, name) for name in names.split()})


class _Drawn:
    """A batch sampler without the batches that a stream passes over."""

    def __init__(self, stream: Stream, sampler: Any) -> None:
        self.stream, self.sampler = stream, sampler

    def __iter__(self) -> Iterator[Any]:
        return self.stream.rest(self.sampler, lambda indices: repr(list(indices)).encode())

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
