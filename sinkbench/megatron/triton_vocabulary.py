"""The vocabulary loss of whole rows of logits and its gradient, in one Triton kernel; see ``vocabulary_loss``
for the formulas."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.triton_math import exp2

TILE = 8192
"""Logits at a time, 16 a thread."""
WARPS = 16
"""Few rows at once, whose logits then stay in the cache: two on each of a card's multiprocessors."""
LOWEST = tl.constexpr(-2.0e38)
"""Below all logits, and finite, also times log2 e: a difference of two is no NaN."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row(
    logits_ptr, target_ptr, factor_ptr, loss_ptr, stride, size, z_loss,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token's loss; its logits become their gradient. The second reading of them comes from the cache.

    Each group of logits, which one thread loads at once, has its own maximum and sum of exponentials: threads
    wait for one another once a row. Only the last tile has masks, and the target's gradient is written last.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row)
    factor = tl.load(factor_ptr + row)
    known = (target >= 0) & (target < size)
    target_logit = tl.load(logits_ptr + target, mask=known, other=0.0).to(tl.float32)
    columns = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = size // (GROUPS * WIDTH) * (GROUPS * WIDTH)
    last = whole + columns
    largest = tl.full([GROUPS], LOWEST, tl.float32)
    sums = tl.zeros([GROUPS], tl.float32)
    for start in tl.range(0, whole, GROUPS * WIDTH, loop_unroll_factor=2):
        z = tl.load(logits_ptr + start + columns, eviction_policy="evict_last")
        largest, sums = _add_exponentials(largest, sums, z)
    z = tl.load(logits_ptr + last, mask=last < size, other=-float("inf"), eviction_policy="evict_last")
    largest, sums = _add_exponentials(largest, sums, z)
    top = tl.max(largest, 0)
    partition = top + tl.log(tl.sum(sums * exp2((largest - top) * LOG2_E), 0))
    tl.store(loss_ptr + row, (partition - target_logit + z_loss * partition * partition) * factor)
    pull = factor * (1.0 + 2.0 * z_loss * partition)
    for start in tl.range(0, whole, GROUPS * WIDTH, loop_unroll_factor=2):
        z = tl.load(logits_ptr + start + columns, eviction_policy="evict_first")
        gradient = _weight(z, partition) * pull
        tl.store(logits_ptr + start + columns, gradient.to(z.dtype), eviction_policy="evict_first")
    z = tl.load(logits_ptr + last, mask=last < size, other=0.0, eviction_policy="evict_first")
    gradient = _weight(z, partition) * pull
    tl.store(logits_ptr + last, gradient.to(z.dtype), mask=last < size, eviction_policy="evict_first")
    tl.debug_barrier()  # another thread has just written there
    gradient = _weight(target_logit, partition) * pull - factor
    tl.store(logits_ptr + target, gradient.to(logits_ptr.dtype.element_ty), mask=known)


@triton.jit
def _add_exponentials(largest, sums, z):
    """The maximum of each group and the sum of its exponentials relative to it, with one more tile."""
    z = z.to(tl.float32)
    before = largest
    largest = tl.maximum(before, tl.max(z, 1))
    shifted = z * LOG2_E - (largest * LOG2_E)[:, None]
    return largest, sums * exp2((before - largest) * LOG2_E) + tl.sum(exp2(shifted), 1)


@triton.jit
def _weight(z, partition):
    """exp(z - partition)."""
    return exp2(z.to(tl.float32) * LOG2_E - partition * LOG2_E)


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
