"""`class_damage`: what an edit does to each class, on data of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from discedit.common import validation
from discedit.model.forward import checked_labels, device_of, outside_modes, unpack_batch
from discedit.model.sharded import unwrapped
from discedit.moments.class_samples import logits_of
from discedit.recipes.damage import ClassDamage

OP = "class_damage"


@outside_modes()
def class_damage(model: nn.Module, edited: nn.Module, data: Iterable[Any]) -> ClassDamage:
    """Compare the answers of a classifier before and after an edit, class by class.

    Args:
        model: before; unchanged.
        edited: after, with as many classes; unchanged.
        data: batches, with labels or without: a sample's class is then the answer of `model`.

    Raises:
        ValueError: a model that gives no logits (samples, classes), or other ones than the first; no samples.
    """
    validation.module(OP, model)
    validation.module(OP, edited, "edited")
    validation.batches(OP, "data", data)
    model, edited = unwrapped(model), unwrapped(edited)
    found: ClassDamage | None = None
    for index, batch in enumerate(data):
        inputs, given = unpack_batch(OP, batch, index, device_of(model), labels_needed=False, argument="data")
        before = logits_of(OP, model, inputs)
        after = logits_of(OP, edited, inputs)
        if before.shape != after.shape:
            raise ValueError(
                f"{OP}: edited must give logits of shape {validation.shape_of(before)} as the model does, of batch "
                f"{index} it gives {validation.shape_of(after)}."
            )
        labels = None if given is None else checked_labels(OP, given, before.shape[1], index)
        one = ClassDamage.of(before, after, labels)
        found = one if found is None else found.merged(one)
    if found is None or not int(found.samples.sum()):
        raise ValueError(f"{OP}: data must give at least one sample, it gave none.")
    return found
