"""Every method in every respect that sinkbench checks."""

from __future__ import annotations

from typing import Any

import pytest

from sinkbench.testing import CheckPlugin


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("sink_logit", {"initial": 0.5}),
        ("softpick", {}),
        ("gated", {"per": "element"}),
        ("gated", {"per": "head"}),
        ("value_residual", {}),
        ("value_residual", {"learned": False}),
        ("qk_norm", {}),
    ],
)
def test_method(check_plugin: CheckPlugin, name: str, params: dict[str, Any]) -> None:
    check_plugin(name, params=params)
