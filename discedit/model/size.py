"""Size of a model (parameters, multiply-accumulates) and its accuracy, class by class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from discedit.common import validation
from discedit.model.forward import (
    call,
    checked_labels,
    device_of,
    first_tensor,
    frozen_eval,
    to_device,
    unpack_batch,
)

OP = "accuracy_per_class"


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass: half of what torch's own counter gives for matrix work."""
    return int(_counted(model, example_inputs)["Global"]) // 2


def macs_of_weights(model: nn.Module, example_inputs: Any) -> tuple[dict[str, float], float]:
    """Multiply-accumulates of one forward pass by the weight that they are proportional to, and all others."""
    counted, root = _counted(model, example_inputs), type(model).__name__
    found: dict[str, float] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}  # one of each, also of a shared one
    for name, module in model.named_modules(remove_duplicate=False):  # torch counts a module by one of its names
        weight = module._parameters.get("weight") if isinstance(module, (_ConvNd, nn.Linear)) else None
        if weight is not None:
            found[names[weight]] = found.get(names[weight], 0.0) + counted.get(f"{root}.{name}", 0) / 2
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            # Its projections are no modules: as many positions as its output projection sees, in self-attention.
            whole, last = (counted.get(f"{root}.{part}", 0) / 2 for part in (name, f"{name}.out_proj"))
            positions = last / max(module.out_proj.weight.numel(), 1)
            found[names[module.in_proj_weight]] = min(positions * module.in_proj_weight.numel(), whole - last)
    return found, counted["Global"] / 2 - sum(found.values())


def _counted(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Floating-point operations by module, which torch names from the model's class on; of the whole: "Global"."""
    from torch.utils.flop_counter import FlopCounterMode  # a third of a second to import: only who counts pays

    with frozen_eval(model), _constant(model.parameters()), FlopCounterMode(display=False) as counter:
        call(model, to_device(example_inputs, device_of(model)))
    return {"Global": 0} | {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


@contextmanager
def _constant(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that want no gradients: the counter would set hooks on those that are handed to modules, which fails
    where no gradients are computed."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad and parameter.is_leaf]

    def want(gradients: bool) -> None:
        for parameter in wanted:  # of a model that was made in inference mode, only there
            with torch.inference_mode() if parameter.is_inference() else nullcontext():
                parameter.requires_grad_(gradients)

    want(False)
    try:
        yield
    finally:
        want(True)


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
    with frozen_eval(model):
        for index, batch in enumerate(loader):
            inputs, labels = unpack_batch(OP, batch, index, device, labels_needed=True)
            logits = first_tensor(call(model, inputs))
            classes = checked_labels(OP, labels, num_classes, index).cpu()
            if logits is None or logits.ndim != 2 or len(logits) != len(classes):
                found = "none" if logits is None else f"shape {validation.shape_of(logits)}"
                raise ValueError(f"{OP}: batch {index}: model must give logits for {len(classes)} labels, got {found}.")
            hit = logits.argmax(1).cpu() == classes
            total += torch.bincount(classes, minlength=num_classes)
            right += torch.bincount(classes[hit], minlength=num_classes)
    if not total.any():
        raise ValueError(f"{OP}: loader must give at least one sample, it gave none.")
    return right / total
