"""What is known of a network: found out once, in one forward pass, and handed on. Whoever edits asks `ModelTrace`.

Which channels can be removed together is for pruning alone: see the room `graph`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from discedit.model.forward import (
    TensorNotes,
    call,
    device_of,
    first_tensor,
    frozen_eval,
    hooked,
    index_samples,
    samples_in,
    tensors_in,
    to_device,
    version_of,
)
from discedit.model.functional import why_not_explicit
from discedit.model.layers import is_affine, is_close, takes_constants, why_not_plain
from discedit.model.sharded import has_shards, identity, unwrapped

ALIKE = 1e-2  # of the largest number: two batches need not give the same digits
FEW = 2  # samples that show what runs, and in which order
# Functions that leave each channel in its place, by the name that torch gives them, whoever calls them.
PIECEWISE = {"relu", "relu_", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh", "threshold", "clamp"}
SMOOTH = {"elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "softsign"}
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm"}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d"}
DROPOUTS |= {"alpha_dropout", "feature_alpha_dropout", "feature_dropout"}
POOLINGS = {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
SHAPES = {"contiguous", "clone", "float", "to", "view_as", "flatten"}  # the last only where the maps are 1 x 1
ARITHMETIC = {"add", "mul", "sub", "div", "pow", "__mul__", "__rmul__", "__add__", "__radd__", "__pow__"}
ONE_BY_ONE = PIECEWISE | SMOOTH | NORMS | DROPOUTS | POOLINGS | SHAPES | ARITHMETIC
IN_TRAINING = " in train mode"  # behind the place of an output
ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear))


def width_of(module: nn.Module) -> int | None:
    """Number of output rows of a layer that can be edited, else None."""
    if isinstance(module, _ConvNd):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else None


def components_in(module: nn.Module) -> int | None:
    """Number of components that can be scored: output rows of a layer, or channels that the heads of a
    `MultiheadAttention` hand to its output projection; None where there are none."""
    if isinstance(module, nn.MultiheadAttention):
        return None if why_not_explicit(module) else module.out_proj.in_features
    return width_of(module)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm))


def has_channels_last(module: nn.Module) -> bool:
    """Whether what a module reads and gives has its channels on the last axis; otherwise on axis 1."""
    return isinstance(module, (nn.Linear, nn.LayerNorm))


@dataclass
class ModelTrace:
    """What a forward pass in eval mode shows of a model.

    What a module does is found out when it is first asked for, which must be before hooks are set.

    Attributes:
        model: what was traced, without its wrappers.
        samples: that ran; 0: the inputs hold no tensor with samples.
        runs: module -> how often it was called, in the order in which they first began.
        training: the same of train mode, as far as that decides what runs: see `training_branches`; None: it was not
            asked, or does not run there.
        rows: module -> rows of the tensor that is its first argument; 0: there is none, or it has one axis.
        given: module -> shape of the first tensor that it gave, in the order in which they first ended.
        windows: layer -> rows of that tensor for each sample, 0: they are not in their order. Found out if asked for.
        head: the layer that gives the logits, be it as a copy or a view; of several, the last.
        classifier: the layer whose components are the classes: the head, or else the last layer that has as many.
        norms: layer -> the norm that its output goes straight into, where each runs once.
        consumers: layer -> the layers that read its components, channel by channel.
        sums: layers whose output, or that of the norm behind, is added to something.
        borrowed: layers that a function runs, with another bias than their own.
        outputs: place in what the model gives -> shape of the tensor there.
        logits: the place of the logits; empty when there are none.
        largest: bytes per sample of the largest output of a module.
        nested: modules that give neither a tensor nor, unless they are linear layers, a tuple that begins with one.
    """

    model: nn.Module
    samples: int = 0
    runs: dict[str, int] = field(default_factory=dict)
    training: ModelTrace | None = None
    rows: dict[str, int] = field(default_factory=dict)
    given: dict[str, torch.Size] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    head: str | None = None
    classifier: str | None = None
    norms: dict[str, str] = field(default_factory=dict)
    consumers: dict[str, list[str]] = field(default_factory=dict)
    sums: set[str] = field(default_factory=set)
    borrowed: set[str] = field(default_factory=set)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    logits: str = ""
    largest: int = 1
    nested: set[str] = field(default_factory=set)
    _answers: dict[tuple[Callable[..., Any], str], Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Any,
        few: int | None = FEW,
        *,
        layers: Iterable[str] = (),
        training: bool = False,
        windows: bool = False,
    ) -> ModelTrace:
        """By a pass over the first few samples of a batch (None: over all), which leaves the model as it was.

        Args:
            layers: modules whose output is followed to its consumers, beside convolutions and linear layers.
            training: whether to look at train mode as well, in a pass of its own.
            windows: whether to find out, in two more passes, where rows are samples.
        """
        size = samples_in(inputs)
        trace = cls(unwrapped(model), size if few is None else min(size, few))
        whole = to_device(inputs, trace.device)
        inputs = index_samples(whole, slice(trace.samples), size) if size else whole
        with frozen_eval(model):
            with Tracing(trace, layers) as tracing:
                output = call(model, inputs)
            tracing.end(output)
            # Still inside `frozen_eval`, which puts the random state back; modes and buffers
            # `training_branches` keeps by itself.
            if training:
                in_training = cls(trace.model, trace.samples)
                try:
                    with training_branches(model), Tracing(in_training) as tracing:
                        output = call(model, inputs)
                except Exception:  # what does not run in train mode has no branches there
                    pass
                else:
                    tracing.end(output)
                    trace.training = in_training
            if windows:
                trace.windows = _windows(trace, model, whole)
        return trace

    def of_copy(self, model: nn.Module) -> ModelTrace:
        """The same of a copy whose weights were edited: what its modules do is asked of its own."""
        return replaced(self, model=model)

    @cached_property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def order(self) -> dict[str, int]:
        """Module -> its place among those that ran."""
        return {name: place for place, name in enumerate(self.runs)}

    @property
    def branches(self) -> bool:
        """Whether other modules run in train mode, or run more or less often, or other outputs come out."""
        other = self.training
        return other is not None and (other.runs, other.outputs) != (self.runs, self.outputs)

    def largest_from(self) -> dict[str, int]:
        """Layer -> as `largest`, of what is there from its run on: of what it and the layer before it give, and of
        what runs later."""
        elements = {name: shape.numel() for name, shape in self.given.items()}
        unit = self.largest / max(elements.values(), default=1)
        most, found = 0, {}
        for name in reversed(self.runs):
            most = found[name] = max(most, elements.get(name, 0))
        layers = [name for name in self.runs if is_layer(self.model.get_submodule(name))]
        before = [next(iter(self.runs), ""), *layers]
        return {name: math.ceil(unit * found[other]) for other, name in zip(before, layers, strict=False)}

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Those that ran, in the order in which they first began."""
        wanted = set(names)
        return [name for name in self.runs if name in wanted]

    def _asked(self, question: Callable[[Any], Any], name: str) -> Any:
        """What a module turns out to do."""
        if (question, name) not in self._answers:
            self._answers[question, name] = question(self.model.get_submodule(name))
        return self._answers[question, name]

    def bias_norm(self, layer: str) -> _BatchNorm | None:
        """The batch norm behind a layer whose running mean can stand in for a bias of the layer."""
        norm = self.model.get_submodule(self.norms[layer]) if layer in self.norms else None
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            return None
        return norm if self._asked(takes_constants, self.norms[layer]) else None

    def has_affine_norm(self, layer: str) -> bool:
        """Whether its `bias_norm` is a plain affine map per channel, with no activation inside."""
        return self.bias_norm(layer) is not None and bool(self._asked(is_affine, self.norms[layer]))

    def why_not_plain(self, name: str) -> str:
        """Why a layer's output is not what its class makes of its weight and bias; empty when it is."""
        if name in self.borrowed:
            return "a function uses its weight, with a bias of its own making"
        return str(self._asked(why_not_plain, name))

    def why_not_read(self, name: str) -> str:
        """Why what a layer reads cannot be written as rows; empty when it can."""
        layer = self.model.get_submodule(name)
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            return f"it is a {type(layer).__name__}; only Conv2d and Linear can be fitted"
        if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.padding_mode != "zeros"):
            return "it is a convolution in groups, or one that does not pad with zeros"
        return self.why_not_plain(name)

    def why_not_fitted(self, name: str) -> str:
        """Why a layer cannot be fitted in closed form; empty when it can."""
        why = self.why_not_read(name)
        layer: Any = self.model.get_submodule(name)
        if not why and not isinstance(layer._parameters.get("weight"), nn.Parameter):
            why = "its weight is computed (parametrized or masked) and must be made a plain parameter first"
        if not why and layer.bias is None and self.bias_norm(name) is None:
            return "it has neither a bias nor a batch norm behind it that could take one"
        return why

    def why_not_erased(self, name: str) -> str:
        """Why a layer does not read, in one run, something of every sample in turn; empty when it does."""
        if name not in self.runs:
            return "it does not run as a module of its own"
        if self.runs[name] > 1:
            return "it runs more than once per forward pass"
        if not self.rows[name]:
            return "it is not called with a tensor of samples as its first argument"
        if not self.windows.get(name):
            return "the rows that it reads are not the samples in the order of the batch: its first axis is another"
        if self.windows[name] > 1:
            return f"it reads {self.windows[name]} rows for each sample, such as windows of it"
        return ""


