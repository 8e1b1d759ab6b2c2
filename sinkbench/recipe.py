"""Recipes: YAML files that extend one another, overrides, and where every value came from.

The order is defaults < extends from left to right < file < ``extends+=RECIPE`` < ``key.path=value``. Changing
the name of a plugin, or the source of the data, replaces the whole block, since its parameters belong to it;
``data.train`` takes the place of ``data.prepare``, and the other way round.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sinkbench import recipe_scale, recipe_yaml
from sinkbench.config import MAX_NAME, Config, ModelConfig
from sinkbench.errors import RecipeError, SinkbenchError
from sinkbench.explain import explain, show
from sinkbench.recipe_files import find
from sinkbench.recipe_layers import BLOCKS, Layer, flatten, is_within, join, merge, nest
from sinkbench.redaction import redact

COMMAND_LINE = "command line"
EXTENDS = "extends+="
GENERATED = "sweep"
"""Provenance of a label that was made from a run's values."""
MAX_RUNS = 1000
"""Of a sweep."""
MAX_BASES = 50
"""Recipes that extend one another in a row."""
NAMED_FAULTS = 10
"""Wrong keys that a message names."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with everything it extends, before validation.

    Attributes:
        path: the file.
        values: nested plain values.
        provenance: dotted key -> ``file:line`` or "command line", in the order of setting; a key
            that is absent has its default.
        sweep: a grid {dotted key: values}, a list of override sets, or None.
        scale: factors by dotted key, which ``values`` have had and the sweep's have not.
    """

    path: Path
    values: dict[str, Any]
    provenance: dict[str, str]
    sweep: dict[str, list[Any]] | list[dict[str, Any]] | None = None
    scale: dict[str, float] = field(default_factory=dict)


