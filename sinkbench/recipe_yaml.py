"""The YAML of recipes: the core schema of YAML 1.2, read with the line of every value.

PyYAML follows YAML 1.1, where ``on`` is true, ``4e-4`` a string and ``2024-01-01`` a date. Here a
boolean is true or false, ``4e-4`` a float, and all else a string. Aliases and tags are refused: a
recipe is read by people, and what is shared goes into a file to extend. Nothing is ever built from the
text but plain values, and what no recipe needs is refused before it costs time: texts beyond
``MAX_CHARACTERS``, nesting beyond ``MAX_DEPTH``, integers beyond 64 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

import yaml

from sinkbench.errors import RecipeError

MAX_CHARACTERS = 100_000
"""Of one file or override: several times the longest list of runs that anyone wrote by hand."""
MAX_DEPTH = 20
"""Sections within sections."""

_TAG = "tag:yaml.org,2002:"

_IMPLICIT = (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
)
"""Plain scalars: tag, pattern and possible first characters (none for the empty scalar)."""


def _integer(text: str) -> int:
    if len(text) > 64:
        raise ValueError("the number does not fit into 64 bits")
    value = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError("the number does not fit into 64 bits")
    return value


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _string(text: str) -> str:
    # YAML's escapes can write what neither a path nor UTF-8 can hold.
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("a NUL or half a surrogate pair cannot be in a text")
    return text


_CONSTRUCT: dict[str, Callable[[str], Any]] = {
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": _integer,
    _TAG + "float": _float,
    _TAG + "null": lambda _: None,
    _TAG + "str": _string,
}


class _Loader(yaml.SafeLoader):
    """Composes nodes; plain values are made from them by ``_Reader``, never by PyYAML."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the name and form are PyYAML's

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._refuse("an alias is not allowed: write the value out")
        if self.depth > MAX_DEPTH:
            self._refuse(f"it is nested more than {MAX_DEPTH} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, problem: str) -> NoReturn:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        raise yaml.composer.ComposerError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that YAML 1.1 or 1.2 would read as something else, for readers of either."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _IMPLICIT:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})\Z"), _first)


class _Reader:
    """Turns nodes into plain values and notes where each stands."""

    def __init__(self, source: str, lines: bool) -> None:
        self.source = source
        self.lines = lines
        self.origins: dict[str, str] = {}

    def place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source

    def error(self, node: yaml.Node, path: str, problem: str, remedy: str) -> RecipeError:
        where = self.place(node)
        return RecipeError(f"{where}: {path}" if path else where, problem, remedy)

    def read(self, node: yaml.Node, path: str) -> Any:
        if path:
            self.origins.setdefault(path, self.place(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(item, f"{path}[{i}]") for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _CONSTRUCT:
            try:
                return _CONSTRUCT[node.tag](node.value)
            except ValueError as e:
                raise self.error(node, path, str(e), "write another value") from None
        raise self.error(node, path, f"the YAML tag {node.tag} is not allowed", "write a plain value")

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(key_node, path, "a key must be a word", "write key: value")
            try:
                key = _string(key_node.value)
            except ValueError as e:
                raise self.error(key_node, path, str(e), "write another key") from None
            if not key:
                raise self.error(key_node, path, "a key is empty", "write key: value")
            inner = f"{path}.{key}" if path else key
            if key in values:
                problem = f"the key is given twice, first in line {first[key]}"
                raise self.error(key_node, inner, problem, "remove one of them")
            first[key] = key_node.start_mark.line + 1
            self.origins[inner] = self.place(key_node)
            values[key] = self.read(value_node, inner)
        return values


def parse(text: str, source: str, path: str = "", lines: bool = True) -> tuple[Any, dict[str, str]]:
    """Read one YAML document.

    Args:
        text: the document.
        source: what errors and origins call it.
        path: dotted key under which the value will stand.
        lines: name lines in errors and origins.

    Returns:
        The plain value, and for every dotted key in it the place it was written, ``source:line``.

    Raises:
        RecipeError: not YAML, a duplicate key, an alias, a tag, or more than any recipe needs.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            source, f"it has {len(text):,} characters", f"a recipe has at most {MAX_CHARACTERS:,}"
        )
    reader = _Reader(source, lines)
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else reader.read(node, path)
    except yaml.YAMLError as e:
        raise _syntax_error(e, source, path, lines) from None
    return value, reader.origins


def _syntax_error(error: yaml.YAMLError, source: str, path: str, lines: bool) -> RecipeError:
    where, problem = source, str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        if error.problem_mark is not None and lines:
            where = f"{source}:{error.problem_mark.line + 1}"
        problem = ", ".join(part for part in (error.context, error.problem) if part)
    return RecipeError(
        f"{where}: {path}" if path else where,
        f"not valid YAML: {problem}",
        "check indentation, colons, brackets and quotes there",
    )


def dump(values: Any) -> str:
    """YAML text that ``parse`` reads back as equal values; keys keep their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)
    return text
