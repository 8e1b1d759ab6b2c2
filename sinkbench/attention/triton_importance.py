"""Sums over the rows and columns of attention weights that are never held, for softmax and elementwise rules.

    S = scale Q K^T + b + t_{i-j};  softmax: L_i = log sum_j exp S_ij;  elementwise: z_i = sum_j f(S_ij)
    column k: sum_{i >= max(k, n)} w_i f(S_ik), and the same of |f|, with exp(S - L) in the place of w f

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
from torch.nn.functional import pad

from sinkbench.attention.tiles import Tiles
from sinkbench.attention.triton_blocks import (
    ROW_BLOCK,
    SLOPE,
    TABLE,
    dot,
    key_range,
    load_position,
    load_rows,
    place,
    rows_of,
    scores,
    visible,
)
from sinkbench.attention.triton_tensors import (
    is_wide,
    padded_table,
    pairs_in_cache,
    precision,
    split_head_size,
)
from sinkbench.triton_math import exp2

TILES = {
    "rows": Tiles(128, 128, 8, 2),
    "short rows": Tiles(64, 64, 4, 3),
    "rows with distances": Tiles(128, 64, 8, 2),
    "columns": Tiles(128, 128, 8, 2),
    "columns with more": Tiles(64, 128, 8, 2),
    "few columns": Tiles(64, 64, 4, 3),
}
"""Of half precision and heads up to 128; more is a function or a bias by distance. The queries of the rows
and the keys of the columns stay: how many they are decides how often the rest is read, at 64 with 4.6 TB/s of
an H100's cache. The largest that do not spill with 16 warps on a multiprocessor; for short rows, which have
few of them, others were faster on an H200 (0.152 for 0.163 ms at head size 96, 0.095 for 0.098 at 128)."""
SHORT_ROWS = 4096
FEW_COLUMNS = 64
TILES_LARGE = Tiles(64, 64, 4, 2)
"""Of half precision and larger heads."""
TILES_FLOAT32 = Tiles(32, 32, 4, 2)
UNIT = math.log2(math.e)
"""A softmax's weights are powers of two in the kernels."""
COLUMN_PARTS = 8
"""Programs that may share the queries of a block of columns, where there are few blocks."""
COLUMN_PROGRAMS = 1024
"""As many as keep a card busy."""


