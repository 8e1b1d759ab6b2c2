"""Fixtures for the tests of a plugin package: found by pytest wherever sinkbench is installed.

    def test_mine(check_plugin):
        check_plugin("my_name")

Nothing is imported before a test asks for one of them, so that other test runs stay as fast as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sinkbench.testing import CheckPlugin, RunDistributed


@pytest.fixture(scope="session")
def check_plugin() -> CheckPlugin:
    """``check_plugin(plugin, params=None, ...)``: see ``sinkbench.testing.check_plugin``."""
    from sinkbench.testing import check_plugin

    return check_plugin


@pytest.fixture(scope="session")
def run_distributed() -> RunDistributed:
    """``run_distributed(world_size, function, *args)``: see ``sinkbench.testing.run_distributed``."""
    from sinkbench.testing import run_distributed

    return run_distributed
