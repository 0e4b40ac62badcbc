"""One pass of a model over a share of the data: in step with other processes, and from a checkpoint on."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from discedit.model.forward import checked_labels, device_of, moved, samples_in, split, undisturbed
from discedit.model.sharded import runs_together
from discedit.moments.checkpoint import Checkpoint, Progress
from discedit.moments.distributed import dropped_samples, own_samples
from discedit.moments.group import MORE, NOTHING, Group, pack, unpack
from discedit.moments.stream import Stream


class Pass(ABC):
    """What a pass does whatever it accumulates.

    Args:
        op: what asks, for errors; its last word names the progress bar.
        loader: batches, as `collect_moments` takes them.
        labels: how many classes there are, where the batches must hold labels; else None.
        progress: as for `collect_moments`.
        group: whose share this is.
        checkpoint: of this pass; its progress is gone on from.
        hooks: entered while the model runs.
    """

    def __init__(
        self,
        op: str,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        labels: int | None,
        progress: bool | None,
        group: Group,
        checkpoint: Checkpoint[Any] | None,
        hooks: AbstractContextManager[Any],
    ) -> None:
        self.op, self.model, self.loader, self.group = op, model, loader, group
        self.device = device_of(model)
        self._labels, self._bar, self._hooks = labels, progress, hooks
        self.checkpoint = checkpoint
        self.progress = Progress() if checkpoint is None else replace(checkpoint.progress)
        self._stream: Stream | None = None
        if checkpoint is not None:
            self._stream = Stream(op, loader, self.progress.batches, self.progress.digest)
        self.own = own_samples(loader)
        dropped = dropped_samples(loader)
        if dropped:
            warnings.warn(f"{op}: left out: {dropped} samples that the loader's sampler drops.", stacklevel=6)

    @abstractmethod
    def fold(self, inputs: Any, labels: Tensor | None, counted: int) -> None:
        """Runs the model on a batch and takes in its first samples, as many as count."""

    @abstractmethod
    def idle(self, inputs: Any) -> None:
        """Runs the model on a batch that does not count, because other processes need this one to."""

    @abstractmethod
    def save(self, checkpoint: Checkpoint[Any], progress: Progress) -> None:
        """Puts the state on disk."""

    @abstractmethod
    def check(self) -> None:
        """Before the state leaves the pass: raises what nobody has waited for so far."""

    def run(self) -> None:
        """To the end of this share; in step with the other processes where the model needs them."""
        together = not self.group.alone and runs_together(self.model)
        last: Any = None  # inputs for a pass that does not count
        begun = False
        with undisturbed(self.model) as calls, self._hooks, closing(self._batches()) as batches:
            while True:
                batch = next(batches, None)
                if together:
                    words = self.group.agree(NOTHING if batch is None else MORE)
                    self.group.check(words)
                    if MORE not in words:
                        break
                    if not begun and NOTHING in words:
                        mine = words.index(MORE) == self.group.rank
                        packed = self.group.gather(pack(batch[0]) if mine and batch is not None else b"")
                        last = moved(unpack(packed[words.index(MORE)]), self.device)
                    begun = True
                elif batch is None:
                    break
                if batch is None:
                    self.idle(last)
                    continue
                last, labels, counted = batch
                self.fold(last, labels, counted)
                if samples_in(last):
                    calls.rest()
                self.progress.batches += 1
                self.progress.samples += counted
                if self.checkpoint is not None and self.checkpoint.due():
                    self._save(self.checkpoint)
        self.check()
        if self.checkpoint is not None:
            self._save(self.checkpoint)

    def _batches(self) -> Generator[tuple[Any, Tensor | None, int]]:
        """Inputs on the model's device, labels where they are given, and how many samples count, from the first."""
        from tqdm.auto import tqdm

        shown = sys.stderr.isatty() and self.group.rank == 0 if self._bar is None else self._bar
        batches = self.loader if self._stream is None else self._stream
        for batch in tqdm(batches, desc=self.op.split("_")[-1], unit="batch", disable=not shown):
            index = self.progress.batches
            inputs, given = split(self.op, batch, index, self.device, labels_needed=self._labels is not None)
            labels = None if self._labels is None else checked_labels(self.op, given, self._labels, index)
            samples = samples_in(inputs)
            counted = samples if self.own is None else max(0, min(samples, self.own - self.progress.samples))
            yield inputs, labels, counted

    def _save(self, checkpoint: Checkpoint[Any]) -> None:
        assert self._stream is not None
        self.check()
        self.progress.digest = self._stream.digest
        self.save(checkpoint, replace(self.progress))
