"""Fidelity: how much of what a layer gives can be had from some of its input channels alone (ModHiFi).

A layer's output c is a sum over its input channels i, Y_c = sum_i A_ci (a channel convolved with its slice of the
filter; of a linear layer, a feature times its column). With Q_c[i, j] = E<A_ci, A_cj>, the fidelity of channels S is

    max over delta of 1 - E||Y_c - sum_{i in S} delta_i A_ci||^2 / E||Y_c||^2  =  b_S' Q_c[S, S]^-1 b_S / E||Y_c||^2

with b = Q_c 1: in [0, 1], 0 for none, 1 for all, and it never falls when a channel is added. All of it follows from
second moments of what the layer reads, which one pass collects.

Source: Kashyap, Murti, Nayak, Narshana and Bhattacharyya, ModHiFi, NeurIPS 2025.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from discedit.backends import select
from discedit.common import files, validation
from discedit.common.window import Window
from discedit.model.forward import call, chosen, device_of, outside_inference_mode, samples_in, without_autocast
from discedit.model.sharded import unwrapped
from discedit.model.trace import ModelTrace, is_layer
from discedit.moments.calibration import CHUNK, gram_of, padding_of
from discedit.moments.checkpoint import Checkpoint, Progress, digest_of
from discedit.moments.data_pass import Pass
from discedit.moments.group import WORLD, Group, OtherFailed
from discedit.selection.contributions import TINY, Contributions, Growing

OP = "collect_second_moments"
FILE = "second moments"  # kind of file
KINDS = ("full", "singleton")
POSITIONS = {"full": 49, "singleton": 16}  # of a map, looked at by default


@dataclass(frozen=True)
class OutputMoments:
    """What singleton scores need beside the moments of what is read: y is the layer's output without its bias.

    Attributes:
        mean: (outputs,). cross: sums of y x around the means, (outputs, channels, taps). square: of y y, (outputs,).
            All float64.
    """

    mean: Tensor
    cross: Tensor
    square: Tensor


@dataclass(frozen=True)
class InputMoments:
    """Mean and central second moments of what one layer reads at one output position: of each channel a patch (x).

    Attributes:
        count: samples x positions, shape (), int64.
        mean: (channels, taps), float64; a linear layer has one tap.
        scatter: sums of products around the mean, float64: of all pairs, (channels x taps, channels x taps), or, for
            the kind "singleton", of those within each channel, (channels, taps, taps).
        weight: of the layer, (outputs, channels, taps), float64.
        output: for the kind "singleton" alone; otherwise it follows from the weight.

    Sums, not averages, so that states merge exactly (Chan, Golub and LeVeque 1979).
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    weight: Tensor
    output: OutputMoments | None = None

    @property
    def channels(self) -> int:
        return self.mean.shape[0]

    @staticmethod
    def shapes(kind: str, outputs: int, channels: int, taps: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name, as files have them."""
        wide = channels * taps
        shapes: dict[str, tuple[int, ...]] = {
            "count": (),
            "mean": (channels, taps),
            "scatter": (wide, wide) if kind == "full" else (channels, taps, taps),
            "weight": (outputs, channels, taps),
        }
        if kind == "singleton":
            shapes |= {
                "output.mean": (outputs,),
                "output.cross": (outputs, channels, taps),
                "output.square": (outputs,),
            }
        return shapes

    def tensors(self) -> dict[str, Tensor]:
        found = {"count": self.count, "mean": self.mean, "scatter": self.scatter, "weight": self.weight}
        if self.output is not None:
            found |= {f"output.{name}": getattr(self.output, name) for name in ("mean", "cross", "square")}
        return found

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> InputMoments:
        output = {name.removeprefix("output."): t for name, t in tensors.items() if name.startswith("output.")}
        count, mean, scatter, weight = (tensors[name] for name in ("count", "mean", "scatter", "weight"))
        return cls(count, mean, scatter, weight, OutputMoments(**output) if output else None)

    def clone(self) -> InputMoments:
        """A copy, all of it float64."""
        return self.to(self.mean.device)

    def to(self, device: torch.device | str) -> InputMoments:
        """A copy on a device, all of it float64. Count and weight, which are not summed up, stay where they are."""
        copies = {
            name: t.clone() if name == "count" else t.to(device, torch.float64, copy=True)
            for name, t in self.tensors().items()
            if name != "weight"
        }
        return self.of_tensors({**copies, "weight": self.weight})

    def add_(self, other: InputMoments) -> InputMoments:
        """Take in the samples of `other`, in place.

        Raises:
            ValueError: the two are of different kinds or layers.
        """
        same = self.weight is other.weight or torch.equal(self.weight, other.weight)
        if self.scatter.shape != other.scatter.shape or not same:
            raise ValueError("both must be of one kind, and of a layer with the same weights.")
        share = other.count.double() / (self.count + other.count).clamp(min=1)
        cross = self.count * share
        shift = other.mean - self.mean
        if self.output is not None and other.output is not None:
            of_output = other.output.mean - self.output.mean
            self.output.cross.add_(other.output.cross)
            self.output.cross.flatten(1).addr_(cross * of_output, shift.flatten())
            self.output.square.add_(other.output.square).add_(cross * of_output.square())
            self.output.mean.add_(share * of_output)
        self.scatter.add_(other.scatter)
        if self.scatter.ndim == 2:
            self.scatter.addr_(cross * shift.flatten(), shift.flatten())
        else:
            self.scatter.add_(cross * _products(shift, False))
        self.mean.add_(share * shift)
        self.count.add_(other.count)
        return self


def _products(x: Tensor, full: bool) -> Tensor:
    """Of a (channels, taps) tensor with itself, in the shape of a scatter."""
    return torch.outer(x.flatten(), x.flatten()) if full else x[:, :, None] * x[:, None, :]


class SecondMoments(Mapping[str, InputMoments]):
    """Second moments of what layers read: a mapping from layer name to `InputMoments`. Mergeable, saved without pickle.

    Args:
        kind: "full" or "singleton", as for `collect_second_moments`.
        positions: of a map, at most, that are looked at; None: all.
        classes: whose samples alone were counted; None: all.

    Attributes:
        kind, positions, classes: as given.
        samples: that were counted.
        skipped: layer -> why it was left out.
    """

    def __init__(
        self, kind: str = "full", *, positions: int | None = None, classes: Sequence[int] | None = None
    ) -> None:
        op = "SecondMoments"
        self.kind = validation.choice(op, "kind", kind, KINDS)
        self.positions = None if positions is None else validation.positive_integer(op, "positions", positions)
        for cls in classes or ():
            if (validation.index(cls) or 0) != cls or cls < 0:
                raise ValueError(f"{op}: classes must be integers of at least 0, got {cls!r}.")
        self.classes = None if classes is None else sorted(set(classes))
        self.samples = 0
        self.skipped: dict[str, str] = {}
        self._layers: dict[str, InputMoments] = {}

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, layer: str) -> InputMoments:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"SecondMoments({self.kind}, {len(self)} layers, {self.samples} samples)"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the numbers depend on."""
        return {"kind": self.kind, "positions": self.positions, "classes": self.classes}

    def update(self, layer: str, moments: InputMoments) -> None:
        """Merge more of a layer; a new name starts a new state."""
        try:
            if layer in self._layers:
                self._layers[layer].add_(moments)
            else:
                self._layers[layer] = moments.clone()
        except ValueError as error:
            raise ValueError(f"SecondMoments.update: layer {layer!r}: {error}") from error

    def merge(self, other: SecondMoments) -> SecondMoments:
        """Add the samples of `other` to this object, which is returned. Layers that only one side has are kept.

        Raises:
            ValueError: the two differ in kind, positions, classes or a layer's weights. Nothing is then merged.
        """
        if self.settings != other.settings:
            raise ValueError(
                f"SecondMoments.merge: other must have {self.settings} like this object, it has {other.settings}."
            )
        merged = {}
        for layer, state in other.items():
            try:
                own = self._layers.get(layer)
                merged[layer] = state.clone() if own is None else own.clone().add_(state)
            except ValueError as error:
                raise ValueError(f"SecondMoments.merge: layer {layer!r}: {error}") from error
        self._layers.update(merged)
        self.samples += other.samples
        self.skipped |= other.skipped
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SecondMoments:
        """Merge those of all processes of a `torch.distributed` group, in rank order, on every process.

        Raises:
            RuntimeError: no process group is initialised, or another process died or failed.
            ValueError: the processes collected different things.
        """
        return self.reduce_in(Group("SecondMoments.all_reduce", WORLD if group is None else group))

    def reduce_in(self, group: Group) -> SecondMoments:
        total = SecondMoments(**self.settings)
        group.total(FILE, self, total)
        self.samples, self.skipped = total.samples, total.skipped
        self._layers = total._layers
        return self

    def to(self, device: torch.device | str) -> SecondMoments:
        """A copy on another device."""
        copy = SecondMoments(**self.settings)
        copy.samples, copy.skipped = self.samples, dict(self.skipped)
        copy._layers = {layer: state.to(device) for layer, state in self.items()}
        return copy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        files.save_tensors(path, FILE, *self.contents())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SecondMoments:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged or foreign file.
        """
        return cls.from_contents(*files.load_tensors(path, FILE), path)

    def contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of the file format."""
        tensors = {
            f"{index}.{name}": tensor
            for index, state in enumerate(self.values())
            for name, tensor in state.tensors().items()
        }
        layers = {layer: list(state.weight.shape) for layer, state in self.items()}
        header = {"pairs": self.kind, "positions": self.positions, "classes": self.classes}
        return {**header, "samples": self.samples, "skipped": self.skipped, "layers": layers}, tensors

    @classmethod
    def from_contents(
        cls, header: dict[str, Any], tensors: dict[str, Tensor], path: str | os.PathLike[str]
    ) -> SecondMoments:
        moments = cls(
            files.field(header, "pairs", str, path),
            positions=files.field(header, "positions", (int, type(None)), path),
            classes=files.field(header, "classes", (list, type(None)), path),
        )
        for name in ("positions", "classes"):
            own = moments.settings[name]
            if name not in header or repr(header[name]) != repr(own):
                raise ValueError(
                    f"{str(path)!r} is damaged: its header field {name!r} must be {own!r}, got {header.get(name)!r}."
                )
        moments.samples = files.field(header, "samples", int, path)
        moments.skipped = files.field(header, "skipped", dict, path)
        layers = files.field(header, "layers", dict, path)
        for index, layer in enumerate(layers):
            sizes = files.field(layers, layer, list, path)
            if len(sizes) != 3 or not all(validation.index(size) for size in sizes):
                raise ValueError(f"{str(path)!r}: layer {layer!r} must have outputs, channels and taps, got {sizes!r}.")
            shapes = InputMoments.shapes(moments.kind, *sizes)
            moments._layers[layer] = InputMoments.of_tensors({
                name: files.take(
                    tensors, f"{index}.{name}", shape, torch.int64 if name == "count" else torch.float64, path
                )
                for name, shape in shapes.items()
            })  # fmt: skip
        files.nothing_else(header, tensors, moments.contents(), path)
        return moments


@outside_inference_mode
def collect_second_moments(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: str = "full",
    layers: Iterable[str] | None = None,
    positions: int | str | None = "auto",
    classes: Sequence[int] | None = None,
    num_classes: int | None = None,
    progress: bool | None = None,
    group: dist.ProcessGroup | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> SecondMoments:
    """Second moments of what every convolution and linear layer reads, in one forward pass over the data.

    Args:
        model, loader, progress, group, checkpoint, checkpoint_every: as for `collect_moments`; labels are needed for
            `classes` alone, and without it the loader may give bare inputs.
        kind: "full": of all pairs of channels and taps, for everything in this module. "singleton": of each channel,
            and of outputs with inputs, for `singleton_fidelity`: less work and memory where layers are wide.
        layers: names of convolutions (not in groups, padded with zeros) and linear layers; by default all that the
            model has and runs. `SecondMoments.skipped` says which are left out, and why.
        positions: of each map or token sequence, at most so many are looked at: one at random in each cell of a grid,
            the same for all samples; None: all. "auto": 49 for the kind "full", 16 for "singleton".
        classes: count samples of these classes alone; needs labels, and `num_classes`.

    Returns:
        `SecondMoments`, on the CPU, in float64; products are computed in float32 (or float64, as the maps are), around
        the mean of each batch.

    Raises:
        ValueError: an argument that is none of its choices, an unknown layer or one that cannot be read, no layer to
            read, no sample to count, NaN or Inf in a feature map, or a checkpoint of another run.
        RuntimeError: as `collect_moments`.

    Memory: of the kind "full" 8 (channels x taps)^2 bytes per layer, of "singleton" 16 outputs x channels x taps.
    """
    validation.choice(OP, "kind", kind, KINDS)
    if isinstance(positions, str):
        validation.choice(OP, "positions", positions, ("auto",))
        positions = POSITIONS[kind]
    elif positions is not None:
        positions = validation.positive_integer(OP, "positions", positions)
    if classes is not None:
        if num_classes is None:
            raise ValueError(f"{OP}: classes needs num_classes, got num_classes=None.")
        num_classes = validation.positive_integer(OP, "num_classes", num_classes)
        classes = validation.classes(OP, classes, num_classes)
    validation.module(OP, model)
    moments = SecondMoments(kind, positions=positions, classes=classes)
    together = Group(OP, group)
    try:
        reader = _Reader(model, layers, moments)
        save: Checkpoint[SecondMoments] | None = None
        if checkpoint is not None:
            run = {**moments.settings, "layers": list(reader.layers), "model": digest_of(model)}
            save = Checkpoint(OP, checkpoint, checkpoint_every, together, run, SecondMoments.from_contents)
            if save.state is not None:
                reader.moments = save.state.to(device_of(model))
        passing = _Pass(
            OP,
            model,
            loader,
            labels=None if classes is None else num_classes,
            progress=progress,
            group=together,
            checkpoint=save,
            hooks=reader,
        )
        passing.reader = reader
        passing.run()
        moments = reader.moments if device_of(model).type == "cpu" else reader.moments.to("cpu")
    except OtherFailed:
        raise
    except Exception as error:
        together.fail(error)
        raise
    if not together.alone:
        moments.reduce_in(together)
    if not moments.samples:
        what = "loader must give at least one sample" if classes is None else f"loader must give samples of {classes}"
        raise ValueError(f"{OP}: {what}, it gave none.")
    if not moments:
        raise ValueError(f"{OP}: layers must run in the forward pass, none of {list(reader.layers)} did.")
    return moments


class _Pass(Pass):
    """Runs the model under a reader's hooks."""

    reader: _Reader

    def check(self) -> None:
        for layer, state in self.reader.moments.items():
            if not bool(state.scatter.isfinite().all()):
                raise ValueError(f"{OP}: layer {layer!r}: feature maps must be finite, found NaN or Inf.")

    def save(self, checkpoint: Checkpoint[Any], progress: Progress) -> None:
        checkpoint.save(*self.reader.moments.contents(), progress)

    def idle(self, inputs: Any) -> None:
        self.reader.counted = 0
        call(self.model, inputs)

    def fold(self, inputs: Any, labels: Tensor | None, counted: int) -> None:
        samples = samples_in(inputs)
        wanted = self.reader.moments.classes
        if wanted is not None and labels is not None:
            index = torch.isin(labels[:counted].cpu(), torch.tensor(wanted)).nonzero().flatten()
            if not self.group.alone and not len(index):  # the others may wait for this process in the model
                return self.idle(inputs)
            inputs = chosen(inputs, index, samples)
            samples = counted = len(index)
        if not samples:
            return None
        self.reader.samples, self.reader.counted = samples, counted
        call(self.model, inputs)
        self.reader.moments.samples += counted
        return None


class _Reader(ExitStack):
    """Hooks that take in what each layer reads while the model runs."""

    def __init__(self, model: nn.Module, layers: Iterable[str] | None, moments: SecondMoments) -> None:
        super().__init__()
        self.moments = moments
        self.samples = self.counted = 0  # of a batch, and of them those that count
        trace = ModelTrace(unwrapped(model))
        modules = dict(trace.model.named_modules())
        names = [name for name, module in modules.items() if is_layer(module)]
        if layers is not None:
            names = list(layers)
            for name in names:
                why = trace.why_not_read(name) if name in modules else f"it is none of the {len(modules)} modules"
                if why:
                    raise ValueError(f"{OP}: layers must name layers that can be read, {name!r} cannot: {why}.")
        moments.skipped = {name: why for name in names if (why := trace.why_not_read(name))}
        self.layers = {name: modules[name] for name in names if name not in moments.skipped}
        if not self.layers:
            raise ValueError(
                f"{OP}: layers must be at least one that can be read ({moments.skipped or 'it is empty'})."
            )
        self._weights = {name: _weight_of(module) for name, module in self.layers.items()}
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._spots: dict[Any, _Spots] = {}  # by layer, map and device

    def __enter__(self) -> _Reader:
        for name, module in self.layers.items():
            self.callback(module.register_forward_hook(partial(self._read, name)).remove)
        return self

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        counted = self.counted * len(x) // self.samples if self.samples else 0  # windows of a sample lie together
        if counted:
            weight = self._weights[name]
            width = x.shape[1 if isinstance(module, nn.Conv2d) else -1]
            if width != weight.shape[1]:
                raise ValueError(
                    f"{OP}: layers must read all their channels in one process, {name!r} reads {width} of "
                    f"{weight.shape[1]} here; name the others in layers."
                )
            with without_autocast():  # which the model may run in, but products of float32 need their digits
                self.moments.update(name, self._moments(name, x[:counted].detach(), output[:counted].detach()))

    def _moments(self, name: str, x: Tensor, output: Tensor) -> InputMoments:
        module, weight = self.layers[name], self._weights[name]
        x, output = (t.float() if t.element_size() < 4 else t for t in (x, output))
        spots = self._spots_of(name, x, output)
        found: InputMoments | None = None
        step = max(1, CHUNK // max(1, spots.looked * math.prod(weight.shape[1:])))
        for start in range(0, len(x), step):
            some = x[start : start + step]
            rows = _rows(module, some, spots)
            if self.moments.kind == "full":
                part = _of_all_pairs(rows, weight)
            else:
                given = _outputs(module, output[start : start + step], spots)
                part = _of_each_channel(_patches(module, some, rows, spots), rows, given, weight)
            # The first part may be the caller's memory: a copy of it takes in the others.
            found = part if found is None else (found.clone() if start == step else found).add_(part)
        assert found is not None
        return found

    def _spots_of(self, name: str, x: Tensor, output: Tensor) -> _Spots:
        key = (name, tuple(x.shape[1:]), x.device)
        if key not in self._spots:
            module = self.layers[name]
            size = tuple(output.shape[2:]) if isinstance(module, nn.Conv2d) else (math.prod(output.shape[1:-1]),)
            self._spots[key] = _Spots.of(module, tuple(x.shape[2:]), size, self._positions(size)).to(x.device)
        return self._spots[key]

    def _positions(self, size: tuple[int, ...]) -> Tensor | None:
        """Flat positions of a map that are looked at, one at random in each cell of a grid; None: all."""
        most = self.moments.positions
        if most is None or math.prod(size) <= most:
            return None
        if size not in self._places:
            generator = torch.Generator().manual_seed(0)
            cells = [math.isqrt(most)] * 2 if len(size) == 2 else [most]
            flat = torch.zeros(1, dtype=torch.int64)
            for length, number in zip(size, cells, strict=True):
                edges = torch.arange(min(number, length) + 1) * length // min(number, length)
                flat = flat[:, None] * length + edges[:-1]
                widths = (edges[1:] - edges[:-1]).expand(flat.shape)
                flat = (flat + (torch.rand(flat.shape, generator=generator) * widths).long()).flatten()
            self._places[size] = flat
        return self._places[size]


@dataclass(frozen=True)
class _Spots:
    """Where a layer looks at maps of one size.

    Attributes:
        looked: positions of the output that are looked at. places: which, flat, int64; None: all.
        pixels: of a convolution, the flat pixels of their patches, int64; those outside the map are moved to its edge,
            or, where all positions are looked at, counted in the map with its padding.
        inside: which of them lie in the map; None: all.
    """

    looked: int
    places: Tensor | None
    pixels: Tensor | None = None
    inside: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, map_size: tuple[int, ...], size: tuple[int, ...], places: Tensor | None) -> _Spots:
        looked = math.prod(size) if places is None else len(places)
        if not isinstance(module, nn.Conv2d):
            return cls(looked, places)
        left, right, top, bottom = padding_of(module)
        height, width = map_size[0] + top + bottom, map_size[1] + left + right  # of the map with its padding
        ends = torch.arange(looked) if places is None else places
        down = (ends // size[1] * module.stride[0])[:, None] + torch.arange(module.kernel_size[0]) * module.dilation[0]
        across = (ends % size[1] * module.stride[1])[:, None] + torch.arange(module.kernel_size[1]) * module.dilation[1]
        inside = None
        if places is not None:  # of a few places no padded copy is needed
            down, across, (height, width) = down - top, across - left, map_size
            within = [((at >= 0) & (at < length)) for at, length in ((down, height), (across, width))]
            inside = (within[0][:, :, None] & within[1][:, None, :]).flatten()
            down, across = down.clamp(0, height - 1), across.clamp(0, width - 1)
        pixels = (down[:, :, None] * width + across[:, None, :]).flatten()
        return cls(looked, places, pixels, None if inside is None or bool(inside.all()) else inside)

    def to(self, device: torch.device) -> _Spots:
        given = (self.places, self.pixels, self.inside)
        return _Spots(self.looked, *(t if t is None else t.to(device) for t in given))


def _rows(module: nn.Module, x: Tensor, spots: _Spots) -> Tensor:
    """What a layer reads at some positions of its output: (samples x positions, channels x taps)."""
    if not isinstance(module, nn.Conv2d):
        flat = x.reshape(len(x), -1, x.shape[-1])
        return (flat if spots.places is None else flat[:, spots.places]).flatten(0, 1)
    assert spots.pixels is not None
    if spots.places is None:
        x = functional.pad(x, padding_of(module))
    patches = x.flatten(2)[:, :, spots.pixels]
    if spots.inside is not None:
        patches *= spots.inside.to(patches.dtype)
    return patches.view(*x.shape[:2], spots.looked, -1).transpose(1, 2).reshape(len(x) * spots.looked, -1)


def _outputs(module: nn.Module, output: Tensor, spots: _Spots) -> Tensor:
    """What a layer gives there, without its bias: (samples x positions, outputs)."""
    bias: Any = module.bias
    if isinstance(module, nn.Linear):
        flat = output.reshape(len(output), -1, output.shape[-1])
    else:
        flat = output.flatten(2).transpose(1, 2)
    rows = (flat if spots.places is None else flat[:, spots.places]).flatten(0, 1)
    return rows if bias is None else rows - bias.detach().to(rows.dtype)


def _weight_of(module: nn.Module) -> Tensor:
    """(outputs, channels, taps), float64, on the CPU; gathered where it is spread over processes."""
    weight: Any = module.weight
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.detach().flatten(2).double().cpu() if whole.ndim > 2 else whole.detach()[:, :, None].double().cpu()


def _of_all_pairs(rows: Tensor, weight: Tensor) -> InputMoments:
    """The moments of rows (n, channels x taps)."""
    mean = rows.mean(0, dtype=torch.float64)
    scatter = gram_of(rows - mean.to(rows.dtype))
    return InputMoments(torch.tensor(len(rows)), mean.view(weight.shape[1:]), scatter, weight)


def _of_each_channel(own: tuple[Tensor, Tensor], rows: Tensor, given: Tensor, weight: Tensor) -> InputMoments:
    """From mean and scatter of each channel's patches, and rows and outputs (n, outputs) for what goes across."""
    mean_y = given.mean(0, dtype=torch.float64)
    given = given - mean_y.to(given.dtype)
    # Around the mean of the outputs alone: that of the rows drops out. Yet they need it against rounding.
    cross = given.T @ (rows - rows.mean(0))
    output = OutputMoments(mean_y, cross.view(weight.shape), given.square().sum(0, dtype=torch.float64))
    return InputMoments(torch.tensor(len(rows)), *own, weight, output)


def _patches(module: nn.Module, x: Tensor, rows: Tensor, spots: _Spots) -> tuple[Tensor, Tensor]:
    """Mean (channels, taps) and scatter (channels, taps, taps) of what a layer reads of each channel."""
    if isinstance(module, nn.Linear):
        mean = rows.mean(0, dtype=torch.float64)
        return mean[:, None], (rows - mean).square().sum(0)[:, None, None]
    layer: Any = module
    left, right, top, bottom = padding_of(layer)
    window = Window(layer.kernel_size, layer.stride, (top, bottom, left, right), layer.dilation)
    # Not by `ops.patch_moments`, which looks whether the positions are in range: on a GPU that waits for it.
    moments: tuple[Tensor, Tensor] = select("patch_moments", "auto", x.device)(x, window, spots.places)
    return moments


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
        (channels,) float64 in [0, 1]; per output (outputs, channels), those of several layers one after the other. An
        output that gives 0 everywhere has 0, and does not count in means.

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
    values, energies = [], []
    for parts in _of_layers(op, moments, layers, centred, full=True):
        kept = _subset(op, subset, parts.weight.shape[1])
        energies.append(parts.energy())
        values.append((parts.explained(kept) / energies[-1].clamp(min=TINY)).clamp(0.0, 1.0))
    every, energy = torch.cat(values), torch.cat(energies)
    return every if per_output else _over_outputs(every[:, None], energy)[0]


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
    if not validation.is_number(ridge) or not 0 <= ridge < math.inf:
        raise ValueError(f"{op}: ridge must be a finite number of at least 0, got {ridge!r}.")
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
        xx = xx + _products(state.mean, xx.ndim == 2)
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
