from collections.abc import Sequence
from typing import Any

# Arrays are anything with DLPack of CUDA memory, all on one device; a state is as in _cpu.pyi. Nothing is allocated:
# `scratch` holds at least as many float64 as the function of that name says, and may be None where that is 0.
# `stream` is a cudaStream_t as an integer; calls return before the work is done.
def pool(x: Any, channel_axis: int, statistics: Sequence[str], out: Any, scratch: Any, stream: int) -> None: ...
def pool_scratch(x: Any, channel_axis: int, statistics: Sequence[str]) -> int: ...

# Labels outside the state's classes are a device-side assertion. `order`: samples sorted stably by label, or None.
def fold_moments(pooled: Any, scale: float, labels: Any, order: Any, state: tuple[Any, ...], stream: int) -> None: ...
def merge_moments(into: tuple[Any, ...], other: tuple[Any, ...], stream: int) -> None: ...

# Positions, or None for all, must be in range. Four paddings: top, bottom, left, right.
def patch_moments(
    x: Any,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    positions: Any,
    mean: Any,
    scatter: Any,
    scratch: Any,
    stream: int,
) -> None: ...
def patch_moments_scratch(
    x: Any,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    positions: int | None,
) -> int: ...
def one_vs_rest(state: tuple[Any, ...], bound: str, witness: str, out: Any, scratch: Any, stream: int) -> None: ...
def one_vs_rest_scratch(state: tuple[Any, ...]) -> int: ...
def pairwise_min(
    state: tuple[Any, ...], bound: str, witness: str, values: Any, pairs: Any, scratch: Any, stream: int
) -> None: ...
def pairwise_min_scratch(state: tuple[Any, ...]) -> int: ...
def bound(bound: str, mean1: Any, cov1: Any, mean2: Any, cov2: Any, out: Any, stream: int) -> None: ...
