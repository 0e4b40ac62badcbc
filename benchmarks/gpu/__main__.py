"""Installs discedit, checks its kernels, measures them and runs the tests on a GPU, most valuable first.

    make gpu-wheel PYTHON=python3.12                     # elsewhere: dist/discedit-...whl, for sm_90
    python -m benchmarks.gpu --wheel dist/discedit-...whl

Needs a CUDA build of torch, Triton and pip; pytest for the tests. Without a wheel, or where it does not run, discedit
is built for the device's own architecture (nvcc, a C++ compiler, setuptools, pybind11, cmake). Each row goes to
FOLDER/<device>-<time>.json as soon as it is there. A step that fails or runs out of its seconds is written down, and
the next one runs. The exit status is 0 only where all went well: 1 where something failed, 2 where there is no device.

    python -m benchmarks.gpu --rehearse --installed      # every step on the CPU, on tiny inputs
    python -m benchmarks.gpu --table FILE                # Markdown of what a run measured
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from benchmarks.gpu import install, plan, programs, rehearsal, table
from benchmarks.gpu.gate import ROOT, TAIL, Ended, Gate, Setting
from benchmarks.gpu.report import Report, Row

RESULTS = ROOT / "benchmarks" / "results"
REHEARSAL = 60.0  # minutes: the interpreter is slow, and a busy machine is no fault of the gate
QUERY = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,memory.used"


def main(given: list[str] | None = None) -> int:
    arguments = parsed(given)
    if arguments.table is not None:
        print(table.markdown(arguments.table))
        return 0
    signal.signal(signal.SIGTERM, _interrupted)
    say = _say
    for step in plan.STEPS:
        say(f"{step.name:14} {step.seconds * arguments.minutes / plan.MINUTES:4.0f} s: {step.estimate}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty").mkdir()
        (folder / "path").mkdir()
        # The benchmarks alone: the package in the source tree must not stand before the one that is installed.
        (folder / "path" / "benchmarks").symlink_to(ROOT / "benchmarks")
        setting = Setting(environment=environment(folder / "path"), folder=folder / "empty")
        try:
            device = {"device": "rehearsal", "architecture": "90"} if arguments.rehearse else install.probe(setting)
        except Ended as error:
            print(f"benchmarks.gpu: {error}", file=sys.stderr)
            return 2
        if device["device"] is None:
            print("benchmarks.gpu: torch finds no CUDA device here; nothing was measured.", file=sys.stderr)
            return 2
        now = datetime.datetime.now()
        stem = re.sub(r"[^a-z0-9]+", "-", device["device"].lower()).strip("-")
        report = Report(arguments.out / f"{stem}-{now:%Y-%m-%d-%H%M%S}.json", **device, date=f"{now:%Y-%m-%d}")
        report.fact(**code(setting), **nvidia(setting, "before"))
        if arguments.rehearse:
            prepared = rehearsal_in(setting, arguments.out)
            setting.environment |= {rehearsal.VARIABLE: str(prepared), "TRITON_INTERPRET": "1"}
        try:
            way = "what is installed here"
            if not arguments.installed:
                wheel = arguments.wheel and arguments.wheel.resolve()
                way = install.install(report, setting, folder, wheel, device["architecture"], say)
            report.fact(installed=way)
            gate = Gate(report, setting, arguments.minutes, say, programs=programs.PROGRAMS)
            gate.run(arguments.steps)
        except Ended as error:
            report.fact(error=str(error))
        except KeyboardInterrupt:
            report.fact(error="interrupted")
        report.fact(**nvidia(setting, "after"))
    failures = report.failures() + ([str(report.content["error"])] if "error" in report.content else [])
    report.fact(status="failed" if failures else "passed")
    say("\n".join([*(f"FAILED {line}" for line in failures), f"written: {report.path}"]))
    return 1 if failures else 0


def parsed(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--wheel", type=Path, metavar="FILE", help="what `make gpu-wheel` made")
    what.add_argument("--installed", action="store_true", help="neither install nor build: take what is there")
    what.add_argument(
        "--table", type=Path, metavar="FILE", help="print a run's tables as Markdown, and do nothing else"
    )
    parser.add_argument("--minutes", type=float, help=f"for all steps (default {plan.MINUTES:g})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default benchmarks/results; of a rehearsal: out")
    names = [step.name for step in (*plan.FIGURES, *plan.PROGRAMS)]
    parser.add_argument("--steps", nargs="+", choices=names, metavar="STEP", help=f"these alone: {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU: tiny inputs, CUDA kernels as host code")
    arguments = parser.parse_args(given)
    for option in ("wheel", "table"):
        path = getattr(arguments, option)
        if path is not None and not path.is_file():
            parser.error(f"--{option} must name a file, there is none at {path}")
    if arguments.minutes is None:
        arguments.minutes = REHEARSAL if arguments.rehearse else plan.MINUTES
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes:g}")
    arguments.out = arguments.out or (ROOT / "out" / "rehearsal" if arguments.rehearse else RESULTS)
    arguments.out = arguments.out.resolve()
    return arguments


def environment(path: Path) -> dict[str, str]:
    """Of all processes, which import from `path` first."""
    before = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": ":".join([str(path), *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }


def rehearsal_in(setting: Setting, out: Path) -> Path:
    """The folder with the CUDA kernels as host code, compiled once for each state of the sources."""
    folder = out / "host"
    sources = [path for part in ("csrc", "tests/cuda_on_host") for path in (ROOT / part).rglob("*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    if folder.is_dir() and any(path.stat().st_mtime < newest for path in folder.glob(f"{rehearsal.NAME}*")):
        shutil.rmtree(folder)
    status, said = setting.run([*setting.python, "-m", "benchmarks.gpu.rehearsal", str(folder)], 300)
    if status != 0:
        raise Ended(f"the CUDA kernels could not be compiled for the host (status {status}):\n{said[-TAIL:]}")
    return folder


def code(setting: Setting) -> Row:
    """The commit, where git is there and this is a checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return {"commit": None}
    commit = setting.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], 20)
    return {"commit": commit[1].strip() if commit[0] == 0 else None}


def nvidia(setting: Setting, when: str) -> Row:
    """What nvidia-smi says of the devices."""
    if shutil.which("nvidia-smi") is None:
        return {}
    status, said = setting.run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], 20)
    return {f"nvidia-smi, {when}": said.strip() if status == 0 else f"status {status}"}


def _say(line: str) -> None:
    print(line, flush=True)


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
