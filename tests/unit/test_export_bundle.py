"""The source that an export copies: what relative imports lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinkbench.export.bundle import bundle

PACKAGE = {
    "__init__.py": "def outer():\n    from ._inner import inner\n\n    return inner()\n",
    "_inner.py": "from .deep.leaf import leaf\n\n\ndef inner():\n    return leaf()\n",
    "deep/__init__.py": "",
    "deep/leaf.py": "from ..number import NUMBER\n\n\ndef leaf():\n    return NUMBER\n",
    "number.py": "NUMBER = 7\nUNUSED = 8\n",
}


def test_relative_imports_are_followed_from_packages_and_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in PACKAGE.items():
        path = tmp_path / "bundled_example" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    copied = bundle([("bundled_example", "outer")])
    assert copied == {
        "plugin_bundled_example.py": (
            "def outer():\n    from .plugin_bundled_example__inner import inner\n\n    return inner()\n"
        ),
        "plugin_bundled_example__inner.py": (
            "from .plugin_bundled_example_deep_leaf import leaf\n\n\ndef inner():\n    return leaf()\n"
        ),
        "plugin_bundled_example_deep_leaf.py": (
            "from .plugin_bundled_example_number import NUMBER\n\n\ndef leaf():\n    return NUMBER\n"
        ),
        "plugin_bundled_example_number.py": "NUMBER = 7\n",
    }
