"""What is known of several layers, by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class ByLayer(Mapping[str, Value]):
    """A mapping from layer name. It has no equality of its own but identity, as for other owners of tensors."""

    layers: dict[str, Value]

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, layer: str) -> Value:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
