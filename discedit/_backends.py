"""Which implementation of an op runs. A backend asked for by name runs or raises; only "auto" chooses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from discedit import _checks, reference
from discedit._state import ClassMoments

NAMES = ("cpp", "cuda", "triton", "reference")
OPS = ("pool", "class_moments", "merge_moments", "fisher_bound", "minimax_bound", "one_vs_rest")


@lru_cache(maxsize=1)
def cpu_module() -> tuple[ModuleType | None, str]:
    """The compiled CPU core, or None and the reason why it is missing."""
    try:
        return importlib.import_module("discedit._cpu"), ""
    except ImportError as error:
        note = Path(__file__).with_name("_build.json")
        if note.exists():
            record = json.loads(note.read_text())["cpu"]
            if not record["built"]:
                return None, record["reason"]
        return None, f"cannot be imported: {error}"


def _cpp(name: str) -> Any:
    module, reason = cpu_module()
    if module is None:
        raise RuntimeError(f"backend 'cpp' cannot run: discedit._cpu {reason}.")
    return getattr(module, name)


def _cpp_pool(x: Tensor, channel_axis: int) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[channel_axis], dtype=torch.float64)
    _cpp("pool")(x, channel_axis, out, torch.get_num_threads())
    return out


def _cpp_class_moments(x: Tensor, channel_axis: int, labels: Tensor, state: ClassMoments) -> None:
    packed = _contiguous(state)
    _cpp("class_moments")(x, channel_axis, labels, *packed.tensors(), torch.get_num_threads())
    _write_back(packed, state)


def _contiguous(state: ClassMoments) -> ClassMoments:
    """The state itself where it is contiguous, copies where it is not."""
    return ClassMoments(*(tensor.contiguous() for tensor in state.tensors()))


def _write_back(packed: ClassMoments, state: ClassMoments) -> None:
    for source, target in zip(packed.tensors(), state.tensors(), strict=True):
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)


def _cpp_merge_moments(into: ClassMoments, other: ClassMoments) -> None:
    packed = _contiguous(into)
    _cpp("merge_moments")(packed.tensors(), _contiguous(other).tensors())
    _write_back(packed, into)


def _cpp_bound(bound: str) -> Callable[..., Tensor]:
    def run(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
        d = mean1.shape[-1]
        out = torch.empty(mean1.shape[:-1], dtype=torch.float64)
        shapes = ((-1, d), (-1, d, d), (-1, d), (-1, d, d))
        laws = (mean1, cov1, mean2, cov2)
        wide = (law.detach().double().reshape(shape).contiguous() for law, shape in zip(laws, shapes, strict=True))
        if out.numel():
            _cpp("bound")(bound, *wide, out.view(-1), torch.get_num_threads())
        return out

    return run


def _cpp_one_vs_rest(moments: ClassMoments, bound: str, witness: str) -> Tensor:
    out = torch.empty(moments.channels, moments.num_classes, dtype=torch.float64)
    _cpp("one_vs_rest")(*_contiguous(moments).tensors(), bound, witness, out, torch.get_num_threads())
    return out


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "cpp": {
        "pool": _cpp_pool,
        "class_moments": _cpp_class_moments,
        "merge_moments": _cpp_merge_moments,
        "fisher_bound": _cpp_bound("fisher"),
        "minimax_bound": _cpp_bound("minimax"),
        "one_vs_rest": _cpp_one_vs_rest,
    },
    "cuda": {},
    "triton": {},
    "reference": {op: getattr(reference, op) for op in OPS},
}


def why_not(backend: str, op: str, device: torch.device) -> str:
    """Why `backend` cannot run `op` on tensors of `device`; empty when it can."""
    if op not in IMPLEMENTATIONS[backend]:
        return f"this version of discedit has no {backend} implementation of {op}"
    if backend == "cpp":
        module, reason = cpu_module()
        if module is None:
            return f"discedit._cpu {reason}"
        if device.type != "cpu":
            return f"it takes CPU tensors, and these are on {device}"
    return ""


def select(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The implementation that runs.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: a backend asked for by name cannot run here; the message says why.
    """
    _checks.choice(op, "backend", backend, ("auto", *NAMES))
    if backend != "auto":
        reason = why_not(backend, op, device)
        if reason:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}.")
        return IMPLEMENTATIONS[backend][op]
    for name in NAMES:
        if not why_not(name, op, device):
            if name == "reference" and device.type == "cpu":
                _warn_of_fallback()
            return IMPLEMENTATIONS[name][op]
    raise AssertionError("the reference backend runs everywhere")


@lru_cache(maxsize=1)
def _warn_of_fallback() -> None:
    reason = cpu_module()[1]
    warnings.warn(
        f"discedit._cpu {reason}; running on the slower torch reference. `discedit doctor` says more.",
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
    module, reason = cpu_module()
    cpp = f"discedit._cpu, {module.instruction_set()}, {torch.get_num_threads()} threads" if module else reason
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} is present, but this version of discedit has no kernels for it"
    else:
        device = "this version of discedit has no CUDA kernels, and torch finds no CUDA device"
    triton = "is installed" if importlib.util.find_spec("triton") else "is not installed"
    return [
        Status("cpp", module is not None, cpp, tuple(IMPLEMENTATIONS["cpp"]) if module else ()),
        Status("cuda", False, device, ()),
        Status("triton", False, f"this version of discedit has no Triton kernels (triton {triton})", ()),
        Status("reference", True, f"torch {torch.__version__}, float64, any device", OPS),
    ]
