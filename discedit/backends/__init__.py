"""Which implementation of an op runs. A backend asked for by name runs or raises; only "auto" chooses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, but re-exported without saying so

from discedit.backends import reference
from discedit.common import validation
from discedit.common.state import State
from discedit.common.validation import Rule, Window

NAMES = ("cpp", "cuda", "triton", "reference")
OPS = (
    "pool",
    "class_moments",
    "merge_moments",
    "patch_moments",
    "fisher_bound",
    "minimax_bound",
    "robust_bound",
    "hellinger_bound",
    "witness_bound",
    "one_vs_rest",
    "one_vs_one",
    "pairwise_min",
    "pairwise_mean",
)
STEPS = ("fold_moments", "minimax_published_bound")  # what is no public op by itself


@lru_cache(maxsize=1)
def cpu_module() -> tuple[ModuleType | None, str]:
    """The compiled CPU core, or None and the reason why it is missing."""
    return _extension("cpu")


@lru_cache(maxsize=1)
def cuda_module() -> tuple[ModuleType | None, str]:
    """The compiled CUDA kernels, or None and the reason why they are missing."""
    return _extension("cuda")


def _extension(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"discedit._{name}"), ""
    except ImportError as error:
        note = Path(__file__).with_name("_build.json")
        if note.exists():
            record = json.loads(note.read_text()).get(name, {"built": False, "reason": "was not built"})
            if not record["built"]:
                return None, record["reason"]
        return None, f"cannot be imported: {error}"


def _cpp(name: str) -> Any:
    module, reason = cpu_module()
    if module is None:
        raise RuntimeError(f"backend 'cpp' cannot run: discedit._cpu {reason}.")
    return getattr(module, name)


def _cuda(name: str) -> Any:
    module, reason = cuda_module()
    if module is None:
        raise RuntimeError(f"backend 'cuda' cannot run: discedit._cuda {reason}.")
    return getattr(module, name)


Pool = Callable[..., Tensor]


def _with_first_token(run: Pool) -> Pool:
    """`run`, which knows all statistics but "cls", with that one too."""

    def pool(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor | None = None) -> Tensor:
        if out is None:
            shape = (len(statistics), x.shape[0], x.shape[channel_axis])
            out = torch.empty(shape, dtype=torch.float64, device=x.device)
        if "cls" not in statistics:
            return run(x, channel_axis, statistics, out)
        place = statistics.index("cls")
        others = statistics[:place] + statistics[place + 1 :]
        if others:
            planes = pool(x, channel_axis, others)
            out[:place], out[place + 1 :] = planes[:place], planes[place:]
        run(_first_token(x), channel_axis, ("mean",), out[place : place + 1])
        return out

    return pool


def _first_token(x: Tensor) -> Tensor:
    """Maps of one token, whose mean is "cls"."""
    return x[:, :1]


# ---- cpp ------------------------------------------------------------------------------------------------------------


def _cpp_pool_all(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor) -> Tensor:
    data, target = _borrowed(x, out)
    _cpp("pool")(data, channel_axis, statistics, target, torch.get_num_threads())
    return out


_cpp_pool = _with_first_token(_cpp_pool_all)


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


def _cpp_patch_moments(x: Tensor, window: Window, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, scatter = _moments_of_patches(x, window)
    places = None if positions is None else _borrowed(positions)[0]
    _cpp("patch_moments")(*_borrowed(x), *window, places, *_borrowed(mean, scatter), torch.get_num_threads())
    return mean, scatter


def _moments_of_patches(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Mean and scatter, to be written to."""
    shape = x.shape[1], window.taps
    mean = torch.empty(*shape, dtype=torch.float64, device=x.device)
    return mean, torch.empty(*shape, window.taps, dtype=torch.float64, device=x.device)


def _contiguous(state: State) -> tuple[Tensor, ...]:
    """The state's own tensors where they are contiguous, copies where they are not."""
    return tuple(tensor.contiguous() for tensor in state.tensors())


def _borrowed(*tensors: Tensor) -> tuple[Any, ...]:
    """DLPack capsules: a tenth of the time that a tensor's own __dlpack__ takes, which counts in a pass over layers."""
    return tuple(to_dlpack(tensor.resolve_neg()) for tensor in tensors)


