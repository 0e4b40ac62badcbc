"""The state of a pass on disk: whatever ends the process, an earlier state is whole."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from discedit.common import files, validation
from discedit.model.sharded import identity
from discedit.moments.group import Group

Saved = TypeVar("Saved")
KIND = "checkpoint"


@dataclass
class Progress:
    """How far a pass has come.

    Attributes:
        batches: taken from the loader.
        samples: of them, those that counted.
        digest: of the batches, by `Stream`.
    """

    batches: int = 0
    samples: int = 0
    digest: str = ""


class Checkpoint(Generic[Saved]):
    """Two files of each process that take turns.

    Args:
        op: what asks, for errors.
        folder: made if it is not there.
        every: seconds between two states.
        group: the processes of the pass.
        run: what must be the same in the run that goes on: JSON.
        load: makes the state from header, tensors and path of a file.

    Attributes:
        state, progress: of the newest file that is whole; of none, None and the beginning.

    Raises:
        ValueError: folder or every are none, files are there but none of them whole, or they are another run's.
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
        self.op, self.folder, self.every = op, Path(folder), float(every)
        self.run = json.loads(json.dumps(run))  # as it comes back from a file
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{op}: checkpoint must be a folder, {str(folder)!r} is a file.")
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"process-{group.rank}-of-{group.size}"
        self._check_processes(group)
        for left in self.folder.glob(f".{name}.*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        self.files = [self.folder / f"{name}.{turn}.safetensors" for turn in "ab"]
        self._state_of = load
        self.state: Saved | None = None
        self.progress = Progress()
        self._load()
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def save(self, header: dict[str, Any], tensors: dict[str, Tensor], progress: Progress) -> None:
        """In place of the older of the two. A disk that does not take it is a warning: the other one stays."""
        if progress == self.progress:
            return
        data = files.to_bytes(KIND, {"moments": header, "run": self.run, "progress": asdict(progress)}, tensors)
        try:
            files.write_atomically(self.files[0], data)
        except OSError as error:
            warnings.warn(
                f"{self.op}: checkpoint {str(self.files[0])!r} could not be written ({error}); the one of batch "
                f"{self.progress.batches} stays.",
                stacklevel=2,
            )
        else:
            self.files.reverse()
            self.progress = progress
        self._last = time.monotonic()

    def _check_processes(self, group: Group) -> None:
        """A share of another number of processes is another share."""
        others = {path.name.split("-of-")[1].split(".")[0] for path in self.folder.glob("process-*-of-*.safetensors")}
        others -= {str(group.size)}
        if others:
            raise ValueError(
                f"{self.op}: checkpoint {str(self.folder)!r} must be of as many processes as go on, it is of "
                f"{', '.join(sorted(others))}, not of {group.size}."
            )

    def _load(self) -> None:
        found, errors = [], []
        for path in self.files:
            if path.exists():
                try:
                    found.append((*self._read(path), path))
                except (ValueError, OSError) as error:
                    errors.append(str(error))
        if errors and not found:
            raise ValueError(f"{self.op}: checkpoint must hold a file that is whole: {' '.join(errors)}")
        if errors:
            warnings.warn(f"{self.op}: checkpoint goes on from the other file: {' '.join(errors)}", stacklevel=2)
        if not found:
            return
        run, self.state, self.progress, path = max(found, key=lambda entry: entry[2].batches)
        if self.files[0] == path:
            self.files.reverse()  # the other one is to be written next
        different = [name for name in self.run if run.get(name) != self.run[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"{self.op}: checkpoint {str(self.folder)!r} is another run's: {name} was {_short(run.get(name))}, "
                f"not {_short(self.run[name])}. Give another folder, or delete it to begin anew."
            )

    def _read(self, path: Path) -> tuple[dict[str, Any], Saved, Progress]:
        header, tensors = files.load_tensors(path, KIND)
        state = self._state_of(files.field(header, "moments", dict, path), tensors, path)
        progress = files.field(header, "progress", dict, path)
        kinds = {"batches": int, "samples": int, "digest": str}
        found = {name: files.field(progress, name, kind, path) for name, kind in kinds.items()}
        return files.field(header, "run", dict, path), state, Progress(**found)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def digest_of(model: nn.Module) -> str:
    """Of all parameters and buffers: of those that are spread over processes, this one's share."""
    found = sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local: Tensor = identity(tensor.detach())
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(local.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
