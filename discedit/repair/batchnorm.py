"""Statistics of batch norms, taken anew from data, or changed by as much as those of a smaller network differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from discedit.model.forward import call, device_of, frozen_eval, unpack_batch
from discedit.moments.calibration import batch_norms, batch_size_of
from discedit.recipes.recipe import copied

Replaced = tuple[dict[str, Tensor], dict[str, Tensor]]  # buffers by name, before and after


def reestimated(model: nn.Module, data: Iterable[Any]) -> Replaced:
    """Sets the statistics of batch norms to those on `data`."""
    return _set(model, _estimated(model, data))


def adapted(model: nn.Module, whole: nn.Module, kept: Mapping[str, tuple[int, ...]], data: Iterable[Any]) -> Replaced:
    """Changes the statistics of batch norms by as much as those on `data` differ from those of the whole model.

    Means by the difference, variances by the ratio, so that what sets `data` apart from what the network was trained on
    (as augmentation does) changes nothing. `kept`: buffer -> its entries in `whole` that `model` has, where not all.
    """
    then, now = _estimated(whole, data), _estimated(model, data)
    before = whole.state_dict()
    after = {}
    for name in batch_norms(model):
        for buffer in (f"{name}.running_mean", f"{name}.running_var"):
            index = torch.tensor(kept.get(buffer, range(len(before[buffer]))), device=before[buffer].device)
            known, was, is_now = before[buffer][index], then[buffer][index], now[buffer]
            if buffer.endswith("mean"):
                after[buffer] = known + (is_now - was)
            else:
                # A channel that was constant on `data` has no ratio: there, what it varies by now stands.
                after[buffer] = torch.where(
                    was > 0, is_now * known / was.clamp(min=torch.finfo(was.dtype).tiny), is_now
                )
    return _set(model, after)


def _set(model: nn.Module, after: dict[str, Tensor]) -> Replaced:
    state = model.state_dict()
    before = {name: state[name].clone() for name in after}
    model.load_state_dict(after, strict=False)
    return before, after


def _estimated(model: nn.Module, data: Iterable[Any]) -> dict[str, Tensor]:
    """Statistics of batch norms by name, averaged over `data` in one pass of a copy.

    Batch averages, weighted by samples. A batch of a single sample, which may have no variance, is left out.
    """
    student = copied(model)
    norms, device = batch_norms(student), device_of(student)
    index, seen = -1, 0
    with frozen_eval(student):
        for module in norms.values():
            module.reset_running_stats()
            module.train()
        for index, batch in enumerate(data):
            inputs, _ = unpack_batch("prune", batch, index, device, labels_needed=False, argument="data")
            samples = batch_size_of("prune", inputs)
            if samples < 2:
                continue
            seen += samples
            for module in norms.values():
                # With this momentum the running statistics are the mean of all batches so far, weighted by samples.
                module.momentum = samples / seen
            call(student, inputs)
    if not seen:
        raise ValueError(
            "prune: data must give at least one batch of two samples to re-estimate batch norms on, it gave "
            f"{index + 1} batches, none of them so large."
        )
    found = {}
    for name, module in norms.items():
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            found[f"{name}.{buffer}"] = getattr(module, buffer)
            if not bool(found[f"{name}.{buffer}"].isfinite().all()):
                raise ValueError(f"prune: data must give finite feature maps, '{name}.{buffer}' would hold NaN or Inf.")
    return found
