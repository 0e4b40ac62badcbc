"""Which channels of a network somebody else's tool has left, found by the weights of what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SEEDS = 16  # rows that are looked for in all columns, before it is known which are left
ROUNDINGS = (None, torch.float16, torch.bfloat16)  # that weights may have gone through
CHANGED = "its weights are not those of the original's layer without some channels"
UNORDERED = "its outputs stand in another order than the original's"
ALIKE = "several outputs of the original have the weights of one that is left"

Pair = tuple[Any, Any]  # of the original, and the same of what is left of it


def outputs_left(layers: Pair, norms: Pair | None, *, summed: bool) -> tuple[list[int], str]:
    """The outputs of a layer that a smaller one has kept, ascending; or why they cannot be told, empty where they can.

    The smaller weight must be some rows and some columns of the other, each in its order, but for a rounding to 16
    bits. Rows that are the same there are told apart by their biases and by the norms behind.

    Args:
        summed: whether it matters which of several equal outputs is left, as it does where others are added to them.
    """
    axis = output_axis(layers[0])
    own, other = (_matrix(module.weight, axis) for module in layers)
    why = CHANGED
    for rounding in ROUNDINGS:
        whole = own.to(other.dtype) if rounding is None else own.to(rounding).to(other.dtype)
        columns = _columns_left(whole, other)
        if columns:
            beside = _beside([layers, *([norms] if norms else [])], len(own), len(other))
            rows, why = _rows_left(whole, other, columns, beside, summed)
        if why != CHANGED:
            return rows, why
    return [], why


def masked_outputs(layers: Pair) -> tuple[list[int], int]:
    """Of layers with as many outputs: those all of whose weights have become 0, and, where they read as much as before,
    the number of other weights that have."""
    whole, part = (_matrix(module.weight, output_axis(module)).flatten(1) for module in layers)
    rows = ~part.any(1) & whole.any(1)
    others = (part == 0) & (whole != 0) & ~rows[:, None] if part.shape == whole.shape else part[:0]
    return rows.nonzero().flatten().tolist(), int(others.count_nonzero())


def output_axis(module: nn.Module) -> int:
    """The axis of a layer's weight that its outputs are on."""
    return 1 if getattr(module, "transposed", False) else 0


def _matrix(weight: Tensor, axis: int) -> Tensor:
    """(outputs, inputs, taps) on the CPU, where 0 has no sign."""
    weight = weight.detach().cpu().movedim(axis, 0)
    return weight.reshape(*weight.shape[:2], -1) + 0.0


def _beside(pairs: Sequence[Pair], outputs: int, left: int) -> list[Pair]:
    """What else there is one of for each output, and is shorter where some are gone."""
    found = []
    for whole, part in pairs:
        for name in ("weight", "bias", "running_mean", "running_var"):
            one, other = getattr(whole, name, None), getattr(part, name, None)
            if one is not None and other is not None and (one.shape, other.shape) == ((outputs,), (left,)):
                found.append((one.detach().cpu().to(other.dtype), other.detach().cpu()))
    return found


def _columns_left(whole: Tensor, part: Tensor) -> list[int]:
    """Which columns are left; none: it cannot be told."""
    if part.shape[1] == whole.shape[1]:
        return list(range(whole.shape[1]))
    found: list[tuple[int, int]] = []  # rows of both that are the same
    if len(part) == len(whole):
        found = [(row, row) for row in range(len(part))]
    else:
        # Rows whose entries stand, in their order, in one row of the whole alone.
        for row in range(0, len(part), -(-len(part) // SEEDS)):
            within = _rows_with(whole, part[row])
            found += [(within[0], row)] if len(within) == 1 else []
    if not found:
        return []
    rows, left = ([pair[i] for pair in found] for i in range(2))
    columns: list[int] = []
    places = _places(whole[rows].transpose(0, 1))
    for key in _keys(part[left].transpose(0, 1)):
        column = next((place for place in places.get(key, ()) if not columns or place > columns[-1]), None)
        if column is None:
            return []
        columns.append(column)
    return columns


def _rows_with(whole: Tensor, row: Tensor) -> list[int]:
    """The rows of the whole in which the entries of a row stand in their order."""
    seen = torch.zeros(len(whole), dtype=torch.int64)  # so many of them, in each
    ended = torch.cat([row, torch.full_like(row[:1], torch.nan)])
    for column in whole.unbind(1):
        seen += (column == ended[seen]).all(1)
    return (seen == len(row)).nonzero().flatten().tolist()


def _rows_left(
    whole: Tensor, part: Tensor, columns: list[int], beside: list[Pair], summed: bool
) -> tuple[list[int], str]:
    """Which rows are left; or why it cannot be told."""
    places = _places(whole[:, columns])
    rows: list[int] = []
    taken: dict[tuple[int, ...], int] = {}  # rows that are the same -> how many of them are left
    for number, key in enumerate(_keys(part)):
        same = places.get(key, [])
        closer = [row for row in same if all(bool(one[row] == other[number]) for one, other in beside)]
        same = closer or same
        row = next((row for row in same if not rows or row > rows[-1]), None)
        if row is None:
            return [], UNORDERED if same else CHANGED
        rows.append(row)
        taken[tuple(same)] = taken.get(tuple(same), 0) + 1
    for equal, number in taken.items():
        if number == len(equal):
            continue
        # Where even what went with the columns is the same, they gave the same numbers, and any of them will do.
        alike = all(bool((one[list(equal)] == one[equal[0]]).all()) for one in (whole, *(one for one, _ in beside)))
        if summed or not alike:
            return [], f"{ALIKE} ({', '.join(map(str, equal[:4]))})"
    return rows, ""


def _places(rows: Tensor) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for place, key in enumerate(_keys(rows)):
        found.setdefault(key, []).append(place)
    return found


def _keys(rows: Tensor) -> list[bytes]:
    """Of each row its bytes."""
    return [row.tobytes() for row in rows.flatten(1).contiguous().view(torch.uint8).numpy()]
