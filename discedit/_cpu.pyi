from typing import Any

def instruction_set() -> str: ...
def pool(x: Any, channel_axis: int, out: Any, threads: int = 1) -> None: ...
def class_moments(
    x: Any,
    channel_axis: int,
    labels: Any,
    count: Any,
    mean: Any,
    m2: Any,
    m3: Any,
    m4: Any,
    threads: int = 1,
) -> None: ...
def merge_moments(into: tuple[Any, ...], other: tuple[Any, ...]) -> None: ...
def one_vs_rest(
    count: Any,
    mean: Any,
    m2: Any,
    m3: Any,
    m4: Any,
    bound: str,
    witness: str,
    out: Any,
    threads: int = 1,
) -> None: ...
def bound(bound: str, mean1: Any, cov1: Any, mean2: Any, cov2: Any, out: Any, threads: int = 1) -> None: ...
