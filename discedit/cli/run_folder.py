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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from discedit.cli.models import InputError
from discedit.common import files

FILE = "run.json"
VALUES = ("prune.values.safetensors", "unlearn.values.safetensors", "discedit.values.safetensors")
# All that a run may leave, so that nothing else is ever replaced or deleted.
NAMES = (FILE, "moments.safetensors", "scores.safetensors", "prune.json", "unlearn.json", *VALUES,
         "model.safetensors", "config.json", "discedit.json", "report.html")  # fmt: skip


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
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    clock: float = field(default_factory=time.perf_counter)

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

    As a context, it takes the folders away that were made for a run that failed.

    Raises:
        InputError: the folder holds another run, or files that this one would write, and may not be overwritten; or it
            is no folder, or not to be written to.
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
            what = "another run" if FILE in self._old else ", ".join(self._old)
            raise InputError(f"--out: {str(path)!r} holds {what}; name another folder, or add --overwrite.")
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise InputError(f"--out: nothing can be written to {str(path)!r}.")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for folder in self._made if kind else ():
            with suppress(OSError):  # it holds something
                folder.rmdir()

    def clear(self) -> None:
        """Removes the run that is to be overwritten, its run.json first."""
        for name in self._old:
            (self.path / name).unlink(missing_ok=True)
        self._old = []

    def file(self, name: str) -> Path:
        """Where to write a file of the run, which run.json will name."""
        assert name in NAMES, name
        self._files.append(name)
        return self.path / name

    def finish(self, record: dict[str, Any]) -> str:
        """Writes run.json, with size and checksum of the other files, and says what was written."""
        record["files"] = []
        for name in self._files:
            data = (self.path / name).read_bytes()
            record["files"].append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        files.write_atomically(self.path / FILE, (as_json(record) + "\n").encode())
        return f"written to {self.path}: {', '.join([*self._files, FILE])}"


def record_of(console: Console, options: Any, packages: Iterable[str], **fields: Any) -> dict[str, Any]:
    """The fields of run.json that every command has, and those given."""
    if console.warnings:
        fields["results"] = {**fields["results"], "warnings": console.warnings}
    record = {
        "kind": "run",
        "version": files.VERSION,
        "command": console.command,
        "arguments": vars(options),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("discedit", "torch", "numpy", *packages)},
        },
        "commit": commit(),
        "started": console.started,
        "seconds": round(time.perf_counter() - console.clock, 3),
        **fields,
    }
    return {name: plain(value) for name, value in record.items()}


def load_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and run.json of a run, which is named by either.

    Raises:
        FileNotFoundError: there is no run. ValueError: run.json is damaged or foreign.
    """
    folder = path.parent if path.name == FILE else path
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"run folder {str(folder)!r} has no {FILE}.")
    record = files.load_json(file, "run")
    for name, kind in (("command", str), ("arguments", dict), ("results", dict), ("files", list), ("data", dict)):
        files.field(record, name, kind, file)
    return folder, record


def commit() -> str | None:
    """The git commit of the working directory; None where there is none."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


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
