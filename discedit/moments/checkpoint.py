"""The state of a pass on disk: whatever ends the process, an earlier state is whole."""

from __future__ import annotations

import json
import os
import reprlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from discedit.common import files, validation
from discedit.common.warning import warn
from discedit.model.sharded import identity
from discedit.moments.distributed import Group

Saved = TypeVar("Saved")
KIND = "checkpoint"
LOADER = "loader"  # the tensor of its state
COUNTS = {"batches": int, "samples": int, "digest": str}


@dataclass
class Progress:
    """How far a pass has come: batches taken, samples of them that counted, and where the loader stands."""

    batches: int = 0
    samples: int = 0
    digest: str = ""  # of the batches, by `Stream`; empty: they cannot be told from others
    loader: Tensor | None = field(default=None, compare=False)  # its own state, bytes, if it has one


class Checkpoint(Generic[Saved]):
    """A file of each process, replaced atomically; with the state and progress of an earlier run, where there was one.

    Args:
        run: what must be the same in the run that goes on: JSON.
        load: makes the state from header, tensors and path of a file.
    """

    def __init__(
        self,
        op: str,
        folder: str | os.PathLike[str],
        every: float,
        group: Group,
        run: Mapping[str, Any],
        load: Callable[[dict[str, Any], dict[str, Tensor], Path], Saved],
    ) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise ValueError(f"{op}: checkpoint must be a folder's path, got {folder!r}.")
        if not validation.is_number(every) or not every >= 0:
            raise ValueError(f"{op}: checkpoint_every must be a number of seconds of at least 0, got {every!r}.")
        self.op, self.every, self._last = op, every, time.monotonic()
        place = Path(folder)
        if place.exists() and not place.is_dir():
            raise ValueError(f"{op}: checkpoint must be a folder, {str(folder)!r} is a file.")
        place.mkdir(parents=True, exist_ok=True)
        sizes = {path.stem.partition("-of-")[2] for path in place.glob("process-*-of-*.safetensors")}
        if sizes - {str(group.size)}:  # a share of another number of processes is another share
            raise ValueError(
                f"{op}: checkpoint {str(folder)!r} must be of as many processes as go on, it is of "
                f"{', '.join(sorted(sizes))}, not of {group.size}."
            )
        self.run = json.loads(json.dumps(run))  # as it comes back from a file
        self.path = place / f"process-{group.rank}-of-{group.size}.safetensors"
        for left in place.glob(f".{self.path.name}.*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        self.state: Saved | None = None
        self.progress = Progress()
        if not self.path.exists():
            return
        header, tensors = files.load_tensors(self.path, KIND)
        loader, earlier = tensors.pop(LOADER, None), files.field(header, "run", dict, self.path)
        for name, value in self.run.items():
            if earlier.get(name) != value:
                was, now = (reprlib.repr(found) for found in (earlier.get(name), value))
                raise ValueError(
                    f"{op}: checkpoint {str(folder)!r} is another run's: {name} was {was}, not {now}. Give another "
                    "folder, or delete it to begin anew."
                )
        self.state = load(files.field(header, "moments", dict, self.path), tensors, self.path)
        progress = files.field(header, "progress", dict, self.path)
        counts = {name: files.field(progress, name, kind, self.path) for name, kind in COUNTS.items()}
        self.progress = Progress(**counts, loader=loader)

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def save(self, header: dict[str, Any], tensors: dict[str, Tensor], progress: Progress) -> None:
        """A disk that does not take it is a warning: the file before stays."""
        if progress == self.progress:
            return
        counts = {name: getattr(progress, name) for name in COUNTS}
        tensors = tensors if progress.loader is None else {**tensors, LOADER: progress.loader}
        data = files.to_bytes(KIND, {"moments": header, "run": self.run, "progress": counts}, tensors)
        try:
            files.write_atomically(self.path, data)
            self.progress = progress
        except OSError as error:
            warn(
                f"{self.op}: checkpoint {str(self.path)!r} could not be written ({error}); the one of batch "
                f"{self.progress.batches} stays."
            )
        self._last = time.monotonic()


def digest_of(model: nn.Module) -> str:
    """Of all parameters and buffers: of those that are spread over processes, this one's share."""
    found = sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local: Tensor = identity(tensor.detach())
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(local.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
