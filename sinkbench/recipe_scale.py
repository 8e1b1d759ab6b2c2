"""Factors on a recipe's numbers: a budget changes steps and batch of any variant in proportion.

``scale: {train.steps: 0.01}`` multiplies what the recipe and its sweep say of train.steps. A value of the
command line is taken as it is; so is one that is absent or null.
"""

from __future__ import annotations

from typing import Any

from sinkbench.config import Config
from sinkbench.errors import RecipeError
from sinkbench.explain import all_keys, nearest, show
from sinkbench.recipe_layers import Layer, flatten

MAX_FACTOR = 1e9


def take(layer: Layer, where: str) -> dict[str, float]:
    """Takes ``scale`` out of a recipe's values: factors by dotted key.

    Args:
        where: the recipe, for errors.

    Raises:
        RecipeError: a factor is no positive number, or no recipe has such a key.
    """
    block = layer.values.pop("scale", None)
    if block is None:
        return {}
    if not isinstance(block, dict):
        place = layer.origins.get("scale", where)
        raise RecipeError(f"{place}: scale", "must map keys to factors", "write scale: {train.steps: 0.1}")
    known = set(all_keys(Config))
    factors = dict(flatten(block))
    for key, factor in factors.items():
        place = f"{layer.origins.get(f'scale.{key}', where)}: scale.{key}"
        if key not in known:
            raise RecipeError(place, "no recipe has such a key", nearest(key, known))
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= MAX_FACTOR:
            remedy = f"write a number above 0, at most {MAX_FACTOR:g}"
            raise RecipeError(place, f"{show(factor)} is not a factor", remedy)
        value = _value(layer, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RecipeError(place, f"{key} is not a number", "name a key that has one")
    return factors


def apply(layer: Layer, factors: dict[str, float], kept: str) -> None:
    """Multiplies, in place; whole numbers stay whole, and those above 0 at least 1.

    Args:
        kept: values from this place are left as they are.
    """
    for key, factor in factors.items():
        section, _, last = key.rpartition(".")
        value = _value(layer, key)
        place = layer.origins.get(key, "")
        if place == kept or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        holder = _value(layer, section) if section else layer.values
        scaled = value * factor
        holder[last] = max(min(value, 1), round(scaled)) if isinstance(value, int) else scaled
        if factor != 1:
            layer.origins[key] = f"{place}, {value:g} x {factor:g}"


def _value(layer: Layer, key: str) -> Any:
    """What stands under a dotted key; None if nothing does."""
    value: Any = layer.values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
