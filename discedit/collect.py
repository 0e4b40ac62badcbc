"""`collect_moments`: one forward pass over the data, every layer at once."""

from __future__ import annotations

import difflib
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from discedit import _checks, ops
from discedit._batches import call, checked_labels, device_of, first_tensor, split, undisturbed
from discedit.moments import Moments

OP = "collect_moments"


def collect_moments(
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    *,
    labels: str = "given",
    layers: Iterable[str] | None = None,
    statistic: str = "mean",
    progress: bool | None = None,
    backend: str = "auto",
) -> Moments:
    """Accumulate the class-conditional moments of every layer's components in one forward pass over the data.

    Each convolution and linear layer is read at its output or, where that output goes straight into a batch norm with
    running statistics, at the norm's output (an affine map per channel, so the scores are the same; the sign of the
    norm's weight counts). The head is left out, because its components are the classes: the layer whose output is the
    model's output, or else the last layer if it has one component per class.

    Args:
        model: a classifier. It runs in eval mode without gradients; its mode, parameters, buffers and hooks, and
            torch's random state, are afterwards what they were, also after an exception.
        loader: any iterable of (inputs, labels). Inputs are a tensor, a tuple of positional or a dict of keyword
            arguments; they are moved to the model's device.
        num_classes: number of classes.
        labels: "given", or "predicted": the model's own argmax, for which batches may also be bare inputs.
        layers: module names to read instead of all; any module with a tensor output will do. Channels are the last
            axis of linear and layer-norm outputs, axis 1 otherwise.
        statistic: what a feature map is reduced to; "mean".
        progress: show a progress bar on stderr; by default only on a terminal.
        backend: as in `discedit.ops`.

    Returns:
        `Moments`, with one entry per layer in the order of execution.

    Raises:
        ValueError: an empty loader, labels that do not fit, no layer to read, an unknown layer name, or NaN or Inf in a
            feature map (the message names layer and batch).

    Memory: the state, classes x channels x 40 bytes, and one batch's pooled features, samples x channels x 8 bytes.
    """
    num_classes = _checks.positive_integer(OP, "num_classes", num_classes)
    _checks.choice(OP, "labels", labels, ("given", "predicted"))
    reader = _Reader(model, statistic, backend, layers)
    moments = Moments(num_classes, statistic=statistic, backend=backend)
    device = device_of(model)
    if progress is None:
        progress = sys.stderr.isatty()
    batch_index = -1
    with undisturbed(model), reader:
        for batch_index, batch in enumerate(tqdm(loader, desc="moments", unit="batch", disable=not progress)):
            inputs, given = split(OP, batch, batch_index, device, labels_needed=labels == "given")
            classes = checked_labels(OP, given, num_classes, batch_index) if labels == "given" else None
            output = reader.run(inputs)
            if classes is None:
                classes = _predicted(output, num_classes)
            for layer, pooled in reader.take(output):
                try:
                    moments.fold(layer, pooled, classes)
                except ValueError as error:
                    raise ValueError(f"{OP}: layer {layer!r}, batch {batch_index}: {error}") from error
    if batch_index < 0:
        raise ValueError(f"{OP}: loader must give at least one batch, it gave none.")
    moments.norms = reader.norms
    return moments


