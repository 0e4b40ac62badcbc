"""Size of a model: parameters and multiply-accumulates."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from discedit._batches import call, device_of, moved, undisturbed


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass: half of what torch's own counter gives for matrix work."""
    from torch.utils.flop_counter import FlopCounterMode  # a third of a second to import: only who counts pays

    with undisturbed(model), FlopCounterMode(display=False) as counter:
        call(model, moved(example_inputs, device_of(model)))
    return int(counter.get_total_flops()) // 2


def macs_of_weights(model: nn.Module, example_inputs: Any) -> tuple[dict[str, float], float]:
    """Multiply-accumulates of one forward pass by the weight that they are proportional to, and all others."""
    from torch.utils.flop_counter import FlopCounterMode

    found: dict[str, float] = {}
    with undisturbed(model), FlopCounterMode(display=False) as counter:
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, (_ConvNd, nn.Linear)) and "weight" in module._parameters:
                before: list[float] = []

                def enter(_: nn.Module, __: Any, before: list[float] = before) -> None:
                    before.append(counter.get_total_flops())

                def leave(_: nn.Module, __: Any, ___: Any, before: list[float] = before, name: str = name) -> None:
                    macs = (counter.get_total_flops() - before.pop()) / 2
                    found[f"{name}.weight"] = found.get(f"{name}.weight", 0.0) + macs

                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            call(model, moved(example_inputs, device_of(model)))
        finally:
            for handle in handles:
                handle.remove()
    return found, counter.get_total_flops() / 2 - sum(found.values())
