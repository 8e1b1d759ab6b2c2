"""The source that an exported model needs, cut out of the modules it lies in.

An exported folder must run without sinkbench: what the model uses of our modules and of its plugins is
copied, and nothing else. From the names that are wanted, every top-level statement that they use is
followed, through the imports of our own and of the plugin's package; each module becomes one flat file,
as transformers loads them. An import within a function that leads to other packages (a kernel's) raises in
the copy, which computes by the reference.

No copy evaluates its annotations, whatever its module does. What they name is copied where that needs no
further module, for some code looks it up: dataclasses ClassVar and InitVar, typing.get_type_hints the rest.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sinkbench.errors import PluginError

STAND_INS = "sinkbench.export.stand_ins"
_STOOD_IN_FOR = ("pydantic", "pluggy")
_PRESENT = ("torch", "transformers", "safetensors", "numpy")
"""Packages that every environment has which loads the model."""
_DEFERRED = "from __future__ import annotations"
_ANNOTATIONS = ("annotation", "returns")
"""Fields of a syntax tree's nodes."""


def bundle(wanted: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Source files by name, flat, for ``(module, top-level name)`` pairs and all that they use.

    Raises:
        PluginError: a module has no source, does not define the name, or imports a package that whoever
            loads the model may not have.
    """
    modules: dict[str, _Module] = {}
    pending = list(wanted)
    packages = {name.partition(".")[0] for name, _ in pending}
    while pending:
        module_name, name = pending.pop()
        module = modules.get(module_name)
        if module is None:
            module = modules[module_name] = _Module.read(module_name, packages)
        pending += module.keep_all() if module_name == STAND_INS else module.keep(name)
    return {f"{flat_name(name)}.py": module.text() for name, module in sorted(modules.items())}


def flat_name(module: str) -> str:
    """The name of a module's file, without ``.py``."""
    flat = module.replace(".", "_")
    return flat if flat.startswith("sinkbench_") else f"plugin_{flat}"


@dataclass
class _Module:
    name: str
    package: str
    """What its relative imports start from: a package's own is its ``__init__.py``."""
    lines: list[str]
    tree: ast.Module
    packages: set[str]
    """Top-level packages whose modules are copied rather than imported."""
    statements: dict[str, list[ast.stmt]]
    """Top-level statements by the names that they define."""
    kept: set[int] = field(default_factory=set)
    """First lines of the statements that are copied."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Imports within functions that cannot be copied, by line, and why: the functions will raise."""

    @classmethod
    def read(cls, name: str, packages: set[str]) -> _Module:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None or not origin.endswith(".py"):
            raise PluginError(name, "has no Python source", "a plugin that is exported needs a .py module")
        text = Path(origin).read_text(encoding="utf-8")
        tree = ast.parse(text, filename=origin)
        statements: dict[str, list[ast.stmt]] = {}
        for statement in tree.body:
            for defined in _defined(statement):
                statements.setdefault(defined, []).append(statement)
        package = name if Path(origin).stem == "__init__" else name.rpartition(".")[0]
        return cls(name, package, text.splitlines(), tree, packages, statements)

    def keep(self, name: str) -> list[tuple[str, str]]:
        """Marks what defines a name, and what that uses here; returns what it uses of other modules."""
        if name not in self.statements:
            raise PluginError(self.name, f"does not define {name}", "define it at its top level")
        elsewhere: list[tuple[str, str]] = []
        pending = self._add(self._closure(name), elsewhere)
        while pending:
            further = self._closure(pending.pop())
            if self._are_alone(further):
                pending += self._add(further, elsewhere)
        return elsewhere

    def _closure(self, name: str) -> list[ast.stmt]:
        """The statements that define a name, and those that they use."""
        found: dict[int, ast.stmt] = {}
        pending = list(self.statements.get(name, []))
        while pending:
            statement = pending.pop()
            if statement.lineno in found:
                continue
            found[statement.lineno] = statement
            for used in _used(statement):
                pending += self.statements.get(used, [])
        return list(found.values())

    def _add(self, statements: list[ast.stmt], elsewhere: list[tuple[str, str]]) -> list[str]:
        """Marks statements, and adds what they use of other modules; returns the names in annotations of
        those that were not marked before."""
        annotated: set[str] = set()
        for statement in statements:
            if statement.lineno in self.kept:
                continue
            self.kept.add(statement.lineno)
            annotated |= _annotated(statement)
            for node in _imports(statement):
                elsewhere += self._follow(node, nested=node is not statement)
        return sorted(annotated)

    def _are_alone(self, statements: list[ast.stmt]) -> bool:
        """Whether statements need no module that is not copied yet, nor a package that may be absent, and run
        without what a stand-in only names."""
        is_import = len(statements) == 1 and isinstance(statements[0], ast.Import | ast.ImportFrom)
        for statement in statements:
            for node in _imports(statement):
                tops = {module.partition(".")[0] for module, _ in self._targets(node)}
                if tops.intersection(_STOOD_IN_FOR) and not is_import:
                    return False
                if statement.lineno not in self.kept and not all(
                    top not in self.packages and _is_present(top) for top in tops
                ):
                    return False
        return True

    def keep_all(self) -> list[tuple[str, str]]:
        self.kept.update(statement.lineno for statement in self.tree.body)
        return []

    def _follow(self, node: ast.Import | ast.ImportFrom, nested: bool) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for module, alias in self._targets(node):
            obstacle = self._obstacle(node, module, alias.name)
            if obstacle and nested:
                self.left_out[node.lineno] = obstacle
                return []
            if obstacle:
                problem = f"line {node.lineno} {obstacle}, which an exported model cannot rely on"
                raise PluginError(self.name, problem, "import it in the function that uses it")
            top = module.partition(".")[0]
            if top in _STOOD_IN_FOR:
                found.append((STAND_INS, alias.name))
            elif top in self.packages:
                found.append((module, alias.name))
        return found

    def _obstacle(self, node: ast.Import | ast.ImportFrom, module: str, name: str) -> str | None:
        """Why an import cannot be copied: it needs a package that may be absent, or is of a whole module
        of the same package."""
        top = module.partition(".")[0]
        if top not in self.packages:
            return None if _is_present(top) else f"imports {top}"
        if isinstance(node, ast.Import) or _is_submodule(module, name):
            return f"imports the module {name}"
        imported = _Module.read(module, self.packages)
        absent = (imported._absent(other) for other in imported.tree.body)
        return next((f"imports {module}, which imports {top}" for top in absent if top), None)

    def _absent(self, statement: ast.stmt) -> str | None:
        """A package that a module needs to be imported and that may be absent."""
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            return None
        tops = [module.partition(".")[0] for module, _ in self._targets(statement)]
        return next((top for top in tops if top not in self.packages and not _is_present(top)), None)

    def _targets(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, ast.alias]]:
        for alias in node.names:
            yield (alias.name if isinstance(node, ast.Import) else self._absolute(node)), alias

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        base = parts[: len(parts) - (node.level - 1)]
        return ".".join([*base, *([node.module] if node.module else [])])

    def text(self) -> str:
        """The copied statements as they were written, imports of copied modules made relative and annotations
        not evaluated: a copy has not all that they name."""
        edits: dict[int, tuple[int, str | None]] = {}
        for statement in self.tree.body:
            first = self._first_line(statement)
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                continue
            if statement is self.tree.body[0] and _is_docstring(statement):
                continue
            assert statement.end_lineno is not None
            if statement.lineno not in self.kept:
                edits[first] = (statement.end_lineno, None)
                continue
            for node in _imports(statement):
                assert node.end_lineno is not None
                edits[node.lineno] = (node.end_lineno, self._rewritten(node))
        return _deferred(_applied(self.lines, edits))

    def _first_line(self, statement: ast.stmt) -> int:
        """Of a statement with its decorators and the comment before it."""
        first: int = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        while first > 1 and self.lines[first - 2].startswith("#"):
            first -= 1
        return first

    def _rewritten(self, node: ast.Import | ast.ImportFrom) -> str:
        if node.lineno in self.left_out:
            return f'raise ImportError("not exported: it {self.left_out[node.lineno]}")'
        module = next(module for module, _ in self._targets(node))
        top = module.partition(".")[0]
        names = ", ".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in node.names)
        if top in _STOOD_IN_FOR:
            return f"from .{flat_name(STAND_INS)} import {names}"
        if top in self.packages:
            return f"from .{flat_name(module)} import {names}"
        return ast.unparse(node)


