"""Conversion in either direction streams: a few layers are in memory at a time."""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sinkbench.export.safetensors_files import Entry, write_shards
from sinkbench.export.stored import StoredTensors
from sinkbench.export.written import Weight, write_weights
from sinkbench.testing import RunDistributed

ROWS, COLUMNS, TABLES = 2**14, 2**8, 24
TABLE_BYTES = 4 * ROWS * COLUMNS


def rank_streams(rank: int, world_size: int, folder: Path) -> tuple[int, int]:
    """Growth of the peak memory, in bytes, by writing a checkpoint with a table in each of many layers, and
    by making shards of two tables of it."""
    shape = (ROWS, COLUMNS)
    table = "decoder.layers.table"
    (folder / "checkpoint").mkdir()
    (folder / "export").mkdir()
    weight = Weight(table, shape, torch.float32, TABLES, lambda layer: torch.ones(shape))
    writing = growth(lambda: write_weights(folder / "checkpoint", [weight]))
    stored = StoredTensors(folder / "checkpoint")
    entries = [Entry(f"{n}", shape, torch.float32, partial(stored.read, table, n)) for n in range(TABLES)]
    return writing, growth(lambda: write_shards(folder / "export", entries, 2 * TABLE_BYTES))


def growth(function: Callable[[], Any]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_few_layers_are_in_memory_at_a_time(run_distributed: RunDistributed, tmp_path: Path) -> None:
    ((writing, converting),) = run_distributed(1, rank_streams, tmp_path)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) == TABLES // 2
    assert writing < 1.5 * 2 * TABLE_BYTES + 2**26
    assert converting < 1.5 * 2 * TABLE_BYTES + 2**26
    assert TABLES * TABLE_BYTES > 3 * (1.5 * 2 * TABLE_BYTES + 2**26)
