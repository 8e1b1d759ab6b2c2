"""How what plugins use goes away: one version with a warning, then a new major version of sinkbench.api.

A name that moves is taken out of its module and kept in a table::

    _MOVED = {"OldSpec": Moved(replacement="NewSpec", removed_in="2.0")}
    __getattr__ = moved_names(__name__, _MOVED)
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class ApiDeprecationWarning(DeprecationWarning):
    """A plugin uses what the next major version of sinkbench.api will not have. pytest shows it; elsewhere
    Python does with ``-W default``."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A name that is going away.

    Attributes:
        replacement: a name of the same module that does what it did.
        removed_in: the version of sinkbench.api that will not have it.
    """

    replacement: str
    removed_in: str


def deprecated(what: str, instead: str, removed_in: str, *, stacklevel: int = 2) -> None:
    """Warns that something is going away.

    Args:
        what: as an author wrote it, such as "AttentionSpec(bias=...)".
        instead: what to write.
        removed_in: the version of sinkbench.api that will not have it.
        stacklevel: 2 names the line that called the caller.
    """
    text = f"{what} goes away in sinkbench.api {removed_in}; use {instead}"
    warnings.warn(text, ApiDeprecationWarning, stacklevel=stacklevel + 1)


def moved_names(module: str, moved: Mapping[str, Moved]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module: old names still give what replaces them, with a warning."""

    def look_up(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        target = moved[name]
        deprecated(f"{module}.{name}", f"{module}.{target.replacement}", target.removed_in)
        return getattr(sys.modules[module], target.replacement)

    return look_up
