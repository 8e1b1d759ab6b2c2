"""Tensors as the Triton kernels of attention take them.

Shapes: b sequence of the batch, h head, t position, d head size, n distance.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sinkbench.attention.triton_blocks import ROW_BLOCK


def split_head_size(head_size: int) -> tuple[int, int]:
    """Two powers of two that add up to the head size, the second 1 if none is needed."""
    first = 1 << (head_size.bit_length() - 1)
    return first, max(head_size - first, 1)


def precision(q: Tensor) -> str:
    """Products of float32 are not rounded to tf32."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def is_wide(*tensors: Tensor) -> bool:
    """Whether an offset within one head of a tensor exceeds 32 bits. A block may reach beyond the end."""
    return any((x.shape[2] + 256) * x.stride(2) >= 2**31 for x in tensors)


CACHED_BYTES = 2**23
"""Of the level-2 cache, for what programs read in common. On an H200, whose cache has 60 MB, more was
slower at head size 96 (benchmarks/LOG.md)."""


def pairs_in_cache(*common_bhtd: Tensor) -> int:
    """How many heads of sequences have these tensors in the cache together; at least one."""
    each = sum(x.shape[2] * x.shape[3] * x.element_size() for x in common_bhtd)
    return max(CACHED_BYTES // max(each, 1), 1)


def by_position(like: Tensor) -> Tensor:
    """An empty [b, h, t, d] that lies as [t, b, h, d], which the projections read without a copy."""
    batch, heads, length, d = like.shape
    return torch.empty(length, batch, heads, d, dtype=like.dtype, device=like.device).permute(1, 2, 0, 3)


def padded_table(table_hn: Tensor, ahead: int, length: int) -> Tensor:
    """A table as the kernels read it: its first entry for a block of more distances ahead, its last for all
    up to the length and a block more, so that no distance is beyond it."""
    behind = max(ahead + length + ROW_BLOCK - table_hn.shape[1], 0)
    return pad(table_hn[None], (ROW_BLOCK, behind), mode="replicate")[0].contiguous()


def whole_blocks(x: Tensor, value: float = 0) -> Tensor:
    """[..., t] with room for whole blocks of rows, filled with ``value``."""
    missing = -x.shape[-1] % ROW_BLOCK
    return pad(x, (0, missing), value=value) if missing else x.contiguous()


def bounds(start_bt: Tensor) -> Tensor:
    """Where the document of each position begins and ends, int32 [b, 2, t], with room for whole blocks."""
    start = start_bt.int().contiguous()
    position = torch.arange(start.shape[1], dtype=torch.int32, device=start.device).expand_as(start)
    # Documents begin later and later: what began up to here ends where the next one begins.
    end = torch.searchsorted(start, position.contiguous(), right=True, out_int32=True)
    return whole_blocks(torch.stack([start, end], 1))
