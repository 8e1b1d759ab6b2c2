"""What the plugins of an exported model declare, built again from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sinkbench.api import AttentionSpec, BuildContext, NormalizationSpec, PositionalSpec


@dataclass(frozen=True)
class Declared:
    attention: AttentionSpec
    normalization: NormalizationSpec
    positional: PositionalSpec


def declare(config: Any, hooks: Mapping[str, Callable[[], list[Any]]]) -> Declared:
    """Builds the plugins.

    Args:
        config: a SinkbenchConfig.
        hooks: kind -> the hook of the plugin's module.
    """
    context = _context(config, config.max_position_embeddings)
    attention = _build(config, hooks, "attention", context)
    if attention.sink_token:
        context = _context(config, config.max_position_embeddings + 1)
    return Declared(
        attention=attention,
        normalization=_build(config, hooks, "normalization", context),
        positional=_build(config, hooks, "positional", context),
    )


def _build(
    config: Any, hooks: Mapping[str, Callable[[], list[Any]]], kind: str, context: BuildContext
) -> Any:
    wanted = config.plugins[kind]
    plugin = next(plugin for plugin in hooks[kind]() if plugin.name == wanted["name"])
    return plugin.build(plugin.params(**wanted["params"]), context)


def _context(config: Any, num_positions: int) -> BuildContext:
    recipe: Any = _namespace(config.recipe)
    return BuildContext(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        seq_length=config.max_position_embeddings,
        num_positions=num_positions,
        vocab_size=config.vocab_size,
        config=recipe,
    )


def _namespace(value: Any) -> Any:
    """Attributes in the place of keys, as plugins read the recipe."""
    if isinstance(value, Mapping):
        return SimpleNamespace(**{key: _namespace(item) for key, item in value.items()})
    return [_namespace(item) for item in value] if isinstance(value, list) else value
