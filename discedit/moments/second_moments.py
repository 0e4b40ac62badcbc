"""Second moments of what layers read, of all pairs of channels or of each by itself, in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from discedit.backends import select
from discedit.common import files, validation
from discedit.common.window import Window
from discedit.model.forward import call, hooked, index_samples, outside_inference_mode, samples_in, without_autocast
from discedit.model.sharded import unwrapped
from discedit.model.trace import ModelTrace, is_layer
from discedit.moments import positions as sampling
from discedit.moments.covariances import gram_of
from discedit.moments.data_pass import Pass, RunOptions, asked_by
from discedit.moments.positions import Positions, padding_of, sample_positions, wide
from discedit.moments.states import LayerStates

if TYPE_CHECKING:
    from typing_extensions import Unpack

OP = "collect_second_moments"
KINDS = ("full", "singleton")
POSITIONS = {"full": 49, "singleton": 16}  # of a map, looked at by default


class OutputMoments(NamedTuple):
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
        shapes: dict[str, tuple[int, ...]] = {"count": (), "mean": (channels, taps), "scatter": (wide, wide)}
        if kind == "singleton":
            shapes |= {"scatter": (channels, taps, taps)}
        shapes |= {"weight": (outputs, channels, taps)}
        if kind == "singleton":
            shapes |= {
                "output.mean": (outputs,),
                "output.cross": (outputs, channels, taps),
                "output.square": (outputs,),
            }
        return shapes

    def named(self) -> dict[str, Tensor]:
        found = {"count": self.count, "mean": self.mean, "scatter": self.scatter, "weight": self.weight}
        output = {} if self.output is None else self.output._asdict()
        return found | {f"output.{name}": tensor for name, tensor in output.items()}

    def clone(self) -> InputMoments:
        """A copy, all of it float64."""
        return self.to(self.mean.device)

    def to(self, device: torch.device | str) -> InputMoments:
        """A copy on a device, all of it float64. Count and weight, which are not summed up, stay where they are."""
        mean, scatter, *output = (
            tensor.to(device, torch.float64, copy=True) for tensor in (self.mean, self.scatter, *(self.output or ()))
        )
        return InputMoments(self.count.clone(), mean, scatter, self.weight, OutputMoments(*output) if output else None)

    def add_(self, other: InputMoments) -> InputMoments:
        """Take in the samples of `other`, in place.

        Raises:
            ValueError: the two are of different kinds or layers.
        """
        # Within one pass it is the very tensor, which need not be compared.
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
            self.scatter.add_(cross * products(shift, full=False))
        self.mean.add_(share * shift)
        self.count.add_(other.count)
        return self


def products(x: Tensor, *, full: bool) -> Tensor:
    """Of a (channels, taps) tensor with itself, in the shape of a scatter."""
    return torch.outer(x.flatten(), x.flatten()) if full else x[:, :, None] * x[:, None, :]


class SecondMoments(LayerStates[InputMoments]):
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

    KIND = "second moments"
    EXTRAS = ("samples", "skipped")

    def __init__(
        self, kind: str = "full", *, positions: int | None = None, classes: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        op = "SecondMoments"
        self.kind = validation.choice(op, "kind", kind, KINDS)
        self.positions = None if positions is None else validation.positive_integer(op, "positions", positions)
        for cls in classes or ():
            if (validation.index(cls) or 0) != cls or cls < 0:
                raise ValueError(f"{op}: classes must be integers of at least 0, got {cls!r}.")
        self.classes = None if classes is None else sorted(set(classes))
        self.samples = 0
        self.skipped: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"SecondMoments({self.kind}, {len(self)} layers, {self.samples} samples)"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the numbers depend on."""
        return {"kind": self.kind, "positions": self.positions, "classes": self.classes}

    def update(self, layer: str, moments: InputMoments) -> None:
        """Merge more of a layer; a new name starts a new state."""
        try:
            self.layers[layer] = self.layers[layer].add_(moments) if layer in self else moments.clone()
        except ValueError as error:
            raise ValueError(f"SecondMoments.update: layer {layer!r}: {error}") from error

    def _merged(self, own: InputMoments, other: InputMoments) -> InputMoments:
        return own.clone().add_(other)

    def header(self) -> dict[str, Any]:
        layers = {layer: list(state.weight.shape) for layer, state in self.items()}
        header = {"pairs": self.kind, "positions": self.positions, "classes": self.classes}
        return {**header, "samples": self.samples, "skipped": self.skipped, "layers": layers}

    @classmethod
    def of_header(cls, header: dict[str, Any], path: files.Source) -> SecondMoments:
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
        return moments

    def _shapes(self, size: Any) -> dict[str, tuple[int, ...]]:
        if not isinstance(size, list) or len(size) != 3 or not all(map(validation.index, size)):
            raise ValueError(f"it must have outputs, channels and taps, got {size!r}.")
        return InputMoments.shapes(self.kind, *size)

    def _state(self, tensors: dict[str, Tensor]) -> InputMoments:
        count, mean, scatter, weight, *output = tensors.values()
        return InputMoments(count, mean, scatter, weight, OutputMoments(*output) if output else None)


