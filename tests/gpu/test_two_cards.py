"""Tensor parallelism on two cards: the same steps as on one, launched or replayed."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from sinkbench.testing.distributed import run_distributed
from tests.distributed.test_saving import an_engine
from tests.distributed.test_transformer_engine import ENGINE
from tests.gpu.test_step_graph import CARD, losses

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
SHARED = [*ENGINE, *CARD, "train.deterministic=false"]


def rank_steps(rank: int, world_size: int, graph: bool) -> list[float]:
    """Losses, with communication in pieces however small."""
    from sinkbench.megatron import host

    # Engines make a process group of their own, for cards.
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    host.prepare("cuda")
    from sinkbench.megatron import overlapped_linears

    overlapped_linears.SMALLEST_PIECE = 1
    parallel = [
        f"parallel={{tensor: {world_size}, sequence: true}}",
        f"train.cuda_graph={str(graph).lower()}",
    ]
    with an_engine([*SHARED, *parallel]) as engine:
        found = losses(engine)
        assert (engine.graphs is not None) == graph
    return found


def test_tensor_parallel_steps() -> None:
    launched, other = run_distributed(2, rank_steps, False)
    assert launched == other
    replayed, _ = run_distributed(2, rank_steps, True)
    assert replayed == pytest.approx(launched, rel=1e-4)
    with an_engine([*SHARED, "train.cuda_graph=false"]) as engine:
        assert launched == pytest.approx(losses(engine), rel=2e-3)
