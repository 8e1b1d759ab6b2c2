"""The source that an exported model needs, cut out of the modules it lies in.

An exported folder must run without sinkbench: what the model uses of our modules and of its plugins is
copied, and nothing else. From the names that are wanted, every top-level statement that they use is
followed, through the imports of our own and of the plugin's package; each module becomes one flat file,
as transformers loads them. Annotations are not followed: they are not evaluated. An import within a function
that leads to other packages (a kernel's) raises in the copy, which computes by the reference.
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
        pending = list(self.statements[name])
        while pending:
            statement = pending.pop()
            if statement.lineno in self.kept:
                continue
            self.kept.add(statement.lineno)
            for used in _used(statement):
                pending += self.statements.get(used, [])
            for node in _imports(statement):
                elsewhere += self._follow(node, nested=node is not statement)
        return elsewhere

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
        """The copied statements as they were written, imports of copied modules made relative."""
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
        return _applied(self.lines, edits)

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


def _imports(statement: ast.stmt) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in _walk(statement) if isinstance(node, ast.Import | ast.ImportFrom)]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but annotations and what only type checkers see."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (isinstance(child, ast.If) and _is_type_checking(child)):
                yield from _walk(child)


def _is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


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
