"""Fixtures for the tests of a plugin package: found by pytest wherever sinkbench is installed.

Nothing is imported before a test asks for one of them, so that other test runs stay as fast as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sinkbench.testing import RunDistributed


@pytest.fixture(scope="session")
def run_distributed() -> RunDistributed:
    """``run_distributed(world_size, function, *args)``: see ``sinkbench.testing.run_distributed``."""
    from sinkbench.testing import run_distributed

    return run_distributed
