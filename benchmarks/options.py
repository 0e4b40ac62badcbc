"""Options of `unlearn` by one name each, as tables of settings have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from discedit import (
    AblateComponents,
    AboveDeviations,
    EraseDirections,
    LeastSquares,
    MaxDamage,
    ModHiFiU,
    TopFraction,
    TopK,
)

LIMITS = {"fraction": TopFraction, "top": TopK, "deviations": AboveDeviations, "damage": MaxDamage}
FIELDS = ("by", "sign", "around", "repair", "remove", "components", "factor", "protection", *LIMITS)


def with_method(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `unlearn`: fields of its method become a `method`; "factor" is its scale, `components="directions"`
    erases directions, `method="modhifi"` is ModHiFi-U."""
    left = {name: value for name, value in options.items() if name not in FIELDS}
    given = {name: options[name] for name in FIELDS if name in options}
    kind = left.pop("method", None)
    if "factor" in given:
        given["scale"] = given.pop("factor")
    if given.get("components") == "directions" or (given.keys() == {"scale"} and "data" in left):
        given.pop("components", None)
        return {**left, "method": EraseDirections(**given)}
    if not given and kind is None:
        return left
    for name in LIMITS.keys() & given.keys():
        given["limit"] = LIMITS[name](given.pop(name))
    if "protection" in given:
        given["repair"] = LeastSquares(given.pop("protection"))
    return {**left, "method": ModHiFiU(**given) if kind == "modhifi" else AblateComponents(**given)}
