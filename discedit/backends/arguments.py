"""What the ops take: the names of statistics, witnesses and bounds, and the checks of every argument.

What depends on values (`label_range`, `index_range`, `radius_range`, `second_moments`, `settled`) is checked when a
program runs, everything else when it is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from discedit.common import validation
from discedit.common.state import MAX_STATISTICS, ClassMoments, State, VectorMoments
from discedit.common.validation import choice, is_number, shape_of, tensor
from discedit.common.window import Window

STATISTICS = ("mean", "sum", "l2", "rms", "absmax", "max", "positive_fraction", "cls")
SCALAR_WITNESSES = ("linear", "quadratic", "exp")
WITNESSES = (*SCALAR_WITNESSES, "vector")
OF_ONE_NUMBER = ("witness", "witness_published", "certified")  # bounds of a scalar witness
BOUNDS = ("fisher", "minimax", "minimax_published", "robust", "hellinger", *OF_ONE_NUMBER)
OPTIONS: dict[str, dict[str, Any]] = {
    "robust": {"radius": 2.0, "rho": 0.0},
    "certified": {"alpha": 0.05, "value_range": None, "comparisons": None},
}
LAYOUTS = ("auto", "nchw", "tokens")
MAX_DIMENSION = 32


class Rule(NamedTuple):
    """A bound by name, and what it needs beyond two laws; csrc/common/family.hpp has the same."""

    name: str
    radius: float = 0.0  # robust: in standard errors of the mean
    rho: float = 0.0  # robust: in units of the summed variance
    log_term: float = 0.0  # certified: ln(1 / probability of one of its events)
    low: float = 0.0  # certified: the range of the witness
    high: float = 1.0


class Asked(NamedTuple):
    """A rule as far as it is known before the moments are: `settled` shares alpha over the comparisons."""

    rule: Rule
    alpha: float = 0.0
    comparisons: int | None = None  # by default all values that are returned


# ---- maps and labels ------------------------------------------------------------------------------------------------


def statistics(op: str, value: Any) -> tuple[str, ...]:
    """The names, each known and named once, of one statistic or of a tuple or list of them."""
    if isinstance(value, str):
        return (choice(op, "statistic", value, STATISTICS),)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{op}: statistic must be a name or a tuple or list of names, got {type(value).__name__}.")
    if not value or len({*map(str, value)}) < len(value):
        raise ValueError(f"{op}: statistic must name at least one statistic and each once, got {value!r}.")
    return tuple(choice(op, "statistic", name, STATISTICS) for name in value)


def feature_map(op: str, x: Any, layout: str, statistics: Collection[str]) -> tuple[Tensor, int]:
    """The checked feature map, detached, and the axis of its channels."""
    x = tensor(op, "x", x, validation.FLOATS)
    choice(op, "layout", layout, LAYOUTS)
    axis, broken = x.ndim - 1 if layout == "tokens" else 1, ""
    if x.ndim < 2:
        broken = "x must have at least a sample and a channel axis"
    elif "cls" in statistics and not (layout == "tokens" and x.ndim == 3):
        broken = "statistic 'cls', the token at position 0, needs layout='tokens' and x (samples, tokens, channels)"
    elif layout == "auto" and x.ndim == 3:
        broken = "layout must be named for a map with 3 axes, 'nchw' or, where channels are the last one, 'tokens'"
    elif x.numel() == 0 and x.shape[0] and x.shape[axis]:
        broken = "x must have at least one element per map"
    if broken:
        raise ValueError(f"{op}: {broken}, got layout={layout!r} and shape {shape_of(x)}.")
    return x.detach(), axis


def image_map(op: str, x: Any) -> Tensor:
    """The checked feature map of shape (samples, channels, height, width), detached."""
    if tensor(op, "x", x, validation.FLOATS).ndim != 4:
        raise ValueError(f"{op}: x must have shape (samples, channels, height, width), got shape {shape_of(x)}.")
    return feature_map(op, x, "nchw", ())[0]


def labels(op: str, value: Any, x: Tensor) -> Tensor:
    """Class indices of the samples of x: int64, contiguous, on x's device."""
    if isinstance(value, Tensor) and value.dtype not in validation.INTEGERS:
        found = f"{validation.type_of(value.dtype)} (shape {shape_of(value)})"
        raise ValueError(f"{op}: labels must be integers (class indices), got {found}.")
    given = tensor(op, "labels", value, validation.INTEGERS)
    if given.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: labels must hold one class index per sample: x has {x.shape[0]} samples (shape {shape_of(x)}), "
            f"labels has shape {shape_of(given)}."
        )
    return _beside(op, "labels", given, x).to(torch.int64)


