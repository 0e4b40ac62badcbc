"""Calibration samples of some classes, or of some classes more often, out of data of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from discedit.common import validation
from discedit.model.forward import (
    Quota,
    call,
    checked_labels,
    device_of,
    first_tensor,
    frozen_eval,
    index_samples,
    to_device,
    unpack_batch,
)
from discedit.moments.calibration import SAMPLES, batch_size_of, concat_batches, fits, held_out_of

BATCH = 64


def class_samples(
    op: str, model: nn.Module, data: Iterable[Any], weights: Tensor, named: Iterable[int]
) -> list[tuple[Any, Tensor]]:
    """Batches with as many samples as a repair and its check take: of each class in proportion to its weight, the first
    there are, in turns, and several times where there are fewer.

    `data` is read until there are enough of each class, however it is sorted. A sample's class is its label or, in data
    without labels, what the model takes it for.

    Args:
        op: what asks, for errors.
        weights: (classes,), float64, at least 0.
        named: classes of which there must be samples.
    """
    validation.batches(op, "data", data)
    each = max(1.0, (SAMPLES + held_out_of(SAMPLES)) / float(weights.sum()))  # of a class with weight 1
    quota = Quota({cls: int(number) for cls, number in enumerate((each * weights).ceil()) if number})
    batches: list[tuple[Any, Tensor]] = []
    for inputs, labels in labelled(op, model, data, len(weights)):
        if len(places := quota.take(labels)):
            batches.append((index_samples(inputs, places, len(labels)), labels[places]))
        if quota.full():
            break
    found = {int(label) for _, labels in batches for label in labels}
    if missing := [cls for cls in named if cls not in found]:
        raise ValueError(f"{op}: data must hold samples of class {missing[0]}, it holds none.")
    batches = list(takewhile(lambda batch: fits(batches[0][0], batch[0]), batches))
    together = torch.cat([labels for _, labels in batches])
    whole = concat_batches([inputs for inputs, _ in batches], len(batches[0][1]))
    chosen, turns = [], []
    for cls in sorted(found.intersection(together.tolist())):
        own = (together == cls).nonzero()[:, 0]
        number = max(1, round(min(len(own), each) * float(weights[cls])))
        place = torch.arange(number)
        chosen.append(own[place * len(own) // number if number > len(own) else place])
        turns.append((place + 0.5) / number)
    order = torch.cat(chosen)[torch.cat(turns).argsort(stable=True)]
    return [(index_samples(whole, part, len(together)), together[part]) for part in torch.split(order, BATCH)]


def logits_of(op: str, model: nn.Module, inputs: Any) -> Tensor:
    """What a classifier gives: (samples, classes).

    Raises:
        ValueError: it gives something else.
    """
    with frozen_eval(model):
        logits = first_tensor(call(model, to_device(inputs, device_of(model))))
    if logits is None or logits.ndim != 2:
        found = "no tensor" if logits is None else f"shape {validation.shape_of(logits)}"
        raise ValueError(f"{op}: model must give logits of shape (samples, classes), it gives {found}.")
    return logits


def labelled(
    op: str, model: nn.Module, data: Iterable[Any], number: int, *, predicted: bool = True
) -> Iterator[tuple[Any, Tensor]]:
    """Inputs on the model's device, and a class for each sample, on the CPU.

    Args:
        number: of classes there are.
        predicted: whether data without labels have the model's own answers.
    """
    device = device_of(model)
    for index, batch in enumerate(data):
        inputs, given = unpack_batch(op, batch, index, device, labels_needed=not predicted, argument="data")
        samples = batch_size_of(op, inputs)
        if given is None and not samples:  # not every model runs on none
            continue
        own = given is None
        labels = logits_of(op, model, inputs).argmax(1) if own else checked_labels(op, given, number, index)
        if samples != len(labels):
            raise ValueError(
                f"{op}: data must give one label per sample, batch {index} has {samples} samples and {len(labels)} "
                "labels."
            )
        yield inputs, labels.cpu().long()
