"""A pytest plugin for tests that share a GPU: this process runs its part of them and writes a line for each at once.

    DISCEDIT_SHARD=1/4 DISCEDIT_SHARD_LOG=FILE python -m pytest -p benchmarks.gpu.shard tests/test_gpu.py

What the log holds already is not run again: a process that died, at whatever test, is followed by one that goes on
behind it. DISCEDIT_SHARD_FIRST=N takes the first N cases of each test function and backend.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import rehearsal
from benchmarks.gpu.report import DEVICE_BROKEN

LOG = Path(os.environ["DISCEDIT_SHARD_LOG"])


def write(**line: Any) -> None:
    with LOG.open("a") as file:
        file.write(json.dumps(line) + "\n")


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.is_file() else []


def pytest_configure(config: pytest.Config) -> None:
    rehearsal.install()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, os.environ.get("DISCEDIT_SHARD", "0/1").split("/"))
    most = int(os.environ.get("DISCEDIT_SHARD_FIRST", len(items)))
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for item in items:
        backend = re.search(r"cuda|triton", item.name.partition("[")[2])
        kind = (getattr(item, "originalname", item.name), backend[0] if backend else "")
        seen[kind] += 1
        if seen[kind] <= most:
            chosen.append(item)
    mine = chosen[index::count]
    write(selected=len(mine))
    done = {line["test"] for line in lines() if "test" in line}
    items[:] = [item for item in mine if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    write(test=nodeid, begins=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    what: dict[str, Any] = {"status": {"passed": "ok"}.get(report.outcome, report.outcome)}
    if report.skipped:
        what["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif report.failed:
        what["traceback"] = report.longreprtext[-3000:]
    write(test=report.nodeid, seconds=round(report.duration, 3), **what)
    if report.failed and not _works():
        # An error of the device stays: every later test would fail with it. The next process goes on.
        os._exit(DEVICE_BROKEN)


def pytest_warning_recorded(warning_message: Any, nodeid: str) -> None:
    write(warning=f"{warning_message.category.__name__}: {warning_message.message}"[:300], at=nodeid)


def _works() -> bool:
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
