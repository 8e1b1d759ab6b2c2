"""The vocabulary loss in one kernel against float64: on a card, or in Triton's interpreter where the package
is there."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

DEVICE = "cuda" if CUDA else "cpu"
CASES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), CASES, ids=str)
@pytest.mark.parametrize("size", [1, 64, 16384, 20011])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_losses_and_gradient(size: int, z_loss: float, dtype: torch.dtype, tolerance: float) -> None:
    from sinkbench.megatron import triton_vocabulary

    generator = torch.Generator().manual_seed(size)
    logits = (20 * torch.randn(5, size, generator=generator)).to(dtype)
    target = torch.tensor([0, size - 1, -100, size // 2, size])
    factor = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    wide = logits.double().requires_grad_()
    known = (target >= 0) & (target < size)
    at_target = wide.gather(1, target.clamp(0, size - 1)[:, None])[:, 0] * known
    partition = wide.logsumexp(1)
    expected = factor * (partition - at_target + z_loss * partition**2)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), wide)

    losses, gradient = triton_vocabulary.losses_and_gradient(
        logits.to(DEVICE), target.to(DEVICE), factor.to(DEVICE), z_loss
    )
    torch.testing.assert_close(losses.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=tolerance, atol=tolerance)
