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
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, but re-exported without saying so

from discedit import _checks, reference
from discedit._state import State

NAMES = ("cpp", "cuda", "triton", "reference")
OPS = ("pool", "class_moments", "merge_moments", "fisher_bound", "minimax_bound", "one_vs_rest", "pairwise_min")
STEPS = ("fold_moments",)  # parts of ops that other modules run by themselves


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


def _cpp_pool(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(len(statistics), x.shape[0], x.shape[channel_axis], dtype=torch.float64)
    if "cls" not in statistics:
        data, target = _borrowed(x, out)
        _cpp("pool")(data, channel_axis, statistics, target, torch.get_num_threads())
        return out
    place = statistics.index("cls")
    others = statistics[:place] + statistics[place + 1 :]
    if others:
        planes = _cpp_pool(x, channel_axis, others)
        out[:place], out[place + 1 :] = planes[:place], planes[place:]
    _cpp_pool(_first_token(x), channel_axis, ("mean",), out[place : place + 1])
    return out


def _first_token(x: Tensor) -> Tensor:
    """Maps of one token, whose mean is "cls"."""
    return x[:, :1]


def _cpp_class_moments(
    x: Tensor, channel_axis: int, statistics: tuple[str, ...], scale: float, labels: Tensor, state: State
) -> None:
    if "cls" in statistics:
        if len(statistics) > 1:
            return _cpp_fold_moments(_cpp_pool(x, channel_axis, statistics), scale, labels, state)
        x, statistics = _first_token(x), ("mean",)
    run, threads = _cpp("class_moments"), torch.get_num_threads()
    data, classes = _borrowed(x, labels)
    return _in_place(state, lambda arrays: run(data, channel_axis, statistics, scale, classes, arrays, threads))


def _cpp_fold_moments(pooled: Tensor, scale: float, labels: Tensor, state: State) -> None:
    run, threads = _cpp("fold_moments"), torch.get_num_threads()
    data, classes = _borrowed(pooled, labels)
    _in_place(state, lambda arrays: run(data, scale, classes, arrays, threads))


def _cpp_merge_moments(into: State, other: State) -> None:
    run, threads = _cpp("merge_moments"), torch.get_num_threads()
    _in_place(into, lambda arrays: run(arrays, _borrowed(*_contiguous(other)), threads))


def _contiguous(state: State) -> tuple[Tensor, ...]:
    """The state's own tensors where they are contiguous, copies where they are not."""
    return tuple(tensor.contiguous() for tensor in state.tensors())


def _borrowed(*tensors: Tensor) -> tuple[Any, ...]:
    """DLPack capsules: a tenth of the time that a tensor's own __dlpack__ takes, which counts in a pass over layers."""
    return tuple(to_dlpack(tensor.resolve_neg()) for tensor in tensors)


def _in_place(state: State, write: Callable[[tuple[Any, ...]], None]) -> None:
    arrays = _contiguous(state)
    write(_borrowed(*arrays))
    for source, target in zip(arrays, state.tensors(), strict=True):
        if source is not target:
            target.copy_(source)


def _cpp_bound(bound: str) -> Callable[..., Tensor]:
    def run(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
        d = mean1.shape[-1]
        out = torch.empty(mean1.shape[:-1], dtype=torch.float64)
        shapes = ((-1, d), (-1, d, d), (-1, d), (-1, d, d))
        laws = (mean1, cov1, mean2, cov2)
        wide = (law.detach().double().reshape(shape).contiguous() for law, shape in zip(laws, shapes, strict=True))
        if out.numel():
            _cpp("bound")(bound, *_borrowed(*wide, out.view(-1)), torch.get_num_threads())
        return out

    return run


def _cpp_one_vs_rest(moments: State, bound: str, witness: str) -> Tensor:
    out = torch.empty(moments.channels, moments.num_classes, dtype=torch.float64)
    arrays, (target,) = _borrowed(*_contiguous(moments)), _borrowed(out)
    _cpp("one_vs_rest")(arrays, bound, witness, target, torch.get_num_threads())
    return out


def _cpp_pairwise_min(moments: State, bound: str, witness: str) -> tuple[Tensor, Tensor]:
    values = torch.empty(moments.channels, dtype=torch.float64)
    pairs = torch.empty(moments.channels, 2, dtype=torch.int64)
    arrays, targets = _borrowed(*_contiguous(moments)), _borrowed(values, pairs)
    _cpp("pairwise_min")(arrays, bound, witness, *targets, torch.get_num_threads())
    return values, pairs


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "cpp": {
        "pool": _cpp_pool,
        "class_moments": _cpp_class_moments,
        "merge_moments": _cpp_merge_moments,
        "fisher_bound": _cpp_bound("fisher"),
        "minimax_bound": _cpp_bound("minimax"),
        "one_vs_rest": _cpp_one_vs_rest,
        "pairwise_min": _cpp_pairwise_min,
        "fold_moments": _cpp_fold_moments,
    },
    "cuda": {},
    "triton": {},
    "reference": {op: getattr(reference, op) for op in (*OPS, *STEPS)},
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
        Status("cpp", module is not None, cpp, OPS if module else ()),
        Status("cuda", False, device, ()),
        Status("triton", False, f"this version of discedit has no Triton kernels (triton {triton})", ()),
        Status("reference", True, f"torch {torch.__version__}, float64, any device", OPS),
    ]
