"""Runs of the console command: what is said while one goes on, and the folder with its run.json that it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from discedit.cli.errors import InputError
from discedit.common import files

FILE = "run.json"
VALUES = ("prune.values.safetensors", "unlearn.values.safetensors", "discedit.values.safetensors")
# All that a run may leave, so that nothing else is ever replaced or deleted.
NAMES = (FILE, "moments.safetensors", "scores.safetensors", "divergences.safetensors", "latencies.safetensors",
         "prune.json", "unlearn.json", *VALUES, "model.safetensors", "config.json", "discedit.json",
         "report.html")  # fmt: skip
Result = tuple[dict[str, Any], str]  # what run.json holds, and what is shown


@dataclass
class Console:
    """What a command says beside its results, on stderr: on rank 0 of those that torchrun starts, and if not quiet."""

    command: str
    quiet: bool = False
    rank: int = field(default_factory=lambda: _integer_of_environment("RANK", 0))
    ranks: int = field(default_factory=lambda: _integer_of_environment("WORLD_SIZE", 1))
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

    @contextmanager
    def warning(self) -> Iterator[None]:
        """Shows warnings of the library as lines of the command, and keeps them for run.json."""

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            if issubclass(category, (UserWarning, RuntimeWarning)):
                self.warnings.append(str(message))
                if not self.rank:
                    print(f"discedit {self.command}: warning: {message}", file=sys.stderr, flush=True)

        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = show
            yield


def _integer_of_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name} in the environment must be an integer, got {text!r}.")
    return int(text)


class RunFolder:
    """A folder that holds one run: looked at before the work, made by the first file after it; run.json is the last."""

    def __init__(self, options: Any, console: Console) -> None:
        if console.ranks > 1 and console.command != "score":
            only = f"torchrun started {console.ranks}: only score takes several"
            raise InputError(f"{console.command} runs on one rank, {only}.")
        self.path: Path = options.out
        self._files: list[str] = []
        self._old: list[str] = []
        if console.rank:  # another one writes
            return
        self._old = [name for name in NAMES if (self.path / name).is_file()]
        if self._old and not options.overwrite:
            what = "another run" if FILE in self._old else ", ".join(self._old)
            raise InputError(f"--out: {str(self.path)!r} holds {what}; name another folder, or add --overwrite.")
        nearest = next(place for place in (self.path, *self.path.parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputError(f"--out: must be a folder that can be written to, {str(nearest)!r} is none.")

    def file(self, name: str) -> Path:
        """Where to write a file of the run, which run.json will name; the first removes the run that was there."""
        assert name in NAMES, name
        while self._old:  # its run.json first
            (self.path / self._old.pop(0)).unlink(missing_ok=True)
        self._files.append(name)
        return self.path / name

    def finish(self, record: dict[str, Any], text: str = "") -> Result:
        """Writes run.json, with size and checksum of the other files, and adds what was written to the text."""
        target, record["files"] = self.file(FILE), []
        for name in self._files[:-1]:
            data = (self.path / name).read_bytes()
            record["files"].append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        files.write_atomically(target, (as_json(record) + "\n").encode())
        return record, f"{text}\nwritten to {self.path}: {', '.join(self._files)}".lstrip()


def record_of(console: Console, options: Any, packages: Iterable[str], **fields: Any) -> dict[str, Any]:
    """The fields of run.json that every command has, and those given, as JSON has them."""
    if console.warnings:
        fields["results"] = {**fields["results"], "warnings": console.warnings}
    names = ("discedit", "torch", "numpy", *packages)
    record = {
        "kind": "run",
        "version": files.VERSION,
        "command": console.command,
        "arguments": vars(options),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "commit": commit(),
        "started": console.started,
        "seconds": round(time.perf_counter() - console.clock, 3),
        **fields,
    }
    found: dict[str, Any] = json.loads(as_json(record))
    return found


def load_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and run.json of a run, which is named by either."""
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


def as_json(record: Any) -> str:
    """Paths and other objects as text, NaN and infinities as null."""
    known = json.loads(json.dumps(record, default=str), parse_constant=lambda _: None)
    return json.dumps(known, indent=1)
