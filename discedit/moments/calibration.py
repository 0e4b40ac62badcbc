"""The samples of a closed-form fit: the first of the data, in parts, and others to check it on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from discedit.common import validation
from discedit.model.forward import (
    call,
    first_tensor,
    frozen_eval,
    index_samples,
    map_tensors,
    samples_in,
    unpack_batch,
)
from discedit.model.layers import is_close
from discedit.model.trace import ModelTrace

SAMPLES = 1024  # at most this many are looked at
HELD_OUT = 8  # of so many samples one is kept back, for a check of what was made of the others
PARTS = 8  # in which they run: each has threads of its own, and changing over takes time
LATE = 2  # times as many, where some of them have to begin late
# Times as many as there is room for; more cost a ResNet-50 more time than they bring it (docs/notes.md).
ROOMS = 3
MAP = 3 * 2**23  # bytes of the largest map of a part: of more, the memory would be given back and asked for each time
MEMORY = 4 * 2**30  # bytes that the feature maps of samples may take at once
MAPS = 6  # as large as the largest that a network holds at one moment


def calibrated(
    op: str, trace: ModelTrace, data: Iterable[Any], *, further: bool = False
) -> tuple[list[Any], ModelTrace, Any]:
    """The first samples of `data` on the model's device, in equal parts, and the trace: one without a pass yet is made
    anew on the first.

    At most `SAMPLES`, and no more than `ROOMS` times as many as `MEMORY` has room for side by side, of which some then
    begin late (`beginnings`). Ends at a batch that does not fit the others.

    With `further`, also a batch of the samples behind those, from the same pass over `data`, which may be shuffled anew
    in each; otherwise, and where there are none, None.
    """
    validation.batches(op, "data", data)
    taken: list[Any] = []
    total, limit, most = 0, SAMPLES, 0
    device = trace.device
    for index, batch in enumerate(data):
        inputs, _ = unpack_batch(op, batch, index, device, labels_needed=False, argument="data")
        size = batch_size_of(op, inputs)
        if not size:
            continue
        if not taken:
            trace = trace if trace.runs else ModelTrace.of(trace.model, inputs)
            limit = min(SAMPLES, ROOMS * room_for(trace.largest))
            most = limit + (held_out_of(limit) if further else 0)
        elif not fits(taken[0], inputs):
            break
        few = min(size, most - total)
        taken.append(index_samples(inputs, slice(few), size))
        total += few
        if total >= most:
            break
    if not taken:
        raise ValueError(f"{op}: data must give at least one sample, it gave none.")
    whole = _in_fastest_layout(trace, concat_batches(taken, batch_size_of(op, taken[0])))
    samples = min(total, limit)
    # On the CPU large maps are fetched from the system anew for every layer (docs/notes.md, Moments); torch's
    # allocator for GPUs keeps their memory.
    parts = 1 if device.type != "cpu" else min(PARTS, -(-samples * trace.largest // MAP))
    parts = min(samples, parts if samples <= room_for(trace.largest) else LATE * PARTS)
    rest = total - samples
    behind = concat_batches([index_samples(whole, slice(samples, samples + rest), total)], rest) if rest else None
    return _in_parts(whole, total, samples, parts), trace, behind


def _in_fastest_layout(trace: ModelTrace, inputs: Any) -> Any:
    """On CPUs convolutions run faster on channels_last, and patches lie together (docs/notes.md); but some models make
    views of maps that only the other layout allows, or that then show other numbers: one sample shows it."""
    if trace.device.type != "cpu" or not any(isinstance(module, nn.Conv2d) for module in trace.model.modules()):
        return inputs

    def laid_out(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    one = index_samples(inputs, slice(1), samples_in(inputs))
    same = False
    with suppress(Exception), frozen_eval(trace.model):
        given, other = (first_tensor(call(trace.model, x)) for x in (one, map_tensors(one, laid_out)))
        same = is_close(given, other)
    return map_tensors(inputs, laid_out) if same else inputs


def _in_parts(inputs: Any, total: int, samples: int, parts: int) -> list[Any]:
    """The first samples of a batch, of so many in total, in equal parts."""
    each = -(-samples // parts)
    starts = range(0, samples, each)
    return [index_samples(inputs, slice(start, min(start + each, samples)), total) for start in starts]


def room_for(largest: int) -> int:
    """How many samples may be held at once, with the bytes of the largest map of one."""
    return max(1, MEMORY // (MAPS * largest))


def beginnings(trace: ModelTrace, layers: Iterable[str], samples: Sequence[int]) -> list[set[str]]:
    """Where parts of so many samples may begin to be held, side by side with those before them, for the layers from
    there on: late parts where maps have become smaller, so that wide layers, which are fitted to small maps, see them
    all. Empty for a part that there is room for nowhere."""
    largest = trace.largest_from()
    rooms = {layer: room_for(largest.get(layer, trace.largest)) for layer in layers}
    together = accumulate(samples)
    # There is always room for one.
    return [{layer for layer, room in rooms.items() if not part or n <= room} for part, n in enumerate(together)]


def held_out_of(samples: int) -> int:
    """How many of so many samples a check takes."""
    return max(1, samples // HELD_OUT)


@dataclass(frozen=True)
class HeldOut:
    """A batch of samples for a check of what was made of others."""

    inputs: Any
    samples: int
    apart: bool = True  # whether it was indeed made of others: of a single sample there are none


def kept_back(op: str, inputs: Sequence[Any], further: Any) -> tuple[list[Any], HeldOut]:
    """Parts to make something of, and samples to check it on: further ones, or else the last of those in the parts."""
    if further is not None:
        return list(inputs), HeldOut(further, batch_size_of(op, further))
    sizes = [batch_size_of(op, part) for part in inputs]
    number, samples = held_out_of(sum(sizes)), sum(sizes)
    if samples == 1:
        return list(inputs), HeldOut(inputs[0], 1, apart=False)
    whole, left = concat_batches(inputs, sizes[0]), samples - number
    parts = _in_parts(whole, samples, left, len(sizes))
    return parts, HeldOut(index_samples(whole, slice(left, samples), samples), number)


def batch_size_of(op: str, inputs: Any) -> int:
    """Size of the first axis of the first tensor."""
    first = first_tensor(inputs)
    if first is None or not first.ndim:
        raise ValueError(f"{op}: data must give tensors with a sample axis, got {type(inputs).__name__}.")
    return len(first)


def fits(first: Any, other: Any) -> bool:
    """Whether two batches can be joined."""

    def form(tensor: Tensor) -> Any:
        return tuple(tensor.shape[1:]), tensor.dtype

    return bool(map_tensors(first, form) == map_tensors(other, form))


def concat_batches(batches: Sequence[Any], samples: int) -> Any:
    """One batch of several, the first with so many samples; tensors without a sample axis as in the first."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(tuple(batches)) if first.ndim and len(first) == samples else first
    if isinstance(first, Mapping):
        return {name: concat_batches([batch[name] for batch in batches], samples) for name in first}
    if isinstance(first, (tuple, list)):
        return tuple(concat_batches(several, samples) for several in zip(*batches, strict=True))
    return first


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """By name, those with running statistics that training would change."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


def scale_of(norm: _BatchNorm) -> Tensor:
    """What a batch norm multiplies its inputs by, before whatever else is inside it: (channels,)."""
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach()
