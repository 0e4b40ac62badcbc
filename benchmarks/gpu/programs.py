"""The steps that are programs of their own: the tests, and the tools that look into kernels."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import rehearsal
from benchmarks.gpu.gate import ROOT, TAIL, Ended, Gate, end
from benchmarks.gpu.report import DEVICE_BROKEN, Row

TOOLS = ["/usr/local/cuda/bin", *sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)]
# Neither the project's settings, which make errors of warnings and want plugins, nor foreign plugins.
PYTEST = ("-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "--noconftest")
TESTS = str(ROOT / "tests" / "test_gpu.py")
ENDS = (0, 1, 5)  # of pytest: all passed, some failed, none was left
# Of what Nsight Compute says, what is kept, by the start of the metric's name.
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit",
    "launch__grid_size",
    "launch__block_size",
    "sm__maximum_warps_per_active_cycle_pct",
    "smsp__average_warp",  # the reasons for which warps stall
    "lts__t_sector_hit_rate.pct",
)


class Shard:
    """One process of the tests, and those that go on behind it where it dies."""

    def __init__(
        self,
        gate: Gate,
        folder: Path,
        index: int,
        count: int,
        arguments: list[str],
        prefix: list[str],
        first: int | None,
    ) -> None:
        self.gate, self.arguments, self.prefix = gate, arguments, prefix
        self.log, self.printed = folder / f"shard{index}.jsonl", folder / f"shard{index}.txt"
        self.variables = {"DISCEDIT_SHARD": f"{index}/{count}", "DISCEDIT_SHARD_LOG": str(self.log)}
        if first is not None:
            self.variables["DISCEDIT_SHARD_FIRST"] = str(first)
        self.read = 0
        self.selected: int | None = None
        self.begun: str | None = None
        self.results = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        setting = self.gate.setting
        with self.printed.open("ab") as printed:
            return subprocess.Popen(
                [*self.prefix, *setting.python, *PYTEST, "-p", "benchmarks.gpu.shard", *self.arguments],
                cwd=setting.folder,
                env={**setting.environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def rows(self) -> Iterator[Row]:
        """What has been written since."""
        if not self.log.is_file():
            return
        with self.log.open() as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self.read += len(whole.encode())
        for line in whole.splitlines():
            found = json.loads(line)
            if "selected" in found:
                self.selected = found["selected"]
            elif "begins" in found:
                self.begun = found["test"]
            else:
                if "test" in found:
                    self.begun = None
                    self.results += 1
                    found["test"] = short(found["test"])
                yield found

    def go_on(self) -> Row | None:
        """Of a process that has ended: starts another behind the test that it died of, if tests are left. A row where
        something is to be said."""
        status = self.process.wait()
        died, self.begun = self.begun, None
        if died is not None:
            self.results += 1
        done = self.selected is not None and self.results >= self.selected
        if died is None and ((done and status in ENDS) or status == DEVICE_BROKEN):
            row = None
        else:
            said = f"the process ended with status {status}. It had printed:\n{self.said()}"
            row = {"status": "failed", "traceback": said} | ({"test": short(died)} if died else {})
            done = done or died is None  # no test to go on behind
        if not done:
            self.process = self._start()
        return row

    def said(self) -> str:
        return self.printed.read_text(errors="replace")[-TAIL:]


def short(test: str) -> str:
    """A test's name without that of its file."""
    return test.partition("::")[2] or test


