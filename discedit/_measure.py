"""Size of a model: parameters and multiply-accumulates."""

from __future__ import annotations

from typing import Any

from torch import nn

from discedit._batches import call, device_of, moved, undisturbed


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass: half of what torch's own counter gives for matrix work."""
    from torch.utils.flop_counter import FlopCounterMode  # a third of a second to import: only who counts pays

    with undisturbed(model), FlopCounterMode(display=False) as counter:
        call(model, moved(example_inputs, device_of(model)))
    return int(counter.get_total_flops()) // 2
