"""Tensor parallelism on two cards: the same steps as on one, launched or replayed."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.distributed.test_saving import an_engine
from tests.distributed.test_transformer_engine import ENGINE
from tests.gpu.test_step_graph import CARD, losses

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
SHARED = [*ENGINE, *CARD, "train.deterministic=false"]


def rank_steps(rank: int, graph: bool, folder: Path) -> None:
    """Leaves the losses in the folder. Communication is in pieces, however small."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    from sinkbench.megatron import host

    host.prepare("cuda")
    from sinkbench.megatron import overlapped_linears

    overlapped_linears.SMALLEST_PIECE = 1
    parallel = ["parallel={tensor: 2, sequence: true}", f"train.cuda_graph={str(graph).lower()}"]
    with an_engine([*SHARED, *parallel]) as engine:
        found = losses(engine)
        assert (engine.graphs is not None) == graph
    (folder / f"{graph}_{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def test_tensor_parallel_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    for name, value in {**address, "NCCL_NVLS_ENABLE": "0"}.items():
        monkeypatch.setenv(name, value)
    for graph in (False, True):
        spawn(rank_steps, (graph, tmp_path), nprocs=2)
    for name in address:
        monkeypatch.delenv(name)
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    assert found["False_0"] == found["False_1"]
    assert found["True_0"] == pytest.approx(found["False_0"], rel=1e-4)
    with an_engine([*SHARED, "train.cuda_graph=false"]) as engine:
        assert found["False_0"] == pytest.approx(losses(engine), rel=2e-3)
