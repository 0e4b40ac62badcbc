"""What one pass accumulates of each layer: mergeable, saved without pickle, the same on every process of a group."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from discedit.common import files
from discedit.common.by_layer import ByLayer
from discedit.moments.distributed import WORLD, Group

if TYPE_CHECKING:
    from typing_extensions import Self


class LayerState(Protocol):
    """What is known of one layer."""

    @property
    def mean(self) -> Tensor: ...
    def named(self) -> dict[str, Tensor]: ...
    def clone(self) -> Any: ...
    def to(self, device: torch.device | str, /) -> Any: ...


S = TypeVar("S", bound=LayerState)


class LayerStates(ByLayer[S]):
    """A mapping from layer name to the layer's state."""

    KIND: ClassVar[str]  # of the files
    EXTRAS: ClassVar[tuple[str, ...]]  # attributes beside the layers: dictionaries are joined, numbers add up

    def __init__(self) -> None:
        self.layers: dict[str, S] = {}

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that the numbers depend on."""

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """Of the files: JSON, whose "layers" has the size of each layer."""

    @classmethod
    @abstractmethod
    def of_header(cls, header: dict[str, Any], path: files.Source) -> Self:
        """What has this header and no layers."""

    @abstractmethod
    def _shapes(self, size: Any) -> dict[str, tuple[int, ...]]:
        """Of a layer's tensors, from its size in the header; ValueError: it is none."""

    @abstractmethod
    def _state(self, tensors: dict[str, Tensor]) -> S:
        """Of a layer that has these tensors."""

    @abstractmethod
    def _merged(self, own: S, other: S) -> S:
        """Both states of a layer together."""

    def _add_extras(self, other: Self) -> None:
        for name in self.EXTRAS:
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, mine | theirs if isinstance(mine, dict) else mine + theirs)

    def _like(self) -> Self:
        """One with the same settings and no layers."""
        return type(self)(**self.settings)

    def contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of the file format."""
        layers = enumerate(self.values())
        return self.header(), {f"{i}.{name}": tensor for i, state in layers for name, tensor in state.named().items()}

    @classmethod
    def from_contents(cls, header: dict[str, Any], tensors: dict[str, Tensor], path: files.Source) -> Self:
        found = cls.of_header(header, path)
        for index, (layer, size) in enumerate(files.field(header, "layers", dict, path).items()):
            try:
                shapes = found._shapes(size)
            except ValueError as error:
                raise ValueError(f"{str(path)!r} is damaged: layer {layer!r}: {error}") from error
            kinds = {name: torch.int64 if name == "count" else torch.float64 for name in shapes}
            found.layers[layer] = found._state({
                name: files.take(tensors, f"{index}.{name}", shape, kinds[name], path) for name, shape in shapes.items()
            })  # fmt: skip
        files.nothing_else(header, tensors, found.contents(), path)
        return found

    def merge(self, other: Self) -> Self:
        """Add the samples of `other` to this object, which is returned. Layers that only one side has are kept.

        Raises:
            ValueError: the two differ in settings, or in a layer's shape or weights. Nothing is then merged.
        """
        op, mine, theirs = f"{type(self).__name__}.merge", self.settings, other.settings
        if mine != theirs:
            different = [name for name in mine if mine[name] != theirs[name]]
            wanted, found = (", ".join(f"{name}={of[name]!r}" for name in different) for of in (mine, theirs))
            raise ValueError(f"{op}: other must have {wanted} like this object, it has {found}.")
        merged: dict[str, S] = {}
        for layer, state in other.items():
            try:
                merged[layer] = self._merged(self.layers[layer], state) if layer in self else state.clone()
            except ValueError as error:
                raise ValueError(f"{op}: layer {layer!r}: {error}") from error
        self.layers.update(merged)
        self._add_extras(other)
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge those of all processes of a `torch.distributed` group, in rank order; all end with the same bits.

        Args:
            group: by default all processes.

        Raises:
            RuntimeError: no process group is initialised, or another process died, failed or came to no end in the
                group's timeout.
            ValueError: the processes accumulated different things.
        """
        return self.reduce_in(Group(f"{type(self).__name__}.all_reduce", WORLD if group is None else group))

    def reduce_in(self, group: Group, device: torch.device | None = None) -> Self:
        """`all_reduce`; layers that this process has not read come to the device."""
        total = self._like()
        refused: ValueError | None = None
        # Without a checksum of their own: nothing lies on a disk between the processes.
        for rank, data in enumerate(group.exchange(files.to_bytes(self.KIND, *self.contents(), sealed=False))):
            source = f"rank {rank}"
            try:
                total.merge(self.from_contents(*files.from_bytes(data, self.KIND, source), source))
            except ValueError as error:  # the others still wait for the rest
                refused = refused or error
        if refused is not None:
            raise refused
        devices = {layer: state.mean.device for layer, state in self.items()}
        self.layers = {layer: state.to(devices.get(layer, device or "cpu")) for layer, state in total.items()}
        for name in self.EXTRAS:
            setattr(self, name, getattr(total, name))
        return self

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""
        copy = self._like()
        copy._add_extras(self)
        copy.layers = {layer: state.to(device) for layer, state in self.items()}
        return copy

    def save(self, path: files.Source) -> None:
        """Write one safetensors file, atomically."""
        files.save_tensors(path, self.KIND, *self.contents())

    @classmethod
    def load(cls, path: files.Source) -> Self:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged or foreign file.
        """
        return cls.from_contents(*files.load_tensors(path, cls.KIND), path)
