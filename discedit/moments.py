"""`Moments`: the per-class moments of every layer of a model, mergeable and saved without pickle."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from discedit import _checks, _files, ops
from discedit._state import ClassMoments

_FIELDS = ("count", "mean", "m2", "m3", "m4")


class Moments(Mapping[str, ClassMoments]):
    """Class-conditional moments of the components of a model's layers: a mapping from layer name to `ClassMoments`.

    `collect_moments` makes one from a model and data; `update` makes one from feature maps of any origin.

    Args:
        num_classes: number of classes.
        statistic: what a feature map is reduced to; "mean" over space or tokens.
        backend: as in `discedit.ops`.

    Attributes:
        norms: for a layer whose output goes straight into a normalisation, the name of that normalisation. Such a
            layer is read after it, and edits reach both.
    """

    def __init__(self, num_classes: int, *, statistic: str = "mean", backend: str = "auto") -> None:
        self.num_classes = _checks.positive_integer("Moments", "num_classes", num_classes)
        self.statistic = _checks.choice("Moments", "statistic", statistic, _checks.STATISTICS)
        self.backend = backend
        self.norms: dict[str, str] = {}
        self._layers: dict[str, ClassMoments] = {}

    # A mapping of tensors has no equality of its own: identity, as for other owners of tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, layer: str) -> ClassMoments:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        channels = sum(state.channels for state in self.values())
        return f"Moments({len(self)} layers, {channels} channels, {self.num_classes} classes, {self.samples} samples)"

    @property
    def samples(self) -> int:
        """Samples seen by the layer that saw most."""
        return max((int(state.count.sum()) for state in self.values()), default=0)

    def update(self, layer: str, x: Tensor, labels: Tensor, *, layout: str = "auto") -> None:
        """Merge one batch of a layer's feature maps.

        Args:
            layer: name of the layer; a new name starts a new state.
            x, layout: feature map, as for `discedit.ops.pool`.
            labels: class index of each sample, shape (samples,).

        Raises:
            ValueError: labels or shape do not fit, or the map holds NaN or Inf. The state is then unchanged.
        """
        try:
            pooled = ops.pool(x, statistic=self.statistic, layout=layout, backend=self.backend)
            self.fold(layer, pooled, labels)
        except ValueError as error:
            raise ValueError(f"layer {layer!r}: {error}") from error

    def fold(self, layer: str, pooled: Tensor, labels: Tensor) -> None:
        """Merge one batch of a layer's pooled features, shape (samples, channels), float64: `update` after pooling."""
        bad = ~pooled.isfinite()
        if bool(bad.any()):
            sample, channel = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"feature maps must be finite, found NaN or Inf in the map of sample {sample}, channel {channel}."
            )
        state = self._layers.get(layer)
        state = ops.class_moments(pooled, labels, self.num_classes, out=state, backend=self.backend)
        self._layers[layer] = state

    def merge(self, other: Moments) -> Moments:
        """Add the samples of `other` to this object, which is returned. Layers that only one side has are kept.

        Raises:
            ValueError: the two differ in classes, in statistic or in a layer's channels. Nothing is then merged.
        """
        if (other.num_classes, other.statistic) != (self.num_classes, self.statistic):
            raise ValueError(
                f"Moments.merge: other must have num_classes={self.num_classes} and statistic={self.statistic!r}, "
                f"it has num_classes={other.num_classes} and statistic={other.statistic!r}."
            )
        merged = {}
        for layer, state in other.items():
            try:
                mine = self._layers.get(layer)
                merged[layer] = state.clone() if mine is None else ops.merge_moments(mine, state, backend=self.backend)
            except ValueError as error:
                raise ValueError(f"Moments.merge: layer {layer!r}: {error}") from error
        self._layers.update(merged)
        self.norms.update(other.norms)
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Merge the moments of all processes of a `torch.distributed` group, in rank order, on every process.

        Every rank ends with the same bits. Raises RuntimeError when no process group is initialised.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("Moments.all_reduce: torch.distributed must be initialised first.")
        total = Moments(self.num_classes, statistic=self.statistic, backend=self.backend)
        for rank, data in enumerate(_gather_bytes(_files.to_bytes("moments", *self._contents()), group)):
            total.merge(self._from_contents(*_files.from_bytes(data, "moments", f"rank {rank}"), f"rank {rank}"))
        devices = {layer: state.device for layer, state in self.items()}
        self._layers = {layer: state.to(devices.get(layer, "cpu")) for layer, state in total.items()}
        self.norms = total.norms
        return self

    def to(self, device: torch.device | str) -> Moments:
        """A copy on another device."""
        copy = Moments(self.num_classes, statistic=self.statistic, backend=self.backend)
        copy.norms = dict(self.norms)
        copy._layers = {layer: state.to(device) for layer, state in self.items()}
        return copy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        _files.save_tensors(path, "moments", *self._contents())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: no such file. ValueError: a damaged or foreign file.
        """
        return cls._from_contents(*_files.load_tensors(path, "moments"), path)

    def _contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of the file format."""
        tensors = {
            f"{index}.{field}": tensor
            for index, state in enumerate(self.values())
            for field, tensor in zip(_FIELDS, state.tensors(), strict=True)
        }
        header = {
            "num_classes": self.num_classes,
            "statistic": self.statistic,
            "layers": {layer: state.channels for layer, state in self.items()},
            "norms": self.norms,
        }
        return header, tensors

    @classmethod
    def _from_contents(
        cls, header: dict[str, Any], tensors: dict[str, Tensor], path: str | os.PathLike[str]
    ) -> Moments:
        moments = cls(
            _files.field(header, "num_classes", int, path), statistic=_files.field(header, "statistic", str, path)
        )
        moments.norms = _files.field(header, "norms", dict, path)
        for index, (layer, channels) in enumerate(_files.field(header, "layers", dict, path).items()):
            shape = (moments.num_classes, channels)
            count = _files.take(tensors, f"{index}.count", shape[:1], torch.int64, path)
            sums = (_files.take(tensors, f"{index}.{field}", shape, torch.float64, path) for field in _FIELDS[1:])
            moments._layers[layer] = ClassMoments(count, *sums)
        return moments


def _gather_bytes(data: bytes, group: dist.ProcessGroup | None) -> list[bytes]:
    """Every rank's bytes, in rank order: as tensors, because objects would travel as pickle."""
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [bytes(part[: int(size)].cpu().numpy()) for part, size in zip(parts, sizes, strict=True)]
