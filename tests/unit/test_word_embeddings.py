"""Rows' gradients added to a table's: by torch, and by the kernel on a card or in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = "cuda" if CUDA else "cpu"
ROWS, WIDTH = 11, 1100
"""The width is more than a program's columns."""


def by_torch() -> Callable[..., None]:
    from sinkbench.megatron import host

    host.prepare()
    from sinkbench.megatron.word_embeddings import add_rows

    return add_rows


def by_kernel() -> Callable[..., None]:
    pytest.importorskip("triton")
    from sinkbench.megatron.triton_embedding import add_rows

    return add_rows


@pytest.mark.parametrize("make", [by_torch, by_kernel])
def test_rows(make: Callable[[], Callable[..., None]]) -> None:
    """Each as often as it comes, those of other ranks not at all, to what is there already."""
    add_rows = make()
    generator = torch.Generator(DEVICE).manual_seed(0)
    random: Any = {"generator": generator, "device": DEVICE}
    rows = torch.randint(-4, ROWS + 4, (40,), **random)
    wide = torch.randn(40, 2 * WIDTH, **random)
    for gradient in (wide[:, :WIDTH], wide[:, WIDTH:].contiguous(), wide[:, ::2]):
        total: Tensor = torch.randn(ROWS, WIDTH, **random)
        expected = total.double()
        for row, one in zip(rows.tolist(), gradient, strict=True):
            if 0 <= row < ROWS:
                expected[row] += one.double()
        add_rows(total, rows, gradient)
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
