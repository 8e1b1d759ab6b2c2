"""The hooks of sinkbench. Each is called once, before any CUDA work, and returns list[Plugin].

``SINKBENCH_TRACE_PLUGINS=1`` in the environment prints every call, of which package, and what it returned.
"""

from __future__ import annotations

from pathlib import Path

import pluggy

from sinkbench.api import PROJECT, Plugin

hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec
def sinkbench_attention() -> list[Plugin]:
    """Attention variants; ``build`` returns an AttentionSpec."""
    raise NotImplementedError


@hookspec
def sinkbench_normalization() -> list[Plugin]:
    """Norms and their location; ``build`` returns a NormalizationSpec."""
    raise NotImplementedError


@hookspec
def sinkbench_positional() -> list[Plugin]:
    """Position information; ``build`` returns a PositionalSpec."""
    raise NotImplementedError


@hookspec
def sinkbench_loss() -> list[Plugin]:
    """Losses; ``build`` returns a LossSpec."""
    raise NotImplementedError


@hookspec
def sinkbench_data_transform() -> list[Plugin]:
    """Changes to a batch of token sequences; ``build`` returns a DataTransform."""
    raise NotImplementedError


@hookspec
def sinkbench_metric() -> list[Plugin]:
    """Measurements; ``build`` returns a Metric."""
    raise NotImplementedError


@hookspec
def sinkbench_recipe_paths() -> dict[str, Path]:
    """Folders of recipes by package name, so that ``package:name.yaml`` names one of them."""
    raise NotImplementedError