@triton.jit
def _load(base, at, columns, stride, length, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a [t, d] matrix from ``at`` on, which all exist unless MASK: then zero beyond the end. Where
    they lie from the first one on is the same for each block."""
    rows = tl.arange(0, BLOCK)
    pointers = base + tl.cast(at, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    return tl.load(pointers, mask=(rows < length - at)[:, None], other=0.0) if MASK else tl.load(pointers)


@triton.jit
def _block_scores(
    a, b, rest_a, rest_b, row, key, at, scale, bias, position_ptr, slope, ahead,
    BIAS: tl.constexpr, POSITION: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Scores a b^T in units of UNIT; ``row`` and ``key`` broadcast to their shape."""
    s = dot(a, tl.trans(b), None, PRECISION)
    if D1 > 1:
        s = dot(rest_a, tl.trans(rest_b), s, PRECISION)
    return scores(
        s, scale, bias, row, key, 0, at, position_ptr, slope, False, ahead, BIAS, POSITION, PREFIX, UNIT
    )


@triton.jit
def _row_sums_block(
    at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
    length, scale, bias, window, prefix, position_ptr, slope, ahead,
    F: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASK: tl.constexpr, LEVEL: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LEVEL: ``largest`` stays what a softmax's scores are compared with. Without MASK all keys exist."""
    keys = at + tl.arange(0, BLOCK_K)
    k0 = _load(k_ptr, at, first, stride_kt, length, MASK, BLOCK_K)
    k1 = k0
    if D1 > 1:
        k1 = _load(k_ptr, at, second, stride_kt, length, MASK, BLOCK_K)
    s = _block_scores(
        q0, k0, q1, k1, rows[:, None], keys[None, :], at, scale, bias, position_ptr, slope, ahead,
        BIAS, POSITION, PREFIX, PRECISION, UNIT, D1,
    )  # fmt: skip
    if MASK:
        seen = visible(rows[:, None], keys[None, :], 0, window, prefix, WINDOW, PREFIX, False)
    if SOFTMAX:
        if MASK:
            s = tl.where(seen, s, float("-inf"))
        if LEVEL:
            total += tl.sum(exp2(s - largest[:, None]), 1)
        else:
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
    heads, group, length, pairs, together, scale, window, prefix, ahead, count,
    F: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """log sum exp of a row's scores, or the sums of f and |f|."""
    blocks = tl.cdiv(length, BLOCK_Q)
    number, pair = place(blocks, pairs, together)
    block = blocks - 1 - number
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
    for at in range(unmasked, end, BLOCK_K):
        total, absolute, largest = _row_sums_block(
            at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
            length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, True, False, PRECISION, UNIT, D1, BLOCK_K,
        )  # fmt: skip
    if not WINDOW:
        # Each row has seen itself. Compared with its largest score so far, no sum is too small, and none too
        # large unless a score is 2^128 times as likely: only then are these keys looked at for the largest.
        so_far = total
        for at in range(start, unmasked, BLOCK_K):
            total, absolute, largest = _row_sums_block(
                at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
                length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, False, True, PRECISION, UNIT, D1, BLOCK_K,
            )  # fmt: skip
        if SOFTMAX:
            beyond = (total == float("inf")) | (largest == float("-inf"))
            again = tl.max(beyond.to(tl.int32), 0)
            total = tl.where(again > 0, so_far, total)
            for at in range(start, tl.where(again > 0, unmasked, start), BLOCK_K):
                total, absolute, largest = _row_sums_block(
                    at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
                    length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                    F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, False, False, PRECISION, UNIT, D1, BLOCK_K,
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
    at, keys, k0, k1, raw, proxy, q_ptr, raw_ptr, proxy_ptr, stride_qt, first, second,
    length, scale, bias, window, prefix, position_ptr, slope, ahead,
    F: tl.constexpr, SOFTMAX: tl.constexpr, PROXY: tl.constexpr, BIAS: tl.constexpr,
    POSITION: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    rows = at + tl.arange(0, BLOCK_Q)
    # Read while the product is computed; what is added takes an instruction less than what is subtracted.
    of_row = tl.load(raw_ptr + at + tl.arange(0, BLOCK_Q))[None, :]
    q0 = _load(q_ptr, at, first, stride_qt, length, not EVEN, BLOCK_Q)
    q1 = q0
    if D1 > 1:
        q1 = _load(q_ptr, at, second, stride_qt, length, not EVEN, BLOCK_Q)
    s = _block_scores(
        k0, q0, k1, q1, rows[None, :], keys[:, None], at, scale, bias, position_ptr, slope, ahead,
        BIAS, POSITION, PREFIX, PRECISION, UNIT, D1,
    )  # fmt: skip
    p = exp2(s + of_row) if SOFTMAX else F(s)
    if MASK:
        seen = visible(rows[None, :], keys[:, None], 0, window, prefix, WINDOW, PREFIX, False)
        p = tl.where(seen & (rows[None, :] >= keys[:, None]), p, 0.0)
    if SOFTMAX:
        raw += tl.sum(p, 1)
    else:
        raw += tl.sum(p * of_row, 1)
    if PROXY:
        proxy += tl.sum(tl.abs(p) * tl.load(proxy_ptr + at + tl.arange(0, BLOCK_Q))[None, :], 1)
    return raw, proxy


@triton.jit
def _column_sums(
    q_ptr, k_ptr, raw_ptr, proxy_ptr, bias_ptr, position_ptr, out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    heads, group, length, pairs, together, columns, offset, scale, window, prefix, ahead, count,
    F: tl.constexpr, SOFTMAX: tl.constexpr, PROXY: tl.constexpr, BIAS: tl.constexpr,
    POSITION: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of each column from ``offset`` on, over a share of the queries from the column's own on: of
    2^(s + raw) or f(s) raw, and with PROXY of 2^(s + raw) proxy or |f(s)| proxy.
    What is read by row has room for whole blocks. EVEN: the queries are whole blocks."""
    block, pair = place(tl.cdiv(columns, BLOCK_K), pairs, together)
    part = tl.program_id(1)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch * stride_kb + (head // group).to(tl.int64) * stride_kh
    position_ptr += head.to(tl.int64) * count
    row = rows_of(pair, length)
    raw_ptr += row
    proxy_ptr += row
    key = offset + block * BLOCK_K
    keys = key + tl.arange(0, BLOCK_K)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    k0 = load_rows(k_ptr, keys, first, stride_kt, length, True, WIDE)
    k1 = load_rows(k_ptr, keys, second, stride_kt, length, D1 > 1, WIDE)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head) * UNIT
    slope, _ = load_position(position_ptr, POSITION, False, UNIT)
    raw = tl.zeros([BLOCK_K], tl.float32)
    proxy = tl.zeros([BLOCK_K], tl.float32)
    step = tl.num_programs(1) * BLOCK_Q
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
            at, keys, k0, k1, raw, proxy, q_ptr, raw_ptr, proxy_ptr, stride_qt, first, second,
            length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, PROXY, BIAS, POSITION, WINDOW, PREFIX, True, EVEN, PRECISION, UNIT, D1, BLOCK_Q,
        )  # fmt: skip
    if not WINDOW:
        for at in range(masked_end, end, step):
            raw, proxy = _column_sums_block(
                at, keys, k0, k1, raw, proxy, q_ptr, raw_ptr, proxy_ptr, stride_qt, first, second,
                length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                F, SOFTMAX, PROXY, BIAS, POSITION, WINDOW, PREFIX, False, EVEN, PRECISION, UNIT, D1, BLOCK_Q,
            )  # fmt: skip
    sums = tl.cast(pairs, tl.int64) * columns
    out = out_ptr + part.to(tl.int64) * sums + pair.to(tl.int64) * columns
    within = block * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(out + within, raw, mask=within < columns)
    if PROXY:
        out += tl.num_programs(1) * sums
        tl.store(out + within, proxy, mask=within < columns)


def _options(tiles: Tiles) -> dict[str, int]:
    """Of 8 warps, two programs fit a multiprocessor: one computes products while the other sums."""
    return tiles.options() | ({"maxnreg": 128} if tiles.num_warps == 8 else {})


def _whole_blocks(x_bht: Tensor, value: float) -> Tensor:
    """With room for whole blocks of rows, filled with ``value``."""
    missing = -x_bht.shape[-1] % ROW_BLOCK
    return pad(x_bht, (0, missing), value=value) if missing else x_bht.contiguous()


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

    def row_sums(self, tiles: Tiles | None = None) -> tuple[Tensor, Tensor | None]:
        """float32 [b, h, t]: for softmax log sum exp of each row; else the sums of f and of |f|.

        Args:
            tiles: sizes of the blocks in the place of ``TILES``.
        """
        batch, heads, length, _ = self.query_bhtd.shape
        shape, device = (batch, heads, length), self.query_bhtd.device
        total = torch.empty(shape, dtype=torch.float32, device=device)
        absolute = None if self.function is None else torch.empty_like(total)
        query, key, arguments, switches = self._arguments(total)
        bias, position, *numbers = arguments
        kernel = "short rows" if length <= SHORT_ROWS and self.function is None else "rows"
        chosen = tiles or self._tiles("rows with distances" if self._by_distance else kernel)
        _row_sums[(triton.cdiv(length, chosen.block_q) * batch * heads,)](
            query, key, total, total if absolute is None else absolute, bias, position,
            *query.stride()[:3], *key.stride()[:3], heads, heads // key.shape[1], length, batch * heads,
            pairs_in_cache(key), *numbers,
            **switches, **_options(chosen),
        )  # fmt: skip
        return total, absolute

    def column_sums(
        self,
        raw_bht: Tensor,
        proxy_bht: Tensor | None,
        columns: int,
        offset: int,
        tiles: Tiles | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sums [b, h, columns] of the columns from ``offset`` on over queries from the column's own on.

        Args:
            raw_bht: for softmax, what is added to a row's scores before the exponential, -inf for a row that
                does not count; else the factor of a row in the first sum.
            proxy_bht: factor of a row in the second sum, which is of absolute values; None for none.
            tiles: as in ``row_sums``; of at most ROW_BLOCK queries.
        """
        batch, heads, length, _ = self.query_bhtd.shape
        softmax = self.function is None
        kernel = "columns" if softmax and not self._by_distance else "columns with more"
        chosen = tiles or self._tiles(kernel if columns > FEW_COLUMNS else "few columns")
        blocks = triton.cdiv(columns, chosen.block_k)
        parts = min(COLUMN_PARTS, triton.cdiv(length, chosen.block_q))
        parts = min(parts, max(COLUMN_PROGRAMS // (blocks * batch * heads), 1))
        shape = (1 if proxy_bht is None else 2, parts, batch, heads, columns)
        out = torch.empty(shape, dtype=torch.float32, device=raw_bht.device)
        raw = _whole_blocks(raw_bht * UNIT if softmax else raw_bht, float("-inf") if softmax else 0.0)
        query, key, arguments, switches = self._arguments(raw)
        bias, position, *numbers = arguments
        _column_sums[(blocks * batch * heads, parts)](
            query, key, raw, raw if proxy_bht is None else _whole_blocks(proxy_bht, 0.0),
            bias, position, out, *query.stride()[:3], *key.stride()[:3],
            heads, heads // key.shape[1], length, batch * heads, pairs_in_cache(query), columns, offset,
            *numbers,
            PROXY=proxy_bht is not None, EVEN=length % chosen.block_q == 0,
            **switches, **_options(chosen),
        )  # fmt: skip
        sums = out.sum(1) if parts > 1 else out[:, 0]
        return sums[0], None if proxy_bht is None else sums[1]

    @property
    def _by_distance(self) -> bool:
        return self.slope_h is not None or self.table_hn is not None

    def _tiles(self, kernel: str) -> Tiles:
        if self.query_bhtd.dtype == torch.float32:
            return TILES_FLOAT32
        return TILES_LARGE if self.query_bhtd.shape[-1] > 128 else TILES[kernel]

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