class SampleOrder:
    """Shows whether the rows of tensors are the samples of a batch, in their order, or windows that lie together.

    The model runs twice on a few samples, the second time with the last of them first: rows must move on alike. Their
    number alone would not show it: a sequence may be as long as a batch, and samples may be sorted.

    Args:
        inputs: a batch.
        samples: in it.
        run: runs the model; gives tensors by name.
    """

    def __init__(self, inputs: Any, samples: int, run: Callable[[Any], dict[str, Tensor]]) -> None:
        def seen(few: list[int]) -> list[dict[str, Tensor]]:
            return [run(index_samples(inputs, torch.tensor(order), samples)) for order in (few, few[-1:] + few[:-1])]

        # Never as many as there are: a sequence of that length would look alike.
        few = {1: [0, 0], 2: [0, 1, 0], 3: [0, 1, 2, 0]}.get(samples, [0, 1, 2])
        self._number, fixed = len(few), False
        state = _random_state()
        try:
            self._seen = seen(few)
        except Exception:  # some models insist on the size of their batches
            self._number, fixed = samples, True
            self._seen = seen(list(range(samples)))
        # A model that draws random numbers gives others in each pass: there the number of rows alone must do.
        self._by_chance = not fixed and not torch.equal(_random_state(), state)

    def windows(self, name: str, axis: int = 0) -> int:
        """Entries along an axis for each sample; 0 where they are not in the order of the samples."""
        first, second = (identity(seen[name]).detach() if name in seen else None for seen in self._seen)
        if first is None or second is None or first.ndim <= axis or first.shape != second.shape:
            return 0
        first, second = first.movedim(axis, 0), second.movedim(axis, 0)
        each, rest = divmod(len(first), self._number)
        if rest or not first.numel():
            return 0
        alike = is_close(first.roll(each, 0), second, ALIKE)
        return each if alike or (each == 1 and self._by_chance) else 0


