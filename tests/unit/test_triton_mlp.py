"""The map of kernel_mlp in one kernel: on a card, or in Triton's interpreter where the package is there."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench_plugins.attention import _triton_mlp, kernels  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
SIZES = [(1, 16), (130, 24)] + ([(5000, 64), (70000, 96), (70000, 128)] if CUDA else [])
"""Rows and head sizes."""


def by_torch(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return linear(linear(x, first).relu(), second)


def inputs(rows: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(rows)
    shapes = [(rows, size), (size, size), (size, size)]
    drawn = [torch.randn(*shape, generator=generator, device=DEVICE) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_output_and_gradients(rows: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are more than the programs take at once."""
    monkeypatch.setattr(_triton_mlp, "PROGRAMS", 132 if CUDA else 2)
    dtype, tolerance = (torch.bfloat16, 1e-2) if CUDA else (torch.float32, 1e-5)
    given = inputs(rows, size, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    output, expected = _triton_mlp.mlp(*given), by_torch(*exact)
    grad = torch.randn_like(output)
    found = [output, *torch.autograd.grad(output, given, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for what, one, other in zip(("output", "x", "first", "second"), found, wanted, strict=True):
        assert one.shape == other.shape
        error = float((one.double() - other).norm() / other.norm())
        assert error < tolerance, f"{what}: relative error {error:.1e}"


class OnACard(torch.Tensor):
    """Says that it is on a card."""

    is_cuda = True


def test_when_the_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision on a card."""
    taken: list[torch.dtype] = []

    def recorded(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        taken.append(x.dtype)
        return by_torch(x, first, second)

    monkeypatch.setattr(_triton_mlp, "mlp", recorded)
    for size, on_card in ((16, True), (16, False), (192, True)):
        context: Any = SimpleNamespace(head_size=size)
        spec = kernels.build_mlp(kernels.KernelParams(), context)
        assert spec.feature_map is not None
        for dtype in (torch.float32, torch.bfloat16):
            x, first, second = (each.detach().cpu() for each in inputs(3, size, dtype))
            weights = {"kernel_1": first.float(), "kernel_2": second.float()}
            result = spec.feature_map.function(x.as_subclass(OnACard) if on_card else x, weights)
            torch.testing.assert_close(result.as_subclass(Tensor), by_torch(x, first, second))
    assert taken == [torch.bfloat16]
