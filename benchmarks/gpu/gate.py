"""Runs the steps one after the other, watches them, and writes down what comes.

Imports neither torch nor discedit: what they do to a process happens to others.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import FIGURES, MINUTES, PROGRAMS, Step
from benchmarks.gpu.report import Report, Row, title

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 10.0  # seconds beyond a step's budget, after which what still runs is ended
STARTING = 90.0  # seconds that a process may take until it is ready: a cold disk reads 3 GB of libraries
TAIL = 4000  # characters kept of what a program printed


class Ended(Exception):
    """A process ended, or was ended, before it had answered."""


@dataclass
class Setting:
    """How processes are started.

    Attributes:
        python: the interpreter, with what comes before its arguments.
        environment: of every process.
        folder: where they run: a folder with nothing in it that could be imported.
    """

    python: list[str] = field(default_factory=lambda: [sys.executable])
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: Path = ROOT

    def run(self, command: Iterable[str], seconds: float, **more: str) -> tuple[int | None, str]:
        """Exit status (None where the time was over) and what was printed, errors among it."""
        process = subprocess.Popen(
            list(command),
            cwd=self.folder,
            env={**self.environment, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            end(process)
            said, _ = process.communicate()
            return None, said or ""
        except BaseException:
            end(process)
            raise
        return process.returncode, said


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Worker:
    """A process of `benchmarks.gpu.worker`.

    Args:
        log: where it prints to.
        module: what it runs; the tests give one of their own.
        starting: seconds that it may take until it is ready.

    Raises:
        Ended: it does not get ready.
    """

    def __init__(
        self, setting: Setting, log: Path, module: str = "benchmarks.gpu.worker", starting: float = STARTING
    ) -> None:
        reading, writing = os.pipe()
        self._log = log
        with log.open("ab") as printed:
            self._from = printed.tell()
            self.process = subprocess.Popen(
                [*setting.python, "-m", module, str(writing)],
                cwd=setting.folder,
                env=setting.environment,
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                start_new_session=True,
                text=True,
            )
        os.close(writing)
        self._pipe, self._read = reading, b""
        os.set_blocking(reading, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(reading, selectors.EVENT_READ)
        try:
            self.facts: Row = self.ready(starting)
        except BaseException:
            self.close()
            raise

    def ready(self, seconds: float) -> Row:
        message = self.next(time.monotonic() + seconds)
        if "ready" not in message:
            raise Ended(message.get("failed", str(message)))
        facts: Row = message["ready"]
        return facts

    def ask(self, **request: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Ended(self.said()) from error

    def next(self, deadline: float) -> Row:
        """The next message.

        Raises:
            Ended: none came: the process ended by itself, or the time was over and it was ended.
        """
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not self._selector.select(left):
                end(self.process)
                raise Ended(f"ended, because its time was over. It had printed:\n{self.said()}")
            part = os.read(self._pipe, 1 << 16)
            if not part:
                status = self.process.wait()
                raise Ended(f"ended by itself with status {status}. It had printed:\n{self.said()}")
            self._read += part
        line, self._read = self._read.split(b"\n", 1)
        message: Row = json.loads(line)
        return message

    def said(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")[-TAIL:]

    def close(self) -> None:
        end(self.process)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._selector.close()
        os.close(self._pipe)


class Gate:
    """One run.

    Args:
        report: what is kept.
        setting: how processes are started.
        minutes: for all steps; their budgets are scaled to it.
        say: prints a line.
        module: what the worker runs.
        programs: the steps that are programs of their own: a function of this gate that gives rows until a deadline.
    """

    def __init__(
        self,
        report: Report,
        setting: Setting,
        minutes: float,
        say: Callable[[str], None],
        *,
        module: str = "benchmarks.gpu.worker",
        programs: dict[str, Callable[[Gate, float], Iterator[Row]]] | None = None,
    ) -> None:
        self.report, self.setting, self.say, self.module = report, setting, say, module
        self.programs = programs or {}
        self.scale = minutes / MINUTES
        self.over = time.monotonic() + 60 * minutes
        self.worker: Worker | None = None
        self.facts: Row = {}  # of the first process that got ready
        self.log = report.path.with_suffix(".log")

    def run(self, names: Iterable[str] | None = None, steps: tuple[Step, ...] = (*FIGURES, *PROGRAMS)) -> None:
        """These steps, or all; one that fails is written down, and the next one runs."""
        chosen = set(names) if names is not None else {step.name for step in steps}
        try:
            for step in steps:
                if step.name in chosen:
                    if step.name in self.programs:
                        self.close()  # the programs have the device for themselves
                    self.step(step)
        finally:
            self.close()

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def step(self, step: Step) -> None:
        start = time.monotonic()
        budget = min(step.seconds * self.scale, self.over - start)
        entry = self.report.begin(step.name, max(0.0, budget))
        status, traceback = "interrupted", ""
        try:
            if budget <= 1:
                status, traceback = "not started", "the time of the whole run was over"
            else:
                found = []
                for row in self._program(step, budget) if step.name in self.programs else self._figures(step, budget):
                    self.report.add(entry, row)
                    found.append(row.get("status", "ok"))
                    self.say(f"  {shown(self.report.rows[-1])}")
                status = status_of(found)
        except Ended as error:
            status, traceback = "failed", str(error)
        finally:
            taken = time.monotonic() - start
            self.report.end(entry, status, taken, traceback)
        self.say(f"{step.name}: {status}, {entry['rows']} rows, {taken:.1f} of {budget:.0f} s")
        if traceback:
            self.say(traceback)

    def _program(self, step: Step, budget: float) -> Iterator[Row]:
        return self.programs[step.name](self, time.monotonic() + budget)

    def _figures(self, step: Step, budget: float) -> Iterator[Row]:
        """Rows of a step of the worker; a new process goes on behind the case that the last one did not survive."""
        done = 0
        self._start()  # a cold disk is no fault of the step
        deadline = min(time.monotonic() + budget, max(self.over, time.monotonic() + 1))
        while True:
            self._start()
            assert self.worker is not None
            case: Row | None = None
            try:
                self.worker.ask(step=step.name, seconds=deadline - time.monotonic(), skip=done)
                while True:
                    message = self.worker.next(min(deadline + GRACE, max(self.over, deadline)))
                    if "row" in message:
                        done, case = done + 1, None
                        yield message["row"]
                    elif "case" in message:
                        case = message["case"]
                    elif message["end"] == "broken":  # the last row says why; the cases behind it go on elsewhere
                        break
                    else:
                        return
            except Ended as error:
                self.close()
                done += 1
                yield (case or {}) | {"status": "failed", "traceback": str(error)}
                if case is None:  # between cases: nothing tells that the next process fares better
                    return
            self.close()
            if time.monotonic() >= deadline - 1:
                yield {"status": "not measured", "why": "no time was left for the cases behind the one that failed"}
                return

    def _start(self) -> None:
        """A worker, where there is none."""
        if self.worker is None:
            starting = min(STARTING, max(GRACE, self.over - time.monotonic()))
            self.worker = Worker(self.setting, self.log, self.module, starting)
        if not self.facts:
            self.facts = self.worker.facts
            self.report.fact(**self.facts)


def status_of(rows: list[str]) -> str:
    """Of a step: the worst of its rows."""
    if not rows:
        return "failed"  # a step that measures nothing is broken
    for status in ("failed", "not measured"):
        if status in rows:
            return "out of budget" if status == "not measured" else status
    return "skipped" if set(rows) == {"skipped"} else "ok"


def shown(row: Row) -> str:
    """A row as a line on the screen."""
    parts = [row["step"], title(row)]
    if row.get("seconds"):
        parts.append(f"{row['seconds'] * 1e3:.4g} ms")
    parts += [f"{key} {row[key]:.3g}" for key in ("of read", "x torch", "x bare", "x torch.mean") if key in row]
    if row.get("status", "ok") != "ok":
        lines = str(row.get("traceback") or row.get("why") or "").strip().splitlines()
        parts.append(f"{row['status'].upper()}: {lines[-1] if lines else ''}")
    return "  ".join(part for part in parts if part)
