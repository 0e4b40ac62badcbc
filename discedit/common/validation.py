"""Input checks shared by every layer. An error names the argument, the rule and the value."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from discedit.common.state import MAX_STATISTICS, ClassMoments, State, VectorMoments

STATISTICS = ("mean", "sum", "l2", "rms", "absmax", "max", "positive_fraction", "cls")
WITNESSES = ("linear", "quadratic", "exp", "vector")
SCALAR_WITNESSES = ("linear", "quadratic", "exp")
BOUNDS = (
    "fisher",
    "minimax",
    "minimax_published",
    "robust",
    "hellinger",
    "witness",
    "witness_published",
    "certified",
)
OF_ONE_NUMBER = ("witness", "witness_published", "certified")  # bounds of a scalar witness
OPTIONS: dict[str, dict[str, Any]] = {
    "robust": {"radius": 2.0, "rho": 0.0},
    "certified": {"alpha": 0.05, "value_range": None, "comparisons": None},
}
LAYOUTS = ("auto", "nchw", "tokens")
MAX_DIMENSION = 32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Rule(NamedTuple):
    """A bound by name, and what it needs beyond two laws; csrc/common/family.hpp has the same."""

    name: str
    radius: float = 0.0  # robust: in standard errors of the mean
    rho: float = 0.0  # robust: in units of the summed variance
    log_term: float = 0.0  # certified: ln(1 / probability of one of its events)
    low: float = 0.0  # certified: the range of the witness
    high: float = 1.0


class Asked(NamedTuple):
    """A bound by name with its options, all that can be said of it before the moments are looked at."""

    bound: str
    radius: float = 0.0
    rho: float = 0.0
    alpha: float = 0.0
    low: float = 0.0
    high: float = 1.0
    comparisons: int | None = None  # by default all values that are returned


class Window(NamedTuple):
    """What a convolution reads: pairs are (rows, columns), `padding` is (top, bottom, left, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def padded(self, x: Tensor) -> tuple[int, int]:
        """Size of the map with its padding."""
        top, bottom, left, right = self.padding
        return top + x.shape[2] + bottom, left + x.shape[3] + right

    def extent(self) -> tuple[int, int]:
        """Size of one patch, the gaps that dilation leaves included."""
        rows, columns = ((size - 1) * gap + 1 for size, gap in zip(self.kernel, self.dilation, strict=True))
        return rows, columns

    def outputs(self, x: Tensor) -> tuple[int, int]:
        """Size of the output map."""
        sizes = zip(self.padded(x), self.extent(), self.stride, strict=True)
        rows, columns = ((size - extent) // step + 1 for size, extent, step in sizes)
        return rows, columns


def shape_of(tensor: Tensor) -> str:
    """The shape as a user would type it."""
    return str(tuple(tensor.shape))


def quoted(values: Collection[str]) -> str:
    return ", ".join(repr(value) for value in values)


def choice(op: str, argument: str, value: str, allowed: Collection[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{op}: {argument} must be one of {quoted(allowed)}, got {value!r}.")
    return value


def tensor(op: str, argument: str, value: Any, dtypes: Collection[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a torch.Tensor, got {type(value).__name__}.")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {argument} must be one of {names}, got {found} (shape {shape_of(value)}).")
    return value


def index(value: Any) -> int | None:
    """The value as an int if it is an integer of any library (never a bool), else None."""
    if type(value) is int:  # also an integer that torch.compile leaves open, which operator.index would fix
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def classes(op: str, value: Any, num_classes: int) -> list[int]:
    """The classes of a group, in the order given: indices of any library, or those that a predicate holds for."""
    if callable(value) and not isinstance(value, Iterable):
        found = []
        for label in range(num_classes):
            answer = value(label)
            if not isinstance(answer, bool):
                raise ValueError(f"{op}: classes as a predicate must give True or False, gave {answer!r} for {label}.")
            if answer:
                found.append(label)
        if not found:
            raise ValueError(f"{op}: classes must hold for at least one label in 0..{num_classes - 1}, holds for none.")
        return found
    if isinstance(value, (int, str)) or not isinstance(value, Iterable):
        raise ValueError(f"{op}: classes must be a list of class indices, or a predicate on them, got {value!r}.")
    indices: list[int] = []
    for cls in value:
        # Anything that is an index: NumPy integers and one-element integer tensors too.
        which = index(cls)
        if which is None or not 0 <= which < num_classes:
            raise ValueError(f"{op}: classes must be indices in 0..{num_classes - 1}, got {cls!r}.")
        if which not in indices:
            indices.append(which)
    if not indices:
        raise ValueError(f"{op}: classes must name at least one class, it is empty.")
    return indices


def module(op: str, model: Any, argument: str = "model") -> None:
    """What can be looked at and run: a module in Python that holds values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: {argument} must be a torch.nn.Module, got {_named(model)}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{op}: {argument} must be a module in Python, got a {type(model).__name__}: give the module that it was "
            "made of."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        missing = is_lazy(tensor)
        if tensor.is_meta or missing:
            what = "has none yet: run it once" if missing else "is on the meta device: move it with to_empty"
            raise ValueError(f"{op}: {argument} must hold values, {name!r} {what}, and load its weights first.")


def _named(value: Any) -> str:
    """What an argument is: an object by its type, a class or function by its name."""
    name = getattr(value, "__name__", "")
    return f"{type(value).__name__} {name}".strip()


def positive_integer(op: str, argument: str, value: Any) -> int:
    number = index(value)
    if number is None or number < 1:
        raise ValueError(f"{op}: {argument} must be an integer of at least 1, got {value!r}.")
    return number


def is_number(value: Any) -> bool:
    """A real number of any library, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def statistics(op: str, value: Any) -> tuple[str, ...]:
    """The names, each known and named once, of one statistic or of a tuple or list of them."""
    if isinstance(value, str):
        return (choice(op, "statistic", value, STATISTICS),)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{op}: statistic must be a name or a tuple or list of names, got {type(value).__name__}.")
    if not value or len({*map(str, value)}) < len(value):
        raise ValueError(f"{op}: statistic must name at least one statistic and each once, got {value!r}.")
    return tuple(choice(op, "statistic", name, STATISTICS) for name in value)


def witness(op: str, value: str, statistic: Any, scale: Any) -> None:
    """A witness that fits the statistic, which is one name or several, and the scale, which "exp" needs."""
    choice(op, "witness", value, WITNESSES)
    if isinstance(statistic, str) == (value == "vector"):
        raise ValueError(
            f"{op}: statistic must be a tuple or list of names for witness='vector' and one name for every other "
            f"witness, got statistic={statistic!r} with witness={value!r}."
        )
    if value != "exp" and scale is not None:
        raise ValueError(f"{op}: scale must be left out unless witness='exp', got {scale!r} with witness={value!r}.")


def scale(op: str, value: Any) -> float:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{op}: scale must be a finite number above 0 for witness='exp', got {value!r}.")
    return float(value)


def witness_of(op: str, moments: State, value: str | None, bound: str = "minimax") -> str:
    """The witness to compute: the state's kind must fit. The state of "exp" holds the moments of a linear one."""
    if isinstance(moments, VectorMoments):
        if value not in (None, "vector"):
            raise ValueError(f"{op}: witness must be 'vector' for VectorMoments, got {value!r}.")
        value = "vector"
    elif value is None:
        value = "linear" if bound in OF_ONE_NUMBER else "quadratic"
    elif value not in SCALAR_WITNESSES:
        raise ValueError(f"{op}: witness must be one of {quoted(SCALAR_WITNESSES)} for ClassMoments, got {value!r}.")
    fits(op, bound, value)
    return "linear" if value == "exp" else value


def fits(op: str, bound: str, witness: str) -> None:
    """Whether the bound makes sense for the witness."""
    if bound in OF_ONE_NUMBER and witness not in ("linear", "exp"):
        numbers_of = "(t, t^2)" if witness == "quadratic" else "a vector of statistics"
        raise ValueError(
            f"{op}: witness must be 'linear' or 'exp' for bound={bound!r}, which compares the moments of one number: "
            f"witness={witness!r} is {numbers_of}."
        )


def rule(op: str, bound: str, options: Mapping[str, Any], moments: State, witness: str | None, values: int) -> Rule:
    """The bound with its options checked; `values` is how many numbers it is asked for together."""
    return settled(op, asked(op, bound, options, witness), moments, values)


def asked(op: str, bound: str, options: Mapping[str, Any], witness: str | None) -> Asked:
    """The bound with its options checked, as far as that goes without moments."""
    choice(op, "bound", bound, BOUNDS)
    known = OPTIONS.get(bound, {})
    for name in options:
        if name not in known:
            takes = f"takes {quoted(known)}" if known else "takes no options"
            raise TypeError(f"{op}: {name!r} is no option of bound={bound!r}, which {takes}.")
    given = {**known, **options}
    if bound == "robust":
        return Asked(bound, at_least_zero(op, "radius", given["radius"]), at_least_zero(op, "rho", given["rho"]))
    if bound != "certified":
        return Asked(bound)
    level = alpha(op, given["alpha"])
    comparisons = given["comparisons"]
    if comparisons is not None:
        comparisons = positive_integer(op, "comparisons", comparisons)
    low, high = _value_range(op, given["value_range"], witness)
    return Asked(bound, alpha=level, low=low, high=high, comparisons=comparisons)


def settled(op: str, asked: Asked, moments: State, values: int) -> Rule:
    """What is computed for these moments, which must be possible where the bound says what values there are."""
    if asked.bound != "certified":
        return Rule(asked.bound, asked.radius, asked.rho)
    if isinstance(moments, ClassMoments):
        _within(op, moments, asked.low, asked.high)
    comparisons = values if asked.comparisons is None else asked.comparisons
    log_term = math.log(6 * max(1, comparisons) / asked.alpha)
    return Rule(asked.bound, log_term=log_term, low=asked.low, high=asked.high)


def alpha(op: str, value: Any, argument: str = "alpha") -> float:
    if not is_number(value) or not 0 < value < 1:
        raise ValueError(f"{op}: {argument} must be a probability above 0 and below 1, got {value!r}.")
    return float(value)


def at_least_zero(op: str, argument: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{op}: {argument} must be a finite number of at least 0, got {value!r}.")
    return float(value)


def _value_range(op: str, value: Any, witness: str | None) -> tuple[float, float]:
    if value is None:
        if witness == "exp":
            return 0.0, 1.0
        raise ValueError(
            f"{op}: value_range must be given for bound='certified' unless witness='exp': the least and the greatest "
            f"value that t can ever take, such as (0, 1) for the statistic 'positive_fraction'."
        )
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(map(is_number, pair)) or not -math.inf < pair[0] < pair[1] < math.inf:
        raise ValueError(f"{op}: value_range must be two finite numbers, the lower one first, got {value!r}.")
    return float(pair[0]), float(pair[1])


def _within(op: str, moments: ClassMoments, low: float, high: float) -> None:
    """Refuses moments that no law on [low, high] has: var <= (mean - low) (high - mean)."""
    seen = moments.count > 0
    mean, n = moments.mean[seen], moments.count[seen].double()[:, None]
    slack = 1e-9 * (high - low)
    room = (mean - low + slack) * (high - mean + slack)
    wrong = (mean < low - slack) | (mean > high + slack) | (moments.m2[seen] / n > room)
    if bool(wrong.any()):
        row, channel = wrong.nonzero()[0].tolist()
        cls = int(seen.nonzero()[row, 0])
        raise ValueError(
            f"{op}: value_range must hold every value of the witness, ({low:g}, {high:g}) does not: class {cls}, "
            f"channel {channel} has mean {float(mean[row, channel]):g} and standard deviation "
            f"{float((moments.m2[seen] / n)[row, channel].sqrt()):g}."
        )


def state(op: str, argument: str, moments: Any) -> State:
    """A state whose tensors fit together."""
    if not isinstance(moments, (ClassMoments, VectorMoments)):  # torch 2.9 cannot compile the question for State
        raise TypeError(f"{op}: {argument} must be a ClassMoments or VectorMoments, got {type(moments).__name__}.")
    tensors, mean = moments.tensors(), moments.mean
    fits = mean.ndim == moments.axes and moments.count.dtype == torch.int64
    if fits:
        for part, shape in zip(tensors, moments.shapes(*mean.shape).values(), strict=True):
            fits = fits and part.shape == shape and part.device == mean.device
        for part in tensors[1:]:
            fits = fits and part.dtype == torch.float64
    if isinstance(moments, VectorMoments):
        rule = (
            f"count (classes,) int64, mean (d, classes, channels) and scatter (d (d + 1) / 2, classes, channels) "
            f"float64 with d in 1..{MAX_STATISTICS}"
        )
        fits = fits and 1 <= moments.dimension <= MAX_STATISTICS
    else:
        rule = "count (classes,) int64 and mean, m2, m3, m4 (classes, channels) float64"
    if not fits:
        found = ", ".join(f"{shape_of(part)} {str(part.dtype).removeprefix('torch.')}" for part in tensors)
        raise ValueError(f"{op}: {argument} must hold {rule} on one device, it holds {found}.")
    return moments


def described(moments: State) -> str:
    return description(type(moments), moments.mean.shape, moments.device)


def description(kind: type[State], mean: Sequence[int], device: torch.device) -> str:
    """In words, the state of a kind whose mean has this shape."""
    *several, classes, channels = mean
    vector = f"{several[0]} statistics, " if several else ""
    return f"a {kind.__name__} of {vector}{classes} classes and {channels} channels on {device}"


def has_tokens(x: Tensor, layout: str) -> bool:
    """Whether "cls", the token at position 0, is defined."""
    return layout == "tokens" and x.ndim == 3


def feature_map(op: str, x: Any, layout: str, statistics: Collection[str]) -> tuple[Tensor, int]:
    """The checked feature map, detached, and the axis of its channels."""
    tensor(op, "x", x, FLOATS)
    choice(op, "layout", layout, LAYOUTS)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must have at least a sample and a channel axis, got shape {shape_of(x)}.")
    if "cls" in statistics and not has_tokens(x, layout):
        raise ValueError(
            f"{op}: statistic 'cls', the token at position 0, needs layout='tokens' and x of shape (samples, tokens, "
            f"channels), got layout={layout!r} and shape {shape_of(x)}."
        )
    if layout == "auto" and x.ndim == 3:
        raise ValueError(
            f"{op}: layout must be named for a map with 3 axes, 'nchw' for (samples, channels, length) or 'tokens' for "
            f"(samples, tokens, channels): x has shape {shape_of(x)}."
        )
    axis = x.ndim - 1 if layout == "tokens" else 1
    if x.numel() == 0 and x.shape[0] and x.shape[axis]:
        raise ValueError(f"{op}: x must have at least one element per map, got shape {shape_of(x)}.")
    feature: Tensor = x
    return feature.detach(), axis


def image_map(op: str, x: Any) -> Tensor:
    """The checked feature map of shape (samples, channels, height, width), detached."""
    tensor(op, "x", x, FLOATS)
    if x.ndim != 4:
        raise ValueError(f"{op}: x must have shape (samples, channels, height, width), got shape {shape_of(x)}.")
    return feature_map(op, x, "nchw", ())[0]


def window(op: str, x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Window:
    """The window of a convolution over x, which has at least one output."""
    found = Window(
        _pair(op, "kernel_size", kernel_size, 1),
        _pair(op, "stride", stride, 1),
        _sides(op, padding),
        _pair(op, "dilation", dilation, 1),
    )
    extent, padded = found.extent(), found.padded(x)
    if extent[0] > padded[0] or extent[1] > padded[1]:
        raise ValueError(
            f"{op}: kernel_size must fit into the padded map: it covers {extent[0]} x {extent[1]} with "
            f"dilation={dilation!r}, the map has {padded[0]} x {padded[1]} with padding={padding!r} (x has shape "
            f"{shape_of(x)})."
        )
    return found


def _pair(op: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    parts = _integers(value, least)
    if len(parts) not in (1, 2):
        raise ValueError(f"{op}: {argument} must be an integer of at least {least} or a pair of them, got {value!r}.")
    return parts[0], parts[-1]


def _sides(op: str, value: Any) -> tuple[int, int, int, int]:
    """Top, bottom, left and right."""
    parts = _integers(value, 0)
    if len(parts) == 4:
        return parts[0], parts[1], parts[2], parts[3]
    if len(parts) not in (1, 2):
        raise ValueError(
            f"{op}: padding must be an integer of at least 0, a pair (rows, columns) or four (top, bottom, left, "
            f"right) of them, got {value!r}."
        )
    return parts[0], parts[0], parts[-1], parts[-1]


def _integers(value: Any, least: int) -> list[int]:
    """One integer, or those of a sequence; empty where some part is no integer or too small."""
    given = value if isinstance(value, (tuple, list)) else (value,)
    parts = [number for number in map(index, given) if number is not None and number >= least]
    return parts if len(parts) == len(given) else []


def positions(op: str, value: Any, x: Tensor) -> Tensor:
    """Flat output positions, contiguous, on x's device. Their range is `position_range`'s to check."""
    places = tensor(op, "positions", value, (torch.int64,))
    if places.ndim != 1:
        raise ValueError(f"{op}: positions must have shape (positions,), got {shape_of(places)}.")
    if places.device != x.device:
        raise ValueError(f"{op}: positions must be on the device of x, {x.device}, got {places.device}.")
    return places.contiguous()


def position_range(op: str, places: Tensor, outputs: tuple[int, int]) -> None:
    last = outputs[0] * outputs[1] - 1
    wrong = (places < 0) | (places > last)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{op}: positions must lie in 0..{last} ({outputs[0]} x {outputs[1]} outputs), found {int(places[place])} "
            f"at position {place}."
        )


def labels(op: str, value: Any, x: Tensor) -> Tensor:
    """Class indices of the samples of x: int64, contiguous, on x's device. Their range is `label_range`'s to check."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: labels must be a torch.Tensor of class indices, got {type(value).__name__}.")
    if value.dtype not in INTEGERS:
        raise ValueError(
            f"{op}: labels must be integers (class indices), got {str(value.dtype).removeprefix('torch.')} "
            f"(shape {shape_of(value)})."
        )
    if value.ndim != 1 or value.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: labels must hold one class index per sample: x has {x.shape[0]} samples (shape {shape_of(x)}), "
            f"labels has shape {shape_of(value)}."
        )
    if value.device != x.device:
        raise ValueError(f"{op}: labels must be on the device of x, {x.device}, got {value.device}.")
    return value.to(torch.int64).contiguous()


def label_range(op: str, labels: Tensor, num_classes: int) -> None:
    wrong = (labels < 0) | (labels >= num_classes)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{op}: labels must lie in 0..{num_classes - 1} (num_classes={num_classes}), found {int(labels[position])} "
            f"at position {position}."
        )


def radius(op: str, argument: str, value: Any, mean: Tensor) -> Tensor:
    """A radius for every pair of laws, float64: from one number, or from a tensor of the means' batch shape, whose
    values are `radius_range`'s to check."""
    batch = mean.shape[:-1]
    if is_number(value):
        return mean.new_full(batch, at_least_zero(op, argument, value), dtype=torch.float64)
    tensor(op, argument, value, (torch.float32, torch.float64))
    if value.shape != batch or value.device != mean.device:
        raise ValueError(
            f"{op}: {argument} must be a number or have shape {tuple(batch)} on {mean.device}, got shape "
            f"{shape_of(value)} on {value.device}."
        )
    ball: Tensor = value.detach().double()
    return ball


def radius_range(op: str, argument: str, value: Tensor) -> None:
    if not bool(((value >= 0) & value.isfinite()).all()):
        raise ValueError(f"{op}: {argument} must be finite and at least 0 everywhere, got {float(value.min())!r}.")


def witness_moments(op: str, mean1: Any, second1: Any, mean2: Any, second2: Any) -> None:
    """Four tensors that fit together. Whether moments are possible is `second_moments`'s to check."""
    given = {"mean1": mean1, "second1": second1, "mean2": mean2, "second2": second2}
    for argument, value in given.items():
        tensor(op, argument, value, (torch.float32, torch.float64))
        if value.dtype != mean1.dtype or value.device != mean1.device or value.shape != mean1.shape:
            raise ValueError(
                f"{op}: {argument} must have the shape, type and device of mean1: mean1 is {mean1.dtype} "
                f"{shape_of(mean1)} on {mean1.device}, {argument} is {value.dtype} {shape_of(value)} on {value.device}."
            )


def second_moments(op: str, mean1: Tensor, second1: Tensor, mean2: Tensor, second2: Tensor) -> None:
    for mean, second, argument in ((mean1, second1, "second1"), (mean2, second2, "second2")):
        # Below the square by more than rounding, of the given type.
        least = mean.double().square() * (1 - 8 * torch.finfo(mean.dtype).eps)
        if bool((second.double() < least).any()):
            raise ValueError(
                f"{op}: {argument} must be at least the square of its mean, E f^2 >= (E f)^2; it is below by up to "
                f"{float((least - second.double()).max()):g}."
            )


def law_pairs(op: str, mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> int:
    """Checks the four arguments of a bound and returns the dimension d."""
    given = {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}
    for argument, value in given.items():
        tensor(op, argument, value, (torch.float32, torch.float64))
        if value.dtype != mean1.dtype or value.device != mean1.device:
            raise ValueError(
                f"{op}: {argument} must have the type and device of mean1: mean1 is {mean1.dtype} on {mean1.device}, "
                f"{argument} is {value.dtype} on {value.device}."
            )
    d = mean1.shape[-1] if mean1.ndim else 0
    shapes = ", ".join(f"{argument} {shape_of(value)}" for argument, value in given.items())
    if not 1 <= d <= MAX_DIMENSION:
        raise ValueError(f"{op}: the last axis of mean1 must be d in 1..{MAX_DIMENSION}, got {shapes}.")
    batch = mean1.shape[:-1]
    if mean2.shape != mean1.shape or cov1.shape != (*batch, d, d) or cov2.shape != cov1.shape:
        raise ValueError(f"{op}: means must have shape (..., d) and covariances (..., d, d), got {shapes}.")
    return int(d)
