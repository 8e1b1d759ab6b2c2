"""What the documentation takes from the code: recipe keys, commands, recipes, plugins.

mkdocs calls ``on_page_markdown`` for every page (``hooks`` of mkdocs.yml); a line such as
``<!-- generated: recipes -->`` is replaced by what ``GENERATED`` makes of it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from itertools import takewhile
from pathlib import Path
from typing import Any

import griffe
import yaml
from pydantic import BaseModel

from sinkbench import cli, config, plugins
from sinkbench.api import KINDS
from sinkbench.plugins import Found
from sinkbench.recipe_files import SHIPPED, list_recipes, recipe_roots

PACKAGE = "sinkbench"
"""Plugins of other packages that happen to be installed are left out."""
MARKER = re.compile(r"^<!-- generated: (?P<name>[a-z ]+) -->$", re.MULTILINE)
HELP_WIDTH = "100"
UNSHOWN = {"name", "label"}
"""Recipe values that say nothing of what a run changes."""
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Top level", config.Config),
    ("model", config.ModelConfig),
    ("data: Bigram-Backcopy", config.BigramBackcopyConfig),
    ("data: token files", config.IndexedConfig),
    ("data.train[]", config.BlendEntry),
    ("data.prepare", config.PrepareConfig),
    ("data.prepare.tokenizer", config.TokenizerConfig),
    ("optim", config.OptimConfig),
    ("train", config.TrainConfig),
    ("parallel", config.ParallelConfig),
    ("validation", config.ValidationConfig),
    ("checkpoint", config.CheckpointConfig),
    ("measure", config.MeasureConfig),
    ("log", config.LogConfig),
    ("log.wandb", config.WandbConfig),
)
"""Titles and what validates them."""
TITLES = {model.__name__: title for title, model in SECTIONS}

Schema = dict[str, Any]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with every marker replaced; a marker that names nothing is a KeyError, and no site."""
    return MARKER.sub(lambda found: GENERATED[found["name"]](), markdown)


