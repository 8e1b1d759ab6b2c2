"""Conversion in either direction streams: a few layers are in memory at a time."""

from __future__ import annotations

import resource
from functools import partial
from pathlib import Path

import torch

from sinkbench.export.safetensors_files import Entry, write_shards
from sinkbench.export.stored import StoredTensors
from sinkbench.export.written import Weight, write_weights
from sinkbench.testing import RunDistributed

ROWS, COLUMNS, TABLES = 2**14, 2**8, 24
TABLE_BYTES = 4 * ROWS * COLUMNS


def rank_streams(rank: int, world_size: int, folder: Path) -> int:
    """Growth of the peak memory, in bytes, from converting few layers to converting many, a table each."""
    stream(folder / "few", 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream(folder / "many", TABLES)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def stream(folder: Path, layers: int) -> None:
    """Writes a checkpoint, and makes shards of two tables of it."""
    shape, table = (ROWS, COLUMNS), "decoder.layers.table"
    checkpoint, export = folder / "checkpoint", folder / "export"
    for path in (checkpoint, export):
        path.mkdir(parents=True)
    write_weights(checkpoint, [Weight(table, shape, torch.float32, layers, lambda layer: torch.ones(shape))])
    stored = StoredTensors(checkpoint)
    entries = [Entry(f"{n}", shape, torch.float32, partial(stored.read, table, n)) for n in range(layers)]
    write_shards(export, entries, 2 * TABLE_BYTES)


def test_memory_does_not_grow_with_the_layers(run_distributed: RunDistributed, tmp_path: Path) -> None:
    (growth,) = run_distributed(1, rank_streams, tmp_path)
    assert len(list((tmp_path / "many" / "export").glob("*.safetensors"))) == TABLES // 2
    assert growth < 6 * TABLE_BYTES  # not the 20 more that there are
