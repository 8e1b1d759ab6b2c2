"""``sinkbench plugins``: what is installed, who provides it, what it can be given; and a new one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from sinkbench import plugins
from sinkbench.api import KINDS
from sinkbench.cli_text import columns, plain
from sinkbench.discovery import Package
from sinkbench.errors import PluginError
from sinkbench.explain import nearest
from sinkbench.plugins import Found, PluginIndex


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="action")
    for action, text in (
        ("list", "one line for each plugin"),
        ("show", "parameters, capabilities and origin of each plugin"),
    ):
        command = commands.add_parser(action, help=text, description=text)
        command.add_argument("kind", nargs="?", metavar="KIND", help=f"one of {', '.join(KINDS)}")
        command.add_argument("name", nargs="?", metavar="NAME", help="a plugin of that kind")
        command.add_argument("--json", action="store_true", help="print JSON")
    text = "write the package of a new plugin"
    command = commands.add_parser("new", help=text, description=text)
    command.add_argument("name", metavar="NAME", help="of the plugin, such as squared_relu")
    command.add_argument("--kind", required=True, help=f"one of {', '.join(KINDS)}")
    command.add_argument(
        "--folder", type=Path, default=Path(), metavar="DIR", help="where its folder is made (default: here)"
    )


def run(args: argparse.Namespace) -> None:
    """Print plugins, or write a new one.

    Raises:
        PluginError: there is no such kind or name, or a new plugin cannot be called or written so.
    """
    if args.action == "new":
        _new(args.name, args.kind, args.folder)
        return
    index = plugins.discover()
    found = _select(index, args.kind, args.name)
    if args.json:
        print(json.dumps(_as_json(index, found), indent=2))
    elif args.action == "list":
        _print_list(index, found)
    else:
        print("\n\n".join(_description(item) for item in found))


def _new(name: str, kind: str, parent: Path) -> None:
    from sinkbench.scaffold.package import new_package

    folder = new_package(name, kind, parent)
    print(f"{folder}: a package with the {kind} plugin {name}\n")
    print(f"  cd {folder}")
    print("  pip install -e '.[test]'")
    print(f"  sinkbench plugins show {kind} {name}")
    print("  pytest")


def _select(index: PluginIndex, kind: str | None, name: str | None) -> list[Found]:
    if kind is not None and kind not in KINDS:
        raise PluginError(f"plugins {kind}", "there is no such kind", nearest(kind, KINDS))
    if kind is not None and name is not None:
        return index.providers(kind, name) or [index.get(kind, name)]
    chosen = [item for item in index.found if kind in (None, item.kind)]
    return sorted(chosen, key=lambda item: (KINDS.index(item.kind), item.plugin.name))


def _print_list(index: PluginIndex, found: list[Found]) -> None:
    rows = [("KIND", "NAME", "PACKAGE", "SUMMARY")]
    for item in found:
        rivals = [f.package.id for f in _rivals(index, item)]
        flag = f"NAME TAKEN TWICE, also by {', '.join(rivals)}: " if rivals else ""
        rows.append((item.kind, item.plugin.name, str(item.package), flag + item.plugin.summary))
    print(columns(rows))
    for broken in index.broken:
        print(f"broken: {broken.package} ({broken.package.id}): {broken.error}")
    for package in index.disabled:
        print(f"left out by SINKBENCH_PLUGINS: {package} ({package.id})")


def _description(item: Found) -> str:
    plugin = item.plugin
    facts = [
        ("package", f"{item.package} ({item.package.id}, {item.package.module})"),
        ("provides", ", ".join(sorted(plugin.provides)) or "nothing"),
        ("requires", ", ".join(sorted(plugin.requires)) or "nothing"),
    ]
    parameters = [(p["name"], p["type"], p["default"], p["description"]) for p in _parameters(item)]
    lines = [f"{item.kind} {plugin.name}: {plugin.summary}", columns(facts, "  ")]
    if parameters:
        lines += ["", columns([("PARAMETER", "TYPE", "DEFAULT", "DESCRIPTION"), *parameters], "  ")]
    return "\n".join(lines)


def _parameters(item: Found) -> list[dict[str, str]]:
    """Name, type, default and description of each parameter."""
    described = []
    for name, field in item.plugin.params.model_fields.items():
        default = field.get_default(call_default_factory=True)
        described.append(
            {
                "name": field.alias or name,
                "type": _type_name(field.annotation),
                "default": "required" if default is PydanticUndefined else plain(default),
                "description": " ".join((field.description or "").split()),
            }
        )
    return described


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (Union, UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is Annotated:  # by what values are checked
        return _type_name(arguments[0])
    if origin is not None and arguments:
        inner = ", ".join("..." if argument is Ellipsis else _type_name(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    if annotation is type(None):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and not origin else str(annotation)


def _rivals(index: PluginIndex, item: Found) -> list[Found]:
    return [other for other in index.providers(item.kind, item.plugin.name) if other is not item]


def _as_json(index: PluginIndex, found: list[Found]) -> dict[str, Any]:
    def package(of: Package) -> dict[str, str]:
        return {
            "distribution": of.distribution,
            "version": of.version,
            "entry_point": of.entry_point,
            "module": of.module,
        }

    return {
        "plugins": [
            {
                "kind": item.kind,
                "name": item.plugin.name,
                "summary": item.plugin.summary,
                "package": package(item.package),
                "also_provided_by": [package(rival.package) for rival in _rivals(index, item)],
                "provides": sorted(item.plugin.provides),
                "requires": sorted(item.plugin.requires),
                "parameters": _parameters(item),
            }
            for item in found
        ],
        "broken": [{"package": package(b.package), "error": b.error} for b in index.broken],
        "disabled": [package(p) for p in index.disabled],
    }
