"""`Moments`: the per-class moments of every layer of a model, mergeable and saved without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from discedit import ops
from discedit.backends import arguments, select
from discedit.common import files, validation
from discedit.common.state import ClassMoments, State, VectorMoments
from discedit.moments.states import LayerStates

Statistic = str | tuple[str, ...]
Scale = float | dict[str, float] | None
READS = ("consumer", "norm", "output")  # where `collect_moments` reads a layer
READ_ONCE = "norm"  # what files say that do not name it
GREATEST_EXPONENT = 350.0  # of exp(-scale t), whose square must stay within the range of float64


class Moments(LayerStates[State]):
    """Class-conditional moments of the components of a model's layers: a mapping from layer name to the layer's state.

    A state is a `ClassMoments` or, for the witness "vector", a `VectorMoments`.
    `collect_moments` makes one from a model and data; `update` makes one from feature maps of any origin.

    Args:
        num_classes: number of classes.
        statistic: what a feature map is reduced to, as for `discedit.ops.pool`: "mean", "sum", "l2", "rms", "absmax",
            "max", "positive_fraction" or "cls"; for the witness "vector" a tuple or list of several.
        witness: "quadratic" or "linear" (the state is that of the statistic t, and serves both), "exp" (that of
            exp(-scale t)) or "vector".
        scale: for "exp" alone, a finite number above 0, or a mapping from layer name to one.
        read: where `collect_moments` read the layers; moments that were read elsewhere do not merge.
        backend: as in `discedit.ops`.

    Attributes:
        num_classes, statistic, witness, scale, read: as given; several statistics are a tuple.
        statistics: a tuple also of one.
        norms: for a layer whose output goes straight into a normalisation, the name of that normalisation. Edits reach
            both.

    Raises:
        TypeError, ValueError: an argument is not one of its choices, or statistic or scale does not fit the witness.
    """

    KIND = "moments"
    EXTRAS = ("norms",)

    def __init__(
        self,
        num_classes: int,
        *,
        statistic: Statistic | list[str] = "mean",
        witness: str = "quadratic",
        scale: float | Mapping[str, float] | None = None,
        read: str = "consumer",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = "Moments"
        self.num_classes = validation.positive_integer(op, "num_classes", num_classes)
        self.statistics = arguments.statistics(op, statistic)
        arguments.witness(op, witness, statistic, scale)
        self.statistic: Statistic = statistic if isinstance(statistic, str) else self.statistics
        self.witness = witness
        self.scale: Scale = None
        if isinstance(scale, Mapping):
            self.scale = {layer: arguments.scale(op, value) for layer, value in scale.items()}
        elif witness == "exp":
            self.scale = arguments.scale(op, scale)
        self.read = validation.choice(op, "read", read, READS)
        self.backend = backend
        self.norms: dict[str, str] = {}

    def __repr__(self) -> str:
        channels = sum(state.channels for state in self.values())
        return f"Moments({len(self)} layers, {channels} channels, {self.num_classes} classes, {self.samples} samples)"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the numbers depend on."""
        return {name: getattr(self, name) for name in ("num_classes", "statistic", "witness", "scale", "read")}

    @property
    def samples(self) -> int:
        """Samples seen by the layer that saw most."""
        return max((int(state.count.sum()) for state in self.values()), default=0)

    def update(self, layer: str, x: Tensor, labels: Tensor, *, layout: str = "auto") -> None:
        """Merge one batch of a layer's feature maps.

        Args:
            layer: name of the layer; a new name starts a new state.
            x, layout: feature map, as for `discedit.ops.pool`.
            labels: class index of each sample, shape (samples,), on the device of x.

        Raises:
            ValueError: labels or shape do not fit, a statistic is NaN or infinite (NaN in a map makes it so, Inf unless
                the statistic passes it over, as "max" does -Inf), exp(-scale t) is too large, or a mapping of scales
                lacks the layer. The state is then unchanged.
        """
        try:
            pooled = ops.pool(x, statistic=self.statistic, layout=layout, backend=self.backend)
            self.fold_planes(layer, pooled[None] if pooled.ndim == 2 else pooled.permute(2, 0, 1), labels)
        except ValueError as error:
            raise ValueError(f"layer {layer!r}: {error}") from error

    def fold_planes(self, layer: str, planes: Tensor, labels: Tensor, *, checked: bool = False) -> None:
        """`update` after pooling, from the layout of the kernels: (statistics, samples, channels).

        ``checked`` leaves the values to the caller, to whom `sentinel` tells whether they are sound.
        """
        labels = arguments.labels("class_moments", labels, planes[0])
        scale = self._scale_of(layer)
        if not checked:
            _check_range(planes, scale)
        state = self.layers.get(layer)
        if state is None:
            state = self._kind.with_mean(self._mean_shape(planes.shape[2]), planes.device)
        elif state.channels != planes.shape[2] or state.device != planes.device:
            raise ValueError(
                f"pooled must have {state.channels} channels on {state.device} like the batches before, got "
                f"{planes.shape[2]} on {planes.device}."
            )
        select("fold_moments", self.backend, planes.device)(planes.contiguous(), scale, labels, state)
        self.layers[layer] = state

    def sentinel(self, layer: str, planes: Tensor) -> Tensor:
        """One number, on the device of the planes, that is not finite where `update` would refuse them."""
        if planes.numel() == 0:
            return planes.new_zeros(())
        greatest, scale = planes.abs().amax(), self._scale_of(layer)
        if scale:
            greatest = greatest.masked_fill(planes.amin() * scale < -GREATEST_EXPONENT, torch.nan)
        return greatest

    def _scale_of(self, layer: str) -> float:
        """The scale of a layer; 0 for every witness but "exp"."""
        if not isinstance(self.scale, dict):
            return self.scale or 0.0
        if layer not in self.scale:
            raise ValueError(f"scale must name every layer, layer {layer!r} is not among {list(self.scale)}.")
        return self.scale[layer]

    def _mean_shape(self, channels: int) -> tuple[int, ...]:
        plane = (self.num_classes, channels)
        return (len(self.statistics), *plane) if self.witness == "vector" else plane

    @property
    def _kind(self) -> type[State]:
        return VectorMoments if self.witness == "vector" else ClassMoments

    def _merged(self, own: State, other: State) -> State:
        return ops.merge_moments(own, other, backend=self.backend)

    def _like(self) -> Moments:
        return Moments(**self.settings, backend=self.backend)

    def rows(self, which: slice | list[int]) -> Moments:
        """A copy with some of the classes alone, in their order."""
        number = len(range(self.num_classes)[which]) if isinstance(which, slice) else len(which)
        settings = self.settings | {"num_classes": number}
        part = Moments(**settings, backend=self.backend)
        part.norms = dict(self.norms)
        for layer, state in self.items():
            sums = (tensor[..., which, :].clone() for tensor in state.tensors()[1:])
            part.layers[layer] = self._kind(state.count[which].clone(), *sums)
        return part

    def of_classes(self, classes: Sequence[int]) -> Moments:
        """A copy with some of the classes alone, in the order given: what tells these from each other.

        Raises:
            ValueError: classes that are none.
        """
        return self.rows(validation.classes("Moments.of_classes", classes, self.num_classes))

    def header(self) -> dict[str, Any]:
        return {
            **self.settings,
            "layers": {layer: state.channels for layer, state in self.items()},
            "norms": self.norms,
        }

    @classmethod
    def of_header(cls, header: dict[str, Any], path: files.Source) -> Moments:
        moments = cls(
            files.field(header, "num_classes", int, path),
            statistic=files.field(header, "statistic", (str, list), path),
            witness=files.field(header, "witness", str, path),
            scale=files.field(header, "scale", (float, dict, type(None)), path),
            read=READ_ONCE if "read" not in header else files.field(header, "read", str, path),
        )
        moments.norms = files.field(header, "norms", dict, path)
        return moments

    def _shapes(self, size: Any) -> dict[str, tuple[int, ...]]:
        if not isinstance(size, int):
            raise ValueError(f"it must have a number of channels, got {size!r}.")
        return self._kind.shapes(*self._mean_shape(size))

    def _state(self, tensors: dict[str, Tensor]) -> State:
        return self._kind(*tensors.values())


def _check_range(planes: Tensor, scale: float) -> None:
    """Refuses NaN, Inf and what would overflow; cheap where all is well, because a finite sum has finite terms."""
    if not math.isfinite(float(planes.sum())):
        _refuse(~planes.isfinite(), "feature maps must be finite, found NaN or Inf in")
    if scale and planes.numel() and float(planes.amin()) * scale < -GREATEST_EXPONENT:
        rule = f"scale must keep exp(-scale t) below exp({GREATEST_EXPONENT:g}), scale={scale} does not for"
        _refuse(planes * scale < -GREATEST_EXPONENT, rule)


def _refuse(bad: Tensor, rule: str) -> None:
    if bool(bad.any()):
        _, sample, channel = bad.nonzero()[0].tolist()
        raise ValueError(f"{rule} the map of sample {sample}, channel {channel}.")
