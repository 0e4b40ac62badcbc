"""`collect_moments`: one forward pass over the data, every layer at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from discedit.backends import arguments, select
from discedit.common import validation
from discedit.common.warning import warn
from discedit.model.forward import call, first_tensor, hooked, outside_inference_mode, samples_in, to_device
from discedit.model.sharded import Channels, unwrapped
from discedit.model.trace import ModelTrace, SampleOrder, components_in, has_channels_last, watched
from discedit.moments.data_pass import Pass, RunOptions, asked_by
from discedit.moments.moments import GREATEST_EXPONENT, Moments, Statistic

if TYPE_CHECKING:
    from typing_extensions import Unpack

OP = "collect_moments"
INPUT = "input of "  # a place that is not the output of the module named
REPEATED = "they run more than once per forward pass"
FOREIGN = "their rows are not the samples in the order of the batch, nor windows of them that lie together"
TOKENLESS = "statistic 'cls' needs an output of shape (samples, tokens, channels)"
SETTINGS = ("read", "statistic", "witness", "scale")  # of `Moments`
NEVER = torch.iinfo(torch.int64).max  # of a batch that is not sound


@outside_inference_mode()
def collect_moments(
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    *,
    labels: str = "given",
    layers: Iterable[str] | None = None,
    read: str = "consumer",
    statistic: Statistic | list[str] = "mean",
    witness: str = "quadratic",
    scale: float | Mapping[str, float] | None = None,
    **run: Unpack[RunOptions],
) -> Moments:
    """Accumulate the class-conditional moments of every layer's components in one forward pass over the data.

    Args:
        model: a classifier, perhaps wrapped; afterwards what it was.
        loader: (inputs, labels); inputs are a tensor, or a tuple or dict of arguments.
        num_classes: number of classes.
        labels: "given", or "predicted": the model's own argmax, for which batches may also be bare inputs.
        layers: modules to read; by default all convolutions and linear layers but the head.
        read: "consumer": as the next layer gets the components; "norm": at the output, or behind the batch norm that it
            goes straight into; "output": always at the output.
        statistic: what a feature map is reduced to, as for `discedit.ops.pool`; for the witness "vector" several.
        witness, scale: what the moments are of, as in `Moments`.
        run: progress, backend, group, checkpoint, checkpoint_every: see `RunOptions`.

    Returns:
        `Moments`, float64, by layer in order of execution; what cannot be read is left out, with a warning.

    Raises:
        ValueError: an empty loader, labels, layers, a statistic or a scale that do not fit, NaN or Inf in a feature
            map, or a checkpoint of another run or other batches.
        RuntimeError: another process of the group failed, died, or came to no end in the group's timeout.

    Memory: classes x channels x 32 bytes, and one batch's pooled features. docs/how-to/score.md has the details.

    >>> import torch, discedit
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    >>> loader = [(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)]
    >>> discedit.collect_moments(model, loader, num_classes=2)
    Moments(1 layers, 4 channels, 2 classes, 8 samples)
    """
    settings = {"read": read, "statistic": statistic, "witness": witness, "scale": scale}
    return _MomentPass(model, loader, num_classes, 1, {"labels": labels, "layers": layers, **settings, **run}).collect()


@outside_inference_mode()
def collect_blocks(
    model: nn.Module, loader: Iterable[Any], num_classes: int, *, blocks: int = 10, **options: Any
) -> list[Moments]:
    """`collect_moments` in disjoint blocks of the samples, each class spread evenly over them, in the same one pass.

    `discedit.score` of the blocks gives the scores of all samples together, with standard errors by the jackknife.

    Args:
        blocks: number of blocks, at least 2. The samples of a class go to them in turn, in each process of a group.
        model, loader, num_classes, options: as for `collect_moments`.

    Returns:
        One `Moments` for each block. Merged, they are what `collect_moments` returns, up to rounding.

    Raises:
        ValueError: blocks is no integer of at least 2, and whatever `collect_moments` refuses.

    Memory: that of `collect_moments`, with the state as many times as there are blocks.

    >>> import torch, discedit
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    >>> loader = [(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)]
    >>> [block.samples for block in discedit.collect_blocks(model, loader, num_classes=2, blocks=4)]
    [2, 2, 2, 2]
    """
    number = validation.index(blocks)
    if number is None or number < 2:
        raise ValueError(f"collect_blocks: blocks must be an integer of at least 2, got {blocks!r}.")
    together = _MomentPass(model, loader, num_classes, number, options).collect()
    # A class's share of a block is a class of its own.
    return [together.rows(slice(block, None, number)) for block in range(number)]


class BlockAssigner:
    """Deals the samples of each class to the blocks in turn; nobody waits for the device."""

    def __init__(self, classes: int, blocks: int) -> None:
        self.classes, self.blocks = classes, blocks
        self._seen = torch.zeros(classes, dtype=torch.int64)

    def go_on(self, moments: Moments) -> None:
        """From the samples that were dealt already."""
        for state in moments.values():
            self._seen = state.count.view(-1, self.blocks).sum(1)

    def __call__(self, labels: Tensor) -> Tensor:
        """Class x blocks + block of each sample."""
        self._seen = self._seen.to(labels.device)
        # A sample's rank in its class: its place among all, sorted by class, less that of the first of its class.
        ordered, order = torch.sort(labels, stable=True)
        position = torch.arange(len(labels), device=labels.device)
        rank = torch.empty_like(position)
        rank[order] = position - torch.searchsorted(ordered, ordered)
        turn = (self._seen[labels] + rank) % self.blocks
        self._seen = self._seen.index_add(0, labels, torch.ones_like(labels))
        return labels * self.blocks + turn


class _MomentPass(Pass[Moments]):
    """Pools every layer and folds what it gives into the moments; each class times each block is a class of theirs."""

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], num_classes: int, blocks: int, options: Mapping[str, Any]
    ) -> None:
        run = dict(options)
        self.num_classes = validation.positive_integer(OP, "num_classes", num_classes)
        self._labels_from = validation.choice(OP, "labels", run.pop("labels", "given"), ("given", "predicted"))
        names = run.pop("layers", None)
        self._names = None if names is None else validation.names(OP, "layers", names)
        settings = {name: run.pop(name) for name in SETTINGS if name in run}
        with asked_by(OP, "Moments"):
            moments = Moments(self.num_classes * blocks, **settings, backend=run.get("backend", "auto"))
        given = self.num_classes if self._labels_from == "given" else None
        super().__init__(OP, model, loader, moments, given, cast(RunOptions, run))
        self.assigner = BlockAssigner(self.num_classes, blocks)
        self.monitor = NonFiniteMonitor(self.device)

    def prepare(self) -> dict[str, Any]:
        self.pooling = PoolingHooks(self.model, self._names, self.moments)
        return {"labels": self._labels_from, "layers": list(self.pooling.layers), "blocks": self.assigner.blocks}

    def collect(self) -> Moments:
        moments = super().collect()
        if not moments:
            raise ValueError(f"{OP}: loader must give at least one batch, it gave none.")
        return moments

    def hooks(self) -> PoolingHooks:
        return self.pooling

    def go_on(self, moments: Moments) -> None:
        moments.backend = self.moments.backend
        super().go_on(moments)
        self.assigner.go_on(self.moments)

    def check(self) -> None:
        self.monitor.check()
        self.moments.norms |= self.pooling.norms

    def idle(self, inputs: Any) -> None:
        self.pooling.run(inputs)
        for _ in self.pooling.take():
            pass

    def fold(self, inputs: Any, labels: Tensor | None, counted: int) -> None:
        index = self.progress.batches
        output = self.pooling.run(inputs)
        classes = to_device(_predicted(output, self.num_classes) if labels is None else labels, self.device)
        whole = self.own is None or counted == len(classes)
        classes = classes if whole else classes[:counted]
        if self.assigner.blocks > 1:
            classes = self.assigner(classes)
        # On a GPU nobody asks now whether they are finite: the answer would wait for all that is queued there.
        for layer, planes in self.pooling.take():
            planes = planes if whole else planes[:, :counted]
            try:
                self.moments.fold_planes(layer, planes, classes, checked=self.monitor.defers)
            except ValueError as error:
                raise ValueError(f"{OP}: layer {layer!r}, batch {index}: {error}") from error
            if self.monitor.defers:
                self.monitor.note(layer, self.moments.sentinel(layer, planes))
        self.monitor.end_batch(index)


class NonFiniteMonitor:
    """Finds batches that are not to be folded after they were, so that nobody waits for the device in between."""

    def __init__(self, device: torch.device) -> None:
        self.defers = device.type != "cpu"  # where asking costs nothing, each batch is asked
        self._batch: dict[str, Tensor] = {}
        self._first: dict[tuple[str, ...], Tensor] = {}  # by layers, of each the first batch that was not sound

    def note(self, layer: str, sentinel: Tensor) -> None:
        self._batch[layer] = sentinel

    def end_batch(self, index: int) -> None:
        if self._batch:
            # One stack for all layers, so that a batch adds a handful of small kernels and not some for each layer.
            layers, sound = tuple(self._batch), torch.stack(list(self._batch.values())).isfinite()
            first = torch.where(sound, NEVER, index)
            self._first[layers] = torch.minimum(self._first.get(layers, first), first)
            self._batch.clear()

    def check(self) -> None:
        found = [pair for layers, first in self._first.items() for pair in zip(first.tolist(), layers, strict=True)]
        index, layer = min(found, default=(NEVER, ""))
        if index != NEVER:
            raise ValueError(
                f"{OP}: layer {layer!r}, batch {index}: feature maps must be finite, and exp(-scale t) below "
                f"exp({GREATEST_EXPONENT:g}) for the witness 'exp'; found NaN, Inf or more."
            )


class _Pool:
    """Pools what is seen at one place. What holds for one batch is not asked again of those like it.

    Args:
        layer: that is read there, for errors.
        layout: as for `ops.pool`.
        windows: parts of a sample (windows, views, frames, heads), each of which comes as a sample of its own.
        turned: samples are the second axis of (positions, samples, channels).
    """

    planes: Tensor | None = None  # (statistics, samples, channels) of the last batch

    def __init__(self, layer: str, layout: str, windows: int, turned: bool, moments: Moments) -> None:
        self.layer, self.layout, self.windows, self.turned = layer, layout, windows, turned
        self._statistics, self._backend = moments.statistics, moments.backend
        self._known: tuple[Any, ...] = ()
        self._axis = 1
        self._channels = Channels()
        self._own: Tensor | None = None  # planes of the channels that this process has: the next batch's buffer
        self._run: Callable[..., Tensor]

    def read(self, x: Tensor, samples: int) -> None:
        """Pools a batch of so many samples (0: as many as there are rows)."""
        x = x.transpose(0, 1) if self.turned else x
        if samples and len(x) != samples and (self.windows == 1 or len(x) % samples):
            raise ValueError(
                f"{OP}: layer {self.layer!r} must give as many rows for each sample as in the first batch "
                f"({self.windows}; where there were several, any whole number); it gave {len(x)} rows for {samples} "
                "samples. Leave it out: name the others in layers."
            )
        if self.windows > 1 and self.layout == "tokens":
            x = x.reshape(samples, -1, x.shape[-1])
        elif self.windows > 1:  # the parts are one more axis to pool over
            x = x.reshape(samples, -1, *x.shape[1:]).transpose(1, 2)
        x = self._channels.of(x, -1 if self.layout == "tokens" else 1)
        kind = (x.shape, x.dtype, x.device)
        if kind != self._known:
            try:
                x, self._axis = arguments.feature_map("pool", x, self.layout, self._statistics)
            except ValueError as error:
                raise ValueError(f"{OP}: layer {self.layer!r}: {error}") from error
            self._run = select("pool", self._backend, x.device)
            self._known, self._own = kind, None
        self._own = self._run(x.detach(), self._axis, self._statistics, self._own)
        self.planes = self._channels.together(self._own)


class PoolingHooks:
    """Hooks that pool the components of each layer while the model runs, set where they are read.

    A trace of the first batch shows where that is, and two more passes of a few samples how rows are samples there.

    Args:
        names: of layers; None: all that have components, but the head.
        moments: what the components are pooled for.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None, moments: Moments) -> None:
        self.model, self.moments, self.explicit = model, moments, names is not None
        self._modules = dict(unwrapped(model).named_modules())
        self.layers = _layers_of(model, self._modules, names)
        self.norms: dict[str, str] = {}  # layer -> the norm that it goes straight into
        self._places: dict[str, str] = {}  # layer -> where it is read
        self._pools: dict[str, _Pool] = {}  # by place
        self._handles: list[RemovableHandle] = []
        self._samples = 0
        self._ran: set[str] = set()

    def __enter__(self) -> PoolingHooks:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, inputs: Any) -> Any:
        """The model's output for a batch."""
        first, self._samples = first_tensor(inputs), samples_in(inputs)
        nothing = first is not None and first.ndim > 0 and not self._samples  # shows nothing of a model
        if not self._places and not nothing:
            self._discover(inputs)
        self._ran.clear()
        return call(self.model, inputs)

    def take(self) -> Iterator[tuple[str, Tensor]]:
        """The pooled planes of the batch that just ran, by layer; the next batch overwrites them."""
        for layer, place in self._places.items():
            planes = self._pools[place].planes
            if place not in self._ran or planes is None:
                raise ValueError(f"{OP}: layer {layer!r} ran in the first batch but gave no tensor in a later one.")
            yield layer, planes

    def _at(self, place: str, x: Tensor) -> None:
        pool = self._pools[place]
        if place in self._ran:
            raise ValueError(
                f"{OP}: layer {pool.layer!r} must be read once per forward pass, as for the first few samples, but "
                f"{_module_at(place)!r} ran again in a batch of {self._samples}. Leave it out: name the others in "
                "layers."
            )
        self._ran.add(place)
        pool.read(x, self._samples)

    def _discover(self, inputs: Any) -> None:
        try:
            trace = ModelTrace.of(self.model, inputs, layers=self.layers)
        except Exception:  # some models insist on the size of their batches
            trace = ModelTrace.of(self.model, inputs, None, layers=self.layers)
        head = None if self.explicit else trace.classifier
        found = {layer: self._place_of(layer, trace) for layer in trace.given if layer in self.layers and layer != head}
        self._places = {layer: place for layer, place in found.items() if place is not None}
        missing = sorted(set(self.layers) - set(self._places)) if self.explicit else []
        if missing:
            raise ValueError(
                f"{OP}: layers must name modules that run in the forward pass and give a tensor, not so {missing}."
            )
        if not self._places:
            raise ValueError(
                f"{OP}: model must have a convolution or linear layer besides its head {head!r}, it has none that runs."
            )
        self._leave_out([layer for layer in self._places if trace.runs[layer] > 1], REPEATED)
        self._set_pools(trace, inputs)
        self._leave_out([layer for layer, place in self._places.items() if place not in self._pools], FOREIGN)
        if "cls" in self.moments.statistics and not self.explicit:
            tokens = {place for place, pool in self._pools.items() if pool.layout == "tokens" and pool.windows == 1}
            tokens = {place for place in tokens if len(trace.given[_module_at(place)]) == 3}
            self._leave_out([layer for layer, place in self._places.items() if place not in tokens], TOKENLESS)
        self.norms = {layer: norm for layer, norm in trace.norms.items() if layer in self._places}
        self._handles = [self._hook(place, self._at) for place in self._pools]

    def _place_of(self, layer: str, trace: ModelTrace) -> str | None:
        """Where a layer is read. What runs twice serves several layers: no single one may be read there."""
        module, read, norm = self._modules[layer], self.moments.read, trace.norms.get(layer)
        heads = isinstance(module, nn.MultiheadAttention)  # what they give is seen by their consumer alone
        consumers = trace.consumers.get(layer) if heads or read == "consumer" else None
        if consumers:
            return INPUT + consumers[0] if trace.runs[consumers[0]] == 1 else None if heads else layer
        if heads:
            return None
        behind = None if norm is None or read == "output" else self._modules[norm]
        return norm if isinstance(behind, _BatchNorm) and behind.running_mean is not None else layer

    def _set_pools(self, trace: ModelTrace, inputs: Any) -> None:
        """For all places whose rows are the samples in their order, or windows of them that lie together; labels would
        not fit others."""
        places = dict.fromkeys(self._places.values())

        def seen(batch: Any) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            with hooked([self._hook(place, found.__setitem__) for place in places]):
                call(self.model, batch)
            return found

        order = SampleOrder(inputs, self._samples, seen) if self._samples else None
        for layer, place in self._places.items():
            shape, layout = trace.given[_module_at(place)], _layout(self._modules[_module_at(place)])
            windows, turned = (1, False) if order is None else _rows_of(place, layout, shape, trace.samples, order)
            if windows:
                self._pools[place] = _Pool(layer, layout, windows, turned, self.moments)
            elif self.explicit:
                raise ValueError(
                    f"{OP}: layers must give one output per sample, or windows that lie together by samples, layer "
                    f"{layer!r} gives shape {tuple(shape)} for {trace.samples} samples, in another order."
                )

    def _leave_out(self, layers: list[str], why: str) -> None:
        if not layers:
            return
        if len(layers) == len(self._places):
            raise ValueError(f"{OP}: model must have layers that can be read, none can, because {why}: {layers}.")
        warn(f"{OP}: left out, because {why}: {layers}.")
        self._places = {layer: place for layer, place in self._places.items() if layer not in layers}
        for place in self._pools.keys() - self._places.values():
            del self._pools[place]

    def _hook(self, place: str, note: Callable[[str, Tensor], None]) -> RemovableHandle:
        """Has the first tensor that a module reads or gives noted."""
        return watched(self._modules[_module_at(place)], partial(note, place), reads=place.startswith(INPUT))


