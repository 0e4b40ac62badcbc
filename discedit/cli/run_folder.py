"""Runs of the console command: what is said while one goes on, and the folder with its run.json that it leaves."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from discedit.cli.models import InputError
from discedit.common import files as _files

FILE = "run.json"
# All that a run may leave, so that nothing else is ever replaced or deleted.
NAMES = (
    FILE,
    "moments.safetensors",
    "scores.safetensors",
    "prune.json",
    "prune.values.safetensors",
    "unlearn.json",
    "unlearn.values.safetensors",
    "model.safetensors",
    "config.json",
    "discedit.json",
    "discedit.values.safetensors",
    "report.html",
)


class NothingChangedError(Exception):
    """The command had nothing to do; the message says why."""


class GroupError(Exception):
    """Another process of the group failed or did not answer in time."""


@dataclass
class Console:
    """What a command says beside its results, on stderr: on rank 0, and unless it is to be quiet."""

    command: str
    quiet: bool = False
    rank: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def progress(self) -> bool | None:
        """Whether to show progress bars, as `collect_moments` takes it."""
        return False if self.quiet or self.rank else None

    def say(self, text: str) -> None:
        if not self.quiet and not self.rank:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        if not self.rank:
            print(f"discedit {self.command}: warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def warning(self) -> Iterator[None]:
        """Shows warnings of the library as lines of the command, and keeps them for run.json."""

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            if issubclass(category, (UserWarning, RuntimeWarning)):
                self.warn(str(message))

        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = show
            yield


class RunFolder:
    """A folder that holds one run: claimed before the work, filled after it, run.json last.

    Raises:
        InputError: the folder holds another run, or files that this one would write, and may not be overwritten; or it
            is no folder.
    """

    def __init__(self, path: Path, *, overwrite: bool, writes: bool = True) -> None:
        self.path = path
        self._made: list[Path] = []
        self._files: list[str] = []
        self._old: list[str] = []
        if not writes:  # another rank does
            return
        if path.exists() and not path.is_dir():
            raise InputError(f"--out: must be a folder, {str(path)!r} is a file.")
        self._old = [name for name in NAMES if (path / name).is_file()]
        if self._old and not overwrite:
            what = "another run" if FILE in self._old else f"{', '.join(self._old)}"
            raise InputError(f"--out: {str(path)!r} holds {what}; name another folder, or add --overwrite.")
        folder = path
        while not folder.exists():
            self._made.append(folder)
            folder = folder.parent
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise InputError(f"--out: nothing can be written to {str(path)!r}.")

    def release(self) -> None:
        """Takes the folders away that were made for nothing."""
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def clear(self) -> None:
        """Removes the run that is to be overwritten, its run.json first."""
        for name in self._old:
            (self.path / name).unlink(missing_ok=True)
        self._old = []

    def file(self, name: str) -> Path:
        """Where to write a file of the run, which run.json will name."""
        assert name in NAMES or name.endswith(".png"), name
        self._files.append(name)
        return self.path / name

    def finish(self, record: dict[str, Any]) -> None:
        """Writes run.json, with size and checksum of the other files."""
        files = []
        for name in self._files:
            data = (self.path / name).read_bytes()
            files.append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        record["files"] = files
        _files.write_atomically(self.path / FILE, (as_json(record) + "\n").encode())


class Clock:
    """When a run started, and how long it has taken."""

    def __init__(self) -> None:
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)


def record_of(
    command: str, arguments: Mapping[str, Any], clock: Clock, packages: Iterable[str], **fields: Any
) -> dict[str, Any]:
    """The fields of run.json that every command has, and those given."""
    names = ["discedit", "torch", "numpy", *packages]
    return {
        "kind": "run",
        "version": _files.VERSION,
        "command": command,
        "arguments": plain(dict(arguments)),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "commit": commit(),
        "started": clock.started,
        "seconds": clock.seconds,
        **plain(fields),
    }


def load_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and run.json of a run, which is named by either.

    Raises:
        FileNotFoundError: there is no run. ValueError: run.json is damaged or foreign.
    """
    folder = path.parent if path.name == FILE else path
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"run folder {str(folder)!r} has no {FILE}.")
    record = _files.load_json(file, "run")
    for name, kind in (("command", str), ("arguments", dict), ("results", dict), ("files", list), ("data", dict)):
        _files.field(record, name, kind, file)
    return folder, record


def commit() -> str | None:
    """The git commit of the working directory; None where there is none."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return found or None


def plain(value: Any) -> Any:
    """As JSON has it: paths and other objects as text, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def as_json(record: Any) -> str:
    return json.dumps(record, indent=1, allow_nan=False)
