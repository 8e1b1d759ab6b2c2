"""Sums over the rows and columns of attention weights that are never held, for softmax and elementwise rules.

    S = scale Q K^T + b + t_{i-j};  softmax: L_i = log sum_j exp S_ij;  elementwise: z_i = sum_j f(S_ij)
    column k: sum_{i >= max(k, n)} w_i f(S_ik), and the same of |f|, with exp(S - L) in the place of f

One kernel goes along the rows and one, for the first columns alone, along the columns: a matrix product each,
without values and without a gradient. No sum depends on the order of programs.

Shapes: b sequence of the batch, h head, g kv head, t and q query, k key, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.tiles import Tiles
from sinkbench.attention.triton_blocks import (
    ROW_BLOCK,
    SLOPE,
    TABLE,
    dot,
    key_range,
    load_position,
    load_rows,
    scores,
    visible,
)
from sinkbench.attention.triton_tensors import is_wide, padded_table, precision, split_head_size
from sinkbench.triton_math import exp2

TILES = {"rows": Tiles(64, 64, 4, 3), "columns": Tiles(64, 64, 4, 3)}
"""Of half precision and heads up to 128."""
UNIT = math.log2(math.e)
"""A softmax's weights are powers of two in the kernels."""
COLUMN_PARTS = 8
"""Programs that may share the queries of a block of columns, where there are few blocks."""
COLUMN_PROGRAMS = 1024
"""As many as keep a card busy."""


