"""Accuracy of a classifier, class by class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from discedit._batches import call, device_of, first_tensor, split, undisturbed


def accuracy_per_class(model: nn.Module, loader: Iterable[Any], num_classes: int) -> Tensor:
    """Share of each class's samples that the model classifies rightly.

    Args:
        model: a classifier; its mode and torch's random state are left as they were.
        loader: any iterable of (inputs, labels).

    Returns:
        Shape (num_classes,), float64, in [0, 1]; NaN for a class without samples.
    """
    right = torch.zeros(num_classes, dtype=torch.float64)
    total = torch.zeros(num_classes, dtype=torch.float64)
    device = device_of(model)
    with undisturbed(model):
        for index, batch in enumerate(loader):
            inputs, labels = split("accuracy_per_class", batch, index, device, labels_needed=True)
            logits = first_tensor(call(model, inputs))
            if logits is None:
                raise ValueError("accuracy_per_class: model must give logits.")
            hit = logits.argmax(1).cpu() == labels.cpu()
            total += torch.bincount(labels.cpu(), minlength=num_classes)
            right += torch.bincount(labels.cpu()[hit], minlength=num_classes)
    return right / total