class _Reader:
    """Hooks that pool each layer's output while the model runs.

    The first batch also tells which norm reads which layer and which layer is the head, by identity of the tensors
    that pass; from then on only the modules that matter are pooled.
    """

    def __init__(self, model: nn.Module, statistic: str, backend: str, layers: Iterable[str] | None) -> None:
        self.model = model
        self.statistic = statistic
        self.backend = backend
        modules = dict(model.named_modules())
        self.explicit = layers is not None
        self.layers: dict[str, nn.Module]
        # Normalisations, which may directly follow a layer.
        self.candidates: dict[str, nn.Module] = {name: m for name, m in modules.items() if _is_norm(m)}
        if layers is None:
            self.layers = {name: m for name, m in modules.items() if isinstance(m, (_ConvNd, nn.Linear))}
            if not self.layers:
                raise ValueError(
                    f"{OP}: model must have a convolution or linear layer, {type(model).__name__} has none."
                )
        else:
            self.layers = {name: _named(modules, name) for name in layers}
            if not self.layers:
                raise ValueError(f"{OP}: layers must name at least one module, it is empty.")
        self.norms: dict[str, str] = {}  # layer -> the norm that it goes straight into
        self.places: dict[str, str] = {}  # layer -> where it is read, if not at its own output
        self._wanted: set[str] | None = None
        self._repeated: set[str] = set()
        self._ran: set[str] = set()
        self._pooled: dict[str, Tensor] = {}
        self._outputs: dict[int, tuple[str, weakref.ref[Tensor]]] = {}
        self._order: list[str] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Reader:
        for name, module in {**self.layers, **self.candidates}.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._wanted is not None and name not in self._wanted:
                return
            x = first_tensor(output)
            if x is None:
                raise ValueError(f"{OP}: layer {name!r} must give a tensor, it gave {type(output).__name__}.")
            if name in self._ran:
                self._repeated.add(name)
                return
            self._ran.add(name)
            if self._wanted is None:
                self._follow(name, args, x)
            if name not in self.layers and name not in self.places.values():
                return
            try:
                self._pooled[name] = ops.pool(x, statistic=self.statistic, layout=_layout(module), backend=self.backend)
            except ValueError as error:
                raise ValueError(f"{OP}: layer {name!r}: {error}") from error

        return hook

    def _follow(self, name: str, args: tuple[Any, ...], x: Tensor) -> None:
        norm = self.candidates.get(name)
        if norm is not None:
            source = self._source(args[0] if args else None)
            if source is not None and source not in self.norms:
                self.norms[source] = name
                if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                    self.places[source] = name
        if name in self.layers:
            self._order.append(name)
            # A weak reference: the first pass must not keep every feature map alive.
            self._outputs[id(x)] = (name, weakref.ref(x))

    def _source(self, tensor: Any) -> str | None:
        """The layer whose output is this very tensor."""
        name, reference = self._outputs.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def run(self, inputs: Any) -> Any:
        self._pooled.clear()
        self._ran.clear()
        return call(self.model, inputs)

    def take(self, output: Any) -> Iterator[tuple[str, Tensor]]:
        """The pooled features of the batch that just ran, by layer."""
        if self._wanted is None:
            self._settle(output)
        self._repeated &= {*self.layers, *self.places.values()}
        if self._repeated:
            warnings.warn(
                f"{OP}: left out, because they run more than once per forward pass: {sorted(self._repeated)}.",
                stacklevel=3,
            )
            self._order = [layer for layer in self._order if self._place(layer) not in self._repeated]
            self._repeated = set()
            self._wanted = {self._place(layer) for layer in self._order}
            if not self._order:
                raise ValueError(f"{OP}: no layer is left to read.")
        for layer in self._order:
            place = self._place(layer)
            if place not in self._pooled:
                raise ValueError(f"{OP}: layer {layer!r} ran in the first batch but not in a later one.")
            yield layer, self._pooled[place]

    def _settle(self, output: Any) -> None:
        head = None if self.explicit else self._head(first_tensor(output))
        # A norm that runs twice serves several layers: no single one may be read or edited there.
        for found in (self.norms, self.places):
            for layer in [layer for layer, norm in found.items() if norm in self._repeated]:
                del found[layer]
        self._order = [layer for layer in self._order if layer != head]
        missing = sorted(set(self.layers) - set(self._order) - {head})
        if self.explicit and missing:
            raise ValueError(f"{OP}: layers must name modules that run in the forward pass, these did not: {missing}.")
        if not self._order:
            raise ValueError(
                f"{OP}: model must have a convolution or linear layer besides its head {head!r}, it has none that runs."
            )
        self.norms = {layer: norm for layer, norm in self.norms.items() if layer in self._order}
        self._wanted = {self._place(layer) for layer in self._order}
        self._outputs.clear()

    def _head(self, logits: Tensor | None) -> str | None:
        """The layer whose output is the model's, or the last one if it has one component per class."""
        head = self._source(logits)
        if head is None and logits is not None and logits.ndim == 2 and self._order:
            last = self._pooled.get(self._order[-1])
            if last is not None and last.shape[1] == logits.shape[1]:
                head = self._order[-1]
        return head

    def _place(self, layer: str) -> str:
        return self.places.get(layer, layer)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm))


def _layout(module: nn.Module) -> str:
    """Where a module's output has its channels; for a module of unknown kind `ops.pool` refuses to guess."""
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        return "tokens"
    return "nchw" if isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm)) else "auto"


def _named(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3)
        hint = f"; close names: {_checks.quoted(close)}" if close else ""
        raise ValueError(f"{OP}: layers must name modules of the model, {name!r} is none{hint}.")
    return modules[name]


def _predicted(output: Any, num_classes: int) -> Tensor:
    logits = first_tensor(output)
    if logits is None or logits.ndim != 2 or logits.shape[1] != num_classes:
        found = type(output).__name__ if logits is None else f"shape {_checks.shape_of(logits)}"
        raise ValueError(
            f"{OP}: labels='predicted' needs logits of shape (samples, {num_classes}) from the model, got {found}."
        )
    return logits.argmax(1)