@triton.jit
def _row_sums_block(
    at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
    length, scale, bias, window, prefix, position_ptr, slope, ahead,
    F: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    keys = at + tl.arange(0, BLOCK_K)
    s = dot(q0, tl.trans(load_rows(k_ptr, keys, first, stride_kt, length, True, WIDE)), None, PRECISION)
    if D1 > 1:
        s = dot(q1, tl.trans(load_rows(k_ptr, keys, second, stride_kt, length, True, WIDE)), s, PRECISION)
    s = scores(
        s, scale, bias, rows[:, None], keys[None, :], 0, at,
        position_ptr, slope, False, ahead, BIAS, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    if MASK:
        seen = visible(rows[:, None], keys[None, :], 0, window, prefix, WINDOW, PREFIX, False)
    if SOFTMAX:
        if MASK:
            s = tl.where(seen, s, float("-inf"))
        now = tl.maximum(largest, tl.max(s, 1))
        # A row may have seen no key yet: then it has no largest score to be compared with.
        level = tl.where(now == float("-inf"), 0.0, now)
        total = total * exp2(largest - level) + tl.sum(exp2(s - level[:, None]), 1)
        largest = now
    else:
        p = F(s)
        if MASK:
            p = tl.where(seen, p, 0.0)
        total += tl.sum(p, 1)
        absolute += tl.sum(tl.abs(p), 1)
    return total, absolute, largest


@triton.jit
def _row_sums(
    q_ptr, k_ptr, first_ptr, second_ptr, bias_ptr, position_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    heads, group, length, scale, window, prefix, ahead, count,
    F: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """log sum exp of a row's scores, or the sums of f and |f|."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch * stride_kb + (head // group).to(tl.int64) * stride_kh
    position_ptr += head.to(tl.int64) * count
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    q0 = load_rows(q_ptr, rows, first, stride_qt, length, True, WIDE)
    q1 = load_rows(q_ptr, rows, second, stride_qt, length, D1 > 1, WIDE)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head) * UNIT
    slope, _ = load_position(position_ptr, POSITION, False, UNIT)
    total = tl.zeros([BLOCK_Q], tl.float32)
    absolute = tl.zeros([BLOCK_Q], tl.float32)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    start, _, unmasked, end = key_range(
        block, length, window, prefix, 0, WINDOW, PREFIX, False, BLOCK_Q, BLOCK_K
    )
    for at in range(start, unmasked, BLOCK_K):
        total, absolute, largest = _row_sums_block(
            at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
            length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, False, PRECISION, WIDE, UNIT, D1, BLOCK_K,
        )  # fmt: skip
    for at in range(unmasked, end, BLOCK_K):
        total, absolute, largest = _row_sums_block(
            at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
            length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, True, PRECISION, WIDE, UNIT, D1, BLOCK_K,
        )  # fmt: skip
    inside = rows < length
    at_row = pair.to(tl.int64) * length + rows
    if SOFTMAX:
        total = (largest + tl.log2(total)) / UNIT
    tl.store(first_ptr + at_row, total, mask=inside)
    if not SOFTMAX:
        tl.store(second_ptr + at_row, absolute, mask=inside)


@triton.jit
def _column_sums_block(
    at, keys, k0, k1, raw, proxy, q_ptr, shift_ptr, raw_ptr, proxy_ptr, stride_qt, first, second,
    length, scale, bias, window, prefix, position_ptr, slope, ahead,
    F: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    rows = at + tl.arange(0, BLOCK_Q)
    inside = rows < length
    q0 = load_rows(q_ptr, rows, first, stride_qt, length, True, WIDE)
    s = dot(q0, tl.trans(k0), None, PRECISION)
    if D1 > 1:
        q1 = load_rows(q_ptr, rows, second, stride_qt, length, True, WIDE)
        s = dot(q1, tl.trans(k1), s, PRECISION)
    s = scores(
        s, scale, bias, rows[:, None], keys[None, :], 0, at,
        position_ptr, slope, False, ahead, BIAS, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    if SOFTMAX:
        shift = tl.load(shift_ptr + rows, mask=inside, other=float("inf"))
        p = exp2(s - shift[:, None])
    else:
        p = F(s)
    if MASK:
        seen = visible(rows[:, None], keys[None, :], 0, window, prefix, WINDOW, PREFIX, False)
        p = tl.where(seen & (rows[:, None] >= keys[None, :]), p, 0.0)
    raw += p * tl.load(raw_ptr + rows, mask=inside, other=0.0)[:, None]
    proxy += tl.abs(p) * tl.load(proxy_ptr + rows, mask=inside, other=0.0)[:, None]
    return raw, proxy


@triton.jit
def _column_sums(
    q_ptr, k_ptr, shift_ptr, raw_ptr, proxy_ptr, bias_ptr, position_ptr, out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    heads, group, length, columns, offset, scale, window, prefix, ahead, count,
    F: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Two weighted sums of each column from ``offset`` on, over a share of the queries from the column's own
    on: of f by ``raw``, of |f| by ``proxy``."""
    pair, part = tl.program_id(1), tl.program_id(2)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch * stride_kb + (head // group).to(tl.int64) * stride_kh
    position_ptr += head.to(tl.int64) * count
    row = pair.to(tl.int64) * length
    shift_ptr += row
    raw_ptr += row
    proxy_ptr += row
    block = tl.program_id(0)
    key = offset + block * BLOCK_K
    keys = key + tl.arange(0, BLOCK_K)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    k0 = load_rows(k_ptr, keys, first, stride_kt, length, True, WIDE)
    k1 = load_rows(k_ptr, keys, second, stride_kt, length, D1 > 1, WIDE)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head) * UNIT
    slope, _ = load_position(position_ptr, POSITION, False, UNIT)
    # Summed over the rows of a block at the end only.
    raw = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    proxy = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    step = tl.num_programs(2) * BLOCK_Q
    start = key // BLOCK_Q * BLOCK_Q + part * BLOCK_Q
    end = length
    if WINDOW:
        end = tl.minimum(length, key + BLOCK_K + window)
        if PREFIX:
            end = tl.maximum(end, prefix)
        masked_end = end
    else:  # the queries after the block see all of its keys
        blocks = tl.cdiv(tl.maximum(tl.minimum(key + BLOCK_K, length) - start, 0), step)
        masked_end = start + blocks * step
    for at in range(start, masked_end, step):
        raw, proxy = _column_sums_block(
            at, keys, k0, k1, raw, proxy, q_ptr, shift_ptr, raw_ptr, proxy_ptr, stride_qt, first, second,
            length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, True, PRECISION, WIDE, UNIT, D1, BLOCK_Q,
        )  # fmt: skip
    if not WINDOW:
        for at in range(masked_end, end, step):
            raw, proxy = _column_sums_block(
                at, keys, k0, k1, raw, proxy, q_ptr, shift_ptr, raw_ptr, proxy_ptr, stride_qt, first,
                second, length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, False, PRECISION, WIDE, UNIT, D1, BLOCK_Q,
            )  # fmt: skip
    out = out_ptr + (part * tl.num_programs(1) + pair).to(tl.int64) * 2 * columns
    within = block * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(out + within, tl.sum(raw, 0), mask=within < columns)
    tl.store(out + columns + within, tl.sum(proxy, 0), mask=within < columns)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one layer.

    Attributes:
        query_bhtd, key_bgtd: of bf16, fp16 or float32, the same positions.
        function: Triton function f, float32; None for softmax.
        bias_h: added to the scores of each head.
        window, prefix: as in AttentionSpec and Problem.
        slope_h, table_hn: the bias by distance, as in ``triton_elementwise.attend``.
    """

    query_bhtd: Tensor
    key_bgtd: Tensor
    scale: float
    function: Any = None
    bias_h: Tensor | None = None
    window: int | None = None
    prefix: int = 0
    slope_h: Tensor | None = None
    table_hn: Tensor | None = None

    def row_sums(self) -> tuple[Tensor, Tensor | None]:
        """float32 [b, h, t]: for softmax log sum exp of each row; else the sums of f and of |f|."""
        batch, heads, length, _ = self.query_bhtd.shape
        shape, device = (batch, heads, length), self.query_bhtd.device
        total = torch.empty(shape, dtype=torch.float32, device=device)
        absolute = None if self.function is None else torch.empty_like(total)
        query, key, arguments, switches = self._arguments(total)
        bias, position, *numbers = arguments
        chosen = self._tiles("rows")
        _row_sums[(triton.cdiv(length, chosen.block_q), batch * heads)](
            query, key, total, total if absolute is None else absolute, bias, position,
            *query.stride()[:3], *key.stride()[:3], heads, heads // key.shape[1], length, *numbers,
            **switches, **chosen.options(),
        )  # fmt: skip
        return total, absolute

    def column_sums(
        self, shift_bht: Tensor, raw_bht: Tensor, proxy_bht: Tensor, columns: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        """Sums [b, h, columns] of the columns from ``offset`` on over queries from the column's own on.

        Args:
            shift_bht: for softmax, what is subtracted from a row's scores; else unused.
            raw_bht, proxy_bht: factors of a row in the first and in the second sum, which is of |f|.
        """
        batch, heads, length, _ = self.query_bhtd.shape
        chosen = self._tiles("columns")
        blocks = triton.cdiv(columns, chosen.block_k)
        parts = min(COLUMN_PARTS, triton.cdiv(length, chosen.block_q))
        parts = min(parts, max(COLUMN_PROGRAMS // (blocks * batch * heads), 1))
        shape = (parts, batch, heads, 2, columns)
        out = torch.empty(shape, dtype=torch.float32, device=shift_bht.device)
        if self.function is None:  # a row without weights is as one beyond the end
            shift_bht = shift_bht.masked_fill(shift_bht.isneginf(), float("inf")) * UNIT
        query, key, arguments, switches = self._arguments(shift_bht)
        bias, position, *numbers = arguments
        _column_sums[(blocks, batch * heads, parts)](
            query, key, shift_bht.contiguous(), raw_bht.contiguous(), proxy_bht.contiguous(),
            bias, position, out, *query.stride()[:3], *key.stride()[:3],
            heads, heads // key.shape[1], length, columns, offset, *numbers,
            **switches, **chosen.options(),
        )  # fmt: skip
        raw, proxy = out.sum(0).unbind(2)
        return raw, proxy

    def _tiles(self, kernel: str) -> Tiles:
        large = self.query_bhtd.dtype == torch.float32 or self.query_bhtd.shape[-1] > 128
        return Tiles(32, 32, 4, 2) if large else TILES[kernel]

    def _arguments(self, unused: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]]:
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.query_bhtd, self.key_bgtd))
        prefix = min(self.prefix, query.shape[2])
        position, kind, count = unused, 0, 1
        if self.slope_h is not None:
            position, kind = self.slope_h.float().contiguous(), SLOPE
        if self.table_hn is not None:
            position = padded_table(self.table_hn.float(), max(prefix - 1, 0), query.shape[2])
            kind, count = TABLE, position.shape[1]
        bias = unused if self.bias_h is None else self.bias_h.float().contiguous()
        d0, d1 = split_head_size(query.shape[-1])
        switches = {
            "F": self.function,
            "SOFTMAX": self.function is None,
            "BIAS": self.bias_h is not None,
            "POSITION": kind,
            "WINDOW": self.window is not None,
            "PREFIX": prefix > 0,
            "PRECISION": precision(query),
            "WIDE": is_wide(query, key),
            "UNIT": UNIT if self.function is None else 1.0,
            "D0": d0,
            "D1": d1,
        }
        at_zero = max(prefix - 1, 0) + ROW_BLOCK
        numbers = (bias, position, self.scale, self.window or 0, prefix, at_zero, count)
        return query, key, numbers, switches
