"""One pass of a model over a share of the data: in step with other processes, and from a checkpoint on."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from typing import Any, Generic, TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from discedit.backends import NAMES
from discedit.common import validation
from discedit.common.warning import warn
from discedit.model.forward import checked_labels, device_of, frozen_eval, samples_in, to_device, unpack_batch
from discedit.model.sharded import runs_together
from discedit.moments.checkpoint import Checkpoint, Progress, digest_of
from discedit.moments.distributed import MORE, NOTHING, Group, dropped_samples, own_samples
from discedit.moments.states import LayerStates
from discedit.moments.stream import Stream

M = TypeVar("M", bound=LayerStates[Any])


class RunOptions(TypedDict, total=False):
    """How a pass over the data runs, whatever it collects.

    Attributes:
        progress: show a progress bar on stderr; by default only on a terminal, and only of the first process.
        backend: as in `discedit.ops`.
        group: "world" or a process group of torch.distributed whose processes each pass over a share of the data; every
            one of them gets the moments of all, the same bits.
        checkpoint: a folder for the state of the pass, which goes on from there when it is called again.
        checkpoint_every: seconds between two states on disk, 60 by default; inf: at the end alone.
    """

    progress: bool | None
    backend: str
    group: dist.ProcessGroup | str | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: float


@contextmanager
def asked_by(op: str, made: str) -> Iterator[None]:
    """Errors of what a function makes with its own arguments begin with the name of the function."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {str(error).removeprefix(f'{made}: ')}") from error


class Pass(ABC, Generic[M]):
    """What a pass does whatever it accumulates.

    Args:
        op: what asks, for errors; its last word names the progress bar.
        labels: how many classes there are, where the batches must hold labels; else None.
    """

    home: torch.device | None = None  # where the moments go at last; None: the model's device

    def __init__(
        self, op: str, model: nn.Module, loader: Iterable[Any], moments: M, labels: int | None, run: RunOptions
    ) -> None:
        validation.module(op, model)
        validation.batches(op, "loader", loader)
        for name in run.keys() - RunOptions.__annotations__.keys():
            raise TypeError(f"{op}() got an unexpected keyword argument {name!r}")
        validation.choice(op, "backend", run.get("backend", "auto"), ("auto", *NAMES))
        self.op, self.model, self.loader, self.moments, self.options = op, model, loader, moments, run
        self.group = Group(op, run.get("group"))
        self.device = device_of(model)
        self.progress = Progress()
        self.checkpoint: Checkpoint[M] | None = None
        self._labels = labels
        self._batches_of: Iterable[Any] = loader

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Finds out what is to be read; returns what must be the same in a run that goes on, beside settings: JSON."""

    @abstractmethod
    def hooks(self) -> AbstractContextManager[Any]:
        """Entered while the model runs."""

    @abstractmethod
    def fold(self, inputs: Any, labels: Tensor | None, counted: int) -> None:
        """Runs the model on a batch and takes in its first samples, as many as count."""

    @abstractmethod
    def idle(self, inputs: Any) -> None:
        """Runs the model on a batch that does not count, because other processes need this one to."""

    @abstractmethod
    def check(self) -> None:
        """Before the state leaves the pass: raises what nobody has waited for so far."""

    def go_on(self, moments: M) -> None:
        """From the state of an earlier run."""
        self.moments = moments.to(self.device)

    def collect(self) -> M:
        """To the end of all shares."""
        with self.group:
            folder = self.options.get("checkpoint")
            run = {**self.moments.settings, **self.prepare()}
            if folder is not None:
                run["model"] = digest_of(self.model)
                every = self.options.get("checkpoint_every", 60.0)
                self.checkpoint = Checkpoint(self.op, folder, every, self.group, run, self.moments.from_contents)
                self.progress = replace(self.checkpoint.progress)
                self._batches_of = Stream(self.op, self.loader, self.progress)
                if self.checkpoint.state is not None:
                    self.go_on(self.checkpoint.state)
            self.own = own_samples(self.loader)
            dropped = dropped_samples(self.loader)
            if dropped:
                warn(f"{self.op}: left out: {dropped} samples that the loader's sampler drops.")
            self._run()
            home = self.home or self.device
            moments = self.moments if home == self.device else self.moments.to(home)
        return moments if self.group.alone else moments.reduce_in(self.group, home)

    def _run(self) -> None:
        """To the end of this share; in step with the other processes where the model needs them."""
        together = not self.group.alone and runs_together(self.model)
        last: Any = None  # inputs for a pass that does not count
        with frozen_eval(self.model) as calls, self.hooks(), closing(self._batches()) as batches:
            while True:
                batch = next(batches, None)
                if together:
                    words = self.group.agree(NOTHING if batch is None else MORE)
                    self.group.check(words)
                    if MORE not in words:
                        break
                    # A process without any batch must run the model as often as the others, which wait for it
                    # inside, and has no inputs of its own to do so with.
                    if last is None and NOTHING in words:
                        last = to_device(self.group.first(words, None if batch is None else batch[0]), self.device)
                elif batch is None:
                    break
                if batch is None:
                    self.idle(last)
                    continue
                last, labels, counted = batch
                self.fold(last, labels, counted)
                # Only a batch with samples shows whether the model needs the mode.
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

        shown = self.options.get("progress")
        shown = sys.stderr.isatty() and self.group.rank == 0 if shown is None else shown
        for batch in tqdm(self._batches_of, desc=self.op.split("_")[-1], unit="batch", disable=not shown):
            index = self.progress.batches
            inputs, given = unpack_batch(self.op, batch, index, self.device, labels_needed=self._labels is not None)
            labels = None if self._labels is None else checked_labels(self.op, given, self._labels, index)
            samples = samples_in(inputs)
            counted = samples if self.own is None else max(0, min(samples, self.own - self.progress.samples))
            yield inputs, labels, counted

    def _save(self, checkpoint: Checkpoint[M]) -> None:
        self.check()
        assert isinstance(self._batches_of, Stream)
        self._batches_of.describe(self.progress)
        checkpoint.save(*self.moments.contents(), replace(self.progress))
