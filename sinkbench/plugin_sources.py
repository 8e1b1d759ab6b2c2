"""The source that a plugin is made of, by which an edited one is told from what it was."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sinkbench.api import PROJECT
from sinkbench.plugins import Chosen


def sources(chosen: Chosen) -> dict[str, str | None]:
    """Module -> sha256 of its source, for the modules of a plugin and what they import of their own packages,
    also within functions; None for one without source. The core's are told by its version."""
    plugin = chosen.plugin
    modules = {chosen.package.module, _module_of(plugin.build), plugin.params.__module__}
    return _hashes(sorted(name for name in modules if _top(name) != PROJECT))


def _module_of(build: Any) -> str:
    while isinstance(build, functools.partial):
        build = build.func
    name: str = inspect.unwrap(build).__module__
    return name


def _hashes(modules: Iterable[str]) -> dict[str, str | None]:
    """Nothing is imported for it: a kernel's module may be unable to."""
    starts = set(modules)
    packages = {_top(name) for name in starts}
    found: dict[str, str | None] = {}
    pending = list(starts)
    while pending:
        name = pending.pop()
        if name in found or _top(name) not in packages:
            continue
        file = _source_file(name)
        if file is None:
            if name in starts:
                found[name] = None
            continue
        source = file.read_bytes()
        found[name] = hashlib.sha256(source).hexdigest()
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        pending += [package, *_imported(source, package)]
    return found


def _source_file(module: str) -> Path | None:
    """Of a module that is loaded, or lies in a package that is."""
    if module in sys.modules:
        loaded = sys.modules[module]
        file = inspect.getsourcefile(loaded) if getattr(loaded, "__file__", None) else None
        return Path(file) if file is not None and Path(file).is_file() else None
    top, *rest = module.split(".")
    for folder in getattr(sys.modules.get(top), "__path__", ()) if rest else ():
        path = Path(folder, *rest)
        for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Names of what a source imports, modules and what may be one."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # whoever imports it will say so
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            parts = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _top(module: str) -> str:
    return module.partition(".")[0]
