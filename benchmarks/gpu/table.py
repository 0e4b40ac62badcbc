"""Markdown of what a run measured, for README and benchmarks/README.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def markdown(path: Path) -> str:
    """All tables of a report, each with what it was measured on; rows that were not measured say why."""
    report = json.loads(path.read_text())
    rows = [row for row in report["rows"] if row.get("status", "ok") == "ok"]
    where = f"{report.get('device')}, torch {report.get('torch')}, Triton {report.get('triton')}"
    parts = [f"Measured on {where}, {report.get('date')}, at {report.get('commit')} ({path.name}).", state(report)]
    parts += [ceilings(rows), maps(rows), pairs(rows), patches(rows), passes(rows), counters(rows), tests(report)]
    missing = [f"- {row['step']}: {name(row)}: {reason(row)}" for row in report["rows"] if row not in rows]
    if missing:
        parts.append("Not measured, or failed:\n\n" + "\n".join(missing))
    return "\n\n".join(part for part in parts if part)


def state(report: Row) -> str:
    steps = ", ".join(f"{s['step']} {s['status']} ({s['seconds']:.0f} s)" for s in report["steps"])
    return f"{report['status'].capitalize()} after {report['seconds'] / 60:.1f} minutes: {steps}."


def ceilings(rows: list[Row]) -> str:
    cells = []
    for row in of(rows, "ceilings"):
        value = ""
        if "bytes" in row:
            value = f"{row['bytes'] / row['seconds'] / 1e12:.2f} TB/s"
        elif "cycles/s" in row:
            value = f"{row['cycles/s'] / 1e9:.2f} GHz"
        elif "conversions per clock and multiprocessor" in row:
            value = f"{row['conversions per clock and multiprocessor']:.1f} per clock and multiprocessor"
        elif "host, seconds" in row:
            value = f"{row['seconds'] * 1e6:.1f} us, of the host {row['host, seconds'] * 1e6:.1f} us"
        cells.append((row["op"], value))
    return table(("ceiling", "measured"), cells)


def maps(rows: list[Row]) -> str:
    head = ("map", "type", "layout", "statistics", "backend", "us", "of read", "host, us", "x torch", "idiom")
    cells = [
        (
            row["map"],
            row["dtype"],
            row["layout"],
            row["statistics"],
            row.get("backend") or row["way"],
            f"{row['seconds'] * 1e6:.1f}",
            number(row, "of read"),
            micro(row, "host, seconds"),
            number(row, "x torch"),
            row.get("torch", ""),
        )
        for row in of(rows, "class_moments")
    ]
    return table(head, cells)


def pairs(rows: list[Row]) -> str:
    head = ("bound", "data", "channels", "backend", "ms", "M pairs/s")
    cells = [
        (
            row["bound"],
            row["data"],
            f"{row['channels']:,}",
            row["backend"],
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['pairs/s'] / 1e6:,.0f}",
        )
        for row in of(rows, "pairwise_min")
    ]
    return table(head, cells)


def patches(rows: list[Row]) -> str:
    head = ("op", "map", "window", "layout", "backend", "us", "of read", "x torch", "x torch.mean")
    cells = [
        (
            row["op"],
            "x".join(map(str, row["shape"])),
            row.get("window", ""),
            row.get("layout", ""),
            row["backend"],
            f"{row['seconds'] * 1e6:.1f}",
            number(row, "of read") if "window" in row else "",
            number(row, "x torch"),
            number(row, "x torch.mean"),
        )
        for row in of(rows, "patches")
        if "backend" in row
    ]
    return table(head, cells)


def passes(rows: list[Row]) -> str:
    head = ("pass", "model", "batch", "bare, ms per batch", "x bare", "host, ms", "host, ms, ours", "first batch, s")
    cells = [
        (
            row["op"],
            row["model"],
            str(row["batch"]),
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['x bare']:.3f}",
            f"{row['host, seconds'] * 1e3:.1f}",
            f"{row['host, seconds, ours'] * 1e3:.1f}",
            f"{row['first batch, seconds, ours']:.2f}",
        )
        for row in rows
        if "x bare" in row
    ]
    return table(head, cells)


def counters(rows: list[Row]) -> str:
    cells = [
        (row["kernel"], metric, f"{value:,.4g}" if isinstance(value, (int, float)) else str(value))
        for row in of(rows, "profile")
        for metric, value in row.get("counters", {}).items()
    ]
    return table(("kernel", "counter", "value"), cells)


def tests(report: Row) -> str:
    found = Counter(row["status"] for row in report["rows"] if row["step"] == "tests" and "test" in row)
    return f"Tests: {', '.join(f'{count} {status}' for status, count in found.items())}." if found else ""


def of(rows: Iterable[Row], step: str) -> list[Row]:
    return [row for row in rows if row["step"] == step]


def name(row: Row) -> str:
    from benchmarks.gpu.report import title

    return title(row) or "?"


def reason(row: Row) -> str:
    lines = str(row.get("why") or row.get("traceback") or row["status"]).strip().splitlines()
    return lines[-1] if lines else ""


def number(row: Row, key: str) -> str:
    return f"{row[key]:.2f}" if key in row else ""


def micro(row: Row, key: str) -> str:
    return f"{row[key] * 1e6:.1f}" if key in row else ""


def table(head: tuple[str, ...], cells: list[tuple[str, ...]]) -> str:
    if not cells:
        return ""
    lines = [head, tuple("---" for _ in head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
