"""Host memory that saves copy into: used again, and never seen by two of them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.reliability import whole_tensors
from sinkbench.checkpoint import CheckpointStore
from sinkbench.config import CheckpointConfig
from sinkbench.failpoints import VARIABLE
from sinkbench.testing import RunDistributed
from tests.distributed.test_saving import ENGINE, an_engine, step

SOURCES = (
    torch.arange(1000, dtype=torch.float32).view(10, 100),
    torch.arange(7, dtype=torch.bfloat16),
    torch.tensor(3.5, dtype=torch.float64),
    torch.arange(5000, dtype=torch.int64),
    torch.empty(0, 4),
    torch.arange(12.0).view(3, 4).t(),
)


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinkbench.megatron import host_copies

    monkeypatch.setattr(host_copies, "CHUNK_BYTES", 1 << 13)
    copies = host_copies.HostCopies(torch.device("cpu"))
    places = []
    for save in range(3):
        sources = [source + save for source in SOURCES]
        copies.begin()
        made = [copies.copy(source, lasting=True) for source in sources]
        copies.end()
        copies.wait()
        copies.hold_back()
        places.append([copy.data_ptr() for copy in made])
        for copy, source in zip(made, sources, strict=True):
            assert torch.equal(copy, source)
            assert copy.dtype == source.dtype
            assert copy.is_contiguous()
            assert written_bytes(copy) < copy.numel() * copy.element_size() + 2000
    assert places[0] == places[1] == places[2]
    assert copies.allocated == 2 * (1 << 13) + 40_000  # the integers have a piece of their own


def written_bytes(tensor: Tensor) -> int:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.tell()


def rank_saves_while_training(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Two saves, each written slowly while the next steps change every weight."""
    from sinkbench.saving import Saver

    os.environ[VARIABLE] = "save.shard:1+:sleep=0.02"
    with an_engine(ENGINE) as engine:
        saver = Saver(CheckpointStore(folder), engine.layout, CheckpointConfig())
        expected: list[dict[str, Tensor]] = []
        allocated = []
        for number in (1, 2, 3):
            step(engine, number)
            expected.append({name: x.detach().clone() for name, x in engine.networks[0].named_parameters()})
            saver.save(engine, number, "seed: 1\n")
            step(engine, 10 + number)
            allocated.append(engine.copies.allocated)
        saver.finish()
        return {"expected": expected, "allocated": allocated}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_slow_write_does_not_see_later_steps(
    run_distributed: RunDistributed, tmp_path: Path, ranks: int
) -> None:
    seen = run_distributed(ranks, rank_saves_while_training, tmp_path)[0]
    assert len(set(seen["allocated"])) == 1
    for number in (2, 3):  # of three, two are kept
        stored = whole_tensors(tmp_path / f"step_{number}")
        weights = seen["expected"][number - 1]
        table = "embedding.word_embeddings.weight"
        assert torch.equal(stored[table], weights[table])
        assert not torch.equal(stored[table], seen["expected"][0][table])
        moments = stored[f"optimizer.state.param.{table}"]
        assert torch.equal(moments, weights[table])  # in fp32 the optimizer's copy is the weight
