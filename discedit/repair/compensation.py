"""What is left of a pruned network, set right by one factor for each kept channel and output (ModHiFi-P)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from discedit.model.trace import ModelTrace
from discedit.moments.contributions import Contributions
from discedit.moments.covariances import fits_of
from discedit.moments.positions import matrix_of
from discedit.repair.least_squares import Repairs

RIDGE = 1e-4


def compensated(
    edited: nn.Module,
    read: Mapping[str, list[int]],
    removed: Mapping[str, list[int]],
    trace: ModelTrace,
    inputs: Any,
) -> Repairs:
    """Scales what readers of removed channels make of the others, in `edited`, and returns what it set.

    The factors are those that bring a reader's output closest to what it gave before, around its mean; the mean goes
    to its bias, or to the running mean of the batch norm behind it. All readers on what the model before pruning gives.

    Args:
        read: reader -> the input channels that it has lost.
        removed: layer -> the output rows that it has lost.
        trace: of the model before pruning.
        inputs: calibration images in parts.
    """
    model, after = trace.model, trace.of_copy(edited)
    result = Repairs(edited, skipped={name: why for name in read if (why := after.why_not_fitted(name))})
    names = [name for name in read if name not in result.skipped]
    fits = fits_of(model, names, inputs, trace)
    result.skipped |= dict.fromkeys(set(names) - set(fits), "it does not run just once per forward pass")
    for name, (fit, channels) in fits.items():
        xx, mean = fit.xx.cpu(), fit.mean_x.cpu().view(channels, -1)
        if not bool(xx.isfinite().all()):
            raise ValueError(f"prune: data must give finite feature maps, what {name!r} reads holds NaN or Inf.")
        matrix = matrix_of(model.get_submodule(name)).double().cpu()
        whole = matrix.view(len(matrix), channels, -1)
        rows, kept = _others(len(whole), removed.get(name, [])), _others(channels, read[name])
        factors = Contributions(xx, (matrix @ xx).view(whole.shape), whole, None).compensation(kept, RIDGE)
        weight = (whole[:, kept] * factors[:, :, None])[rows]
        missing = (whole[rows] * mean).sum((1, 2)) - (weight * mean[kept]).sum((1, 2))
        result.set(name, f"{name}.weight", weight.view(result.tensor(f"{name}.weight").shape))
        result.shift(name, after, missing)
    return result


def _others(number: int, gone: list[int]) -> Tensor:
    left = torch.ones(number, dtype=torch.bool)
    left[gone] = False
    return left.nonzero().flatten()
