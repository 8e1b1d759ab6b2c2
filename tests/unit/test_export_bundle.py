"""The source that an export copies: what relative imports lead to."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from sinkbench.export.bundle import bundle

PACKAGE = {
    "__init__.py": "def outer():\n    from ._inner import inner\n\n    return inner()\n",
    "_inner.py": "from .deep.leaf import leaf\n\n\ndef inner():\n    return leaf()\n",
    "deep/__init__.py": "",
    "deep/leaf.py": "from ..number import NUMBER\n\n\ndef leaf():\n    return NUMBER\n",
    "number.py": "NUMBER = 7\nUNUSED = 8\n",
}


DEFERRED = "from __future__ import annotations\n\n\n"


def write_package(files: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An importable package bundled_example, which other tests may have had in other forms."""
    for name, text in files.items():
        path = folder / "bundled_example" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.startswith(("bundled_example", "copied_example"))]:
        monkeypatch.delitem(sys.modules, name)


def test_relative_imports_are_followed_from_packages_and_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(PACKAGE, tmp_path, monkeypatch)
    copied = bundle([("bundled_example", "outer")])
    assert copied == {
        "plugin_bundled_example.py": (
            f"{DEFERRED}def outer():\n"
            "    from .plugin_bundled_example__inner import inner\n\n    return inner()\n"
        ),
        "plugin_bundled_example__inner.py": (
            f"{DEFERRED[:-1]}from .plugin_bundled_example_deep_leaf import leaf\n\n\n"
            "def inner():\n    return leaf()\n"
        ),
        "plugin_bundled_example_deep_leaf.py": (
            f"{DEFERRED[:-1]}from .plugin_bundled_example_number import NUMBER\n\n\n"
            "def leaf():\n    return NUMBER\n"
        ),
        "plugin_bundled_example_number.py": f"{DEFERRED}NUMBER = 7\n",
    }


ANNOTATED = '''
import dataclasses
import typing as t
from dataclasses import InitVar, dataclass, field
from functools import singledispatch
from typing import Annotated, ClassVar, Literal, get_type_hints

from pydantic import AfterValidator, Field, PositiveFloat
from torch import Tensor

from sinkbench.api import BuildContext, Params

from .absent import Missing
from .near import Near, PLACE

Shared = ClassVar[dict]
Even = Annotated[int, AfterValidator(lambda value: value)]


class PowerParams(Params):
    """Of the rule."""

    power: PositiveFloat = 2.0
    count: Even = 2
    least: Annotated[float, Field(gt=0)] = 0.5
    kind: "Literal['a', 'b b']" = "a"


class Unused:
    pass


class Range:
    pass


@dataclass
class Table:
    known: ClassVar[dict] = {}
    quoted: "ClassVar[dict]" = {}
    shared: Shared = {}
    of_module: t.ClassVar[dict] = {}
    start: InitVar[int] = 1
    end: dataclasses.InitVar[int] = 2
    values: list[float] = field(default_factory=list)

    def __post_init__(self, start, end):
        self.values += [start, end]


@singledispatch
def size(value: "any one") -> "int  # how many":
    return -1


@size.register
def _size(value: Range) -> int:
    return 3


def make_range() -> Range:
    return Range()


@dataclass
class Hinted:
    power: float
    weight: Tensor | None = None
    range_: "Range | None" = None


def build(params: PowerParams, context: BuildContext, near: Near = PLACE, missing: Missing = None) -> Tensor:
    import torch

    exponent: PositiveFloat = params.power
    _ = size
    return torch.full((1,), exponent)


def tables():
    return Table(), [f.name for f in dataclasses.fields(Table)], get_type_hints(Hinted)
'''
NEAR = "class Near:\n    pass\n\n\nPLACE = 7\n"
ABSENT = "import package_of_tomorrow\n\nMissing = package_of_tomorrow.Missing\n"


@pytest.mark.parametrize(
    "first", ["", "from __future__ import annotations\n", "from __future__ import division\n"]
)
def test_annotations_are_not_evaluated_and_can_be_looked_up(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # dataclasses see no ClassVar within quotes that are kept as they are written
    body = ANNOTATED.replace('"ClassVar[dict]"', "ClassVar[dict]") if "annotations" in first else ANNOTATED
    package = {"__init__.py": "", "rule.py": f'"""A rule."""\n{first}{body}', "near.py": NEAR}
    write_package({**package, "absent.py": ABSENT}, tmp_path, monkeypatch)
    wanted = ("build", "PowerParams", "tables", "_size", "make_range")
    copied = bundle([("sinkbench.api", "Params"), *(("bundled_example.rule", name) for name in wanted)])
    source = copied["plugin_bundled_example_rule.py"]
    assert source.startswith('"""A rule."""\n')
    assert source.count("from __future__ import annotations\n") == 1
    assert "Unused" not in source
    assert "plugin_bundled_example_absent.py" not in copied, "for an annotation no module is copied"
    folder = tmp_path / "copied_example"
    folder.mkdir()
    for name, text in copied.items():
        (folder / name).write_text(text)
    (folder / "__init__.py").write_text("")
    importlib.invalidate_caches()
    rule = importlib.import_module("copied_example.plugin_bundled_example_rule")
    assert rule.build(rule.PowerParams(power=3.0), None).tolist() == [3.0]
    assert rule.PowerParams().power == 2.0
    table, fields, hints = rule.tables()
    assert fields == ["values"]
    assert table.values == [1, 2]
    assert hints == {"power": float, "weight": torch.Tensor | None, "range_": rule.Range | None}
    assert rule.size(rule.make_range()) == 3