def load(reference: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and what it extends, then apply overrides.

    Args:
        reference: a path, the name of a shipped recipe, or ``package:name``.
        overrides: ``key.path=value``, the value in YAML; or ``extends+=RECIPE``, which lays one more recipe
            over this one, as a file that extends both would.

    Raises:
        RecipeError: a file is missing or unreadable, extends itself, or is not a recipe; an override
            is malformed.
    """
    path = find(reference)
    known: dict[Path, Layer] = {}
    layer = copy.deepcopy(_load_file(path, (), known))
    for text in overrides:
        if text.startswith(EXTENDS):
            base = find(text.removeprefix(EXTENDS), where=f"{COMMAND_LINE}: extends")
            merge(layer, _load_file(base, (), known))
    merge(layer, _overrides([text for text in overrides if not text.startswith(EXTENDS)]))
    sweep = layer.values.pop("sweep", None)
    if sweep is not None:
        _check_sweep(sweep, layer.origins, path)
    scale = recipe_scale.take(layer, display(path))
    recipe_scale.apply(layer, scale, kept=COMMAND_LINE)
    return Recipe(path, layer.values, layer.origins, sweep, scale)


def to_config(recipe: Recipe) -> Config:
    """Validate a recipe.

    Raises:
        RecipeError: one line for the first wrong value, naming the file it came from, and the keys
            of the others.
    """
    values = _with_default_names(recipe.values)
    _refuse_secrets(recipe)
    try:
        # JSON in strict mode: a list may become a tuple, but "5", true and 5.0 are no integers.
        return Config.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as e:
        first, *others = explain(e, Config, values, also=("extends", "scale", "sweep"), most=NAMED_FAULTS + 1)
        count = e.error_count() - 1
    problem = first.problem
    if others:
        more = ", ..." if count > len(others) else ""
        problem += f" (and {count} more: {', '.join(dict.fromkeys(f.key for f in others))}{more})"
    where = origin(recipe.provenance, first.key, first.problem) or display(recipe.path)
    key = f": {first.key}" if first.key else ""
    raise RecipeError(f"{where}{key}", problem, first.remedy)


def expand(recipe: Recipe) -> list[Recipe]:
    """The runs of a sweep, in order, each with a ``label``; a recipe without a sweep is one run.

    Raises:
        RecipeError: labels collide, there are too many runs, or the command line sets what the sweep
            varies.
    """
    if recipe.sweep is None:
        return [recipe]
    count = _run_count(recipe)
    if count > MAX_RUNS:
        where = f"{recipe.provenance.get('sweep', display(recipe.path))}: sweep"
        raise RecipeError(where, f"it has {count:,} runs", f"a sweep has at most {MAX_RUNS:,}; vary less")
    if isinstance(recipe.sweep, dict):
        keys = list(recipe.sweep)
        sets = [dict(zip(keys, row, strict=True)) for row in itertools.product(*recipe.sweep.values())]
        places = [[f"sweep.{key}" for key in keys]] * len(sets)
    else:
        sets = recipe.sweep
        keys = list(dict.fromkeys(key for run in sets for key in run if key != "label"))
        places = [[f"sweep[{i}].{key}" for key in run] for i, run in enumerate(sets)]
    _refuse_overridden(recipe, keys)
    runs = []
    for run, run_places in zip(sets, places, strict=True):
        changes = Layer()
        for (key, value), place in zip(run.items(), run_places, strict=True):
            join(changes, nest(key, value, recipe.provenance.get(place, display(recipe.path))))
        recipe_scale.apply(changes, recipe.scale, kept=COMMAND_LINE)
        if "label" not in run:
            join(changes, nest("label", _label(run, keys), GENERATED))
        layer = Layer(copy.deepcopy(recipe.values), dict(recipe.provenance))
        merge(layer, changes)
        runs.append(Recipe(recipe.path, layer.values, layer.origins))
    _refuse_equal_labels(recipe, runs)
    return runs


def require_single(recipe: Recipe) -> Recipe:
    """The recipe itself.

    Raises:
        RecipeError: it is a sweep of several runs.
    """
    if recipe.sweep is not None:
        where = display(recipe.path)
        remedy = f"run `sinkbench sweep {where}`, or add sweep=null for the recipe without it"
        place = recipe.provenance.get("sweep", where)
        raise RecipeError(f"{place}: sweep", f"this recipe is a sweep of {_run_count(recipe):,} runs", remedy)
    return recipe


def dump(config: Config | dict[str, Any]) -> str:
    """A recipe in YAML that loads back equal, every default written out."""
    values = config if isinstance(config, dict) else config.model_dump(by_alias=True)
    return recipe_yaml.dump(values)


def origin(provenance: dict[str, str], key: str, problem: str = "") -> str | None:
    """Where a value came from: its own place, or that of what it is part of.

    Args:
        provenance: of the recipe.
        key: dotted; "" or a section if the problem concerns several keys.
        problem: its text, in which those keys are named; the one that was set last is taken.
    """
    parts = [k for k in provenance if k != key and (not key or is_within(k, key))]
    prefix = f"{key}." if key else ""
    named = {prefix + word.rstrip(".") for word in re.findall(r"[a-z_][\w.]*", problem)}
    for part in reversed(parts):
        if part in named:
            return provenance[part]
    while key and key not in provenance:
        shorter = re.sub(r"(\.[^.[]*|\[\d+\]|^[^.[]*)$", "", key)
        key = shorter if shorter != key else ""  # no key, but a path or an override with brackets
    return provenance.get(key)


def locate(error: SinkbenchError, provenance: dict[str, str]) -> SinkbenchError:
    """The same error with the file of the key that it blames, if it blames a key that was set."""
    place = origin(provenance, error.where, error.problem)
    return type(error)(f"{place}: {error.where}", error.problem, error.remedy) if place else error


def display(path: Path) -> str:
    """A path as a user would write it: relative to the working directory where that is shorter."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


# --- files and layers -----------------------------------------------------------------------------


def _load_file(path: Path, stack: tuple[Path, ...], known: dict[Path, Layer]) -> Layer:
    """A file laid over what it extends.

    Args:
        stack: the files that led here by extending.
        known: layers of files that were read before, so that one which is extended along many ways is
            read once.
    """
    path = path.resolve()
    name = display(path)
    if path in known:
        return known[path]
    if len(stack) > MAX_BASES:
        problem = f"more than {MAX_BASES} recipes extend one another in a row"
        raise RecipeError(f"{display(stack[0])}: extends", problem, "write fewer, longer recipes")
    if path in stack:
        chain = " -> ".join(display(p) for p in (*stack[stack.index(path) :], path))
        raise RecipeError(
            f"{display(stack[-1])}: extends", f"a cycle: {chain}", "remove one of these extends"
        )
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(recipe_yaml.MAX_CHARACTERS + 1)
    except UnicodeDecodeError as e:
        raise RecipeError(name, f"not UTF-8 at byte {e.start}", "save it as UTF-8") from None
    except OSError as e:
        raise RecipeError(
            name, f"cannot be read ({e.strerror})", "check the path and its permissions"
        ) from None
    values, origins = recipe_yaml.parse(text, name)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(name, f"holds a {type(values).__name__}", "write key: value pairs")
    bases = values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    where = f"{origins.pop('extends', name)}: extends"
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(where, "must be a recipe or a list of recipes", "write extends: [a.yaml, b.yaml]")
    layer = Layer()
    for base in bases:
        merge(layer, _load_file(find(base, path.parent, where), (*stack, path), known))
    own = {key: place for key, place in origins.items() if not key.startswith("extends[")}
    merge(layer, Layer(values, own))
    known[path] = layer
    return layer


def _overrides(overrides: Sequence[str]) -> Layer:
    layer = Layer()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
            raise RecipeError(f"{COMMAND_LINE}: {text}", "not an override", "write key.path=value")
        if key.count(".") > recipe_yaml.MAX_DEPTH:
            raise RecipeError(f"{COMMAND_LINE}: {show(text)}", "no key is as deep", "write key.path=value")
        if key == "extends":
            raise RecipeError(
                f"{COMMAND_LINE}: {text}",
                "a recipe extends others in its file",
                f"write it there, or {EXTENDS}RECIPE to lay one more over it",
            )
        parsed, _ = recipe_yaml.parse(value, COMMAND_LINE, key, lines=False)
        join(layer, nest(key, parsed, COMMAND_LINE))
    return layer


def _refuse_secrets(recipe: Recipe) -> None:
    """A recipe is copied into run folders, checkpoints and reports."""
    for key, value in flatten(recipe.values):
        text = value if isinstance(value, str) else json.dumps(value)
        if redact(text) != text:
            where = origin(recipe.provenance, key) or display(recipe.path)
            problem = "it holds a token or password, which every copy of the recipe would show"
            raise RecipeError(f"{where}: {key}", problem, "leave it to the environment")


def _with_default_names(values: dict[str, Any]) -> dict[str, Any]:
    """Plugin blocks that set parameters only are completed with the name that is the default."""
    values = copy.deepcopy(values)
    for path in (path for path, name in BLOCKS.items() if name == "name"):
        section, _, key = path.rpartition(".")
        fields = (ModelConfig if section else Config).model_fields
        parent = values.get(section) if section else values
        block = parent.get(key) if isinstance(parent, dict) else None
        if isinstance(block, dict):
            block.setdefault("name", fields[key].default.name)
    return values


# --- sweeps ---------------------------------------------------------------------------------------


def _check_sweep(sweep: Any, origins: dict[str, str], path: Path) -> None:
    where = f"{origins.get('sweep', display(path))}: sweep"
    runs = sweep if isinstance(sweep, list) else [sweep]
    if not runs or not all(isinstance(run, dict) and run for run in runs):
        raise RecipeError(
            where, "must be a grid or a list of override sets", "write sweep: {optim.lr: [1e-3, 1e-4]}"
        )
    if isinstance(sweep, list):
        for number, run in enumerate(sweep):
            if not isinstance(run.get("label", ""), str):
                place = origins.get(f"sweep[{number}].label", where)
                raise RecipeError(f"{place}: sweep[{number}].label", "must be a word", "or leave it out")
        return
    for key, choices in sweep.items():
        if key == "label":
            raise RecipeError(f"{where}.label", "a grid makes its labels itself", "leave label out")
        if not isinstance(choices, list) or not choices:
            place = origins.get(f"sweep.{key}", where)
            raise RecipeError(f"{place}: sweep.{key}", "must be a list of values", f"write {key}: [a, b]")


def _run_count(recipe: Recipe) -> int:
    if isinstance(recipe.sweep, dict):
        return math.prod(len(choices) for choices in recipe.sweep.values())
    return len(recipe.sweep or ())


def _refuse_overridden(recipe: Recipe, keys: Iterable[str]) -> None:
    for path, _ in flatten(recipe.values):
        if recipe.provenance.get(path) != COMMAND_LINE:
            continue
        for key in keys:
            if is_within(path, key) or is_within(key, path):
                problem = f"the sweep of {display(recipe.path)} varies {key}"
                raise RecipeError(f"{COMMAND_LINE}: {path}", problem, "leave it out, or override sweep=...")


def _refuse_equal_labels(recipe: Recipe, runs: list[Recipe]) -> None:
    seen: set[str] = set()
    for run in runs:
        label = str(run.values["label"])
        where = f"{recipe.provenance.get('sweep', display(recipe.path))}: sweep"
        if label in seen:
            raise RecipeError(where, f"two runs have the label {label}", "give each run another label:")
        if len(label) > MAX_NAME:
            raise RecipeError(
                where, f"the label {label[:40]}... is too long for a folder", "give label: yourself"
            )
        seen.add(label)


def _label(run: dict[str, Any], keys: list[str]) -> str:
    """The values of a run as a folder name, keys shortened where that is unambiguous."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    short = last if len(set(last)) == len(last) else keys
    names = dict(zip(keys, short, strict=True))
    text = ",".join(f"{names[key]}={_label_value(value)}" for key, value in run.items())
    return re.sub(r"[^A-Za-z0-9._=,+-]", "-", text)


def _label_value(value: Any) -> str:
    if isinstance(value, dict):
        named = [str(value["name"])] if "name" in value else []
        rest = [f"{k}={_label_value(v)}" for k, v in value.items() if k != "name"]
        return ",".join(named + rest)
    if isinstance(value, list):
        return "+".join(_label_value(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