def _beside(op: str, argument: str, value: Tensor, x: Tensor) -> Tensor:
    if value.device != x.device:
        raise ValueError(f"{op}: {argument} must be on the device of x, {x.device}, got {value.device}.")
    return value.contiguous()


def label_range(op: str, labels: Tensor, num_classes: int) -> None:
    index_range(op, "labels", labels, num_classes, f"num_classes={num_classes}")


def index_range(op: str, argument: str, values: Tensor, size: int, meaning: str) -> None:
    wrong = (values < 0) | (values >= size)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0, 0])
        found = f"found {int(values[place])} at position {place}"
        raise ValueError(f"{op}: {argument} must lie in 0..{size - 1} ({meaning}), {found}.")


def window(op: str, x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Window:
    """The window of a convolution over x, which has at least one output."""
    kernel, steps, gaps = (
        _sizes(op, argument, value, 1, " or a pair of them", (1, 2))
        for argument, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    several = ", a pair (rows, columns) or four (top, bottom, left, right) of them"
    sides = _sizes(op, "padding", padding, 0, several, (1, 2, 4))
    top, bottom, left, right = sides if len(sides) == 4 else (sides[0], sides[0], sides[-1], sides[-1])
    found = Window((kernel[0], kernel[-1]), (steps[0], steps[-1]), (top, bottom, left, right), (gaps[0], gaps[-1]))
    extent, padded = found.extent(), found.padded(x)
    if extent[0] > padded[0] or extent[1] > padded[1]:
        raise ValueError(
            f"{op}: kernel_size must fit into the padded map: it covers {extent[0]} x {extent[1]} with "
            f"dilation={dilation!r}, the map has {padded[0]} x {padded[1]} with padding={padding!r} (x has shape "
            f"{shape_of(x)})."
        )
    return found


def _sizes(op: str, argument: str, value: Any, least: int, several: str, lengths: tuple[int, ...]) -> list[int]:
    given = value if isinstance(value, (tuple, list)) else (value,)
    parts = [number for number in map(validation.index, given) if number is not None and number >= least]
    if len(parts) < len(given) or len(parts) not in lengths:
        raise ValueError(f"{op}: {argument} must be an integer of at least {least}{several}, got {value!r}.")
    return parts


def positions(op: str, value: Any, x: Tensor) -> Tensor:
    """Flat output positions, contiguous, on x's device."""
    places = tensor(op, "positions", value, (torch.int64,))
    if places.ndim != 1:
        raise ValueError(f"{op}: positions must have shape (positions,), got {shape_of(places)}.")
    return _beside(op, "positions", places, x)


# ---- states ---------------------------------------------------------------------------------------------------------

_RULES = {
    ClassMoments: "count (classes,) int64 and mean, m2, m3, m4 (classes, channels) float64",
    VectorMoments: "count (classes,) int64, mean (d, classes, channels) and scatter (d (d + 1) / 2, classes, channels) "
    f"float64 with d in 1..{MAX_STATISTICS}",
}


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
        fits = fits and 1 <= moments.dimension <= MAX_STATISTICS
    if not fits:
        found = ", ".join(f"{shape_of(part)} {validation.type_of(part.dtype)}" for part in tensors)
        raise ValueError(f"{op}: {argument} must hold {_RULES[type(moments)]} on one device, it holds {found}.")
    return moments


def description(kind: type[State], mean: Sequence[int], device: torch.device) -> str:
    """In words, the state of a kind whose mean has this shape."""
    *several, classes, channels = mean
    vector = f"{several[0]} statistics, " if several else ""
    return f"a {kind.__name__} of {vector}{classes} classes and {channels} channels on {device}"


# ---- witnesses and bounds of a state --------------------------------------------------------------------------------


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


def witness_of(op: str, moments: State, value: str | None, bound: str) -> str:
    """The witness to compute: the state's kind must fit. The state of "exp" holds the moments of a linear one."""
    vector = isinstance(moments, VectorMoments)
    if value is None:
        value = "vector" if vector else "linear" if bound in OF_ONE_NUMBER else "quadratic"
    if vector and value != "vector":
        raise ValueError(f"{op}: witness must be 'vector' for VectorMoments, got {value!r}.")
    if not vector and value not in SCALAR_WITNESSES:
        allowed = validation.quoted(SCALAR_WITNESSES)
        raise ValueError(f"{op}: witness must be one of {allowed} for ClassMoments, got {value!r}.")
    fits(op, bound, value)
    return "linear" if value == "exp" else value


def fits(op: str, bound: str, witness: str) -> None:
    """Whether the bound makes sense for the witness."""
    if bound in OF_ONE_NUMBER and witness not in ("linear", "exp"):
        numbers = "(t, t^2)" if witness == "quadratic" else "a vector of statistics"
        raise ValueError(
            f"{op}: witness must be 'linear' or 'exp' for bound={bound!r}, which compares the moments of one number: "
            f"witness={witness!r} is {numbers}."
        )


def asked(op: str, bound: str, options: Mapping[str, Any], witness: str | None) -> Asked:
    """The bound with its options checked, as far as that goes without moments."""
    choice(op, "bound", bound, BOUNDS)
    known = OPTIONS.get(bound, {})
    for name in options:
        if name not in known:
            takes = f"takes {validation.quoted(known)}" if known else "takes no options"
            raise TypeError(f"{op}: {name!r} is no option of bound={bound!r}, which {takes}.")
    given = {**known, **options}
    if bound == "robust":
        return Asked(Rule(bound, *(validation.at_least_zero(op, name, given[name]) for name in ("radius", "rho"))))
    if bound != "certified":
        return Asked(Rule(bound))
    level, comparisons = validation.alpha(op, given["alpha"]), given["comparisons"]
    if comparisons is not None:
        comparisons = validation.positive_integer(op, "comparisons", comparisons)
    low, high = _value_range(op, given["value_range"], witness)
    return Asked(Rule(bound, low=low, high=high), level, comparisons)


def _value_range(op: str, value: Any, witness: str | None) -> tuple[float, float]:
    if value is None and witness == "exp":
        return 0.0, 1.0
    if value is None:
        raise ValueError(
            f"{op}: value_range must be given for bound='certified' unless witness='exp': the least and the greatest "
            f"value that t can ever take, such as (0, 1) for the statistic 'positive_fraction'."
        )
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(map(is_number, pair)) or not -math.inf < pair[0] < pair[1] < math.inf:
        raise ValueError(f"{op}: value_range must be two finite numbers, the lower one first, got {value!r}.")
    return float(pair[0]), float(pair[1])


def settled(op: str, asked: Asked, moments: State, values: int) -> Rule:
    """What is computed for these moments, which must be possible where the bound says what values there are."""
    rule = asked.rule
    if rule.name != "certified":
        return rule
    if isinstance(moments, ClassMoments):
        _within(op, moments, rule.low, rule.high)
    comparisons = values if asked.comparisons is None else asked.comparisons
    return rule._replace(log_term=math.log(6 * max(1, comparisons) / asked.alpha))


def _within(op: str, moments: ClassMoments, low: float, high: float) -> None:
    """Refuses moments that no law on [low, high] has: var <= (mean - low) (high - mean)."""
    mean, variance = moments.mean, moments.m2 / moments.count.clamp(min=1).double()[:, None]
    slack = 1e-9 * (high - low)
    room = (mean - low + slack) * (high - mean + slack)
    wrong = (mean < low - slack) | (mean > high + slack) | (variance > room)
    wrong &= (moments.count > 0)[:, None]
    if bool(wrong.any()):
        cls, channel = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: value_range must hold every value of the witness, ({low:g}, {high:g}) does not: class {cls}, "
            f"channel {channel} has mean {float(mean[cls, channel]):g} and standard deviation "
            f"{float(variance[cls, channel].sqrt()):g}."
        )


# ---- moments of two laws --------------------------------------------------------------------------------------------


def law_pairs(op: str, mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> None:
    """Means (..., d) and covariances (..., d, d)."""
    given = {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}
    alike(op, given, shapes=False)
    d, rule = mean1.shape[-1] if mean1.ndim else 0, ""
    if not 1 <= d <= MAX_DIMENSION:
        rule = f"the last axis of mean1 must be d in 1..{MAX_DIMENSION}"
    elif mean2.shape != mean1.shape or cov1.shape != (*mean1.shape, d) or cov2.shape != cov1.shape:
        rule = "means must have shape (..., d) and covariances (..., d, d)"
    if rule:
        found = ", ".join(f"{argument} {shape_of(value)}" for argument, value in given.items())
        raise ValueError(f"{op}: {rule}, got {found}.")


def alike(op: str, given: Mapping[str, Any], shapes: bool = True) -> None:
    """Tensors of one type and device, and of one shape where asked."""
    what = "shape, type and device" if shapes else "type and device"
    (name, first), *_ = given.items()
    for argument, value in given.items():
        tensor(op, argument, value, (torch.float32, torch.float64))
        if value.dtype != first.dtype or value.device != first.device or (shapes and value.shape != first.shape):
            one, two = (f"is {x.dtype} on {x.device} of shape {shape_of(x)}" for x in (first, value))
            raise ValueError(f"{op}: {argument} must have the {what} of {name}: {name} {one}, {argument} {two}.")


def radius(op: str, argument: str, value: Any, mean: Tensor) -> Tensor:
    """A radius for every pair of laws, float64: from one number, or from a tensor of the means' batch shape."""
    batch = mean.shape[:-1]
    if is_number(value):
        return mean.new_full(batch, validation.at_least_zero(op, argument, value), dtype=torch.float64)
    ball = tensor(op, argument, value, (torch.float32, torch.float64))
    if ball.shape != batch or ball.device != mean.device:
        allowed = f"a number or have shape {tuple(batch)} on {mean.device}"
        raise ValueError(f"{op}: {argument} must be {allowed}, got shape {shape_of(ball)} on {ball.device}.")
    return ball.detach().double()


def radius_range(op: str, radius1: Tensor, radius2: Tensor) -> None:
    if bool(((torch.minimum(radius1, radius2) >= 0) & (radius1 + radius2 < math.inf)).all()):
        return
    for argument, value in (("radius1", radius1), ("radius2", radius2)):
        if not bool(((value >= 0) & value.isfinite()).all()):
            raise ValueError(f"{op}: {argument} must be finite and at least 0 everywhere, got {float(value.min())!r}.")


def second_moments(op: str, mean1: Tensor, second1: Tensor, mean2: Tensor, second2: Tensor) -> None:
    for mean, second, argument in ((mean1, second1, "second1"), (mean2, second2, "second2")):
        # Below the square by more than rounding, of the given type.
        least = mean.double().square() * (1 - 8 * torch.finfo(mean.dtype).eps)
        if bool((second.double() < least).any()):
            below = f"it is below by up to {float((least - second.double()).max()):g}"
            raise ValueError(f"{op}: {argument} must be at least the square of its mean, E f^2 >= (E f)^2; {below}.")
