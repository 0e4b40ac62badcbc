"""Tables as text, for summaries and the console."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest


def format_table(rows: Iterable[Sequence[object]], *, left: Collection[int] = (0,)) -> str:
    """Cells in columns, each as wide as its widest cell, two spaces apart.

    Args:
        rows: of cells; a short row is filled up with empty ones. The header is a row like the others.
        left: indices of the columns that are aligned to the left; others, such as numbers, are to the right.

    >>> print(format_table([("layer", "removed"), ("conv1", "3 of 32")]))
    layer  removed
    conv1  3 of 32
    """
    columns = [[str(cell) for cell in column] for column in zip_longest(*rows, fillvalue="")]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        aligned = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
