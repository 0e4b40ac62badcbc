"""Fidelity: how much of what a layer gives can be had from some of its input channels alone. See docs/fidelity.md.

Source: Kashyap, Murti, Nayak, Narshana and Bhattacharyya, ModHiFi, NeurIPS 2025.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from discedit.common import validation
from discedit.moments.contributions import TINY, Contributions, Growing
from discedit.moments.second_moments import InputMoments, SecondMoments, products


def singleton_fidelity(
    moments: SecondMoments, layers: str | Sequence[str], *, centred: bool = False, per_output: bool = False
) -> Tensor:
    """The fidelity of each input channel alone: E<Y_c, A_ci>^2 / (E||Y_c||^2 E||A_ci||^2).

    Args:
        moments: of either kind.
        layers: a layer, or several that read the same channels (a coupled group), over all of whose outputs is
            averaged.
        centred: around the means, which a bias or batch norm behind the layer can carry; by default around zero, as in
            ModHiFi.
        per_output: of each output instead of the mean over outputs.

    Returns:
        (channels,) float64 in [0, 1]; per output (outputs, channels), layer after layer. An output that gives 0
        everywhere has 0, and does not count in means.

    Raises:
        ValueError: no layer, one that is not in the moments, or layers that read different numbers of channels.
    """
    found = _of_layers("singleton_fidelity", moments, layers, centred, full=False)
    values = torch.cat([parts.singletons() for parts in found])
    return values if per_output else _over_outputs(values, torch.cat([parts.energy() for parts in found]))


def subset_fidelity(
    moments: SecondMoments,
    layers: str | Sequence[str],
    subset: Iterable[int],
    *,
    centred: bool = False,
    per_output: bool = False,
) -> Tensor:
    """The fidelity of a set of input channels together, each scaled in the best way.

    Args:
        moments: of the kind "full".
        layers, centred, per_output: as for `singleton_fidelity`.
        subset: indices of input channels.

    Returns:
        () float64 in [0, 1]; per output (outputs,).

    Raises:
        ValueError: moments of the kind "singleton", a channel out of range or named twice, and as `singleton_fidelity`.
    """
    op = "subset_fidelity"
    found = _of_layers(op, moments, layers, centred, full=True)
    kept = _subset(op, subset, found[0].weight.shape[1])
    energy = torch.cat([parts.energy() for parts in found])
    values = (torch.cat([parts.explained(kept) for parts in found]) / energy.clamp(min=TINY)).clamp(0.0, 1.0)
    return values if per_output else _over_outputs(values[:, None], energy)[0]


def compensation(
    moments: SecondMoments, layer: str, subset: Iterable[int], *, centred: bool = False, ridge: float = 0.0
) -> Tensor:
    """The factors of the kept channels that make up best for the others: delta = 1 + Q[S, S]^-1 Q[S, not S] 1.

    Args:
        moments: of the kind "full".
        layer: a layer.
        subset: the input channels that are kept.
        centred: as for `singleton_fidelity`; where a batch norm behind is re-estimated, or a bias takes the mean.
        ridge: share of each channel's own E||A_ci||^2 that is added to it, which draws factors to 1; ModHiFi has 1e-4.

    Returns:
        (outputs, kept channels) float64, in the order of `subset`: what the slices of the weight are multiplied by. A
        channel that adds nothing to an output keeps 1.

    Raises:
        ValueError: as `subset_fidelity`, or a ridge that is no number of at least 0.
    """
    op = "compensation"
    validation.at_least_zero(op, "ridge", ridge)
    [parts] = _of_layers(op, moments, layer, centred, full=True)
    return parts.compensation(_subset(op, subset, parts.weight.shape[1]), ridge)


def top_k(values: Tensor, k: int) -> list[int]:
    """The k channels of highest singleton fidelity, the highest first; of equal ones the first.

    The best choice of k where contributions are uncorrelated: fidelities then add up.

    Args:
        values: (channels,), as `singleton_fidelity` gives them.

    Raises:
        ValueError: k is no integer in 0..channels.
    """
    number = _number("top_k", k, len(values))
    return values.sort(descending=True, stable=True).indices[:number].tolist()


def greedy(
    moments: SecondMoments, layers: str | Sequence[str], k: int, *, centred: bool = False
) -> tuple[list[int], Tensor]:
    """k channels, one after the other, each the one that raises the fidelity of those before it most.

    Args:
        moments: of the kind "full".
        layers, centred: as for `singleton_fidelity`.

    Returns:
        The channels in the order in which they were chosen, and the fidelity after each, (k,) float64.

    Memory: 8 outputs x channels^2 bytes.

    Raises:
        ValueError: k is no integer in 0..channels, and as `subset_fidelity`.
    """
    op = "greedy"
    found = _of_layers(op, moments, layers, centred, full=True)
    channels = found[0].weight.shape[1]
    number = _number(op, k, channels)
    states = [Growing(parts, outputs) for parts in found for outputs in parts.chunks()]
    audible = sum(int((parts.energy() > 0).sum()) for parts in found)
    taken: list[int] = []
    reached = torch.zeros(number, dtype=torch.float64)
    total = 0.0
    for step in range(number):
        gains = torch.stack([state.gains() for state in states]).sum(0)
        # Below every gain: where nothing is left to gain, rounding must not choose a channel again.
        gains[taken] = -1.0
        channel = int(gains.argmax())
        total += max(float(gains[channel]), 0.0)
        for state in states:
            state.add(channel)
        taken.append(channel)
        reached[step] = total / max(audible, 1)
    return taken, reached.clamp(max=1.0)


def _of_layers(
    op: str, moments: SecondMoments, layers: str | Sequence[str], centred: bool, *, full: bool
) -> list[Contributions]:
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise ValueError(f"{op}: layers must name at least one layer, it is empty.")
    if full and moments.kind != "full":
        raise ValueError(f'{op}: moments must be of kind "full", they are of kind {moments.kind!r}.')
    for name in names:
        if name not in moments:
            raise ValueError(f"{op}: layers must name layers of the moments, {name!r} is none of {list(moments)}.")
    widths = {name: moments[name].channels for name in names}
    if len(set(widths.values())) > 1:
        raise ValueError(f"{op}: layers must read the same channels, they read {widths}.")
    return [_contributions(moments[name], centred) for name in names]


def _contributions(state: InputMoments, centred: bool) -> Contributions:
    number = state.count.clamp(min=1)
    xx = state.scatter / number
    if not centred:
        xx = xx + products(state.mean, full=xx.ndim == 2)
    if state.output is None:
        outputs = len(state.weight)
        return Contributions(xx, (state.weight.view(outputs, -1) @ xx).view(state.weight.shape), state.weight, None)
    yx, yy = state.output.cross / number, state.output.square / number
    if not centred:
        yx = yx + state.output.mean[:, None, None] * state.mean
        yy = yy + state.output.mean.square()
    return Contributions(xx, yx, state.weight, yy)


def _over_outputs(values: Tensor, energy: Tensor) -> Tensor:
    """Mean over the outputs that give anything."""
    audible = energy > 0
    return values[audible].mean(0) if bool(audible.any()) else torch.zeros_like(values[:1].sum(0))


def _subset(op: str, subset: Iterable[int], channels: int) -> Tensor:
    given = list(subset)
    indices = [validation.index(channel) for channel in given]
    for channel, index in zip(given, indices, strict=True):
        if index is None or not 0 <= index < channels:
            raise ValueError(f"{op}: subset must hold channels in 0..{channels - 1}, got {channel!r}.")
    if len(set(indices)) < len(indices):
        raise ValueError(f"{op}: subset must name each channel once, got {given}.")
    return torch.tensor(indices, dtype=torch.int64)


def _number(op: str, k: Any, channels: int) -> int:
    number = validation.index(k)
    if number is None or not 0 <= number <= channels:
        raise ValueError(f"{op}: k must be an integer in 0..{channels}, got {k!r}.")
    return number