def _in_place(state: State, write: Callable[[tuple[Any, ...]], None]) -> None:
    arrays = _contiguous(state)
    write(_borrowed(*arrays))
    _give_back(arrays, state)


def _give_back(arrays: tuple[Tensor, ...], state: State) -> None:
    """Into the state's own tensors, where they were not contiguous."""
    for source, target in zip(arrays, state.tensors(), strict=True):
        if source is not target:
            target.copy_(source)


def _flat_laws(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> list[Tensor]:
    """Means (pairs, d) and covariances (pairs, d, d), contiguous, in float64."""
    pairs, d = mean1.shape[:-1].numel(), mean1.shape[-1]
    shapes = ((pairs, d), (pairs, d, d)) * 2
    laws = zip((mean1, cov1, mean2, cov2), shapes, strict=True)
    return [law.detach().double().reshape(shape).contiguous() for law, shape in laws]


def _compiled_bound(
    module: Callable[[str], Any], bound: str, where: Callable[[torch.device], int]
) -> Callable[..., Tensor]:
    """`bound` of an extension, which runs on so many threads, or on this stream."""

    def run(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
        out = torch.empty(mean1.shape[:-1], dtype=torch.float64, device=mean1.device)
        laws = _flat_laws(mean1, cov1, mean2, cov2)
        if out.numel():
            module("bound")(bound, *_borrowed(*laws, out.view(-1)), where(out.device))
        return out

    return run


def _cpp_bound(bound: str) -> Callable[..., Tensor]:
    return _compiled_bound(_cpp, bound, lambda _: torch.get_num_threads())


def _cpp_published(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    return _cpp_member(Rule("minimax_published"), mean1, cov1, mean2, cov2)


def _cpp_hellinger(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    return _cpp_member(Rule("hellinger"), mean1, cov1, mean2, cov2)


def _cpp_robust(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, radius: Tensor, rho: float) -> Tensor:
    return _cpp_member(Rule("robust", rho=rho), mean1, cov1, mean2, cov2, radius)


def _cpp_member(
    rule: Rule, mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, radius: Tensor | None = None
) -> Tensor:
    out = torch.empty(mean1.shape[:-1], dtype=torch.float64)
    laws = _flat_laws(mean1, cov1, mean2, cov2)
    if out.numel():
        ball = None if radius is None else _borrowed(radius.contiguous().view(-1))[0]
        _cpp("member")(rule, *_borrowed(*laws), ball, *_borrowed(out.view(-1)), torch.get_num_threads())
    return out


def _cpp_witness(mean1: Tensor, second1: Tensor, mean2: Tensor, second2: Tensor, published: bool) -> Tensor:
    out = torch.empty(mean1.shape, dtype=torch.float64)
    moments = [moment.detach().double().contiguous() for moment in (mean1, second1, mean2, second2)]
    _cpp("witness")(published, *_borrowed(*moments, out), torch.get_num_threads())
    return out


# Bounds with kernels of their own; the others compare one pair after the other.
FAST = ("fisher", "minimax")


def _cpp_one_vs_rest(moments: State, rule: Rule, witness: str) -> Tensor:
    out = torch.empty(moments.channels, moments.num_classes, dtype=torch.float64)
    if rule.name not in FAST:
        return _cpp_compare(moments, rule, witness, "with_rest", out)
    arrays, (target,) = _borrowed(*_contiguous(moments)), _borrowed(out)
    _cpp("one_vs_rest")(arrays, rule.name, witness, target, torch.get_num_threads())
    return out


def _cpp_one_vs_one(moments: State, rule: Rule, witness: str) -> Tensor:
    out = torch.empty(moments.channels, moments.num_classes, moments.num_classes, dtype=torch.float64)
    return _cpp_compare(moments, rule, witness, "all_pairs", out)


def _cpp_pairwise_mean(moments: State, rule: Rule, witness: str) -> Tensor:
    return _cpp_compare(moments, rule, witness, "mean", torch.empty(moments.channels, dtype=torch.float64))


def _cpp_compare(
    moments: State, rule: Rule, witness: str, comparison: str, out: Tensor, pairs: Tensor | None = None
) -> Tensor:
    arrays, targets = _borrowed(*_contiguous(moments)), _borrowed(out)
    classes = None if pairs is None else _borrowed(pairs)[0]
    _cpp("one_vs_one")(arrays, rule, witness, comparison, *targets, classes, torch.get_num_threads())
    return out


def _cpp_pairwise_min(moments: State, rule: Rule, witness: str) -> tuple[Tensor, Tensor]:
    values = torch.empty(moments.channels, dtype=torch.float64)
    pairs = torch.empty(moments.channels, 2, dtype=torch.int64)
    if rule.name not in FAST:
        return _cpp_compare(moments, rule, witness, "least", values, pairs), pairs
    arrays, targets = _borrowed(*_contiguous(moments)), _borrowed(values, pairs)
    _cpp("pairwise_min")(arrays, rule.name, witness, *targets, torch.get_num_threads())
    return values, pairs


# minimax_published rises with minimax: what knows one of them knows the other.


def _published_bound(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def minimax_published(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
        return reference.published(run(mean1, cov1, mean2, cov2))

    return minimax_published


def _published_rest(run: Callable[[State, Rule, str], Tensor]) -> Callable[[State, Rule, str], Tensor]:
    def one_vs_rest(moments: State, rule: Rule, witness: str) -> Tensor:
        if rule.name == "minimax_published":
            return reference.published(run(moments, Rule("minimax"), witness))
        return run(moments, rule, witness)

    return one_vs_rest


def _published_pairs(
    run: Callable[[State, Rule, str], tuple[Tensor, Tensor]],
) -> Callable[[State, Rule, str], tuple[Tensor, Tensor]]:
    def pairwise_min(moments: State, rule: Rule, witness: str) -> tuple[Tensor, Tensor]:
        if rule.name == "minimax_published":
            values, pairs = run(moments, Rule("minimax"), witness)
            return reference.published(values), pairs
        return run(moments, rule, witness)

    return pairwise_min


# ---- cuda -----------------------------------------------------------------------------------------------------------

UNSORTED = 4096  # samples up to which a class's members are found by looking at every label


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _cuda_scratch(size: int, device: torch.device) -> Any:
    """Working memory of so many float64, from torch's own allocator."""
    return _borrowed(torch.empty(size, dtype=torch.float64, device=device))[0] if size else None


def _cuda_pool_all(x: Tensor, channel_axis: int, statistics: tuple[str, ...], out: Tensor) -> Tensor:
    scratch = _cuda_scratch(_cuda("pool_scratch")(*_borrowed(x), channel_axis, statistics), x.device)
    data, target = _borrowed(x, out)
    _cuda("pool")(data, channel_axis, statistics, target, scratch, _stream(x.device))
    return out


_cuda_pool = _with_first_token(_cuda_pool_all)


def _cuda_class_moments(
    x: Tensor, channel_axis: int, statistics: tuple[str, ...], scale: float, labels: Tensor, state: State
) -> None:
    _cuda_fold_moments(_cuda_pool(x, channel_axis, statistics), scale, labels, state)


def _cuda_fold_moments(pooled: Tensor, scale: float, labels: Tensor, state: State) -> None:
    order = _borrowed(torch.sort(labels, stable=True).indices)[0] if len(labels) > UNSORTED else None
    data, classes = _borrowed(pooled.contiguous(), labels)
    stream = _stream(labels.device)
    _in_place(state, lambda arrays: _cuda("fold_moments")(data, scale, classes, order, arrays, stream))


def _cuda_merge_moments(into: State, other: State) -> None:
    stream = _stream(into.device)
    _in_place(into, lambda arrays: _cuda("merge_moments")(arrays, _borrowed(*_contiguous(other)), stream))


def _cuda_patch_moments(x: Tensor, window: Window, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, scatter = _moments_of_patches(x, window)
    count = None if positions is None else len(positions)
    scratch = _cuda_scratch(_cuda("patch_moments_scratch")(*_borrowed(x), *window, count), x.device)
    places = None if positions is None else _borrowed(positions)[0]
    targets = _borrowed(mean, scatter)
    _cuda("patch_moments")(*_borrowed(x), *window, places, *targets, scratch, _stream(x.device))
    return mean, scatter


def _cuda_bound(bound: str) -> Callable[..., Tensor]:
    return _compiled_bound(_cuda, bound, _stream)


def _cuda_one_vs_rest(moments: State, rule: Rule, witness: str) -> Tensor:
    arrays, device = _contiguous(moments), moments.device
    out = torch.empty(moments.channels, moments.num_classes, dtype=torch.float64, device=device)
    scratch = _cuda_scratch(_cuda("one_vs_rest_scratch")(_borrowed(*arrays)), device)
    _cuda("one_vs_rest")(_borrowed(*arrays), rule.name, witness, *_borrowed(out), scratch, _stream(device))
    return out


def _cuda_pairwise_min(moments: State, rule: Rule, witness: str) -> tuple[Tensor, Tensor]:
    arrays, device = _contiguous(moments), moments.device
    values = torch.empty(moments.channels, dtype=torch.float64, device=device)
    pairs = torch.empty(moments.channels, 2, dtype=torch.int64, device=device)
    scratch = _cuda_scratch(_cuda("pairwise_min_scratch")(_borrowed(*arrays)), device)
    targets = _borrowed(values, pairs)
    _cuda("pairwise_min")(_borrowed(*arrays), rule.name, witness, *targets, scratch, _stream(device))
    return values, pairs


# ---- triton ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def triton_interprets() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors; for tests."""
    if importlib.util.find_spec("triton") is None:
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def _triton(op: str, name: str) -> Callable[..., Any]:
    """A launcher of `discedit.kernels`, imported when first used: Triton takes a while."""

    def run(first: Tensor | State, *others: Any) -> Any:
        launch = getattr(importlib.import_module(f"discedit.kernels.{op}"), name)
        with _on(first.device):
            return launch(_resolved(first), *(_resolved(other) for other in others))

    return run


def _resolved(argument: Any) -> Any:
    """Triton reads a tensor's memory as it is, without the sign of a view that torch has negated."""
    return argument.resolve_neg() if isinstance(argument, Tensor) else argument


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Where kernels are launched, which is not always the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_triton_pool = _with_first_token(_triton("pool", "pool"))
_triton_fold = _triton("class_moments", "fold_moments")


def _triton_class_moments(
    x: Tensor, channel_axis: int, statistics: tuple[str, ...], scale: float, labels: Tensor, state: State
) -> None:
    _triton_fold_moments(_triton_pool(x, channel_axis, statistics), scale, labels, state)


def _triton_fold_moments(pooled: Tensor, scale: float, labels: Tensor, state: State) -> None:
    if labels.device.type == "cpu":
        validation.label_range("class_moments", labels, state.num_classes)
    arrays = _contiguous(state)
    _triton_fold(pooled.contiguous(), scale, labels, type(state)(*arrays))
    _give_back(arrays, state)


_triton_bound = _triton("bounds", "bound")
_triton_pairs = _triton("pairwise_min", "pairwise_min")


def _triton_bound_named(bound: str) -> Callable[..., Tensor]:
    def run(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
        bounds: Tensor = _triton_bound(*_flat_laws(mean1, cov1, mean2, cov2), bound)
        return bounds.view(mean1.shape[:-1])

    return run


def _triton_pairwise_min(moments: State, rule: Rule, witness: str) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _triton_pairs(type(moments)(*_contiguous(moments)), rule.name, witness)
    return result


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "cpp": {
        "pool": _cpp_pool,
        "class_moments": _cpp_class_moments,
        "merge_moments": _cpp_merge_moments,
        "patch_moments": _cpp_patch_moments,
        "fisher_bound": _cpp_bound("fisher"),
        "minimax_bound": _cpp_bound("minimax"),
        "minimax_published_bound": _cpp_published,
        "robust_bound": _cpp_robust,
        "hellinger_bound": _cpp_hellinger,
        "witness_bound": _cpp_witness,
        "one_vs_rest": _cpp_one_vs_rest,
        "one_vs_one": _cpp_one_vs_one,
        "pairwise_min": _published_pairs(_cpp_pairwise_min),
        "pairwise_mean": _cpp_pairwise_mean,
        "fold_moments": _cpp_fold_moments,
    },
    "cuda": {
        "pool": _cuda_pool,
        "class_moments": _cuda_class_moments,
        "merge_moments": _cuda_merge_moments,
        "patch_moments": _cuda_patch_moments,
        "fisher_bound": _cuda_bound("fisher"),
        "minimax_bound": _cuda_bound("minimax"),
        "minimax_published_bound": _published_bound(_cuda_bound("minimax")),
        "one_vs_rest": _published_rest(_cuda_one_vs_rest),
        "pairwise_min": _published_pairs(_cuda_pairwise_min),
        "fold_moments": _cuda_fold_moments,
    },
    "triton": {
        "pool": _triton_pool,
        "class_moments": _triton_class_moments,
        "fold_moments": _triton_fold_moments,
        "patch_moments": _triton("patch_moments", "patch_moments"),
        "fisher_bound": _triton_bound_named("fisher"),
        "minimax_bound": _triton_bound_named("minimax"),
        "minimax_published_bound": _published_bound(_triton_bound_named("minimax")),
        "pairwise_min": _published_pairs(_triton_pairwise_min),
    },
    "reference": {op: getattr(reference, op) for op in (*OPS, *STEPS)},
}


# Up to which dimension a backend's bounds go, where not to all.
MOST_DIMENSIONS = {"cuda": 8, "triton": 2}
# Which bounds a backend compares classes by, where not by all.
ONLY_BOUNDS = {"cuda": (*FAST, "minimax_published"), "triton": (*FAST, "minimax_published")}


def why_not(backend: str, op: str, device: torch.device, dimension: int = 1, bound: str = "minimax") -> str:
    """Why `backend` cannot run `op` on tensors of `device`, with this bound in this dimension; empty when it can."""
    if op not in IMPLEMENTATIONS[backend]:
        return f"this version of discedit has no {backend} implementation of {op}"
    if backend == "cpp":
        module, reason = cpu_module()
        if module is None:
            return f"discedit._cpu {reason}"
        if device.type != "cpu":
            return f"it takes CPU tensors, and these are on {device}"
    if backend == "cuda":
        module, reason = cuda_module()
        if module is None:
            return f"discedit._cuda {reason}"
        if device.type != "cuda" or torch.version.hip:
            return f"it takes tensors of an NVIDIA GPU, and these are on {device}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type != "cuda" and not (device.type == "cpu" and triton_interprets()):
            return f"it takes CUDA tensors, and these are on {device}"
    if dimension > MOST_DIMENSIONS.get(backend, dimension):
        return f"its bounds go up to {MOST_DIMENSIONS[backend]} dimensions, these have {dimension}"
    if bound not in ONLY_BOUNDS.get(backend, (bound,)):
        return f"it compares classes by {validation.quoted(ONLY_BOUNDS[backend])}, not by {bound!r}"
    return ""


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
    for name in NAMES:
        if name == "triton" and device.type == "cpu":  # the interpreter is there to be asked for
            continue
        if not why_not(name, op, device, dimension, bound):
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
    kernels, missing = cuda_module()
    cuda = kernels is not None and torch.cuda.is_available() and not torch.version.hip
    present = torch.cuda.get_device_name() if torch.cuda.is_available() else "torch finds no CUDA device"
    installed = importlib.util.find_spec("triton") is not None
    triton = f"triton {version('triton')}, {present}" if installed else "triton is not installed"

    def having(backend: str) -> tuple[str, ...]:
        return tuple(op for op in OPS if op in IMPLEMENTATIONS[backend])

    return [
        Status("cpp", module is not None, cpp, OPS if module else ()),
        Status(
            "cuda",
            cuda,
            f"discedit._cuda {missing}" if missing else f"discedit._cuda, {present}",
            having("cuda") if cuda else (),
        ),
        Status("triton", installed and torch.cuda.is_available(), triton, having("triton") if installed else ()),
        Status("reference", True, f"torch {torch.__version__}, float64, any device", OPS),
    ]