def _random_state() -> Tensor:
    """Of the generators that a model draws from."""
    states = [torch.get_rng_state()]
    # To ask CUDA for its state would initialise it, in processes that never use it.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


def watched(module: nn.Module, note: Callable[[Tensor], Any], *, reads: bool) -> RemovableHandle:
    """A hook that notes the first tensor that a module reads, or else gives."""

    def see(_: nn.Module, *given: Any) -> None:
        if (x := first_tensor(given[-1])) is not None:
            note(x)

    # Before tensor parallelism makes a local tensor of what it gives.
    late = module.register_forward_hook
    return module.register_forward_pre_hook(see) if reads else late(see, prepend=has_shards(module))


def _windows(trace: ModelTrace, model: nn.Module, inputs: Any) -> dict[str, int]:
    """Of layers, see `ModelTrace`."""
    layers = {name: trace.model.get_submodule(name) for name, rows in trace.rows.items() if rows}
    layers = {name: module for name, module in layers.items() if is_layer(module)}

    def run(batch: Any) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        with hooked([watched(module, partial(seen.setdefault, name), reads=True) for name, module in layers.items()]):
            call(model, batch)
        return seen

    order = SampleOrder(inputs, samples_in(inputs), run)
    found = {name: order.windows(name) for name in layers}
    return {name: each if each * trace.samples == trace.rows[name] else 0 for name, each in found.items()}