@outside_inference_mode()
def collect_second_moments(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: str = "full",
    layers: Iterable[str] | None = None,
    positions: int | str | None = "auto",
    classes: Sequence[int] | None = None,
    num_classes: int | None = None,
    **run: Unpack[RunOptions],
) -> SecondMoments:
    """Second moments of what every convolution and linear layer reads, in one forward pass over the data.

    Args:
        model, loader, run: as for `collect_moments`; labels are needed for `classes` alone, and without it the loader
            may give bare inputs.
        kind: "full": of all pairs of channels and taps, for everything in `discedit.fidelity`. "singleton": of each
            channel, and of outputs with inputs, for `singleton_fidelity`: less work and memory where layers are wide.
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
    if classes is None:
        num_classes = None  # the loader needs no labels
    elif num_classes is None:
        raise ValueError(f"{OP}: classes needs num_classes, got num_classes=None.")
    else:
        num_classes = validation.positive_integer(OP, "num_classes", num_classes)
        classes = validation.classes(OP, classes, num_classes)
    most: Any = POSITIONS.get(kind) if positions == "auto" else positions
    with asked_by(OP, "SecondMoments"):
        moments = SecondMoments(kind, positions=most, classes=classes)
    passing = _SecondMomentPass(model, loader, moments, num_classes, run, layers)
    moments = passing.collect()
    if not moments.samples:
        what = "loader must give at least one sample" if classes is None else f"loader must give samples of {classes}"
        raise ValueError(f"{OP}: {what}, it gave none.")
    if not moments:
        raise ValueError(f"{OP}: layers must run in the forward pass, none of {list(passing.layers)} did.")
    return moments


class _SecondMomentPass(Pass[SecondMoments]):
    """Takes in what each layer reads while the model runs."""

    home = torch.device("cpu")
    samples = counted = 0  # of a batch, and of them those that count

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        moments: SecondMoments,
        labels: int | None,
        run: RunOptions,
        names: Iterable[str] | None,
    ) -> None:
        super().__init__(OP, model, loader, moments, labels, run)
        self.layers: dict[str, nn.Module] = {}
        self._names = None if names is None else validation.names(OP, "layers", names)
        self._positions: dict[Any, Positions] = {}  # by layer, size of its output and device

    def prepare(self) -> dict[str, Any]:
        trace = ModelTrace(unwrapped(self.model))
        modules = dict(trace.model.named_modules())
        names = [name for name, module in modules.items() if is_layer(module)] if self._names is None else self._names
        for name in self._names or ():
            why = trace.why_not_read(name) if name in modules else f"it is none of the {len(modules)} modules"
            if why:
                raise ValueError(f"{OP}: layers must name layers that can be read, {name!r} cannot: {why}.")
        skipped = self.moments.skipped = {name: why for name in names if (why := trace.why_not_read(name))}
        self.layers = {name: modules[name] for name in names if name not in skipped}
        if not self.layers:
            raise ValueError(f"{OP}: layers must be at least one that can be read ({skipped or 'it is empty'}).")
        self._weights = {name: _weight_of(module) for name, module in self.layers.items()}
        return {"layers": list(self.layers)}

    def hooks(self) -> AbstractContextManager[Any]:
        return hooked([module.register_forward_hook(partial(self._read, name)) for name, module in self.layers.items()])

    def check(self) -> None:
        for layer, state in self.moments.items():
            if not bool(state.scatter.isfinite().all()):
                raise ValueError(f"{OP}: layer {layer!r}: feature maps must be finite, found NaN or Inf.")

    def idle(self, inputs: Any) -> None:
        self.counted = 0
        call(self.model, inputs)

    def fold(self, inputs: Any, labels: Tensor | None, counted: int) -> None:
        self.samples = samples_in(inputs)
        if self.moments.classes is not None and labels is not None:
            index = torch.isin(labels[:counted].cpu(), torch.tensor(self.moments.classes)).nonzero().flatten()
            if not self.group.alone and not len(index):  # the others may wait for this process in the model
                self.idle(inputs)
                return
            inputs = index_samples(inputs, index, self.samples)
            self.samples = counted = len(index)
        if self.samples:
            self.counted = counted
            call(self.model, inputs)
            self.moments.samples += counted

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        counted = self.counted * len(x) // self.samples if self.samples else 0  # windows of a sample lie together
        if not counted:
            return
        width, channels = x.shape[1 if isinstance(module, nn.Conv2d) else -1], self._weights[name].shape[1]
        if width != channels:
            raise ValueError(
                f"{OP}: layers must read all their channels in one process, {name!r} reads {width} of {channels} here; "
                "name the others in layers."
            )
        with without_autocast():  # which the model may run in, but products of float32 need their digits
            self.moments.update(name, self._moments(name, wide(x[:counted].detach()), wide(output[:counted].detach())))

    def _moments(self, name: str, x: Tensor, output: Tensor) -> InputMoments:
        weight, positions = self._weights[name], self._positions_of(name, output)
        places = math.prod(_size(positions.layer, output)) if positions.chosen is None else len(positions.chosen)
        bias: Any = positions.layer.bias
        found: InputMoments | None = None
        for i, part in enumerate(positions.chunks(len(x), places, sampling.CHUNK)):
            rows = positions.inputs(x, part)
            if self.moments.kind == "full":
                moments = _of_all_pairs(rows, weight)
            else:
                given = positions.outputs(output[part])
                given = given if bias is None else given - bias.detach().to(given.dtype)
                moments = _of_each_channel(self._patches(positions, x[part], rows), rows, given, weight)
            # A copy of the first part, which may be in single precision, takes in the others.
            found = moments if found is None else (found.clone() if i == 1 else found).add_(moments)
        assert found is not None
        return found

    def _positions_of(self, name: str, output: Tensor) -> Positions:
        layer, most = self.layers[name], self.moments.positions
        size = _size(layer, output)
        key = (name, size, output.device)
        if key not in self._positions:
            chosen = None
            if most is not None and math.prod(size) > most:
                chosen = sample_positions("grid", size, most, 0).to(output.device)
            self._positions[key] = Positions(layer, chosen)
        return self._positions[key]

    def _patches(self, positions: Positions, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (channels, taps) and scatter (channels, taps, taps) of what a layer reads of each channel."""
        layer: Any = positions.layer
        if isinstance(layer, nn.Linear):
            mean = rows.mean(0, dtype=torch.float64)
            return mean[:, None], (rows - mean).square().sum(0)[:, None, None]
        left, right, top, bottom = padding_of(layer)
        window = Window(layer.kernel_size, layer.stride, (top, bottom, left, right), layer.dilation)
        # Not by `ops.patch_moments`, which looks whether the positions are in range: on a GPU that waits for it.
        run = select("patch_moments", self.options.get("backend", "auto"), x.device)
        moments: tuple[Tensor, Tensor] = run(x, window, positions.chosen)
        return moments


def _size(layer: nn.Module, output: Tensor) -> tuple[int, ...]:
    """Of the map that a layer gives."""
    return tuple(output.shape[2:]) if isinstance(layer, nn.Conv2d) else (math.prod(output.shape[1:-1]),)


def _weight_of(layer: nn.Module) -> Tensor:
    """(outputs, channels, taps), float64, on the CPU; gathered where it is spread over processes."""
    weight: Any = layer.weight
    whole: Tensor = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()
    return whole.view(*whole.shape[:2], -1).double().cpu()


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
