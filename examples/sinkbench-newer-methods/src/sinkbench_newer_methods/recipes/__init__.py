"""Recipes, named ``sinkbench-newer-methods:NAME.yaml``."""

from __future__ import annotations

from pathlib import Path

from sinkbench.api import hookimpl


@hookimpl
def sinkbench_recipe_paths() -> dict[str, Path]:
    return {"sinkbench-newer-methods": Path(__file__).parent}