@dataclass(frozen=True)
class _Known:
    """Of a tensor whose channels are the components of layers.

    Attributes:
        given_by: layers whose very output it is. behind: layers whose norm's output it is.
        last: channels are on the last axis, otherwise on axis 1.
    """

    layers: tuple[str, ...]
    last: bool
    given_by: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


class Tracing(TorchFunctionMode):
    """Entered around a forward pass, sees what `ModelTrace` tells of it.

    It knows of each tensor whether its channels are the components of a layer, one by one. Not where components meet
    others: in sums of a residual stream, attention, concatenation. Nor behind a batch norm that normalises by the
    batch, where they depend on what else is in it.

    Args:
        seen: what is known of the model as far as the pass has come: it and the number of samples to begin with.
        layers: as for `ModelTrace.of`.
    """

    def __init__(self, seen: ModelTrace, layers: Iterable[str] = ()) -> None:
        super().__init__()
        self.seen = seen
        self._layers = set(layers)
        self._widths: dict[str, int] = {}  # of layers, in the order in which they gave something
        self._vectors: list[tuple[str, Tensor, int | None]] = []  # outputs that may be the logits
        self._known: TensorNotes[_Known] = TensorNotes()
        self._handles: list[RemovableHandle] = []
        modules = self.seen.model.named_modules()
        self._biases = {name: module._parameters.get("bias") for name, module in modules if is_layer(module)}

    def __enter__(self) -> Any:
        for name, module in self.seen.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes none
                self._handles.append(module.register_forward_pre_hook(partial(self._begin, name)))
                # Before tensor parallelism makes a local tensor of the output, perhaps of a part of the channels.
                end = partial(self._end, name)
                self._handles.append(module.register_forward_hook(end, prepend=has_shards(module)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def end(self, output: Any) -> None:
        """The model has given its output."""
        seen, tensors, logits = self.seen, dict(tensors_in(output)), first_tensor(output)
        seen.head = seen.classifier = None if logits is None else self._head(logits)
        last = next(reversed(self._widths), None)
        if seen.head is None and logits is not None and logits.ndim == 2 and last is not None:
            seen.classifier = last if self._widths[last] == logits.shape[1] else None
        seen.norms = {layer: norm for layer, norm in seen.norms.items() if seen.runs[layer] == seen.runs[norm] == 1}
        seen.outputs = {place: tuple(tensor.shape) for place, tensor in tensors.items()}
        seen.logits = next((place for place, tensor in tensors.items() if tensor is logits), "")
        seen.largest = -(-seen.largest // max(1, seen.samples))

    def _layers_of(self, tensor: Tensor, *, last: bool) -> tuple[str, ...]:
        """The layers whose components the tensor holds on the last axis, or on axis 1."""
        known = self._known.of(tensor)
        return known.layers if known is not None and (known.last == last or tensor.ndim == 2) else ()

    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x, seen = first_tensor(args), self.seen
        seen.runs[name] = seen.runs.get(name, 0) + 1
        seen.rows.setdefault(name, len(x) if x is not None and x.ndim > 1 else 0)
        # What reaches the output projection of attention are its heads: components of the module around it.
        around = name.rpartition(".")[0]
        if x is not None and isinstance(self.seen.model.get_submodule(around), nn.MultiheadAttention):
            self._known.note(x, _Known((around,), last=True))
        known = None if x is None else self._known.of(x)
        if known is not None and is_norm(module):
            for layer in known.given_by:
                seen.norms.setdefault(layer, name)
        # `LayersCalled` gives a layer, for the time of a call, the bias that a function was handed with its weight.
        if is_layer(module) and module._parameters.get("bias") is not self._biases.get(name):
            seen.borrowed.add(name)
        if x is not None and is_layer(module):
            for layer in self._layers_of(x, last=has_channels_last(module)):
                readers = seen.consumers.setdefault(layer, [])
                readers += [name] if name not in readers else []

    def _end(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        x, seen = first_tensor(output), self.seen
        given = output[0] if isinstance(output, tuple) and output and not isinstance(module, nn.Linear) else output
        if not isinstance(given, (Tensor, nn.utils.rnn.PackedSequence)):
            seen.nested.add(name)
        if x is not None:
            seen.given.setdefault(name, x.shape)
            seen.largest = max(seen.largest, x.numel() * x.element_size())
            sources = tuple(layer for layer, norm in seen.norms.items() if norm == name) if is_norm(module) else ()
            if sources and (known := self._known.of(x)) is not None:
                self._known.note(x, _Known(known.layers, known.last, behind=sources))
            if is_layer(module) or name in self._layers:
                self._note(name, module, x)

    def _note(self, name: str, module: nn.Module, x: Tensor) -> None:
        """The tensor holds the components of the layer."""
        last = has_channels_last(module)
        before = self._known.of(x)
        others = before.layers if before is not None and before.last == last else ()
        given_by, behind = ((), ()) if before is None else (before.given_by, before.behind)
        self._known.note(x, _Known((*others, name), last, given_by=(*given_by, name), behind=behind))
        if is_layer(module):
            width = x.shape[-1 if last else 1] if x.ndim > 1 else 0
            self._widths.setdefault(name, width)
            # With its version: what is changed in place later is no longer what the layer gave.
            if x.ndim > 1 and x.numel() == len(x) * width and len(x) == (self.seen.samples or len(x)):
                self._vectors.append((name, identity(x), version_of(identity(x))))

    def _head(self, logits: Tensor) -> str | None:
        # The very tensor, if it is one; else by its values, since a copy, a cast or a flatten makes another
        # tensor of a layer's output.
        known = self._known.of(logits)
        same = [name for name in known.given_by if name in self._widths] if known is not None else []
        same = same or [
            name for name, x, version in self._vectors if version_of(x) == version and _is_same(x, identity(logits))
        ]
        return same[-1] if same else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Before the call, which may change its arguments.
        maps = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1]
        known = [self._known.of(arg) for arg in maps]
        sources = {one.layers if one is not None else () for one in known}
        first = known[0] if known else None
        shape = maps[0].shape if maps else torch.Size()
        if getattr(func, "__name__", "") in ADDITIONS and len(maps) == 2 and maps[1].shape == shape:
            self.seen.sums.update(*((*one.given_by, *one.behind) for one in known if one is not None))
        result = func(*args, **(kwargs or {}))
        # Of one source alone: where components of two layers meet, a channel is no longer one of them.
        if first is not None and len(sources) == 1 and _is_one_by_one(func, args) and isinstance(result, Tensor):
            kept = result.shape == shape if first.last else result.shape[:2] == shape[:2]
            if kept and self._known.of(result) is None:  # dropout gives in eval mode the very tensor that it reads
                self._known.note(result, _Known(first.layers, first.last))
        return result


def _is_one_by_one(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function works on each channel by itself, and on each sample."""
    name = getattr(func, "__name__", "")
    by_the_batch = name == "batch_norm" and (len(args) < 2 or args[1] is None)  # without running statistics
    return name in ONE_BY_ONE and not by_the_batch


def _is_same(x: Tensor, logits: Tensor) -> bool:
    """Whether the logits are a layer's output (samples, components, ...), perhaps copied, cast or flattened."""
    if not x.numel() or x.numel() != logits.numel() or len(x) != len(logits) or x.device != logits.device:
        return False
    return bool((x.reshape(len(x), -1) == logits.reshape(len(x), -1)).all())


@contextmanager
def training_branches(model: nn.Module) -> Iterator[None]:
    """Train mode as far as it decides what runs; modes and buffers as before afterwards.

    torch's own modules stay as they are in eval mode, and dropout does nothing: statistics of batches and random
    numbers say nothing of what reads which channels, and a batch norm may not run on the example inputs at all. The
    random state is the caller's to keep, as `frozen_eval` does.
    """
    modes = [(module, module.training) for module in model.modules()]
    # torch's norms stay in eval mode, but modules of others may count or average when they train.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with _WithoutDropout():
            for module, _ in modes:
                module.training = not type(module).__module__.startswith(("torch.nn.", "torch.jit."))
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def in_training(output: Any) -> dict[str, Tensor]:
    """What a model has given in train mode, by places that say so."""
    return {f"{place}{IN_TRAINING}": tensor for place, tensor in tensors_in(output)}


class _WithoutDropout(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)
