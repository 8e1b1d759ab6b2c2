"""The rotation of queries and keys out of the fused projection, and the gradient of that projection, in one
Triton kernel that reads and writes every number once.

Rows are heads at a position. A program has some of one position's queries, keys or values, which share an
angle, and both halves of each, so that threads exchange nothing. Products and sums are float32, rounded one
by one as torch rounds them, and the result is rounded to the dtype of the heads.

Shapes: s position, b sequence, g kv head, h head, d head size, w width of the projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from sinkbench.megatron.rotation import HeadLayout

BLOCK_BYTES = 16384
"""Of a program's rows, at most."""
WARP_BYTES = 4096
"""Of them for each warp: eight loads of 16 bytes a thread."""


@triton.jit
def _rotary(
    mixed_ptr, query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr,
    stride_qs, stride_qb, stride_qh, stride_ks, stride_kb, stride_kg, stride_vs, stride_vb, stride_vg,
    batch, query_blocks, key_blocks, value_blocks,
    BACK: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, HALF_COLUMNS: tl.constexpr, REST_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Out of the projection, or BACK into it. Values are read where they are, and only go back.

    Args:
        stride_qs: and so on, in UNITs of elements. UNIT tells the compiler what divides them.
        query_blocks, key_blocks, value_blocks: of ROWS rows, for each position.
        HALF: of the dimensions that are rotated.
        HALF_COLUMNS, REST_COLUMNS, COLUMNS: powers of two with room for such a half, the dimensions that are
            not rotated, and a head.
    """
    blocks = query_blocks + key_blocks + value_blocks
    position = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    cos_ptr += position * HALF
    sin_ptr += position * HALF
    if block < query_blocks:
        source, target, inside = _rows(
            mixed_ptr, query_ptr, stride_qs, stride_qb, stride_qh, position, block, batch,
            BACK, 0, QUERIES, GROUPS, QUERIES, SIZE, UNIT, ROWS,
        )  # fmt: skip
        _rotate(source, target, inside, cos_ptr, sin_ptr, BACK, HALF, HALF_COLUMNS)
        _copy(source, target, inside, 2 * HALF, SIZE, REST_COLUMNS)
    elif block < query_blocks + key_blocks:
        source, target, inside = _rows(
            mixed_ptr, key_ptr, stride_ks, stride_kb, stride_kg, position, block - query_blocks, batch,
            BACK, QUERIES, 1, GROUPS, QUERIES, SIZE, UNIT, ROWS,
        )  # fmt: skip
        _rotate(source, target, inside, cos_ptr, sin_ptr, BACK, HALF, HALF_COLUMNS)
        _copy(source, target, inside, 2 * HALF, SIZE, REST_COLUMNS)
    elif BACK:
        source, target, inside = _rows(
            mixed_ptr, value_ptr, stride_vs, stride_vb, stride_vg, position,
            block - query_blocks - key_blocks, batch,
            BACK, QUERIES + 1, 1, GROUPS, QUERIES, SIZE, UNIT, ROWS,
        )  # fmt: skip
        _copy(source, target, inside, 0, SIZE, COLUMNS)


@triton.jit
def _rows(
    mixed_ptr, heads_ptr, stride_s, stride_b, stride_h, position, block, batch,
    BACK: tl.constexpr, FIRST: tl.constexpr, EACH: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr,
    SIZE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pointers to rows where they are read and where they are written, and which of them there are.

    Args:
        heads_ptr: of EACH heads of every kv head, which are in its part of the projection from FIRST on.
    """
    row = block * ROWS + tl.arange(0, ROWS)
    sequence, head = row // (GROUPS * EACH), row % (GROUPS * EACH)
    offset = position * stride_s + sequence.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    heads = heads_ptr + offset * UNIT
    group = position * batch * GROUPS + row // EACH
    mixed = mixed_ptr + (group * (QUERIES + 2) + FIRST + row % EACH) * SIZE
    inside = row < batch * GROUPS * EACH
    if BACK:
        return heads, mixed, inside
    return mixed, heads, inside


@triton.jit
def _rotate(
    source, target, inside, cos_ptr, sin_ptr,
    BACK: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if HALF > 0:
        column = tl.arange(0, COLUMNS)[None, :]
        cos = tl.load(cos_ptr + column, mask=column < HALF)
        sin = tl.load(sin_ptr + column, mask=column < HALF)
        if BACK:
            sin = -sin
        mask = inside[:, None] & (column < HALF)
        source, target = source[:, None] + column, target[:, None] + column
        first = tl.load(source, mask=mask)
        second = tl.load(source + HALF, mask=mask)
        tl.store(target, (first * cos - second * sin).to(first.dtype), mask=mask)
        tl.store(target + HALF, (second * cos + first * sin).to(first.dtype), mask=mask)


@triton.jit
def _copy(source, target, inside, START: tl.constexpr, END: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of the rows as they are."""
    if START < END:
        column = START + tl.arange(0, COLUMNS)[None, :]
        mask = inside[:, None] & (column < END)
        tl.store(target[:, None] + column, tl.load(source[:, None] + column, mask=mask), mask=mask)


def rotated(mixed_sbw: Tensor, cos: Tensor, sin: Tensor, heads: HeadLayout) -> tuple[Tensor, Tensor]:
    """Rotated queries [s, b, h, d] and keys [s, b, g, d], contiguous.

    Args:
        cos, sin: of the positions, float32 [s, 1, 1, r/2].
    """
    length, batch, _ = mixed_sbw.shape
    query = mixed_sbw.new_empty(length, batch, heads.groups * heads.queries, heads.size)
    key = mixed_sbw.new_empty(length, batch, heads.groups, heads.size)
    _launch(mixed_sbw.contiguous(), (query, key), cos, sin, heads, back=False)
    return query, key


def rotated_back(
    query_sbhd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor, cos: Tensor, sin: Tensor, heads: HeadLayout
) -> Tensor:
    """The projection's gradient [s, b, w] from those of rotated queries and keys, and of values, which may
    have any strides.

    Args:
        cos, sin: of the positions, float32 [s, 1, 1, r/2].
    """
    parts = [x if x.stride(-1) == 1 else x.contiguous() for x in (query_sbhd, key_sbgd, value_sbgd)]
    mixed = query_sbhd.new_empty(*query_sbhd.shape[:2], heads.groups * (heads.queries + 2) * heads.size)
    _launch(mixed, parts, cos, sin, heads, back=True)
    return mixed


def rotate_back_into(
    mixed_sbw: Tensor, query_sbhd: Tensor, key_sbgd: Tensor, cos: Tensor, sin: Tensor, heads: HeadLayout
) -> None:
    """As ``rotated_back``, into a gradient that has the values' part. The keys', not yet rotated, may lie
    where it belongs."""
    parts = [x if x.stride(-1) == 1 else x.contiguous() for x in (query_sbhd, key_sbgd)]
    _launch(mixed_sbw, parts, cos, sin, heads, back=True)


def _launch(
    mixed: Tensor, parts: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: HeadLayout, *, back: bool
) -> None:
    """Args:
    parts: queries and keys, to be written, or to go back the gradients of queries, keys and, if they are
        to be copied, values.
    """
    (length, batch), half = mixed.shape[:2], cos.shape[-1]
    if mixed.numel() == 0:
        return
    query, key, value = parts if len(parts) == 3 else (*parts, parts[1])
    strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
    unit = math.gcd(8, *strides)
    columns = triton.next_power_of_2(heads.size)
    row_bytes = columns * mixed.element_size()
    rows = min(triton.next_power_of_2(batch * query.shape[2]), max(BLOCK_BYTES // row_bytes, 1))
    query_blocks, key_blocks = (triton.cdiv(batch * x.shape[2], rows) for x in (query, key))
    value_blocks = key_blocks if len(parts) == 3 else 0
    _rotary[(length * (query_blocks + key_blocks + value_blocks),)](
        mixed, query, key, value, *(x.reshape(length, half).contiguous() for x in (cos, sin)),
        *(stride // unit for stride in strides), batch, query_blocks, key_blocks, value_blocks,
        BACK=back, GROUPS=heads.groups, QUERIES=heads.queries, SIZE=heads.size, HALF=half,
        UNIT=unit, ROWS=rows, HALF_COLUMNS=triton.next_power_of_2(max(half, 1)),
        REST_COLUMNS=triton.next_power_of_2(max(heads.size - 2 * half, 1)), COLUMNS=columns,
        num_warps=min(max(rows * row_bytes // WARP_BYTES, 1), 16),
        enable_fp_fusion=False,
    )  # fmt: skip
