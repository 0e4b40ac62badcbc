"""The colour scale of scores: equal steps of a score look equally far apart, also to the colour-blind."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEPS = 21  # 0, 0.05, ..., 1
# Bezier points in OKLab (lightness, green to red, blue to yellow): pale yellow, teal, blue, indigo. Lightness alone
# carries the order, so that it survives every kind of colour blindness and a grey printer.
POINTS = np.array([[0.965, -0.015, 0.055], [0.80, -0.13, 0.015], [0.58, -0.05, -0.13], [0.27, 0.03, -0.13]])
# Ottosson, "A perceptual color space for image processing", 2020: OKLab to the cube roots of cone responses, and cone
# responses to linear sRGB.
TO_ROOTS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def scale(steps: int = STEPS) -> list[str]:
    """So many colours, "#rrggbb", from pale to dark, each as far from the last in OKLab as all others."""
    t = np.linspace(0, 1, 2001)[:, None]
    curve = (
        (1 - t) ** 3 * POINTS[0] + 3 * t * (1 - t) ** 2 * POINTS[1] + 3 * t**2 * (1 - t) * POINTS[2] + t**3 * POINTS[3]
    )
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    places = np.linspace(0, lengths[-1], steps)
    even = np.stack([np.interp(places, lengths, axis) for axis in curve.T], axis=1)
    linear = ((even @ TO_ROOTS.T) ** 3) @ TO_RGB.T
    return ["#" + "".join(f"{round(255 * value):02x}" for value in _encoded(row)) for row in linear]


def ink(colour: str) -> str:
    """Black or white, whichever is easier to read on the colour: a contrast of at least 4.58 (WCAG 2)."""
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], _decoded(colour)))
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def step(value: float) -> int | None:
    """The place of a score in the scale; None for NaN."""
    return None if value != value else min(STEPS - 1, max(0, round(value * (STEPS - 1))))


def _encoded(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear light to the values of sRGB."""
    light = linear.clip(0, 1)
    encoded: NDArray[np.float64] = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return encoded


def _decoded(colour: str) -> NDArray[np.float64]:
    """The values of sRGB to linear light."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    light: NDArray[np.float64] = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return light
