from collections.abc import Sequence
from typing import Any

# Arrays are anything with DLPack or NumPy's; a state is (count, mean, m2, m3, m4) or, of a vector of statistics,
# (count, mean, scatter).
def instruction_set() -> str: ...
def pool(x: Any, channel_axis: int, statistics: Sequence[str], out: Any, threads: int = 1) -> None: ...
def class_moments(
    x: Any,
    channel_axis: int,
    statistics: Sequence[str],
    scale: float,
    labels: Any,
    state: tuple[Any, ...],
    threads: int = 1,
) -> None: ...
def fold_moments(pooled: Any, scale: float, labels: Any, state: tuple[Any, ...], threads: int = 1) -> None: ...
def merge_moments(into: tuple[Any, ...], other: tuple[Any, ...], threads: int = 1) -> None: ...
def patch_moments(
    x: Any,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    positions: Any,
    mean: Any,
    scatter: Any,
    threads: int = 1,
) -> None: ...
def one_vs_rest(state: tuple[Any, ...], bound: str, witness: str, out: Any, threads: int = 1) -> None: ...
def pairwise_min(
    state: tuple[Any, ...], bound: str, witness: str, values: Any, pairs: Any, threads: int = 1
) -> None: ...
def bound(bound: str, mean1: Any, cov1: Any, mean2: Any, cov2: Any, out: Any, threads: int = 1) -> None: ...

# A rule is (name, radius, rho, log_term, low, high): a member of the family of bounds and what it needs.
Rule = tuple[str, float, float, float, float, float]

def member(
    rule: Rule, mean1: Any, cov1: Any, mean2: Any, cov2: Any, radius: Any, out: Any, threads: int = 1
) -> None: ...
def witness(
    published: bool, mean1: Any, second1: Any, mean2: Any, second2: Any, out: Any, threads: int = 1
) -> None: ...
def one_vs_one(
    state: tuple[Any, ...], rule: Rule, witness: str, comparison: str, out: Any, pairs: Any, threads: int = 1
) -> None: ...
