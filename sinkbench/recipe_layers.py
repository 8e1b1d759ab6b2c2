"""Layers of a recipe: nested values with the place each was written, laid over one another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BLOCKS = {
    "model.attention": "name",
    "model.normalization": "name",
    "model.positional": "name",
    "loss": "name",
    "data": "source",
}
"""Blocks that are replaced as a whole when the key that names them changes."""
ALTERNATIVES = (
    ("data.train", "data.prepare"),
    ("data.prepare.tokenizer.path", "data.prepare.tokenizer.train_vocab_size"),
)
"""Keys of which a recipe has one: a layer that sets one takes the other away."""


@dataclass
class Layer:
    """Values and their places.

    Attributes:
        values: nested plain values.
        origins: dotted key -> place, for values and for sections, in the order of setting.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def nest(key: str, value: Any, place: str) -> Layer:
    """The layer that sets one dotted key."""
    origins = dict.fromkeys(_paths(value, key), place)
    *sections, last = key.split(".")
    values = {last: value}
    for section in reversed(sections):
        values = {section: values}
    for i in range(len(sections)):
        origins.setdefault(".".join(sections[: i + 1]), place)
    return Layer(values, origins)


def _paths(value: Any, path: str) -> Iterator[str]:
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _paths(inner, f"{path}[{i}]")


def merge(base: Layer, top: Layer) -> None:
    """Put a layer over another, in place."""
    for pair in ALTERNATIVES:
        for key, other in (pair, pair[::-1]):
            if _value(top, key) and not _value(top, other):
                _drop(base, other)
    join(base, top)


def join(base: Layer, more: Layer) -> None:
    """Add to a layer what is set at the same place, such as the next override, so that it takes away nothing
    that is set there beside it."""
    _merge_mapping(base.values, base.origins, more.values, more.origins, "")


def _value(layer: Layer, key: str) -> Any:
    value: Any = layer.values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _drop(layer: Layer, key: str) -> None:
    section, _, last = key.rpartition(".")
    parent = _value(layer, section)
    if isinstance(parent, dict) and last in parent:
        del parent[last]
        for gone in [k for k in layer.origins if is_within(k, key)]:
            del layer.origins[gone]


def _merge_mapping(
    old: dict[str, Any],
    old_origins: dict[str, str],
    new: dict[str, Any],
    new_origins: dict[str, str],
    prefix: str,
) -> None:
    for key, value in new.items():
        path = prefix + key
        if BLOCKS.get(path) == "name" and isinstance(value, str):
            value, new_origins = {"name": value}, new_origins | {f"{path}.name": new_origins[path]}
        # A sweep is one value: its keys are not those of the recipe.
        section = isinstance(value, dict) and path != "sweep"
        if not section or _replaces(path, old.get(key), value):
            for gone in [k for k in old_origins if is_within(k, path)] if key in old else ():
                del old_origins[gone]
            old[key] = {} if section else copy.deepcopy(value)
            whole = isinstance(value, list | dict) and not section
            kept = tuple(k for k in new_origins if is_within(k, path)) if whole else (path,)
            old_origins.update((k, new_origins[k]) for k in kept)
        if section:
            _merge_mapping(old[key], old_origins, value, new_origins, f"{path}.")


def _replaces(path: str, before: Any, after: dict[str, Any]) -> bool:
    """Whether a section takes the place of what was there rather than adding to it."""
    name = BLOCKS.get(path)
    if name is None or not isinstance(before, dict):
        return not isinstance(before, dict)
    return name in before and name in after and before[name] != after[name]


def is_within(key: str, path: str) -> bool:
    """Whether a dotted key is another, or part of its value."""
    return key == path or key.startswith((f"{path}.", f"{path}["))


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; lists and empty mappings are values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
