"""Which implementation of an op runs. A backend asked for by name runs or raises; only "auto" chooses.

Each backend is a module with one function per op that it has, of the op's name; `reference` has all of them.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch

from discedit.backends import cpp, cuda, extensions, reference, triton
from discedit.backends.buffers import FAST
from discedit.backends.triton import triton_interprets
from discedit.common import validation

NAMES = ("cpp", "cuda", "triton", "reference")
MOMENTS = ("pool", "class_moments", "merge_moments", "patch_moments")
BOUNDS = ("fisher_bound", "minimax_bound", "robust_bound", "hellinger_bound", "witness_bound")
COMPARISONS = ("one_vs_rest", "one_vs_one", "pairwise_min", "pairwise_mean")
OPS = (*MOMENTS, *BOUNDS, *COMPARISONS)
STEPS = ("fold_moments", "minimax_published_bound")  # what is no public op by itself
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    name: {op: getattr(module, op) for op in (*OPS, *STEPS) if hasattr(module, op)}
    for name, module in zip(NAMES, (cpp, cuda, triton, reference), strict=True)
}
# Up to which dimension a backend's bounds go, where not to all.
MOST_DIMENSIONS = {"cuda": 8, "triton": 2}
# Which bounds a backend compares classes by, where not by all.
ONLY_BOUNDS = {"cuda": (*FAST, "minimax_published"), "triton": (*FAST, "minimax_published")}


def why_not(backend: str, op: str, device: torch.device, dimension: int = 1, bound: str = "minimax") -> str:
    """Why `backend` cannot run `op` on tensors of `device`, with this bound in this dimension; empty when it can."""
    if op not in IMPLEMENTATIONS[backend]:
        return f"this version of discedit has no {backend} implementation of {op}"
    missing = _missing(backend)
    if missing:
        return missing
    if backend == "cpp" and device.type != "cpu":
        return f"it takes CPU tensors, and these are on {device}"
    if backend == "cuda" and (device.type != "cuda" or torch.version.hip):
        return f"it takes tensors of an NVIDIA GPU, and these are on {device}"
    if backend == "triton" and device.type != "cuda" and not (device.type == "cpu" and triton_interprets()):
        return f"it takes CUDA tensors, and these are on {device}"
    if dimension > MOST_DIMENSIONS.get(backend, dimension):
        return f"its bounds go up to {MOST_DIMENSIONS[backend]} dimensions, these have {dimension}"
    if bound not in ONLY_BOUNDS.get(backend, (bound,)):
        return f"it compares classes by {validation.quoted(ONLY_BOUNDS[backend])}, not by {bound!r}"
    return ""


def _missing(backend: str) -> str:
    """What a backend needs and this installation lacks."""
    if backend == "cpp":
        module, reason = extensions.cpu_module()
        return "" if module else f"discedit._cpu {reason}"
    if backend == "cuda":
        module, reason = extensions.cuda_module()
        return "" if module else f"discedit._cuda {reason}"
    return "triton is not installed" if backend == "triton" and importlib.util.find_spec("triton") is None else ""


def select(
    op: str, backend: str, device: torch.device, dimension: int = 1, bound: str = "minimax"
) -> Callable[..., Any]:
    """The implementation that runs; `dimension` counts for bounds, `bound` for what compares classes.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: a backend asked for by name cannot run here; the message says why.
    """
    validation.choice(op, "backend", backend, ("auto", *NAMES))
    if backend != "auto":
        reason = why_not(backend, op, device, dimension, bound)
        if reason:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}.")
        return IMPLEMENTATIONS[backend][op]
    for name in NAMES[:-1]:
        if name == "triton" and device.type == "cpu":  # the interpreter is there to be asked for
            continue
        if not why_not(name, op, device, dimension, bound):
            return IMPLEMENTATIONS[name][op]
    if device.type == "cpu":
        _warn_of_fallback()
    return IMPLEMENTATIONS["reference"][op]


@lru_cache(maxsize=1)
def _warn_of_fallback() -> None:
    warnings.warn(
        f"{_missing('cpp')}; running on the slower torch reference. `discedit doctor` says more.",
        RuntimeWarning,
        stacklevel=4,
    )


@dataclass(frozen=True)
class Status:
    """One backend as `discedit doctor` shows it."""

    name: str
    runs: bool
    detail: str
    ops: tuple[str, ...]


def status() -> list[Status]:
    """Every backend: whether it can run on this machine, and why not if it cannot."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "torch finds no CUDA device"
    threads = f"{torch.get_num_threads()} threads"
    details: dict[str, tuple[bool, Callable[[], str]]] = {
        "cpp": (True, lambda: f"discedit._cpu, {extensions.cpu_module()[0].instruction_set()}, {threads}"),
        "cuda": (gpu and not torch.version.hip, lambda: f"discedit._cuda, {device}"),
        "triton": (gpu, lambda: f"triton {version('triton')}, {device}"),
        "reference": (True, lambda: f"torch {torch.__version__}, float64, any device"),
    }
    found = []
    for name, (can_run, detail) in details.items():
        missing = _missing(name)
        runs = can_run and not missing
        ops = tuple(op for op in OPS if op in IMPLEMENTATIONS[name]) if runs else ()
        found.append(Status(name, runs, missing or detail(), ops))
    return found
