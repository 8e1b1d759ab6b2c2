"""The kernels of ``triton_importance``; see there for the formulas and shapes."""

from __future__ import annotations

import triton
import triton.language as tl

from sinkbench.attention.triton_blocks import (
    dot,
    key_range,
    load_block,
    load_position,
    load_rows,
    place,
    rows_of,
    scores,
    visible,
)
from sinkbench.triton_math import exp2


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
        s, scale, bias, 0.0, row, key, 0, at, position_ptr, slope, False, ahead,
        BIAS, False, POSITION, PREFIX, UNIT,
    )  # fmt: skip


@triton.jit
def add_weights(
    s, seen, total, absolute, largest,
    F: tl.constexpr, SOFTMAX: tl.constexpr, MASK: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """Sums of rows with a block of scores [q, k]. LEVEL: ``largest`` stays what a softmax's scores are
    compared with. ``seen``: with MASK, which keys the rows see."""
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
def store_row_sums(
    total, absolute, largest, first_ptr, second_ptr, at_row, inside, SOFTMAX: tl.constexpr, UNIT: tl.constexpr
):
    """log sum exp of a row's scores, or the sums of f and |f|."""
    if SOFTMAX:
        total = (largest + tl.log2(total)) / UNIT
    tl.store(first_ptr + at_row, total, mask=inside)
    if not SOFTMAX:
        tl.store(second_ptr + at_row, absolute, mask=inside)


@triton.jit
def _row_sums_block(
    at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
    length, scale, bias, window, prefix, position_ptr, slope, ahead,
    F: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASK: tl.constexpr, LEVEL: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Without MASK all keys exist."""
    keys = at + tl.arange(0, BLOCK_K)
    k0 = load_block(k_ptr, at, first, stride_kt, length, MASK, WIDE, BLOCK_K)
    k1 = k0
    if D1 > 1:
        k1 = load_block(k_ptr, at, second, stride_kt, length, MASK, WIDE, BLOCK_K)
    s = _block_scores(
        q0, k0, q1, k1, rows[:, None], keys[None, :], at, scale, bias, position_ptr, slope, ahead,
        BIAS, POSITION, PREFIX, PRECISION, UNIT, D1,
    )  # fmt: skip
    seen = s
    if MASK:
        seen = visible(rows[:, None], keys[None, :], 0, window, prefix, WINDOW, PREFIX, False)
    return add_weights(s, seen, total, absolute, largest, F, SOFTMAX, MASK, LEVEL)


@triton.jit
def row_sums(
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
            F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, True, False, PRECISION, WIDE, UNIT, D1, BLOCK_K,
        )  # fmt: skip
    if not WINDOW:
        # Each row has seen itself. Compared with its largest score so far, no sum is too small, and none too
        # large unless a score is 2^128 times as likely: only then are these keys looked at for the largest.
        so_far = total
        for at in range(start, unmasked, BLOCK_K):
            total, absolute, largest = _row_sums_block(
                at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
                length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, False, True, PRECISION, WIDE, UNIT, D1, BLOCK_K,
            )  # fmt: skip
        if SOFTMAX:
            beyond = (total == float("inf")) | (largest == float("-inf"))
            again = tl.max(beyond.to(tl.int32), 0)
            total = tl.where(again > 0, so_far, total)
            for at in range(start, tl.where(again > 0, unmasked, start), BLOCK_K):
                total, absolute, largest = _row_sums_block(
                    at, rows, q0, q1, total, absolute, largest, k_ptr, stride_kt, first, second,
                    length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                    F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, False, False, PRECISION, WIDE, UNIT, D1,
                    BLOCK_K,
                )  # fmt: skip
    at_row = pair.to(tl.int64) * length + rows
    store_row_sums(total, absolute, largest, first_ptr, second_ptr, at_row, rows < length, SOFTMAX, UNIT)


@triton.jit
def share_of_queries(
    key, part, length, window, prefix,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The queries that a program reads for a block of keys: the first one, the step to the next block, of how
    many blocks not all see these keys, which come first, and the end."""
    step = tl.num_programs(1) * BLOCK_Q
    start = key // BLOCK_Q * BLOCK_Q + part * BLOCK_Q
    end = length
    if WINDOW:
        end = tl.minimum(length, key + BLOCK_K + window)
        if PREFIX:
            end = tl.maximum(end, prefix)
        masked = tl.cdiv(tl.maximum(end - start, 0), step)
    else:  # the queries after the block see all of its keys
        masked = tl.cdiv(tl.maximum(tl.minimum(key + BLOCK_K, length) - start, 0), step)
    return start, step, masked, end


@triton.jit
def store_column_sums(raw, proxy, out_ptr, within, part, pair, pairs, columns, PROXY: tl.constexpr):
    sums = tl.cast(pairs, tl.int64) * columns
    out = out_ptr + part.to(tl.int64) * sums + pair.to(tl.int64) * columns
    tl.store(out + within, raw, mask=within < columns)
    if PROXY:
        out += tl.num_programs(1) * sums
        tl.store(out + within, proxy, mask=within < columns)


@triton.jit
def _column_sums_block(
    at, keys, k0, k1, raw, proxy, q_ptr, raw_ptr, proxy_ptr, stride_qt, first, second,
    length, scale, bias, window, prefix, position_ptr, slope, ahead,
    F: tl.constexpr, SOFTMAX: tl.constexpr, PROXY: tl.constexpr, BIAS: tl.constexpr,
    POSITION: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    rows = at + tl.arange(0, BLOCK_Q)
    # Read while the product is computed; what is added takes an instruction less than what is subtracted.
    of_row = tl.load(raw_ptr + at + tl.arange(0, BLOCK_Q))[None, :]
    q0 = load_block(q_ptr, at, first, stride_qt, length, not EVEN, WIDE, BLOCK_Q)
    q1 = q0
    if D1 > 1:
        q1 = load_block(q_ptr, at, second, stride_qt, length, not EVEN, WIDE, BLOCK_Q)
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
def column_sums(
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
    start, step, masked, end = share_of_queries(
        key, part, length, window, prefix, WINDOW, PREFIX, BLOCK_Q, BLOCK_K
    )
    masked_end = start + masked * step
    for at in range(start, masked_end, step):
        raw, proxy = _column_sums_block(
            at, keys, k0, k1, raw, proxy, q_ptr, raw_ptr, proxy_ptr, stride_qt, first, second,
            length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, PROXY, BIAS, POSITION, WINDOW, PREFIX, True, EVEN, PRECISION, WIDE, UNIT, D1,
            BLOCK_Q,
        )  # fmt: skip
    if not WINDOW:
        for at in range(masked_end, end, step):
            raw, proxy = _column_sums_block(
                at, keys, k0, k1, raw, proxy, q_ptr, raw_ptr, proxy_ptr, stride_qt, first, second,
                length, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                F, SOFTMAX, PROXY, BIAS, POSITION, WINDOW, PREFIX, False, EVEN, PRECISION, WIDE, UNIT, D1,
            BLOCK_Q,
            )  # fmt: skip
    within = block * BLOCK_K + tl.arange(0, BLOCK_K)
    store_column_sums(raw, proxy, out_ptr, within, part, pair, pairs, columns, PROXY)
