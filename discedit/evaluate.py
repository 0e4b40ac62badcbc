"""Accuracy of a classifier, class by class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from discedit import _checks
from discedit._batches import call, checked_labels, device_of, first_tensor, split, undisturbed

OP = "accuracy_per_class"


def accuracy_per_class(model: nn.Module, loader: Iterable[Any], num_classes: int) -> Tensor:
    """Share of each class's samples that the model classifies rightly.

    Args:
        model: a classifier; its mode and torch's random state are left as they were.
        loader: any iterable of (inputs, labels).

    Returns:
        Shape (num_classes,), float64, in [0, 1]; NaN for a class without samples.

    Raises:
        ValueError: an empty loader, labels that do not fit, or a model without logits.
    """
    right = torch.zeros(num_classes, dtype=torch.float64)
    total = torch.zeros(num_classes, dtype=torch.float64)
    device = device_of(model)
    with undisturbed(model):
        for index, batch in enumerate(loader):
            inputs, labels = split(OP, batch, index, device, labels_needed=True)
            logits = first_tensor(call(model, inputs))
            classes = checked_labels(OP, labels, num_classes, index).cpu()
            if logits is None or logits.ndim != 2 or len(logits) != len(classes):
                found = "none" if logits is None else f"shape {_checks.shape_of(logits)}"
                raise ValueError(f"{OP}: batch {index}: model must give logits for {len(classes)} labels, got {found}.")
            hit = logits.argmax(1).cpu() == classes
            total += torch.bincount(classes, minlength=num_classes)
            right += torch.bincount(classes[hit], minlength=num_classes)
    if not total.any():
        raise ValueError(f"{OP}: loader must give at least one sample, it gave none.")
    return right / total
