"""Fills of a captured graph as kernels, on a card."""

from __future__ import annotations

import pytest
import torch

from sinkbench.megatron import graph_fills
from sinkbench.megatron.step_graph import CudaRecorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")


def test_they_fill_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = graph_fills.driver()
    if cuda is None:
        pytest.skip("needs torch 2.8, and CUDA's bindings and driver of version 13")
    counts = []
    usual = graph_fills.as_kernels
    monkeypatch.setattr(graph_fills, "as_kernels", lambda *of: counts.append(usual(*of)))
    words = torch.empty(100_000, dtype=torch.int32, device="cuda")
    total = torch.zeros_like(words)
    at = words.data_ptr()

    def fill_and_add() -> None:
        """Overlapping fills, each read before the next."""
        stream = torch.cuda.current_stream().cuda_stream
        words.add_(1)
        for call, *value in (
            (cuda.cuMemsetD8Async, at, 0x5A, 4 * 1028),
            (cuda.cuMemsetD16Async, at + 4, 0xABCD, 2 * 514),
            (cuda.cuMemsetD32Async, at + 4 * 513, 0x12345678, 80_000),
            (cuda.cuMemsetD8Async, at + 1, 0x11, 6),
            (cuda.cuMemsetD2D8Async, at + 4000, 400, 0x77, 8, 9),
        ):
            assert call(*value, stream)[0] == cuda.CUresult.CUDA_SUCCESS
            total.add_(words)

    usual_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(usual_graph):
        fill_and_add()
    graph = CudaRecorder(alone=True)(fill_and_add)
    results = []
    for replayed in (usual_graph, graph):
        words.fill_(3)
        total.zero_()
        for _ in range(3):
            replayed.replay()
        results.append((words.clone(), total.clone()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert counts == [3]
