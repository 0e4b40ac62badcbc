"""`collect_moments`: one forward pass over the data, every layer at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from discedit.backends import arguments, select
from discedit.common import validation
from discedit.common.warning import warn
from discedit.model.forward import call, first_tensor, outside_inference_mode, samples_in, to_device
from discedit.model.sharded import Channels, has_shards, unwrapped
from discedit.model.trace import ModelTrace, SampleOrder, Tracing, components_in, has_channels_last, is_layer
from discedit.moments.data_pass import Pass, RunOptions
from discedit.moments.moments import GREATEST_EXPONENT, READS, Moments, Statistic

if TYPE_CHECKING:
    from typing_extensions import Unpack

OP = "collect_moments"
INPUT = "input of "  # a place that is not the output of the module named
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
    settings: dict[str, Any] = {"read": read, "statistic": statistic, "witness": witness, "scale": scale}
    assigner = BlockAssigner.of(model, num_classes, 1)
    return _MomentPass(model, loader, assigner, labels=labels, layers=layers, **settings, **run).collect()


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
    together = _MomentPass(model, loader, BlockAssigner.of(model, num_classes, number), **options).collect()
    # A class's share of a block is a class of its own.
    return [together.rows(slice(block, None, number)) for block in range(number)]


class BlockAssigner:
    """Deals the samples of each class to the blocks in turn; nobody waits for the device."""

    def __init__(self, classes: int, blocks: int) -> None:
        self.classes, self.blocks = classes, blocks
        self._seen = torch.zeros(classes, dtype=torch.int64)

    @classmethod
    def of(cls, model: nn.Module, num_classes: int, blocks: int) -> BlockAssigner:
        """With what every collection checks first."""
        validation.module(OP, model)
        return cls(validation.positive_integer(OP, "num_classes", num_classes), blocks)

    def go_on(self, moments: Moments) -> None:
        """From the samples that were dealt already."""
        for state in moments.values():
            self._seen = state.count.view(-1, self.blocks).sum(1)

    def __call__(self, labels: Tensor) -> Tensor:
        """Class x blocks + block of each sample."""
        self._seen = self._seen.to(labels.device)
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
        self,
        model: nn.Module,
        loader: Iterable[Any],
        assigner: BlockAssigner,
        *,
        labels: str = "given",
        layers: Iterable[str] | None = None,
        read: str = "consumer",
        statistic: Statistic | list[str] = "mean",
        witness: str = "quadratic",
        scale: float | Mapping[str, float] | None = None,
        **run: Unpack[RunOptions],
    ) -> None:
        self.assigner, self.num_classes = assigner, assigner.classes
        validation.choice(OP, "labels", labels, ("given", "predicted"))
        validation.choice(OP, "read", read, READS)
        self._statistics = arguments.statistics(OP, statistic)
        arguments.witness(OP, witness, statistic, scale)
        settings: dict[str, Any] = {"statistic": statistic, "witness": witness, "scale": scale, "read": read}
        moments = Moments(assigner.classes * assigner.blocks, **settings, backend=run.get("backend", "auto"))
        super().__init__(OP, model, loader, moments, self.num_classes if labels == "given" else None, run)
        self._named = labels, layers
        self.monitor = NonFiniteMonitor(self.device)

    def prepare(self) -> dict[str, Any]:
        labels, layers = self._named
        self.pooling = PoolingHooks(self.model, self._statistics, self.moments.backend, layers, self.moments.read)
        return {"labels": labels, "layers": list(self.pooling.layers), "blocks": self.assigner.blocks}

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
    """Pools the output of one module. What holds for the first batch is not asked again of outputs like it."""

    planes: Tensor | None = None  # (statistics, samples, channels) of the last batch: the next one's buffer
    rows, windows = 0, 1  # of the first batch; parts of a sample, where each comes as a sample of its own
    foreign = False  # rows are not the samples in their order, nor windows of them
    samples_second = can_be_turned = False  # (positions, samples, channels): known; or at least possible

    def __init__(self, name: str, module: nn.Module, statistics: tuple[str, ...], backend: str) -> None:
        self.name, self.statistics, self.backend = name, statistics, backend
        self.layout = _layout(module)
        self.readable = True
        self._known: tuple[Any, ...] = ()
        self._axis = 1
        self._channels = Channels()
        self._own: Tensor | None = None  # planes of the channels that this process has
        self._run: Callable[..., Tensor]

    def cut(self, x: Tensor, samples: int) -> None:
        """In the first batch: whether a sample comes in parts (windows, views, frames, heads), each as one."""
        self.rows = len(x) if x.ndim else 0
        self.can_be_turned = self.layout == "tokens" and x.ndim == 3 and x.shape[1] == samples
        self.foreign = bool(samples and self.rows % samples)
        if self.layout != "auto" and x.ndim > 1 and samples and not self.foreign:
            self.windows = self.rows // samples or 1
        tokens = arguments.has_tokens(x, self.layout) and self.windows == 1
        self.readable = "cls" not in self.statistics or tokens

    def read(self, x: Tensor, samples: int) -> None:
        """Pools a batch of so many samples (0: as many as there are rows)."""
        x = x.transpose(0, 1) if self.samples_second else x
        if samples and len(x) != samples and (self.windows == 1 or len(x) % samples):
            raise ValueError(
                f"{OP}: layer {self.name!r} must give as many rows for each sample as in the first batch "
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
                x, self._axis = arguments.feature_map("pool", x, self.layout, self.statistics)
            except ValueError as error:
                raise ValueError(f"{OP}: layer {self.name!r}: {error}") from error
            self._run = select("pool", self.backend, x.device)
            self._known, self._own = kind, None
        self._own = self._run(x.detach(), self._axis, self.statistics, self._own)
        self.planes = self._channels.together(self._own)


class PoolingHooks(ExitStack):
    """Hooks that pool each layer's output while the model runs.

    The first batch is traced: it also tells which norm is behind each layer, which layers read its components and which
    is the head. From then on only the modules that matter are hooked.
    """

    def __init__(
        self, model: nn.Module, statistics: tuple[str, ...], backend: str, layers: Iterable[str] | None, read: str
    ) -> None:
        super().__init__()
        self.callback(self._keep, set())
        self.model, self.read, self.explicit = model, read, layers is not None
        self._modules = dict(unwrapped(model).named_modules())
        self.layers = _layers_of(model, self._modules, layers)
        self.norms: dict[str, str] = {}  # layer -> the norm that it goes straight into
        self.places: dict[str, str] = {}  # layer -> where it is read, if not at its own output
        self._statistics, self._backend = statistics, backend
        self._pools: dict[str, _Pool] = {}  # by place
        self._tracing: Tracing | None = None
        self._settled = False
        self._samples = 0
        self._probe: dict[str, Tensor] | None = None
        self._ran: set[str] = set()
        self._repeated: set[str] = set()
        self._order: list[str] = []
        self._handles: dict[str, RemovableHandle] = {}

    def _keep(self, places: set[str]) -> None:
        """Hooks at these places and nowhere else; of the others nothing is held."""
        for name in self._pools.keys() - places:
            del self._pools[name]
            if name in self._handles:
                self._handles.pop(name).remove()
        for name in places - self._handles.keys():
            hook, module = partial(self._at, name), self._modules[name.removeprefix(INPUT)]
            if name.startswith(INPUT):
                self._handles[name] = module.register_forward_pre_hook(lambda _, args, hook=hook: hook(args[:1]))
            else:  # before tensor parallelism makes a local tensor of it
                self._handles[name] = module.register_forward_hook(
                    lambda _, __, output, hook=hook: hook(output), prepend=has_shards(module)
                )

    def _begins(self, name: str, module: nn.Module, x: Tensor | None) -> None:
        """In the first batch: a module is about to read x, perhaps the components of layers."""
        if x is None or not is_layer(module):
            return
        assert self._tracing is not None
        for source in self._tracing.layers_of(x, last=has_channels_last(module)):
            # What heads give is seen here alone, wherever layers are read.
            wanted = self.read == "consumer" or isinstance(self._modules[source], nn.MultiheadAttention)
            if wanted and source in self.layers and not self.places.get(source, "").startswith(INPUT):
                self.places[source] = INPUT + name
        self._at(INPUT + name, x)

    def _ends(self, name: str, module: nn.Module, output: Any) -> None:
        """In the first batch: a module has given its output, perhaps as the norm behind layers."""
        assert self._tracing is not None
        if self.read != "output" and isinstance(module, _BatchNorm) and module.running_mean is not None:
            for source, norm in self._tracing.seen.norms.items():
                if norm == name and source in self.layers:
                    self.places.setdefault(source, name)
        if name in self.layers or name in self.places.values():
            self._at(name, output)

    def _at(self, name: str, output: Any) -> None:
        """At a place, which is pooled if it is read."""
        x = first_tensor(output)
        if x is None and name.startswith(INPUT):
            return
        if x is None:
            raise ValueError(f"{OP}: layer {name!r} must give a tensor, it gave {type(output).__name__}.")
        if self._probe is not None:
            self._probe[name] = x
        elif name in self._ran:
            self._repeated.add(name)
        else:
            self._ran.add(name)
            if self._tracing is None or self._discover(name, x):
                self._pools[name].read(x, self._samples)

    def _discover(self, name: str, x: Tensor) -> bool:
        """In the first batch: whether the place is to be read."""
        if name in self.layers:
            self._order.append(name)
        elif name not in self.places.values():
            return False
        module = self._modules[name.removeprefix(INPUT)]
        pool = self._pools[name] = _Pool(name, module, self._statistics, self._backend)
        pool.cut(x, self._samples)
        return not pool.foreign and (self.explicit or pool.readable)

    def run(self, inputs: Any) -> Any:
        self._ran.clear()
        self._samples = samples_in(inputs)
        first = first_tensor(inputs)
        nothing = first is not None and first.ndim > 0 and not self._samples  # shows nothing of a model
        if self._settled or nothing:
            return call(self.model, inputs)
        self._tracing = Tracing(self.model, self._samples, self.layers, self._begins, self._ends)
        with self._tracing:
            output = call(self.model, inputs)
        trace, self._tracing = self._tracing.trace(output), None
        self._repeated = {place for place in self._pools if trace.runs[place.removeprefix(INPUT)] > 1}
        self._check_order(inputs)
        self._settle(trace)
        if any(pool.samples_second for pool in self._pools.values()):
            self._ran.clear()
            call(self.model, inputs)  # once more, now that it is known how
        return output

    def _check_order(self, inputs: Any) -> None:
        """Rows must be the samples in their order, or windows of them that lie together; else they get wrong labels."""
        if not self._samples:
            return
        self._keep(set(self._pools))

        def run(batch: Any) -> dict[str, Tensor]:
            self._probe = {}
            call(self.model, batch)
            return self._probe

        order = SampleOrder(inputs, self._samples, run)
        self._probe = None
        for name, pool in self._pools.items():
            if not pool.foreign and order.windows(name) == pool.windows:
                continue
            pool.samples_second = pool.can_be_turned and order.windows(name, axis=1) == 1
            pool.foreign = not pool.samples_second
            pool.windows = 1 if pool.samples_second else pool.windows
            if pool.foreign and self.explicit:
                raise ValueError(
                    f"{OP}: layers must give one output per sample, or windows that lie together by samples, layer "
                    f"{name!r} gives {pool.rows} rows for {self._samples} samples in another order."
                )

    def _settle(self, trace: ModelTrace) -> None:
        head = None if self.explicit else trace.classifier
        # What runs twice serves several layers: no single one may be read or edited there.
        self.places = {layer: place for layer, place in self.places.items() if place not in self._repeated}
        order = [layer for layer in self._order if layer != head]
        order = [n for n in order if n in self.places or not isinstance(self._modules[n], nn.MultiheadAttention)]
        pools = {layer: self._pools[self._place(layer)] for layer in order}
        foreign = [layer for layer, pool in pools.items() if pool.foreign]
        tokenless = [layer for layer, pool in pools.items() if not pool.foreign and not pool.readable]
        tokenless = [] if self.explicit else tokenless
        self._order = [layer for layer in order if layer not in (*foreign, *tokenless)]
        why = "their rows are not the samples in the order of the batch, nor windows of them that lie together"
        needs = "statistic 'cls' needs an output of shape (samples, tokens, channels)"
        if foreign:
            warn(f"{OP}: left out, because {why}: {foreign}.")
        if self.explicit and len(self._order) < len(self.layers):
            missing = sorted(set(self.layers) - set(self._order))
            raise ValueError(f"{OP}: layers must name modules that run in the forward pass, these did not: {missing}.")
        if not self._order and not tokenless:
            none = "it has none that runs" if not foreign else f"of {foreign}, {why}"
            raise ValueError(f"{OP}: model must have a convolution or linear layer besides its head {head!r}, {none}.")
        if not self._order:
            raise ValueError(f"{OP}: {needs}, no layer has one: {tokenless}.")
        if tokenless:
            warn(f"{OP}: left out, because {needs}: {tokenless}.")
        self.norms = {layer: norm for layer, norm in trace.norms.items() if layer in self._order}
        self._keep({self._place(layer) for layer in self._order})
        self._settled = True

    def take(self) -> Iterator[tuple[str, Tensor]]:
        """The pooled planes of the batch that just ran, by layer; the next batch overwrites them."""
        self._repeated &= {*self.layers, *self.places.values()}
        if self._repeated:
            warn(f"{OP}: left out, because they run more than once per forward pass: {sorted(self._repeated)}.")
            self._order = [layer for layer in self._order if self._place(layer) not in self._repeated]
            self._repeated.clear()
            if not self._order:
                raise ValueError(f"{OP}: no layer is left to read.")
            self._keep({self._place(layer) for layer in self._order})
        for layer in self._order:
            place = self._place(layer)
            planes = self._pools[place].planes
            if place not in self._ran or planes is None:
                raise ValueError(f"{OP}: layer {layer!r} ran in the first batch but not in a later one.")
            yield layer, planes

    def _place(self, layer: str) -> str:
        return self.places.get(layer, layer)


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
