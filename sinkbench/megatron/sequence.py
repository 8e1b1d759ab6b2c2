"""Which positions a context-parallel rank holds, and how shards of the sequence come together.

With n context-parallel ranks the sequence is cut into 2n chunks; rank r holds chunks r and 2n-1-r, so
that every rank has the same share of the causal triangle.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""torch.distributed.ProcessGroup, which is not typed."""


def local_positions(length: int, group: Group, device: torch.device) -> Tensor:
    """The positions of this rank, in the order it holds them, int64. It is shared: nobody writes to it."""
    return _positions(length, group.size(), group.rank(), device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _positions(length: int, size: int, rank: int, device: torch.device) -> Tensor:
    if size == 1:
        return torch.arange(length, device=device)
    chunks = torch.arange(length, device=device).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def in_order(shards: list[Tensor], dim: int) -> Tensor:
    """The whole sequence from the shards of all context-parallel ranks."""
    if len(shards) == 1:
        return shards[0]
    halves = [shard.chunk(2, dim) for shard in shards]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


class _GatherSequence(torch.autograd.Function):
    """All-gather along dimension 0 in position order; the backward pass sums each rank's share."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return in_order(_shards(shard, group), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        size, rank = ctx.group.size(), ctx.group.rank()
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        chunks = grad.chunk(2 * size)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]]), None


def gather_sequence(shard: Tensor, group: Group) -> Tensor:
    """The whole sequence [S, ...] from this rank's part of it [s, ...], with gradients."""
    result: Tensor = _GatherSequence.apply(shard, group)  # type: ignore[no-untyped-call]
    return result


def gather_shards(tensor: Tensor, group: Group, dim: int) -> Tensor:
    """Concatenates the shards of all ranks of a group along a dimension, without gradients."""
    return torch.cat(_shards(tensor, group), dim)


def gather_context(tensor: Tensor, group: Group, dim: int) -> Tensor:
    """Puts the context-parallel shards of a sequence dimension in order, without gradients."""
    return in_order(_shards(tensor, group), dim)


def _shards(tensor: Tensor, group: Group) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    tensor = tensor.contiguous()
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor, group=group)
    return shards
