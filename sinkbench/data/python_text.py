"""Text that every Python installation carries: the reference documentation and the standard library.

It makes a corpus of real prose and code without a download; what it holds depends on the version of
the running Python, which is part of a prepared folder's identity.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

NAMES = ("python:docs", "python:help", "python:stdlib")

_SKIPPED_FOLDERS = frozenset(
    # pydoc_data is the source form of the text that python:docs gives; distributions differ in the tests.
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
)


def stdlib_files() -> list[Path]:
    """The standard library's Python files without its tests, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(p.relative_to(root).parts))
    return sorted(files)


def reference_documents() -> Iterator[tuple[str, str]]:
    """(where, text) of the language reference's topics (what ``help("topics")`` shows) and of the
    docstrings of modules compiled into the interpreter.

    Docstrings of Python modules are left out: they are part of the standard library's source, and a
    document must not be both trained on and held out.
    """
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"topic {topic}", topics[topic]
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        yield f"module {name}", _docstrings(name, module)
        for class_name, value in sorted(vars(module).items()):
            if isinstance(value, type) and value.__module__ == name:
                yield f"class {name}.{class_name}", _docstrings(f"{name}.{class_name}", value)


def _docstrings(name: str, owner: types.ModuleType | type) -> str:
    """The docstrings of a module or class and of its functions, each under its full name."""
    parts = [(name, inspect.getdoc(owner))]
    for member, value in sorted(vars(owner).items()):
        if inspect.isroutine(value):
            parts.append((f"{name}.{member}", inspect.getdoc(value)))
    return "\n\n".join(f"{where}\n{text}" for where, text in parts if text)
