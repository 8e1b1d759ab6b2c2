"""Queries, keys and values out of the fused projection, the first two rotated.

A kv head's queries, key and value lie together in the projection, as in megatron. Fused, queries and keys are
one kernel, and so is the whole projection's gradient, which autograd would put together from three. Its part
that is the values' may be there already (``gradient_room``).

Shapes: s position, b sequence, g kv head, h head, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sinkbench.attention import fused
from sinkbench.attention.gradient_room import Room
from sinkbench.attention.reference import rotate
from sinkbench.megatron.fusions import compiled


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Of a rank's part of the projection.

    Attributes:
        groups: kv heads.
        queries: query heads of each.
        size: of a head.
    """

    groups: int
    queries: int
    size: int

    def split(self, mixed_sbw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [s, b, h, d], keys and values [s, b, g, d]."""
        grouped = mixed_sbw.unflatten(-1, (self.groups, (self.queries + 2) * self.size))
        query, key, value = grouped.split([self.queries * self.size, self.size, self.size], -1)
        return query.unflatten(-1, (self.queries, self.size)).flatten(2, 3), key, value

    def join(self, query_sbhd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor) -> Tensor:
        """The inverse of ``split``."""
        query_sbgw = query_sbhd.unflatten(2, (self.groups, self.queries)).flatten(3)
        return torch.cat([query_sbgw, key_sbgd, value_sbgd], -1).flatten(2)


def split_and_rotate(
    mixed_sbw: Tensor, cos: Tensor, sin: Tensor, heads: HeadLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """``HeadLayout.split`` with rotated queries and keys.

    Args:
        cos, sin: of the positions, float32 [s, 1, 1, r/2].
    """
    result: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(  # type: ignore[no-untyped-call]
        mixed_sbw, cos, sin, heads
    )
    return result


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, heads: HeadLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        _, key, value = heads.split(mixed)
        whole = mixed.is_contiguous() and mixed.storage_offset() == 0
        ctx.room = Room(mixed, key, value) if whole and _by_triton(mixed) else None
        query, key = _fused(mixed)[0](mixed, cos, sin, heads)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = grads
        cos, sin = ctx.saved_tensors
        filled = None if ctx.room is None else ctx.room.filled(value)
        if filled is not None:
            from sinkbench.megatron import triton_rotation

            triton_rotation.rotate_back_into(filled, query, key, cos, sin, ctx.heads)
            return filled, None, None, None
        return _fused(query)[1](query, key, value, cos, sin, ctx.heads), None, None, None


def _by_triton(example: Tensor) -> bool:
    return example.is_cuda and fused.is_installed()


def _fused(example: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions below, where the example is: as kernels of Triton on a card, else compiled."""
    if _by_triton(example):
        from sinkbench.megatron import triton_rotation

        return triton_rotation.rotated, triton_rotation.rotated_back
    return compiled(rotated), compiled(rotated_back)


def rotated(mixed: Tensor, cos: Tensor, sin: Tensor, heads: HeadLayout) -> tuple[Tensor, Tensor]:
    query, key, _ = heads.split(mixed)
    return rotate(query, cos, sin), rotate(key, cos, sin)


def rotated_back(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, heads: HeadLayout
) -> Tensor:
    """The projection's gradient from those of rotated queries and keys, and of values."""
    return heads.join(rotate(query, cos, -sin), rotate(key, cos, -sin), value)
