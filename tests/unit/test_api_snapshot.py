"""The surface of sinkbench.api as it was when it was last looked at, and how it is changed."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sinkbench import api
from sinkbench.deprecation import ApiDeprecationWarning, Moved, deprecated, moved_names

SNAPSHOT = Path(__file__).with_name("api_snapshot.txt")
HEADER = """\
# What plugins may use of sinkbench.api. A test compares. To change it: write it anew with
#   python -m tests.unit.test_api_snapshot
# and raise API_VERSION: the second number for additions, the first for anything changed or taken away.
"""


def surface() -> Iterator[str]:
    """One line a name, and one a field or method."""
    yield f"API_VERSION {api.API_VERSION}"
    for name in sorted(api.__all__):
        value = getattr(api, name)
        if isinstance(value, type) and dataclasses.is_dataclass(value):
            yield f"dataclass {name}"
            yield from (f"  {_field(field)}" for field in dataclasses.fields(value))
            yield from _methods(value)
        elif inspect.isclass(value):
            yield f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"
            yield from _methods(value)
        elif inspect.isfunction(value):
            yield f"function {name}{inspect.signature(value)}"
        elif name != "API_VERSION":
            yield f"value {name}: {type(value).__name__}" + (f" = {value!r}" if _plain(value) else "")


def _field(field: Any) -> str:
    default = ""
    if field.default is not dataclasses.MISSING:
        default = f" = {field.default!r}"
    elif field.default_factory is not dataclasses.MISSING:
        default = f" = {field.default_factory.__name__}()"
    return f"{field.name}: {field.type}{default}"


def _methods(kind: type) -> Iterator[str]:
    for name, value in sorted(vars(kind).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"  property {name}"
        elif inspect.isfunction(value):
            yield f"  {name}{inspect.signature(value)}"


def _plain(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))


def test_the_surface_is_as_it_was() -> None:
    found = HEADER + "\n".join(surface()) + "\n"
    assert found == SNAPSHOT.read_text(), f"see the first lines of {SNAPSHOT.name}"


def test_all_is_public_and_complete() -> None:
    here = {
        name
        for name, value in vars(api).items()
        if getattr(value, "__module__", None) == "sinkbench.api" and not name.startswith("_")
    }
    assert here <= set(api.__all__)
    assert re.fullmatch(r"\d+\.\d+", api.API_VERSION)


def test_a_name_that_moved_warns_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("an_api")
    module.NewSpec = object()
    module.__getattr__ = moved_names("an_api", {"OldSpec": Moved(replacement="NewSpec", removed_in="2.0")})
    monkeypatch.setitem(sys.modules, "an_api", module)
    with pytest.warns(ApiDeprecationWarning) as caught:
        assert module.OldSpec is module.NewSpec
    (warning,) = caught
    assert str(warning.message) == "an_api.OldSpec goes away in sinkbench.api 2.0; use an_api.NewSpec"
    assert warning.filename == __file__
    with pytest.raises(AttributeError, match="module 'an_api' has no attribute 'Other'"):
        _ = module.Other


def test_a_deprecation_names_the_callers_line() -> None:
    def old() -> None:
        deprecated("old()", "new()", "2.0")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old()
    (warning,) = caught
    assert warning.category is ApiDeprecationWarning
    assert warning.filename == __file__


if __name__ == "__main__":
    SNAPSHOT.write_text(HEADER + "\n".join(surface()) + "\n")
