"""Puts discedit into a folder of its own: from a wheel, or built there for the device's own architecture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.gate import ROOT, TAIL, Ended, Setting, Worker
from benchmarks.gpu.report import Report, Row

WHEEL, BUILD = 90.0, 300.0  # seconds that each may take
PROBE = """
import json, torch
found = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if found else None,
    "architecture": "".join(map(str, torch.cuda.get_device_capability())) if found else None,
}))
"""


def probe(setting: Setting) -> Row:
    """Name and architecture of the device, both None where there is none.

    Raises:
        Ended: torch is not there, or does not answer.
    """
    status, said = setting.run([*setting.python, "-c", PROBE], 120)
    if status != 0:
        raise Ended(f"torch could not be asked for the device (status {status}):\n{said[-TAIL:]}")
    found: Row = json.loads(said.strip().splitlines()[-1])
    return found


def install(
    report: Report, setting: Setting, folder: Path, wheel: Path | None, architecture: str, say: Callable[[str], None]
) -> str:
    """What was installed: the wheel, or a build where there is none or it does not run here.

    Raises:
        Ended: neither works.
    """
    entry = report.begin("install", WHEEL if wheel else BUILD)
    start = time.monotonic()
    ways: list[tuple[str, list[str], float, dict[str, str]]] = []
    if wheel is not None:
        ways.append((f"wheel {wheel.name}", [str(wheel)], WHEEL, {}))
    required = {
        "DISCEDIT_BUILD": "require",
        "DISCEDIT_CUDA": "require",
        "CMAKE_ARGS": f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real",
    }
    ways.append((f"build for sm_{architecture}", ["--no-build-isolation", str(ROOT)], BUILD, required))
    for number, (way, arguments, seconds, variables) in enumerate(ways):
        target = folder / f"installed{number}"
        began = time.monotonic()
        command = [*setting.python, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", str(target)]
        status, said = setting.run([*command, *arguments], seconds, **variables)
        problem = f"pip ended with status {status}:\n{said[-TAIL:]}" if status != 0 else ""
        if not problem:
            problem = trial(setting, target, report.path.with_suffix(".log"))
        row = {"op": way, "status": "failed" if problem else "ok", "took, s": round(time.monotonic() - began, 1)}
        report.add(entry, row | ({"traceback": problem} if problem else {}))
        say(f"install: {way}: {problem or 'runs'}")
        if not problem:
            setting.environment["PYTHONPATH"] = paths(setting, target)
            report.end(entry, "ok", time.monotonic() - start)
            return way
    report.end(entry, "failed", time.monotonic() - start)
    raise Ended("discedit could not be installed with its CUDA kernels: neither way above works.")


def paths(setting: Setting, target: Path) -> str:
    """What is installed stands before the source tree, which holds the benchmarks."""
    return ":".join([str(target), setting.environment["PYTHONPATH"]])


def trial(setting: Setting, target: Path, log: Path) -> str:
    """What is wrong with the installation, empty where both modules load in a process that sees the device."""
    there = Setting(setting.python, {**setting.environment, "PYTHONPATH": paths(setting, target)}, setting.folder)
    try:
        worker = Worker(there, log)
    except Ended as error:
        return str(error)
    worker.close()
    wrong = [f"discedit._{name} {reason}" for name, reason in worker.facts["modules"].items() if reason]
    return "; ".join(wrong)
