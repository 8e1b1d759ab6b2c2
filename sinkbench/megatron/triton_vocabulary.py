"""The vocabulary loss of whole rows of logits and its gradient, in one Triton kernel; see ``vocabulary_loss``
for the formulas."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16384
"""Logits at a time, 32 a thread."""
WARPS = 16
"""Few rows at once, whose logits then stay in the cache: two on each of a card's multiprocessors."""
LOWEST = tl.constexpr(-3.0e38)
"""Below all logits, and finite: a difference of two is no NaN."""


@triton.jit
def _row(
    logits_ptr, target_ptr, factor_ptr, loss_ptr, stride, size, z_loss,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token's loss; its logits become their gradient. The second reading of them comes from the cache.

    Each group of logits, which one thread loads at once, has its own maximum and sum of exponentials: threads
    wait for one another once a row.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row)
    factor = tl.load(factor_ptr + row)
    known = (target >= 0) & (target < size)
    target_logit = tl.load(logits_ptr + target, mask=known, other=0.0).to(tl.float32)
    columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    largest = tl.full([GROUPS], LOWEST, tl.float32)
    sums = tl.zeros([GROUPS], tl.float32)
    for start in range(0, size, GROUPS * WIDTH):
        column = start + columns
        z = tl.load(
            logits_ptr + column, mask=column < size, other=-float("inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(z, 1))
        sums = sums * tl.exp(before - largest) + tl.sum(tl.exp(z - largest[:, None]), 1)
    top = tl.max(largest, 0)
    partition = top + tl.log(tl.sum(sums * tl.exp(largest - top), 0))
    tl.store(loss_ptr + row, (partition - target_logit + z_loss * partition * partition) * factor)
    pull = factor * (1.0 + 2.0 * z_loss * partition)
    for start in range(0, size, GROUPS * WIDTH):
        column = start + columns
        z = tl.load(logits_ptr + column, mask=column < size, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        gradient = tl.exp(z - partition) * pull - tl.where(column == target, factor, 0.0)
        gradient = gradient.to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + column, gradient, mask=column < size, eviction_policy="evict_first")


def losses_and_gradient(
    logits_tv: Tensor, target_t: Tensor, factor_t: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses, float32 [t], and the gradient of their sum, which takes the place of the logits.

    Args:
        logits_tv: the whole vocabulary's, bf16 or float32.
    """
    width = 16 // logits_tv.element_size()  # of one load
    losses_t = torch.empty(len(logits_tv), dtype=torch.float32, device=logits_tv.device)
    _row[(len(logits_tv),)](
        logits_tv, target_t.contiguous(), factor_t.contiguous(), losses_t, logits_tv.stride(0),
        logits_tv.shape[1], z_loss, GROUPS=TILE // width, WIDTH=width, num_warps=WARPS,
    )  # fmt: skip
    return losses_t, logits_tv
