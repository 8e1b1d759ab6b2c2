"""The gradient of a table of biases that ends near, made in the kernel for queries, against that of the
kernel for any table: on a card, or in Triton's interpreter where the package is there."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench_plugins.attention import _triton  # noqa: E402

from sinkbench.attention import tiles, triton_call, triton_elementwise  # noqa: E402
from sinkbench.attention.tiles import Tiles  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
HEADS = 2
WINDOW = 50


def softmax(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return triton_elementwise.softmax(q, k, v, scale=0.3, table_hn=table)[0]


def in_a_window(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return triton_elementwise.softmax(q, k, v, scale=0.3, table_hn=table, window=WINDOW)[0]


def in_documents(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    start = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device)
    start[:, 60:], start[1, 81:] = 60, 81
    return triton_elementwise.softmax(q, k, v, scale=0.3, table_hn=table, document_start_bt=start)[0]


def similarity(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    functions = {"function": _triton.sigmoid, "derivative": _triton.sigmoid_derivative}
    return triton_elementwise.attend(q, k, v, **functions, normalize=True, scale=0.3, table_hn=table)


@pytest.mark.parametrize(
    ("length", "last", "block_q", "block_k"),
    [(150, 40, 64, 64), (150, 17, 64, 32), (200, 70, 128, 32), (100, 3, 64, 16)],
)
@pytest.mark.parametrize("attend", [softmax, in_a_window, in_documents, similarity])
def test_a_table_that_ends_near(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    length: int,
    last: int,
    block_q: int,
    block_k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator(DEVICE).manual_seed(length)
    q, k, v, grad = (torch.randn(2, HEADS, length, 16, generator=generator, device=DEVICE) for _ in range(4))
    table = torch.randn(HEADS, last + 1, generator=generator, device=DEVICE).requires_grad_()
    monkeypatch.setattr(tiles, "choose", lambda *_, **__: Tiles(block_q, block_k, 4, 1))
    (near,) = torch.autograd.grad(attend(q, k, v, table), table, grad)
    monkeypatch.setattr(triton_call, "NEAR", -1)
    (any_table,) = torch.autograd.grad(attend(q, k, v, table), table, grad)
    # The last is what the others leave of nothing: its rounding is that of their sum.
    torch.testing.assert_close(near, any_table, rtol=1e-4, atol=3e-5)
    assert near[:, : min(last, WINDOW)].abs().min() > 0
