"""Published pruning criteria as one importance per component, so that every rival runs in the protocol that ours has.

A benchmark takes the same layers, removes the same share of each, and repairs what is left in the same way; what
differs is which components count as important. Every function here returns layer name -> (components,) float64,
higher = keep, on the model's device, and leaves the model as it was. In that protocol only the order within a layer
matters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from discedit.common import validation
from discedit.model.forward import call, device_of, first_tensor, map_tensors, to_device, unpack_batch
from discedit.model.trace import width_of
from discedit.presets import preset

TORCH_PRUNING: dict[str, Any] = {
    "magnitude": torch_pruning.importance.MagnitudeImportance,
    "taylor": torch_pruning.importance.TaylorImportance,
    "hessian": torch_pruning.importance.HessianImportance,
    "lamp": torch_pruning.importance.LAMPImportance,
    "bn_scale": torch_pruning.importance.BNScaleImportance,
}


def chip(
    model: nn.Module, layers: Iterable[str], batches: Iterable[Any], *, readers: Mapping[str, str], images: int = 640
) -> dict[str, Tensor]:
    """CHIP: by how much the nuclear norm of an image's feature maps shrinks when a channel's map becomes zero.

    With A (channels x positions) the maps of a layer for one image, channel i has ||A||_* - ||A with row i zero||_*,
    averaged over images.

    Args:
        model: a network; it runs in eval mode.
        layers: names of convolutions and linear layers.
        batches: inputs, or (inputs, labels) as for `discedit.collect_moments`; labels are not used.
        readers: layer -> the convolution or linear layer whose input is the layer's map behind norm and activation.
            Channels are axis 1 of what a convolution reads and the last axis of what a linear layer reads; the other
            axes are positions.
        images: the first so many are looked at.

    Singular values come from the eigenvalues of Gram matrices in float64, on the shorter side of A. One below about
    1e-7 of the largest, which is the rounding of float32 maps, counts as zero.

    Raises:
        ValueError: images is not positive, a layer is no convolution or linear layer or has no reader, what the reader
            reads has not the layer's channels, or there are no images.

    Source: Sui, Yin, Xie, Phan, Aliari Zonouz and Yuan, CHIP: CHannel Independence-based Pruning for Compact Neural
    Networks, NeurIPS 2021; scripts in Eclipsess/CHIP_NeurIPS2021. Confirmed in the scripts: the formula; maps behind
    the ReLU (for the ResNets of CIFAR the outputs of each block's ReLUs); 5 batches of 128 training images in eval
    mode; the mean over images; the channels with the highest values stay. Different there: images are shuffled,
    cropped and flipped at random, and maps rounded to 4 decimals. Not confirmed: the paper's own text.
    """
    if not isinstance(images, int) or images < 1:
        raise ValueError(f"chip: images must be a positive integer, got {images!r}.")
    copied = copy.deepcopy(model).eval()
    totals = {layer: torch.zeros(_width("chip", copied, layer), dtype=torch.float64) for layer in layers}
    maps: dict[str, Tensor] = {}
    modules = dict(copied.named_modules())
    for layer in totals:
        reader = readers.get(layer)
        if reader not in modules:
            raise ValueError(f"chip: readers must name a module for each layer, got {reader!r} for {layer!r}.")
        _keep_input(modules[reader], layer, maps)
    seen = 0
    for index, batch in enumerate(batches):
        maps.clear()
        inputs, _ = unpack_batch("chip", batch, index, device_of(copied), labels_needed=False)
        with torch.no_grad():
            call(copied, inputs)
        taken = 0
        for layer, total in totals.items():
            if layer not in maps or maps[layer].shape[1] != len(total):
                got = validation.shape_of(maps[layer]) if layer in maps else "nothing"
                raise ValueError(
                    f"chip: readers must read the {len(total)} channels of their layers, {readers[layer]!r} for "
                    f"{layer!r} reads {got} (channels on axis 1)."
                )
            chosen = maps[layer][: images - seen]
            taken = len(chosen)
            totals[layer] = total.to(chosen.device) + sum(
                _independence(image.reshape(len(total), -1)) for image in chosen
            )
        seen += taken
        if seen >= images:
            break
    if totals and not seen:
        raise ValueError("chip: batches must give at least one image, they gave none.")
    return {layer: _checked("chip", copied, layer, total / seen) for layer, total in totals.items()}


def torch_pruning_importance(
    name: str, model: nn.Module, layers: Iterable[str], batches: Iterable[Any], example_inputs: Any
) -> dict[str, Tensor]:
    """An importance of torch-pruning with its own defaults, on the group that a layer's output channels form.

    A group is the layer, the norms behind it and the layers that read it. The default is the mean of the group's
    members, divided by its mean over the layer's channels ("lamp": by the sum of those that are no smaller).

    Args:
        name: "magnitude" (squared weights), "taylor" (|weight x gradient|), "hessian" (weight squared x mean squared
            gradient of a sample), "lamp", or "bn_scale" (|weight| of the batch norm).
        model: a classifier; it runs in eval mode, so that batch norms use their running statistics.
        layers: names of convolutions and linear layers whose channels no other layer shares.
        batches: (inputs, labels) as for `discedit.collect_moments`; the loss is cross entropy. "magnitude", "lamp" and
            "bn_scale" look at none. "hessian" takes a backward pass per sample.
        example_inputs: what torch-pruning traces the model on.

    As torch-pruning 1.6.1 has it, "taylor" looks at convolutions, linear layers and layer norms of the group and passes
    over batch norms, and "lamp" orders the channels of a layer as "magnitude" does: they differ where layers are
    ranked together. One fault is not shared: its `HessianImportance.accumulate_grad` looks for a parameter's name among
    parameters, so that each sample replaces what the samples before it gave. Here the squares are summed.

    Raises:
        ValueError: unknown name, a layer is no convolution or linear layer, no batch norm follows it for "bn_scale", or
            there are no samples where gradients are needed.
        AssertionError: torch-pruning gives another number of values than the layer has components, or NaN or Inf.

    Source: Fang, Ma, Song, Mi and Wang, DepGraph: Towards Any Structural Pruning, CVPR 2023 (torch-pruning); "taylor"
    after Molchanov et al., CVPR 2019; "hessian" after LeCun, Denker and Solla, NeurIPS 1989; "lamp" after Lee et al.,
    ICLR 2021; "bn_scale" after Liu et al., ICCV 2017. Read in the code of torch-pruning 1.6.1.
    """
    op = "torch_pruning_importance"
    validation.choice(op, "name", name, TORCH_PRUNING)
    copied = copy.deepcopy(model).requires_grad_(True).eval()
    graph = torch_pruning.DependencyGraph()
    with torch.random.fork_rng([]), torch.enable_grad():
        graph.build_dependency(copied, example_inputs=to_device(example_inputs, device_of(copied)))
        if name in ("taylor", "hessian"):
            differentiate(copied, batches, squared=name == "hessian")
    importance = TORCH_PRUNING[name]()
    found = {}
    for layer in layers:
        channels = list(range(_width(op, copied, layer)))
        module = copied.get_submodule(layer)
        group = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, channels)
        values = importance(group)
        if values is None:
            raise ValueError(f"{op}: layers must have a batch norm behind them for name={name!r}, {layer!r} has none.")
        found[layer] = _checked(op, copied, layer, values.double())
    return found


def tvsprune(model: nn.Module, layers: Iterable[str], batches: Iterable[Any], *, num_classes: int) -> dict[str, Tensor]:
    """TVSPrune's score, the least over all pairs of classes: the preset "tvsprune" of `discedit.presets`.

    Args:
        model, batches, num_classes: as for `discedit.collect_moments`.
        layers: names of modules.

    Raises:
        ValueError: as `discedit.collect_moments` and `discedit.score`.
    """
    scores = preset("tvsprune").score(model, batches, num_classes, layers=list(layers))
    reduced = scores.reduce("pairwise_min")
    return {layer: _checked("tvsprune", model, layer, values) for layer, values in reduced.items()}


def _width(op: str, model: nn.Module, layer: str) -> int:
    module = dict(model.named_modules()).get(layer)
    width = None if module is None else width_of(module)
    if width is None:
        kind = "no module" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"{op}: layers must name convolutions or linear layers, {layer!r} is {kind}.")
    return width


def _checked(op: str, model: nn.Module, layer: str, values: Tensor) -> Tensor:
    """The values, if they are one finite number for each component of the layer."""
    width = _width(op, model, layer)
    if values.shape != (width,) or not bool(values.isfinite().all()):
        raise AssertionError(f"{op}: {layer!r} has {width} components, its importance is {values}.")
    return values


def _keep_input(reader: nn.Module, layer: str, maps: dict[str, Tensor]) -> None:
    """Keeps what the reader reads in each forward pass, channels on axis 1."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maps[layer] = inputs[0].movedim(-1, 1) if isinstance(module, nn.Linear) else inputs[0]

    reader.register_forward_pre_hook(keep)


def _independence(maps: Tensor) -> Tensor:
    """(channels, positions) -> (channels,): the nuclear norm less those with one row gone."""
    maps = maps.double()
    channels, positions = maps.shape
    if positions < channels:
        gram = maps.T @ maps
        reduced = gram - maps[:, :, None] * maps[:, None, :]
    else:
        gram = maps @ maps.T
        everyone = torch.arange(channels, device=maps.device).expand(channels, channels)
        others = everyone[~torch.eye(channels, dtype=torch.bool, device=maps.device)].view(channels, channels - 1)
        reduced = gram[others[:, :, None], others[:, None, :]]
    whole, parts = torch.linalg.eigvalsh(gram), torch.linalg.eigvalsh(reduced)
    # Square roots would blow up the rounding of eigenvalues that are zero.
    rounding = whole.max() * len(gram) * torch.finfo(torch.float64).eps
    return _roots(whole, rounding) - _roots(parts, rounding)


def _roots(eigenvalues: Tensor, rounding: Tensor) -> Tensor:
    return torch.where(eigenvalues > rounding, eigenvalues, 0.0).sqrt().sum(-1)


def differentiate(model: nn.Module, batches: Iterable[Any], *, squared: bool) -> None:
    """Sets each parameter's grad to the mean over samples of the loss's gradient, or of its square."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    device = device_of(model)
    samples = 0
    for index, batch in enumerate(batches):
        inputs, labels = unpack_batch("torch_pruning_importance", batch, index, device, labels_needed=True)
        labels = torch.as_tensor(labels, device=device)
        number = len(labels)
        size = 1 if squared else number
        for start in range(0, number, size):
            model.zero_grad()
            logits = first_tensor(call(model, _rows(inputs, start, start + size)))
            if logits is None:
                raise ValueError("torch_pruning_importance: model must return logits, it returned no tensor.")
            loss = functional.cross_entropy(logits, labels[start : start + size], reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            for total, parameter in zip(sums, parameters, strict=True):
                if parameter.grad is not None:
                    total += parameter.grad**2 if squared else parameter.grad
        samples += number
    if not samples:
        raise ValueError("torch_pruning_importance: batches must give at least one sample, they gave none.")
    for total, parameter in zip(sums, parameters, strict=True):
        parameter.grad = total / samples


def _rows(inputs: Any, start: int, stop: int) -> Any:
    return map_tensors(inputs, lambda tensor: tensor[start:stop])
