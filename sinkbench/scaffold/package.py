"""Writes the package of a new plugin: one small module that works, its test, and what pip needs.

A template is a file of this folder for ``string.Template``; what is written are its words with the
plugin's names in them, nothing else.
"""

from __future__ import annotations

import keyword
import re
import shutil
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from string import Template

from sinkbench import plugins
from sinkbench.api import API_VERSION
from sinkbench.errors import PluginError
from sinkbench.explain import nearest

TARGETS = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "test.py": "tests/test_{name}.py",
}
"""Templates of every kind -> the file that is made of each."""

MODULES = {
    "attention": {"attention.py": "__init__.py"},
    "normalization": {"normalization.py": "__init__.py", "normalization_module.py": "_norm.py"},
    "positional": {"positional.py": "__init__.py"},
    "loss": {"loss.py": "__init__.py"},
    "data_transform": {"data_transform.py": "__init__.py"},
    "metric": {"metric.py": "__init__.py", "metric_module.py": "_measure.py"},
}
"""Templates of each kind -> the module of the package that is made of each."""

USE = {
    "attention": "model.attention={name}",
    "normalization": "model.normalization={name}",
    "positional": "model.positional={name}",
    "loss": "loss={name}",
    "data_transform": "'data.transforms=[{name}]'",
    "metric": "'measure.metrics=[sink, norms, {name}]'",
}
"""How a command line puts a plugin of each kind into a recipe."""

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def new_package(name: str, kind: str, parent: Path) -> Path:
    """Writes the package of a plugin into a new folder.

    Args:
        name: of the plugin and of its module; the distribution has dashes for underscores.
        kind: one of ``sinkbench.api.KINDS``.
        parent: where the folder is made.

    Returns:
        The folder.

    Raises:
        PluginError: there is no such kind, the name cannot be that of a module or is taken, or the folder
            exists.
    """
    if kind not in MODULES:
        raise PluginError(f"--kind {kind}", "there is no such kind", nearest(kind, MODULES))
    _check_name(name, kind)
    folder = parent / name.replace("_", "-")
    if folder.exists():
        raise PluginError(str(folder), "exists already", "choose another name, or --folder")
    words = {
        "name": name,
        "kind": kind,
        "distribution": folder.name,
        "class_name": "".join(part.capitalize() for part in name.split("_")),
        "use": USE[kind].format(name=name),
        "api_version": API_VERSION,
    }
    modules = {template: f"src/{name}/{module}" for template, module in MODULES[kind].items()}
    files = {target.format(name=name): _render(template, words) for template, target in TARGETS.items()}
    files |= {target: _render(template, words) for template, target in modules.items()}
    _write(folder, files)
    return folder


def _check_name(name: str, kind: str) -> None:
    if not _NAME.fullmatch(name):
        remedy = "write small letters, digits and single underscores, a letter first, as in squared_relu"
        raise PluginError(f"plugin name {name!r}", "cannot be the name of a module", remedy)
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or find_spec(name) is not None:
        raise PluginError(
            f"plugin name {name!r}", "is taken by Python or an installed package", "choose another"
        )
    taken = plugins.discover().providers(kind, name)
    if taken:
        problem = f"is taken by {taken[0].package} ({taken[0].package.id})"
        raise PluginError(f"{kind} {name!r}", problem, "choose another name")


def _render(template: str, words: dict[str, str]) -> str:
    path = resources.files("sinkbench.scaffold") / "templates" / f"{template}.txt"
    return Template(path.read_text(encoding="utf-8")).substitute(words)


def _write(folder: Path, files: dict[str, str]) -> None:
    """All of them or none."""
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        for target, text in files.items():
            path = writing / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        writing.rename(folder)
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise PluginError(str(folder), problem, "choose a writable --folder") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
