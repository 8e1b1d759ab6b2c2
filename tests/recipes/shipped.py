"""The shipped recipes, and how tests make them small."""

from __future__ import annotations

from sinkbench import recipe
from sinkbench.recipe import Recipe
from sinkbench.recipe_files import list_recipes, shipped_root

ROOT = shipped_root()
assert ROOT is not None
NAMES = list_recipes(ROOT)
BUDGET = "extends+=_base/budget/cpu_minute"


def load(name: str) -> Recipe:
    """With the budget, which replaces the data, but for recipes of the synthetic task."""
    loaded = recipe.load(f"sinkbench:{name}")
    if loaded.values["data"]["source"] == "bigram_backcopy":
        return loaded
    return recipe.load(f"sinkbench:{name}", [BUDGET])
