"""Where recipes are: paths, names of shipped recipes, and ``package:name`` of plugin packages."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from sinkbench import discovery
from sinkbench.errors import RecipeError
from sinkbench.explain import nearest, show

SHIPPED = "sinkbench"
"""``sinkbench:demo.yaml`` is the shipped recipe, whatever lies in the working directory."""

RESULTS = "results.yaml"
"""Not a recipe: numbers that were published for the recipes of its folder."""

_SUFFIXES = (".yaml", ".yml")


def find(reference: str | Path, folder: Path | None = None, where: str | None = None) -> Path:
    """The file that a reference means.

    Args:
        reference: a path, the name of a shipped recipe, or ``package:name``; the suffix may be left out.
        folder: where relative paths start; the working directory by default.
        where: what an error names as the wrong place; the reference by default.

    Raises:
        RecipeError: there is no such recipe.
    """
    text = str(reference)
    package, colon, name = text.partition(":")
    if colon:
        roots = recipe_roots()
        if package not in roots:
            raise RecipeError(
                where or text, f"no package {package!r} offers recipes", nearest(package, roots)
            )
        folders = [roots[package]]
    else:
        name, root = text, shipped_root()
        folders = [folder or Path(), *([root] if root else [])]
    candidates = [candidate for base in folders for candidate in _spellings(base / name)]
    try:
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        present = [candidate for candidate in candidates if candidate.exists()]
        remedy = "" if present else _remedy(name, folders)
    except OSError as error:
        problem = f"{show(text)} cannot be looked up ({error.strerror})"
        raise RecipeError(where or show(text), problem, "correct the path") from None
    if any(candidate.is_dir() for candidate in present):
        raise RecipeError(where or text, f"{text!r} is a folder", "name the recipe file in it")
    if present:
        raise RecipeError(where or text, f"{text!r} is not a file", "name a recipe file")
    problem = f"there is no recipe {show(text)}" if where else "there is no such recipe"
    raise RecipeError(where or text, problem, remedy)


def _remedy(name: str, folders: list[Path]) -> str:
    """The recipe of a similar name in one of the folders."""
    path = Path(name)
    known = {found.stem: path.with_name(found.name) for base in folders for found in _siblings(base / path)}
    close = difflib.get_close_matches(path.stem, known, n=1)
    if close:
        return f"did you mean {known[close[0]]}?"
    return "give a path, or a name that `sinkbench recipe list` shows"


def _siblings(path: Path) -> list[Path]:
    return sorted(p for suffix in _SUFFIXES for p in path.parent.glob(f"*{suffix}"))


def shipped_root() -> Path | None:
    """The folder of the shipped recipes; None if only the code is on the path."""
    spec = find_spec("sinkbench_recipes")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def recipe_roots() -> dict[str, Path]:
    """Folders of recipes by package, the shipped ones first."""
    root = shipped_root()
    return ({SHIPPED: root} if root else {}) | discovery.recipe_folders()


def list_recipes(root: Path) -> list[str]:
    """Paths below a folder of the recipes that can be run; those in ``_folders`` are for extending, and
    ``measure`` holds lists of models for ``sinkbench measure``."""
    files = (path.relative_to(root) for path in root.rglob("*") if path.suffix in _SUFFIXES)
    files = (f for f in files if f.parts[0] != "measure" and f.name != RESULTS)
    return sorted(f.as_posix() for f in files if not any(part.startswith(("_", ".")) for part in f.parts))


def _spellings(path: Path) -> list[Path]:
    return [path] if path.suffix in _SUFFIXES else [path, *(Path(f"{path}{s}") for s in _SUFFIXES)]
