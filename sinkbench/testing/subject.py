"""The plugin that is checked, in a tiny model: what the checks and the ranks that they start agree on."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sinkbench import plugins, recipe
from sinkbench.api import KINDS, Batch, Plugin
from sinkbench.config import Config
from sinkbench.discovery import Package
from sinkbench.errors import PluginError
from sinkbench.model import Declarations, declare
from sinkbench.plugins import Chosen, Found, PluginIndex, Resolved

TINY = Path(__file__).with_name("tiny.yaml")
VOCABULARY = 65
KEYS = {
    "attention": "model.attention",
    "normalization": "model.normalization",
    "positional": "model.positional",
    "loss": "loss",
    "data_transform": "data.transforms",
    "metric": "measure.metrics",
}
"""Where a recipe names a plugin of each kind."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A plugin with its parameters. It travels to other processes.

    Attributes:
        params: as a recipe would give them.
        overrides: of the tiny recipe, as on the command line.
        plugin: the plugin itself if no installed package registers it.
    """

    kind: str
    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    plugin: Plugin | None = None

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.params.items())
        return f"{self.kind.replace('_', ' ')} {self.name}({given})"

    @property
    def installed(self) -> bool:
        return self.plugin is None

    def config(self, *overrides: str) -> Config:
        """The tiny recipe with the plugin in it."""
        block = json.dumps({"name": self.name, **self.params})
        value = f"[{block}]" if self.kind in ("data_transform", "metric") else block
        mine = f"{KEYS[self.kind]}={value}"
        return recipe.to_config(recipe.load(TINY, (*self.overrides, mine, *overrides)))

    def resolve(self, config: Config) -> Resolved:
        return plugins.resolve(config, self._index(), provided={plugins.FORWARD_PASSES})

    def declare(self, *overrides: str) -> tuple[Config, Resolved, Declarations]:
        """The recipe, its plugins, and what they declare."""
        config = self.config(*overrides)
        resolved = self.resolve(config)
        return config, resolved, declare(config, resolved, VOCABULARY)

    def chosen(self, resolved: Resolved) -> Chosen:
        """The plugin among those of the recipe."""
        plural = {"data_transform": "transforms", "metric": "metrics"}
        found = getattr(resolved, plural.get(self.kind, self.kind))
        one: Chosen = found[0] if isinstance(found, tuple) else found
        return one

    def _index(self) -> PluginIndex:
        index = plugins.discover()
        if self.plugin is None:
            return index
        package = Package(
            distribution="under-test", version="0", entry_point=self.name, module=self.plugin.build.__module__
        )
        others = tuple(f for f in index.found if (f.kind, f.plugin.name) != (self.kind, self.name))
        return replace(index, found=(*others, Found(kind=self.kind, plugin=self.plugin, package=package)))


def find_subject(
    plugin: str | Plugin, kind: str | None, params: Mapping[str, Any], overrides: Sequence[str]
) -> Subject:
    """
    Args:
        kind: needed where a name is registered under several, and for a plugin that is not registered.

    Raises:
        PluginError: there is no such plugin or kind, or the kind is not clear.
    """
    name = plugin if isinstance(plugin, str) else plugin.name
    if kind is not None and kind not in KINDS:
        raise PluginError(f"kind {kind!r}", "there is no such kind", f"write one of {', '.join(KINDS)}")
    index = plugins.discover()
    registered = [f for f in index.found if f.plugin.name == name and kind in (None, f.kind)]
    if not isinstance(plugin, str):
        registered = [f for f in registered if _same(f.plugin, plugin)]
        if not registered and kind is None:
            remedy = f"give kind=..., one of {', '.join(KINDS)}"
            raise PluginError(f"plugin {name!r}", "is not registered, so that its kind is not known", remedy)
    kinds = sorted({f.kind for f in registered})
    if len(kinds) > 1:
        raise PluginError(f"plugin {name!r}", f"is registered as {' and '.join(kinds)}", "give kind=...")
    if not kinds and isinstance(plugin, str):
        # The error with the nearest names and the broken packages.
        index.get(kind or "attention", name)
    own = None if registered or isinstance(plugin, str) else plugin
    if own is not None:
        _check_importable(own)
    return Subject(
        kind=kinds[0] if kinds else str(kind),
        name=name,
        params=dict(params),
        overrides=tuple(overrides),
        plugin=own,
    )


def _check_importable(plugin: Plugin) -> None:
    try:
        pickle.dumps(plugin)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        problem = f"cannot be handed to other processes ({error})"
        remedy = (
            "define build and params at the top level of a module, or install the package and give its name"
        )
        raise PluginError(f"plugin {plugin.name!r}", problem, remedy) from error


def _same(one: Plugin, other: Plugin) -> bool:
    """A hook makes its plugins, and perhaps their functions, anew at each call."""
    ours, theirs = one.build, other.build
    return (ours.__module__, ours.__qualname__) == (theirs.__module__, theirs.__qualname__)


def tokens(count: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (count, length), generator=generator)


def batch(count: int, length: int, seed: int = 0) -> Batch:
    """Random tokens int64 [count, length] with every entry that a data source may add."""
    whole = tokens(count, length, seed)
    position = torch.arange(length).expand(count, length)
    return {"tokens": whole, "trigger": whole % 7 == 0, "loss_mask": (position > length // 4) & (whole > 3)}
