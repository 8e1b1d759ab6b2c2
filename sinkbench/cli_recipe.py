"""``sinkbench recipe``: every value of a recipe with the file it came from, and what follows from it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkbench import flops, plugins, recipe
from sinkbench.cli_text import columns, plain
from sinkbench.config import Config
from sinkbench.plugins import PluginIndex
from sinkbench.recipe import Recipe
from sinkbench.recipe_files import list_recipes, recipe_roots
from sinkbench.recipe_layers import flatten


@dataclass(frozen=True)
class Value:
    """One value and where it was written."""

    value: Any
    source: str


@dataclass(frozen=True)
class Run:
    """A run of a recipe: its values by dotted key, and quantities that follow."""

    label: str | None
    values: dict[str, Value]
    derived: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="action")
    show = commands.add_parser("show", help="every value and the file it came from")
    show.add_argument(
        "recipe", metavar="RECIPE", help="a path, the name of a shipped recipe, or package:name"
    )
    show.add_argument("overrides", nargs="*", default=(), metavar="KEY=VALUE", help="as for training")
    show.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("list", help="the recipes that are installed")


def run(args: argparse.Namespace) -> None:
    """Print a recipe, or the names of all.

    Raises:
        RecipeError: the recipe is wrong.
        PluginError: a plugin that it names is wrong.
    """
    if args.action == "list":
        _print_list()
        return
    loaded = recipe.load(args.recipe, args.overrides)
    index = plugins.discover()
    runs = [_describe(single, index) for single in recipe.expand(loaded)]
    if args.json:
        print(json.dumps(_as_json(loaded, runs), indent=2))
    else:
        _print(runs)


def _describe(single: Recipe, index: PluginIndex) -> Run:
    config = recipe.to_config(single)
    values = config.model_dump(by_alias=True, mode="json")
    defaults: dict[str, str] = {}
    for chosen in plugins.resolve(config, index, single.provenance):
        if "[" in chosen.path:
            continue  # in a list, which is shown as written
        parameters = chosen.params.model_dump(mode="json", by_alias=True)
        section, _, key = chosen.path.rpartition(".")
        parent = values[section] if section else values
        parent[key] = {"name": chosen.plugin.name} | parameters
        defaults |= dict.fromkeys((f"{chosen.path}.{p}" for p in parameters), f"default of {chosen.package}")
    shown = {
        key: Value(value, single.provenance.get(key) or defaults.get(key, "default"))
        for key, value in flatten(values)
    }
    return Run(config.label, shown, _derive(config))


def _derive(config: Config) -> dict[str, int]:
    """Parameters, tokens and operations; those that need an unknown vocabulary are left out."""
    model, train = config.model, config.train
    tokens = train.steps * train.global_batch_size * model.seq_length
    derived = {"parameters_without_tables": flops.parameters_without_tables(model), "tokens": tokens}
    vocab_size = flops.vocab_size(config)
    if vocab_size is not None:
        per_token = flops.flops_per_token(model, vocab_size)
        derived["parameters"] = flops.parameters(model, vocab_size)
        derived |= {"flops_per_token": per_token, "flops": per_token * tokens}
    return derived


def _print(runs: list[Run]) -> None:
    first = runs[0].values
    common = [key for key in first if all(run.values.get(key) == first[key] for run in runs)]
    print(columns([(key, plain(first[key].value), first[key].source) for key in common]))
    same = all(run.derived == runs[0].derived for run in runs)
    if same:
        print("\n" + columns(_derived_rows(runs[0])))
    if len(runs) == 1 and same:
        return
    for number, run in enumerate(runs, start=1):
        print(f"\nrun {number} of {len(runs)}: {run.label}")
        own = [(key, plain(v.value), v.source) for key, v in run.values.items() if key not in common]
        print(columns([row for row in own if row[0] != "label"], "  "))
        if not same:
            print(columns(_derived_rows(run), "  "))


def _derived_rows(run: Run) -> list[tuple[str, str]]:
    derived = run.derived
    layers = f"{_count(derived['parameters_without_tables'])} without embedding and output projection"
    if "parameters" not in derived:
        unknown = f"{layers} (the vocabulary is known once the data is prepared)"
        return [("parameters", unknown), ("tokens", _count(derived["tokens"]))]
    return [
        ("parameters", f"{_count(derived['parameters'])}, {layers}"),
        ("tokens", _count(derived["tokens"])),
        ("FLOPs", f"{_count(derived['flops_per_token'], 'G')} per token, {derived['flops']:.3g} in all"),
    ]


def _count(number: int, billion: str = "B") -> str:
    """A number with a unit: billions of parameters and tokens, G of operations."""
    for unit, size in (("T", 10**12), (billion, 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _as_json(loaded: Recipe, runs: list[Run]) -> dict[str, Any]:
    return {
        "recipe": recipe.display(loaded.path),
        "runs": [
            {
                "label": run.label,
                "values": {k: {"value": v.value, "from": v.source} for k, v in run.values.items()},
                "derived": run.derived,
            }
            for run in runs
        ],
    }


def _print_list() -> None:
    for package, root in recipe_roots().items():
        by_folder: dict[str, list[tuple[str, str]]] = {}
        for name in list_recipes(root):
            folder = str(Path(name).parent)
            by_folder.setdefault(folder, []).append((name, _first_comment(root / name)))
        for folder, rows in by_folder.items():
            print(f"{package}:{'' if folder == '.' else folder}")
            print(columns(rows, "  "))


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