# --- tables -------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def code(value: Any) -> str:
    """A value as a recipe writes it."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return f"`{text}`"


def prose(docstring: str) -> str:
    """A docstring in one line of Markdown, with ``double`` backticks made single."""
    return " ".join(docstring.split()).replace("``", "`")


def type_text(schema: Schema) -> str:
    """A JSON schema in words: its type, its choices, its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name == config.PluginRef.__name__:
            return "plugin"
        return f"section [{TITLES[name]}](#{name.lower()})"
    if "enum" in schema:
        return ", ".join(code(choice) for choice in schema["enum"])
    if "const" in schema:
        return code(schema["const"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(type_text(one) for one in schema[several])
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {type_text(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"name: {type_text(schema['additionalProperties'])}"
    bounds = (
        ("exclusiveMinimum", "> "),
        ("minimum", "≥ "),
        ("exclusiveMaximum", "< "),
        ("maximum", "≤ "),
    )
    limits = [f"{sign}{schema[key]}" for key, sign in bounds if key in schema]
    kind = str(schema.get("type", "any"))
    kind = {"array": "list", "object": "mapping"}.get(kind, kind)
    return " ".join([kind, ", ".join(limits)]).strip()


def key_rows(model: type[BaseModel], docs: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of each field."""
    schema = model.model_json_schema(by_alias=True)
    for name, field in model.model_fields.items():
        key = field.alias or name
        own = schema["properties"][key]
        default = "required" if field.is_required() else _default(own)
        yield f"`{key}`", type_text(own), default, prose(field.description or docs.get(name, ""))


def _default(schema: Schema) -> str:
    """A default as a recipe would write it; that of a section is that of its keys."""
    value = schema.get("default")
    if isinstance(value, dict) and list(value) == ["name"]:
        return code(value["name"])
    if isinstance(value, list) and value and all(isinstance(v, dict) and list(v) == ["name"] for v in value):
        return f"`[{', '.join(v['name'] for v in value)}]`"
    return "" if isinstance(value, dict) and value else code(value)


# --- recipe keys --------------------------------------------------------------------------------


def config_keys() -> str:
    """Every section of a recipe."""
    source = griffe.load("sinkbench.config")
    parts = []
    for title, model in SECTIONS:
        described = source[model.__name__]
        assert isinstance(described, griffe.Class)
        docs = {n: a.docstring.value for n, a in described.attributes.items() if a.docstring}
        text = prose(described.docstring.value) if described.docstring else ""
        rows = list(key_rows(model, docs))
        parts += [f"## {title} {{: #{model.__name__.lower()} }}", text]
        parts.append(table(("key", "type", "default", "meaning"), rows))
    return "\n\n".join(parts)


# --- commands -----------------------------------------------------------------------------------


def command_help() -> str:
    """``--help`` of every command and subcommand."""
    parts = []
    for words in ([], *_commands()):
        title = " ".join(["sinkbench", *words])
        level = "##" if len(words) < 2 else "###"
        parts.append(f"{level} {title}\n\n```text\n{_output(*words, '--help').rstrip()}\n```")
    return "\n\n".join(parts)


def _commands() -> Iterator[list[str]]:
    for subcommand in cli.SUBCOMMANDS:
        yield [subcommand.name]
        parser = cli.build_parser([subcommand.name])
        for nested in _nested(_nested(parser)[subcommand.name]):
            yield [subcommand.name, nested]


def _nested(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's subcommands; argparse has no public way to them."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def _output(*arguments: str) -> str:
    """What a command prints."""
    os.environ.update(COLUMNS=HELP_WIDTH, NO_COLOR="1")
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            failed = cli.main(arguments)
        except SystemExit as done:  # argparse, after --help
            failed = bool(done.code)
    if failed:
        raise RuntimeError(f"sinkbench {' '.join(arguments)} failed")
    return printed.getvalue()


# --- recipes ------------------------------------------------------------------------------------


def recipe_list() -> str:
    """Every shipped recipe: what it changes, in how many runs, at what budget."""
    root = recipe_roots()[SHIPPED]
    parts, folder = [], None
    for name in sorted(list_recipes(root), key=lambda n: (Path(n).parent.as_posix(), n)):
        if Path(name).parent != folder:
            folder = Path(name).parent
            parts.append(f"## {'At the top' if folder == Path() else folder.as_posix()}")
        parts.append(_recipe(name, root))
    return "\n\n".join(parts)


def _recipe(name: str, root: Path) -> str:
    runs = json.loads(_output("recipe", "show", f"{SHIPPED}:{name}", "--json"))["runs"]
    text = (root / name).read_text(encoding="utf-8")
    comment = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    extended = yaml.safe_load(text).get("extends", [])
    extended = [extended] if isinstance(extended, str) else extended
    facts = [f"{len(runs)} runs" if len(runs) > 1 else "one run", *_budget(runs)]
    if extended:
        facts.append(f"extends {' and '.join(code(part) for part in extended)}")
    name = name.removesuffix(".yaml")
    parts = [f"### {Path(name).name}", " ".join(comment), f"{code(name)}: {', '.join(facts)}."]
    rows = [(f"`{run['label']}`", _changes(run, runs)) for run in runs if run["label"]]
    if rows:
        parts.append(table(("run", "sets"), rows))
    return "\n\n".join(parts)


def _changes(run: Schema, runs: Sequence[Schema]) -> str:
    """The values that are not the same in all runs."""
    values = {key: entry["value"] for key, entry in run["values"].items()}

    def varies(key: str) -> bool:
        first = runs[0]["values"].get(key, {}).get("value")
        return any(other["values"].get(key, {}).get("value") != first for other in runs)

    own = [
        f"{key}={_written(value)}"
        for key, value in values.items()
        if key not in UNSHOWN and varies(key) and not run["values"][key]["from"].startswith("default")
    ]
    return ", ".join(f"`{text}`" for text in own)


def _written(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _budget(runs: Sequence[Schema]) -> Iterator[str]:
    """Parameters, steps, tokens and operations, as ranges over the runs."""
    derived = [run["derived"] for run in runs]
    steps = [run["values"]["train.steps"]["value"] for run in runs]
    parameters = _range(d["parameters_without_tables"] for d in derived)
    yield f"{parameters} parameters without the vocabulary's tables"
    yield f"{_range(steps)} steps"
    yield f"{_range(d['tokens'] for d in derived)} tokens"
    if all("flops" in d for d in derived):
        total = sum(d["flops"] for d in derived)
        yield f"{total:.1e} FLOPs{' in all' if len(runs) > 1 else ''}"


def _range(numbers: Iterator[int] | Sequence[int]) -> str:
    ordered = sorted(set(numbers))
    return " to ".join(dict.fromkeys(_count(number) for number in (ordered[0], ordered[-1])))


def _count(number: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


# --- plugins ------------------------------------------------------------------------------------


def plugin_list() -> str:
    """Every first-party plugin with its parameters, by kind."""
    index = plugins.discover()
    parts = []
    for kind in KINDS:
        found = [f for f in index.found if f.kind == kind and f.package.distribution == PACKAGE]
        parts.append(f"## {kind}")
        parts += [_plugin(item) for item in sorted(found, key=lambda item: item.plugin.name)]
    return "\n\n".join(parts)


def _plugin(item: Found) -> str:
    rows = list(key_rows(item.plugin.params, {}))
    parts = [f"### {item.plugin.name}", f"{item.plugin.summary}. (`{item.package.module}`)"]
    if rows:
        parts.append(table(("parameter", "type", "default", "meaning"), rows))
    return "\n\n".join(parts)


GENERATED: dict[str, Callable[[], str]] = {
    "commands": command_help,
    "plugins": plugin_list,
    "recipe keys": config_keys,
    "recipes": recipe_list,
}
"""Markers and what replaces them."""