def _is_present(package: str) -> bool:
    return package in sys.stdlib_module_names or package in _PRESENT or package in _STOOD_IN_FOR


def _is_submodule(package: str, name: str) -> bool:
    spec = importlib.util.find_spec(package)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return is_package and importlib.util.find_spec(f"{package}.{name}") is not None


def _defined(statement: ast.stmt) -> list[str]:
    """Names that a top-level statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.If) and _is_type_checking(statement):
        return []
    return [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _used(statement: ast.stmt) -> set[str]:
    """Names that a statement reads when it runs, annotations left out."""
    return {node.id for node in _walk(statement) if isinstance(node, ast.Name)}


def _annotated(statement: ast.stmt) -> set[str]:
    """Names in the annotations of a statement, those within quotes among them."""
    pending = [part for node in _walk(statement) for part in _annotations(node)]
    names: set[str] = set()
    while pending:
        for node in ast.walk(pending.pop()):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Constant) and (quoted := _expression(node.value)) is not None:
                pending.append(quoted)
    return names


def _expression(constant: object) -> ast.Expression | None:
    """What an annotation has in quotes, unless it is a remark, or words of a Literal."""
    try:
        return ast.parse(constant, mode="eval") if isinstance(constant, str) else None
    except (SyntaxError, ValueError):
        return None


def _annotations(node: ast.AST) -> list[ast.AST]:
    """Of a node itself."""
    parts = (getattr(node, name, None) for name in _ANNOTATIONS)
    return [part for part in parts if isinstance(part, ast.AST)]


def _imports(statement: ast.stmt) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in _walk(statement) if isinstance(node, ast.Import | ast.ImportFrom)]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but annotations and what only type checkers see."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in _ANNOTATIONS:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (isinstance(child, ast.If) and _is_type_checking(child)):
                yield from _walk(child)


def _is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _deferred(text: str) -> str:
    """The text of a module, made to keep its annotations as they are written."""
    body = ast.parse(text).body
    futures = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    if any(alias.name == "annotations" for node in futures for alias in node.names):
        return text
    lines = _unquoted(text)
    docstring = body[0].end_lineno if body and _is_docstring(body[0]) else None
    before = [*lines[:docstring], ""] if docstring else []
    after = "\n".join(lines[docstring:]).lstrip("\n")
    # Some statements want two empty lines before them.
    gap = [""] if after.startswith(("from ", "import ")) else ["", ""]
    return "\n".join([*before, _DEFERRED, *gap, after]).rstrip() + "\n"


def _unquoted(text: str) -> list[str]:
    """The lines of a module with its quoted annotations bare: dataclasses see no ClassVar within quotes once
    annotations are kept as they are written."""
    lines = text.splitlines()
    parts = [part for node in ast.walk(ast.parse(text)) for part in _annotations(node)]
    quoted = [part for part in parts if isinstance(part, ast.Constant)]
    for part in sorted(quoted, key=lambda part: (part.lineno, part.col_offset), reverse=True):
        bare = _expression(part.value)
        if bare is not None and part.lineno == part.end_lineno:
            line = lines[part.lineno - 1].encode()  # columns of a syntax tree are bytes
            changed = line[: part.col_offset] + ast.unparse(bare).encode() + line[part.end_col_offset :]
            lines[part.lineno - 1] = changed.decode()
    return lines


def _applied(lines: list[str], edits: dict[int, tuple[int, str | None]]) -> str:
    """The lines with ranges dropped (None) or replaced, and no more than two empty lines in a row."""
    result: list[str] = []
    number = 1
    while number <= len(lines):
        line = lines[number - 1]
        if number in edits:
            end, replacement = edits[number]
            if replacement is not None:
                result.append(line[: len(line) - len(line.lstrip())] + replacement)
            number = end + 1
            continue
        if line.strip() or result[-2:] != ["", ""]:
            result.append(line.rstrip())
        number += 1
    return "\n".join(result).rstrip() + "\n"
