"""The order of a kernel's programs changes nothing: on a card, or in Triton's interpreter where the package
is there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench_plugins.attention import _triton  # noqa: E402

from sinkbench.attention import tiles, triton_elementwise, triton_tensors  # noqa: E402
from sinkbench.attention.tiles import Tiles  # noqa: E402
from sinkbench.attention.triton_importance import Scores  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
BATCH, HEADS, LENGTH, SIZE = 1, 5, 70, 16
HEAD_BYTES = 4 * LENGTH * SIZE


def results(inputs: list[Tensor]) -> list[Tensor]:
    """Of every kernel whose programs have an order."""
    q, k, v, grad = inputs
    functions: dict[str, Any] = {"function": _triton.sigmoid, "derivative": _triton.sigmoid_derivative}
    bias = torch.linspace(-1, 1, HEADS, device=q.device).requires_grad_()
    slope = bias.detach().clone().requires_grad_()
    output = triton_elementwise.attend(
        q, k, v, **functions, normalize=True, scale=0.3, bias_h=bias, slope_h=slope
    )
    scores = Scores(query_bhtd=q.detach(), key_bgtd=k.detach(), scale=0.3)
    lse, _ = scores.row_sums(Tiles(16, 16, 4, 1))
    sums, _ = scores.column_sums(-lse, None, LENGTH, 0, Tiles(16, 16, 4, 1))
    return [output, *torch.autograd.grad(output, (q, k, v, bias, slope), grad), lse, sums]


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_heads_of_a_group(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last group has fewer."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = [
        torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator, device=DEVICE).requires_grad_()
        for _ in range(4)
    ]
    monkeypatch.setattr(tiles, "choose", lambda *_, **__: Tiles(16, 16, 4, 1))
    expected = results(inputs)
    monkeypatch.setattr(triton_tensors, "CACHED_BYTES", heads * 2 * HEAD_BYTES)
    assert triton_tensors.pairs_in_cache(*inputs[:2]) == heads
    for one, other in zip(results(inputs), expected, strict=True):
        assert torch.equal(one, other)
