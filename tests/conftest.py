"""Fixtures that every test may use."""

from __future__ import annotations

import os

import pytest

from tests.distributed import harness

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts; the ranks are the parallelism


@pytest.fixture(scope="session")
def run_distributed() -> harness.RunDistributed:
    """``run_distributed(world_size, function, *args, timeout=120)`` -> results by rank.

    Calls ``function(rank, world_size, *args)`` on gloo ranks; see tests/distributed/harness.py.
    """
    return harness.run_distributed
