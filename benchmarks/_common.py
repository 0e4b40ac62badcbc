"""Timing and machine facts shared by the benchmarks."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from discedit import _backends


def best_of(run: Callable[[], object], repeats: int = 7) -> float:
    """Shortest of several runs, in seconds: what the machine can do when nobody disturbs it."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def paired_ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 7) -> tuple[float, float]:
    """Median and spread (largest minus smallest quartile) of ours / theirs, runs taken in turns."""
    ours()
    theirs()
    ratios = []
    for _ in range(repeats):
        start = time.perf_counter()
        theirs()
        middle = time.perf_counter()
        ours()
        ratios.append((time.perf_counter() - middle) / (middle - start))
    quartiles = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), quartiles[2] - quartiles[0]


def read_bandwidth() -> float:
    """Bytes per second of a plain streaming read (a float32 sum over 400 MB) with the threads that torch has."""
    x = torch.ones(100_000_000)
    return x.numel() * x.element_size() / best_of(lambda: x.sum(), 5)


def machine() -> str:
    """One line on what the numbers were measured on; no absolute time is comparable without it."""
    module, _ = _backends.cpu_module()
    level = module.instruction_set() if module else "no extension"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{platform.machine()} ({level}), {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, discedit {version('discedit')} at {commit or 'no commit'}"
    )
