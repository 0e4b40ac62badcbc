"""Timing, machine facts, logs and tables shared by the benchmarks."""

from __future__ import annotations

import fcntl
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from discedit import backends

Result = TypeVar("Result")
README = Path(__file__).with_name("README.md")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best_of(run: Callable[[], object], repeats: int = 7) -> float:
    """Shortest of several runs, in seconds: what the machine can do when nobody disturbs it."""
    run()
    return min(seconds(run) for _ in range(repeats))


def paired_ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 7) -> tuple[float, float]:
    """Median and spread (largest minus smallest quartile) of ours / theirs in time, runs taken in turns."""
    ours()
    theirs()
    ratios = []
    for _ in range(repeats):
        reference = seconds(theirs)
        ratios.append(seconds(ours) / reference)
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), quartiles[2] - quartiles[0]


class PlainRead:
    """A streaming read with the threads that torch has (a float32 sum over 200 MB): the ceiling of what reads a map."""

    def __init__(self) -> None:
        self.x = torch.ones(50_000_000)
        self.bytes = self.x.numel() * self.x.element_size()

    def __call__(self) -> None:
        self.x.sum()

    def rate(self) -> float:
        """Bytes per second, the best of several."""
        return self.bytes / best_of(self, 5)


def against(benchmark: Any, ours: Callable[[], object], ceiling: Callable[[], object], rounds: int = 11) -> list[float]:
    """Runs `ours` under pytest-benchmark, `ceiling` before each round; ceiling time / our time of each round."""
    reference: list[float] = []
    ours()
    ceiling()
    benchmark.pedantic(ours, setup=lambda: reference.append(seconds(ceiling)), rounds=rounds, warmup_rounds=0)
    return [theirs / mine for theirs, mine in zip(reference, benchmark.stats.stats.data, strict=True)]


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=README.parent, capture_output=True, text=True, check=False
    ).stdout.strip()


def machine() -> str:
    """One line on what the numbers were measured on; no absolute time is comparable without it."""
    module, _ = backends.extensions.cpu_module()
    level = module.instruction_set() if module else "no extension"
    commit = _git("describe", "--always")
    # Neither what is written nor tests change what is measured.
    outside = (":!/tests", ":!/docs", *(f":!/benchmarks/*.{kind}" for kind in ("md", "json", "png")))
    if _git("status", "--porcelain", "--", ":/", *outside):
        commit += "-dirty"
    return (
        f"{platform.machine()} ({level}), {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, discedit {version('discedit')} at {commit or 'no commit'}"
    )


def resident() -> int:
    """Bytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(run: Callable[[], Result]) -> tuple[int, Result]:
    """Most that was resident while `run` ran, looked at every 2 ms, and what it returned."""
    peak, done = resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()
    finally:
        done.set()
        watcher.join()
    return max(peak, resident()), result


def in_a_fresh_process(code: str) -> list[float]:
    """The numbers that Python code prints."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return [float(part) for part in run.stdout.split()]


class Log:
    """What has been measured, by key; kept on disk after each run, a line for each.

    What is there at the same machine and commit is not measured again; with `any_commit`, neither is what others
    measured. A run that fails is reported, and the others go on.
    """

    def __init__(self, path: Path, *, any_commit: bool = False) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
        self.machine = machine()
        self.any_commit = any_commit
        self.failed: list[str] = []

    def measure(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The entry, after `run` where it is not there; None if that fails."""
        entry = self.entries.get(key)
        if entry is not None and (self.any_commit or entry["machine"] == self.machine):
            return entry
        if key in self.failed:
            return None
        start = time.perf_counter()
        try:
            entry = {**run(), "machine": self.machine}
        except Exception:  # hours of other runs are not to be lost with this one
            self.failed.append(key)
            print(f"{key} failed:\n{traceback.format_exc()}", flush=True)
            return None
        with self.path.open("a+") as file:  # others may have written meanwhile
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self.entries = {**json.loads(file.read() or "{}"), key: entry}
            lines = [f"{json.dumps(name)}: {json.dumps(self.entries[name])}" for name in sorted(self.entries)]
            file.truncate(0)
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
        shown = {name: value for name, value in entry.items() if isinstance(value, (int, float))}
        print(key, shown, f"{time.perf_counter() - start:.1f} s in all", flush=True)
        return entry

    def end(self, program: str) -> None:
        """Of a program, with status 1 if a run failed."""
        if self.failed:
            raise SystemExit(f"{program}: {len(self.failed)} runs failed: {', '.join(self.failed)}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Of pages that are written from what was measured."""
    cells = list(rows)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) if cells else "Not measured."


@dataclass
class Table:
    """A table of benchmarks/README.md, filled by the tests of one file and written by `--write-readme`."""

    section: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.columns), cells
        self.rows.append(cells)
        print("\n" + "  ".join(f"{name}: {cell}" for name, cell in zip(self.columns, cells, strict=True)))

    def markdown(self) -> str:
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"### {self.title}\n\n{self.note}\n\n{table}\n\nMeasured on {machine()}.\n"

    def write(self) -> None:
        """Replaces this section, and nothing else, in benchmarks/README.md."""
        begin, end = f"<!-- begin {self.section} -->", f"<!-- end {self.section} -->"
        text = README.read_text()
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{README.name} must have one section between {begin} and {end}.")
        README.write_text(pattern.sub(lambda _: f"{begin}\n{self.markdown()}{end}", text))
