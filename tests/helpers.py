"""Hostile inputs and the derived tolerance, shared by the tests of the ops."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.options import with_method
from discedit import iterative_prune, ops, prune, unlearn
from discedit.backends import triton_interprets
from discedit.common.state import ClassMoments, State, VectorMoments
from discedit.selection.budget import BUDGETS, AcrossLayers
from discedit.selection.importance import COMPONENTS

BACKENDS = ["cpp", "reference"]
# What has `pool` and `class_moments` on CPU tensors. Triton's interpreter takes a hundred times as long for the same;
# where there is a GPU, Triton compiles for it: tests/test_gpu.py.
POOLING_BACKENDS = [*BACKENDS, pytest.param("triton", marks=pytest.mark.slow)] if triton_interprets() else BACKENDS
Kind = TypeVar("Kind", ClassMoments, VectorMoments)


class Net(nn.Module):
    """Layers by name, and the function that connects them."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def all_pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Few rows, a value of each axis in each, in which every value meets every value of every other axis."""

    def pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(row), 2))

    values = [list(axis) for axis in axes]
    rows = list(itertools.product(*(range(len(axis)) for axis in values)))
    missing, chosen = set().union(*map(pairs, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(axis[i] for axis, i in zip(values, row, strict=True)) for row in chosen]


def mostly_slow(rows: Iterable[Any], quick: int = 1) -> list[Any]:
    """Parameters of which `make test` takes the first `quick` alone."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    slow = [pytest.param(*row, marks=pytest.mark.slow) for row in rows[quick:]]
    return [*(pytest.param(*row) for row in rows[:quick]), *slow]


def hostile_maps() -> dict[str, Tensor]:
    """Feature maps chosen to break a reader: offsets, signs, types, and views of every kind."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    wide = randn(12, 9, 10, 11)
    buffer = randn(12 * 5 * 7 * 7 + 1)
    return {
        "plain": randn(12, 5, 7, 7),
        "one pixel": randn(12, 5, 1, 1),
        "features": randn(12, 33),
        "offset 1e8": randn(12, 5, 8, 8).double() + 1e8,
        "offset 1e8 float32": randn(12, 5, 8, 8) + 1e8,
        "offset 1e4": randn(12, 5, 8, 8) + 1e4,
        "all negative": -randn(12, 5, 8, 8).abs() - 1,
        "huge": randn(12, 5, 8, 8) * 1e30,
        "tiny": randn(12, 5, 8, 8) * 1e-30,
        "constant": torch.full((12, 5, 7, 7), 0.1),
        "misaligned": buffer[1:].view(12, 5, 7, 7),
        "sliced": wide[:, 1:8:2, 2:-1, 1::3],
        "transposed": wide.transpose(2, 3),
        "channels swapped": wide.transpose(1, 3),
        "channels_last": randn(12, 20, 6, 5).to(memory_format=torch.channels_last),
        "channels_last sliced": randn(12, 20, 6, 5).to(memory_format=torch.channels_last)[:, 3:17],
        "expanded": randn(12, 5, 1, 1).expand(12, 5, 4, 4),
        "flipped by samples": randn(6, 12, 5, 4).permute(1, 0, 3, 2),
        "volume": randn(12, 3, 4, 5, 6),
        "many channels": randn(12, 700, 3, 3).to(memory_format=torch.channels_last),
        "bfloat16": randn(12, 5, 9, 9).bfloat16(),
        "bfloat16 channels_last": randn(12, 40, 9, 9).bfloat16().to(memory_format=torch.channels_last),
        "float16": randn(12, 5, 9, 9).half(),
        "float16 subnormal": (randn(12, 5, 9, 9) * 1e-6).half(),
        "float16 channels_last": randn(12, 70, 9, 9).half().to(memory_format=torch.channels_last),
        "float64": randn(12, 5, 9, 9).double(),
    }


def before_the_end_of_memory(values: Tensor) -> Tensor:
    """A copy, flat, that ends where readable memory ends: to read one element more is a segmentation fault."""
    page, size = mmap.PAGESIZE, values.numel() * values.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    x = torch.frombuffer(memory, dtype=torch.uint8)[pages * page - size : pages * page].view(values.dtype)
    x.copy_(values.flatten())
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    return x


def labels_for(samples: int, classes: int = 6, seed: int = 1) -> Tensor:
    """Labels in which class 1 is empty and class 2 has one sample."""
    labels = torch.randint(3, classes, (samples,), generator=torch.Generator().manual_seed(seed))
    labels[samples // 2] = 2
    labels[0] = 0
    return labels


def poisoned_state(classes: int, channels: int) -> ClassMoments:
    """A state with no samples whose values are NaN: an op that reads them shows it."""
    return poisoned(ClassMoments.empty(classes, channels))


def poisoned_vector(dimension: int, classes: int, channels: int) -> VectorMoments:
    return poisoned(VectorMoments.empty(dimension, classes, channels))


def poisoned(state: Kind) -> Kind:
    for tensor in state.tensors()[1:]:
        tensor.fill_(float("nan"))
    return state


def same_bits(a: State, b: State) -> bool:
    return type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def naive_moments(x: Tensor, labels: Tensor, classes: int) -> list[Tensor]:
    """The textbook way in the input's own type: pool, then average powers of deviations."""
    pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
    rows = []
    for k in range(classes):
        own = pooled[labels == k]
        if len(own) == 0:
            rows.append([torch.zeros(pooled.shape[1], dtype=torch.float64)] * 4)
            continue
        deviation = own - own.mean(0)
        rows.append([own.mean(0).double()] + [(deviation**p).sum(0).double() for p in (2, 3, 4)])
    return [torch.stack([row[i] for row in rows]) for i in range(4)]


def scalar_features(t: Tensor, witness: str) -> Tensor:
    """Features (samples, d) of one channel's statistic, in units in which squares are harmless."""
    z = (t - t.mean()) / t.std() if float(t.std()) > 0 else t - t.mean()
    return torch.stack([z, z**2], 1) if witness == "quadratic" else z[:, None]


def bound_of_samples(own: Tensor, rest: Tensor, bound: str) -> float:
    """The bound between two explicit samples of features, (samples, d) each."""
    laws = []
    for phi in (own, rest):
        mean = phi.mean(0)
        laws += [mean, (phi - mean).T @ (phi - mean) / len(phi)]
    function = {"fisher": ops.fisher_bound, "minimax": ops.minimax_bound}[bound]
    return float(function(*laws, backend="reference"))


def assert_no_worse_than(ours: Tensor, naive: Tensor, exact: Tensor, atol: Tensor | float) -> None:
    """|ours - exact| <= 2 |naive - exact| + atol, element by element."""
    naive_error = torch.nan_to_num((naive - exact).abs(), nan=torch.inf)
    excess = (ours - exact).abs() - 2 * naive_error - atol
    assert bool((excess <= 0).all()), f"worse than twice the naive error by {excess.max():.3e}"


def prune_with(model, scores=None, *, keep_outputs=True, steps=1, rescore=None, **options):
    """`prune`, or `iterative_prune`, with the limits of its budget as options, as tables of cases have them."""
    limits = {name: options.pop(name) for name in ("across", "floor", "round_to") if name in options}
    if limits:
        [name] = options.keys() & BUDGETS.keys()
        if not issubclass(BUDGETS[name], AcrossLayers):
            limits.pop("across", None)
        options["budget"] = BUDGETS[name](options.pop(name), **limits)
    if not keep_outputs:
        kinds = options.get("components", COMPONENTS)
        options["components"] = (*([kinds] if isinstance(kinds, str) else kinds), "outputs")
    if steps == 1 and rescore is None:
        return prune(model, scores, **options)
    return iterative_prune(model, scores, steps=steps, rescore=rescore, **options)


def unlearn_with(model, scores, *, inplace=False, **options):
    """`unlearn` with the fields of its method as options, as tables of cases have them."""
    edit = unlearn(model, scores, **with_method(options))
    if inplace:
        changed = edit.recipe.apply(model, inplace=True)
        changed.skipped, changed.widths = edit.skipped, edit.widths
        return changed
    return edit


def operations_of(run: Callable[[], object], device: torch.device) -> float:
    """A stopwatch for tests: operations in place of milliseconds."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())
