"""What came out so far, on disk after every row."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Of a row or a step: only "ok" and "skipped" leave the gate green.
GOOD = ("ok", "skipped")
DEVICE_BROKEN = 86  # exit status of a process of tests whose device is of no use any more
# What a plain read reaches: rows of the ceilings that the others' rates are compared with.
READS = ("torch.sum", "16-byte loads")


class Report:
    """The JSON file of one run: facts, steps with their status, rows as they were measured.

    Args:
        path: of the file; its folder is made. It is replaced as a whole at each write, and never half written.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path = path
        self.start = time.monotonic()
        self.content: dict[str, Any] = {"status": "running", "seconds": 0.0, **facts, "steps": []}
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def fact(self, **facts: Any) -> None:
        self.content |= facts
        self.write()

    def begin(self, step: str, budget: float) -> Row:
        """The entry of a step, to be ended with `end`."""
        entry: Row = {"step": step, "status": "running", "budget, s": round(budget, 1), "seconds": 0.0, "rows": 0}
        self.content["steps"].append(entry)
        self.write()
        return entry

    def add(self, entry: Row, row: Row) -> None:
        """Keeps a row of a step."""
        row = {"step": entry["step"], **row}
        read = self.read_rate()
        if row.get("bytes") and row.get("seconds") and read and row["step"] != "ceilings":
            row["of read"] = row["bytes"] / row["seconds"] / read
        self.rows.append(row)
        entry["rows"] += 1
        self.write()

    def end(self, entry: Row, status: str, seconds: float, traceback: str = "") -> None:
        entry |= {"status": status, "seconds": round(seconds, 2)}
        if traceback:
            entry["traceback"] = traceback
        self.write()

    def read_rate(self) -> float | None:
        """Bytes per second of the fastest plain read of this run, once there is one."""
        rates = [row["bytes"] / row["seconds"] for row in self.rows if row.get("op") in READS and row.get("seconds")]
        return max(rates, default=None)

    def failures(self) -> list[str]:
        """What did not go well, a line each."""
        steps = [f"step {s['step']}: {s['status']}" for s in self.content["steps"] if s["status"] not in GOOD]
        return steps + [
            f"{row['step']}: {title(row)}: {row['status']}" for row in self.rows if row.get("status", "ok") not in GOOD
        ]

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.start, 2)
        head = json.dumps(self.content, indent=1)[:-2]
        rows = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n' if rows else f'{head},\n "rows": []\n}}\n')
        beside.replace(self.path)


def title(row: Row) -> str:
    """What a row is of, in words."""
    named = ("test", "op", "model", "kernel", "bound", "backend", "shape", "window", "dtype", "layout", "statistics")
    named += ("data", "channels", "batch", "way", "warning")
    shown = [row[key] for key in named if row.get(key) is not None]
    return " ".join("x".join(map(str, value)) if isinstance(value, list) else str(value) for value in shown)
