"""Scores, and what readers lose, as an importance of torch-pruning, for all of its pruners."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance

from discedit.common import validation
from discedit.integrations._channels import per_channel
from discedit.model.forward import device_of, index_samples, samples_in, unpack_batch
from discedit.model.trace import width_of
from discedit.scoring.scores import Scores
from discedit.selection.importance import importances

# torch-pruning's name -> what scatter_reduce calls it. "first" and "gate" take one layer in place of all.
OVER_LAYERS = {"mean": "mean", "sum": "sum", "max": "amax", "prod": "prod", "first": "mean", "gate": "mean"}
NORMALIZERS = ("sum", "standarization", "mean", "max", "gaussian", "lamp")  # spelled as torch-pruning spells them
OF_DATA = ("energy", "reconstruction", "fidelity")  # criteria of `prune` that need no labels
# Heads would give all of their channels one importance, and torch-pruning takes channels out of heads.
KINDS = ("filters", "neurons", "stream")
OP = "DiscEditImportance"


class DiscEditImportance(GroupMagnitudeImportance):  # type: ignore[misc]
    """How much the channels of a torch-pruning group count, by scores of the layers that produce them.

    Pass it as ``importance`` to a pruner of torch-pruning; `DiscEditImportance.from_data` makes one that loses less.
    For a group it gives one number per channel of the root, in the order of torch-pruning's ``root_idxs``: float64 on
    the device of the root (float32 on devices without), higher = keep; infinite for a channel that no scored output
    belongs to, and None for a group without scores. How outputs belong to a root channel: docs/embedding.md. Scores
    follow the groups that are pruned after the first call.

    Args:
        model: the model that is pruned, or a part of it, as it was scored.
        scores: `Scores`, or a mapping of layer names to tensors (channels,) or (channels, classes). A class that is NaN
            in a whole layer is left out there.
        reduction: over classes, as in `Scores.reduce`.
        group_reduction: over the outputs of one root channel: "mean", "sum", "max", "prod", or the mean within the
            "first" layer of the group that has the channel, or the last ("gate").
        normalizer: of a group's values, as in torch-pruning: "mean", "sum", "max", "standarization", "gaussian",
            "lamp", "sentinel_0.5" (any quantile), a function, or None. Values that are all 0 stay 0.
        fallback: an importance for groups without scores.

    Attributes:
        kept: layer -> indices of the channels that are left, int64, ascending; `Scores.select` takes it.

    Raises:
        ValueError: an argument that does not fit; when called, a group of another model, a layer that was changed
            otherwise, or a normalizer whose result is not finite.

    Source: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023 (torch-pruning 1.6.1).
    """

    def __init__(
        self,
        model: nn.Module,
        scores: Scores | Mapping[str, Tensor],
        *,
        reduction: str = "max",
        group_reduction: str = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        fallback: Callable[[Any], Tensor | None] | None = None,
    ) -> None:
        validation.choice(OP, "group_reduction", group_reduction, OVER_LAYERS)
        if isinstance(normalizer, str):
            validation.choice(OP, "normalizer", "mean" if _is_sentinel(normalizer) else normalizer, NORMALIZERS)
        super().__init__(group_reduction=group_reduction, normalizer=normalizer)
        self.model = model
        self.fallback = fallback
        self._values = per_channel(OP, scores, reduction)
        modules = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[nn.Module, str] = {}
        for layer, values in self._values.items():
            if layer not in modules:
                raise ValueError(f"{OP}: scores must name modules of the model, {layer!r} is none of them.")
            same = self._names.setdefault(modules[layer], layer)
            if same != layer:
                raise ValueError(f"{OP}: scores must name a module once, {layer!r} and {same!r} are the same.")
            width = width_of(modules[layer])
            if width is not None and width != len(values):
                rule = f"must have a row for each of the layer's {width} channels, got {len(values)}"
                raise ValueError(f"{OP}: scores[{layer!r}] {rule}.")
        self.kept = {layer: torch.arange(len(values)) for layer, values in self._values.items()}
        self._followed: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def from_data(
        cls,
        model: nn.Module,
        data: Iterable[Any],
        *,
        criterion: str = "energy",
        example_inputs: Any = None,
        group_reduction: str = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        fallback: Callable[[Any], Tensor | None] | None = None,
    ) -> DiscEditImportance:
        """The importance to take in a pruner of torch-pruning: by what the layers that read a channel lose without it.

        Up to 1,024 samples of the data, forward passes alone, no labels. Groups that no such layer reads, or that
        torch-pruning and `discedit.prune` see differently (dimensions of attention), have the sum of squared weights
        that torch-pruning's own `MagnitudeImportance` gives.

        Args:
            model: the whole model, before anything is pruned.
            data: batches (labels are not used).
            criterion: of `discedit.prune`: "energy" (the variance that a channel adds to what reads it: where nothing
                is repaired), "reconstruction" (the part of it that other channels cannot make up for: before batch
                norms are re-estimated) or "fidelity".
            example_inputs: what the model is traced on, by default the first sample of `data`.
            group_reduction, normalizer, fallback: as for the class; `fallback` by default squared weights.

        Returns:
            `DiscEditImportance`, with (channels,) float64 for each layer that has them.

        Raises:
            TypeError: data gives no batches.
            ValueError: an argument that is none of its choices, no sample, feature maps with NaN or Inf, a model that
                cannot be traced, or none of whose channels can be judged.

        Source: as for the criteria in docs/pruning.md; measured in benchmarks/embed.md.
        """
        op = f"{OP}.from_data"
        validation.module(op, model)
        validation.choice(op, "criterion", criterion, OF_DATA)
        validation.batches(op, "data", data)
        data = list(data) if isinstance(data, Iterator) else data  # it is read twice
        if example_inputs is None:
            example_inputs = _first_sample(op, data, device_of(model))
        found = importances(model, None, criterion, example_inputs=example_inputs, data=data, components=KINDS)
        if not found:
            raise ValueError(f"{op}: model must have channels that can be removed and are read, none was found.")
        return cls(
            model,
            found,
            group_reduction=group_reduction,
            normalizer=normalizer,
            fallback=GroupMagnitudeImportance(p=2) if fallback is None else fallback,
        )

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Importance of the root's channels in the group, (channels,), or None where nothing in the group is scored."""
        graph = group._DG
        self.follow(graph)
        for scored, name in self._names.items():
            if self.model.get_submodule(name) is not scored:
                raise ValueError(f"{OP}: layers must stay the modules that they were, {name!r} was replaced.")
        root = group[0]
        place = {index: place for place, index in enumerate(self._order(graph, root))}
        members = []
        for item in group.items:
            layer = self._scored(graph, item.dep)
            if layer is None or not item.idxs or None in item.root_idxs:  # None: shared heads, which have no one root
                continue
            self._check_unchanged(graph, layer, item.dep.target.module, max(item.idxs))
            places = torch.tensor([place[index] for index in item.root_idxs])
            members.append((places, self._values[layer][self.kept[layer][item.idxs]]))
        if not members:
            return None if self.fallback is None else self.fallback(group)
        values = self._normalized(self._over_layers(members, len(place)))
        module = root.dep.target.module
        device = module.device if isinstance(module, Tensor) else device_of(module)
        return values.to(device, torch.float32 if device.type == "mps" else torch.float64)

    def follow(self, graph: Any) -> None:
        """Observe the groups that a `torch_pruning.DependencyGraph` makes from now on; a call with a group does so.

        Raises:
            ValueError: the graph has none of the scored layers.
        """
        if graph in self._followed:
            return
        if not any(module in graph.module2node for module in self._names):
            raise ValueError(
                f"{OP}: groups must be of a graph of the model that was given, this one has none of its scored layers."
            )
        make = graph.get_pruning_group

        def get_pruning_group(*args: Any, **kwargs: Any) -> Any:
            group = make(*args, **kwargs)
            group.prune = partial(self._prune, graph, group, group.prune)
            return group

        graph.get_pruning_group = get_pruning_group
        self._followed.add(graph)

    def _prune(self, graph: Any, group: Any, prune: Any, idxs: Any = None, record_history: bool = True) -> None:
        """`Group.prune`, and then the same channels go here. With `idxs` it prunes a group that is observed itself."""
        gone = [(layer, list(own)) for dep, own in group.items if (layer := self._scored(graph, dep))]
        prune(idxs, record_history)
        for layer, channels in gone if idxs is None else ():
            left = torch.ones(len(self.kept[layer]), dtype=torch.bool)
            left[channels] = False
            self.kept[layer] = self.kept[layer][left]

    def _scored(self, graph: Any, dep: Any) -> str | None:
        """The scored layer whose outputs a dependency prunes."""
        layer = self._names.get(dep.target.module)
        return layer if graph.is_out_channel_pruning_fn(dep.handler) else None

    def _check_unchanged(self, graph: Any, layer: str, module: nn.Module, highest: int) -> None:
        width, known = graph.get_out_channels(module), len(self.kept[layer])
        if width != known:
            raise ValueError(
                f"{OP}: layers must change through observed groups alone (see follow), {layer!r} has {width} channels, "
                f"{known} of its {len(self._values[layer])} scored ones should be left."
            )
        if highest >= width:
            raise ValueError(
                f"{OP}: groups must stay within the channels of their layers, this one reaches channel {highest} of "
                f"{layer!r}, which has {width}: torch-pruning mistook layers of different widths for one group. "
                f"Exclude them by ignored_layers."
            )

    def _order(self, graph: Any, root: Any) -> list[int]:
        """The root's channels in the order of the result: ascending for all of them, else as the group has them."""
        module, handler = root.dep.target.module, root.dep.handler
        outputs = graph.is_out_channel_pruning_fn(handler)
        width = graph.get_out_channels(module) if outputs else graph.get_in_channels(module)
        order: list[int] = list(root.idxs)
        return sorted(order) if len(order) == width else order

    def _over_layers(self, members: list[tuple[Tensor, Tensor]], channels: int) -> Tensor:
        how = OVER_LAYERS[self.group_reduction]
        values = torch.full((channels,), torch.inf, dtype=torch.float64)
        if self.group_reduction not in ("first", "gate"):
            members = [(torch.cat([places for places, _ in members]), torch.cat([own for _, own in members]))]
        for places, own in reversed(members) if self.group_reduction == "first" else members:
            values.scatter_reduce_(0, places, own, how, include_self=False)  # what is not among the places stays
        return values

    def _normalized(self, values: Tensor) -> Tensor:
        known = values.isfinite()
        given = values[known]
        if self.normalizer is None or not bool(given.any()):
            return values
        # torch-pruning's "lamp" is float32 alone.
        scaled = self._normalize(given.float() if self.normalizer == "lamp" else given, self.normalizer)
        if not bool(scaled.isfinite().all()):
            raise ValueError(
                f"{OP}: normalizer must give finite numbers, {self.normalizer!r} gives {scaled.tolist()} of "
                f"{given.tolist()}."
            )
        return values.masked_scatter(known, scaled.double())


def _first_sample(op: str, data: Iterable[Any], device: torch.device) -> Any:
    for index, batch in enumerate(data):
        inputs, _ = unpack_batch(op, batch, index, device, labels_needed=False, argument="data")
        if size := samples_in(inputs):
            return index_samples(inputs, slice(1), size)
    raise ValueError(f"{op}: data must give at least one sample, it gave none.")


def _is_sentinel(normalizer: str) -> bool:
    """sentinel_0.5 and the like, any number of at least 0 and below 1."""
    name, _, share = normalizer.partition("_")
    return name == "sentinel" and share.replace(".", "", 1).isdigit() and float(share) < 1