def run_tests(
    gate: Gate, deadline: float, arguments: list[str], prefix: list[str], processes: int, first: int | None
) -> Iterator[Row]:
    """Rows of tests, by so many processes, until the deadline; of each function and backend only the first cases."""
    with tempfile.TemporaryDirectory() as name:
        shards = [Shard(gate, Path(name), i, processes, arguments, prefix, first) for i in range(processes)]
        running = list(shards)
        try:
            while running and time.monotonic() < deadline:
                time.sleep(0.05)
                for shard in list(running):
                    ended = shard.process.poll() is not None  # before what it wrote is read
                    yield from shard.rows()
                    if not ended:
                        continue
                    row = shard.go_on()
                    if row is not None:
                        yield row
                    if shard.process.poll() is not None:
                        running.remove(shard)
            for shard in running:
                end(shard.process)
                yield from shard.rows()
                left = "an unknown number" if shard.selected is None else str(shard.selected - shard.results)
                why = f"the step's time was over; {left} tests of one process have not run"
                yield {"status": "not measured", "why": why} | ({"test": short(shard.begun)} if shard.begun else {})
            if all(shard.selected == 0 for shard in shards):
                yield {"status": "failed", "traceback": f"no test was selected:\n{shards[0].said()}"}
        finally:
            for shard in shards:
                end(shard.process)


def tests(gate: Gate, deadline: float) -> Iterator[Row]:
    """tests/test_gpu.py by several processes, so that one compiles while another runs."""
    rehearsed = rehearsal.VARIABLE in gate.setting.environment
    processes = 2 if rehearsed else min(6, max(1, (os.cpu_count() or 1) // 2))
    yield from run_tests(gate, deadline, [TESTS], [], processes, first=1 if rehearsed else None)


def sanitizer(gate: Gate, deadline: float) -> Iterator[Row]:
    """compute-sanitizer over some tests of the CUDA kernels: the same tests without it in a rehearsal."""
    tool = which("compute-sanitizer")
    if tool is None and rehearsal.VARIABLE not in gate.setting.environment:
        yield {"status": "skipped", "why": "compute-sanitizer is not installed"}
        return
    prefix = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"] if tool else []
    for row in run_tests(gate, deadline, ["-k", "cuda and small", TESTS], prefix, 1, first=2 if tool else 1):
        yield row | {"way": "memcheck" if tool else "without the sanitizer"}


def profile(gate: Gate, deadline: float) -> Iterator[Row]:
    """What Nsight Compute counts for the kernels of `benchmarks.gpu.profiled`; in a rehearsal that program alone."""
    tool = which("ncu")
    program = [*gate.setting.python, "-m", "benchmarks.gpu.profiled"]
    if rehearsal.VARIABLE in gate.setting.environment:
        tool = None
    elif tool is None:
        yield {"status": "skipped", "why": "ncu (Nsight Compute) is not installed"}
        return
    # The clocks are left as they are; the first launch of each kernel is skipped by looking at the last one alone.
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
    options = [f"--section={name}" for name in sections]
    kernels = "regex:pool_rows|pool_columns|fold|compare|best_of"
    command = [tool, "--csv", "--page", "raw", "--clock-control", "none", *options, "-k", kernels] if tool else []
    status, said = gate.setting.run([*command, *program], deadline - time.monotonic())
    if status != 0:
        raise Ended(f"{'ncu' if tool else 'profiled'} ended with status {status}:\n{said[-TAIL:]}")
    if tool is None:
        yield {"op": "profiled", "status": "ok", "why": "ran without ncu"}
        return
    yield from counted(said)


def which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(TOOLS))


def counted(said: str) -> Iterator[Row]:
    """Rows of the CSV that ncu prints with ``--page raw``: names, units, then a line per launch; the last of each
    kernel."""
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise Ended(f"ncu printed no table:\n{said[-TAIL:]}")
    names, units, *launches = csv.reader(io.StringIO("\n".join(lines[start:])))
    last: dict[str, Any] = {}
    for launch in launches:
        if len(launch) != len(names):
            continue
        cells = dict(zip(names, launch, strict=True))
        found: dict[str, Any] = {}
        for name, unit in zip(names, units, strict=True):
            if name.startswith(METRICS) and cells[name]:
                found[f"{name}, {unit}" if unit else name] = _number(cells[name])
        last[cells["Kernel Name"].split("(")[0]] = found
    if not last:
        raise Ended(f"ncu saw none of the kernels:\n{said[-TAIL:]}")
    for kernel, found in last.items():
        yield {"kernel": kernel, "status": "ok", "counters": found}


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


PROGRAMS = {"tests": tests, "profile": profile, "sanitizer": sanitizer}