def _module_at(place: str) -> str:
    return place.removeprefix(INPUT)


def _rows_of(place: str, layout: str, shape: torch.Size, samples: int, order: SampleOrder) -> tuple[int, bool]:
    """How many rows at a place are one sample's, 0: they are in no order; and whether rows are the second axis.

    Args:
        shape: of what the module there gives for so many samples: as many rows as it reads.
    """
    windows = order.windows(place)
    if windows and windows * samples == shape[0] and (windows == 1 or layout != "auto"):
        return windows, False
    turned = layout == "tokens" and len(shape) == 3 and shape[1] == samples and order.windows(place, axis=1) == 1
    return int(turned), turned


def _layers_of(model: nn.Module, modules: Mapping[str, nn.Module], names: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules that are named, or all that have components."""
    if names is None:
        found = {name: module for name, module in modules.items() if components_in(module)}
        if not found:
            raise ValueError(f"{OP}: model must have a convolution or linear layer, {type(model).__name__} has none.")
        return found
    found = {}
    for name in names:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            hint = f"; close names: {validation.quoted(close)}" if close else ""
            raise ValueError(f"{OP}: layers must name modules of the model, {name!r} is none{hint}.")
        found[name] = modules[name]
    if not found:
        raise ValueError(f"{OP}: layers must name at least one module, it is empty.")
    return found


def _layout(module: nn.Module) -> str:
    """Where a module's output has its channels; for a module of unknown kind `ops.pool` refuses to guess."""
    if has_channels_last(module) or isinstance(module, nn.MultiheadAttention):
        return "tokens"
    return "nchw" if isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm)) else "auto"


def _predicted(output: Any, num_classes: int) -> Tensor:
    logits = first_tensor(output)
    if logits is None or logits.ndim != 2 or logits.shape[1] != num_classes:
        found = type(output).__name__ if logits is None else f"shape {validation.shape_of(logits)}"
        raise ValueError(
            f"{OP}: labels='predicted' needs logits of shape (samples, {num_classes}) from the model, got {found}."
        )
    return logits.argmax(1)
