"""The forward kernel of attention; see ``triton_elementwise`` for the formulas and shapes."""

from __future__ import annotations

import triton
import triton.language as tl

from sinkbench.attention.triton_blocks import (
    at_rows,
    divisor,
    dot,
    far_keys,
    key_range,
    load_block,
    load_documents,
    load_position,
    load_rows,
    look_up,
    place,
    rows_of,
    scores,
    visible,
    weigh,
)


@triton.jit
def _forward_block(
    at, rows, since, q0, q1, o0, o1, r, largest, k_ptr, v_ptr, stride_kt, stride_vt, first, second,
    length, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
    F: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    keys = at + tl.arange(0, BLOCK_K)
    k0 = load_block(k_ptr, at, first, stride_kt, length, MASK, WIDE, BLOCK_K)
    s = dot(q0, tl.trans(k0), None, PRECISION)
    if D1 > 1:
        k1 = load_block(k_ptr, at, second, stride_kt, length, MASK, WIDE, BLOCK_K)
        s = dot(q1, tl.trans(k1), s, PRECISION)
    s = scores(
        s, scale, bias, 0.0, rows[:, None], keys[None, :], since[:, None], at,
        position_ptr, slope, by_key, ahead, BIAS, False, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    seen = s
    if MASK:
        seen = visible(
            rows[:, None], keys[None, :], since[:, None], window, prefix, WINDOW, PREFIX, DOCUMENTS
        )
    p, r, largest, fade = weigh(s, seen, r, largest, F, NORMALIZE, MASK)
    if NORMALIZE == 3:
        o0 = o0 * fade[:, None]
        if D1 > 1:
            o1 = o1 * fade[:, None]
    p = p.to(q0.dtype)
    o0 = dot(p, load_block(v_ptr, at, first, stride_vt, length, MASK, WIDE, BLOCK_K), o0, PRECISION)
    if D1 > 1:
        o1 = dot(p, load_block(v_ptr, at, second, stride_vt, length, MASK, WIDE, BLOCK_K), o1, PRECISION)
    return o0, o1, r, largest


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, o_ptr, r_ptr, bias_ptr, position_ptr, documents_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    heads, group, length, pairs, together, scale, eps, window, prefix, ahead, count, constant_from,
    F: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The outputs of one block of queries, and with NORMALIZE what ``divisor`` stores."""
    blocks = tl.cdiv(length, BLOCK_Q)
    number, pair = place(blocks, pairs, together)
    block = blocks - 1 - number  # longest rows first
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    o_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh
    k_ptr += batch * stride_kb + (head // group).to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + (head // group).to(tl.int64) * stride_vh
    position_ptr += head.to(tl.int64) * count
    documents_ptr += rows_of(2 * batch, length)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    since = load_documents(documents_ptr, rows, DOCUMENTS)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    q0 = load_rows(q_ptr, rows, first, stride_qt, length, True, WIDE)
    q1 = load_rows(q_ptr, rows, second, stride_qt, length, D1 > 1, WIDE)
    o0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    o1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    r = tl.zeros([BLOCK_Q], tl.float32)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    scale *= UNIT
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head) * UNIT
    slope, by_key = load_position(position_ptr, POSITION, NORMALIZE == 3 and not WINDOW, UNIT)
    start, seen_by_all, unmasked, end = key_range(
        block, length, window, prefix, documents_ptr, WINDOW, PREFIX, DOCUMENTS, BLOCK_Q, BLOCK_K
    )
    if DOCUMENTS and not WINDOW:
        for at in range(start, seen_by_all, BLOCK_K):
            o0, o1, r, largest = _forward_block(
                at, rows, since, q0, q1, o0, o1, r, largest, k_ptr, v_ptr, stride_kt, stride_vt, first,
                second, length, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
                F, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, True, PRECISION, WIDE, UNIT, D1,
                BLOCK_K,
            )  # fmt: skip
        start = seen_by_all
    if POSITION == 2 and not WINDOW:
        near = far_keys(block, start, unmasked, constant_from, BLOCK_Q, BLOCK_K)
        farthest = bias + UNIT * look_up(position_ptr, ahead + constant_from)
        for at in range(start, near, BLOCK_K):
            o0, o1, r, largest = _forward_block(
                at, rows, since, q0, q1, o0, o1, r, largest, k_ptr, v_ptr, stride_kt, stride_vt, first,
                second, length, scale, farthest, window, prefix, position_ptr, slope, by_key, ahead,
                F, NORMALIZE, True, 0, WINDOW, PREFIX, DOCUMENTS, False, PRECISION, WIDE, UNIT, D1,
                BLOCK_K,
            )  # fmt: skip
        start = near
    for at in range(start, unmasked, BLOCK_K):
        o0, o1, r, largest = _forward_block(
            at, rows, since, q0, q1, o0, o1, r, largest, k_ptr, v_ptr, stride_kt, stride_vt, first,
            second, length, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
            F, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, False, PRECISION, WIDE, UNIT, D1,
            BLOCK_K,
        )  # fmt: skip
    for at in range(unmasked, end, BLOCK_K):
        o0, o1, r, largest = _forward_block(
            at, rows, since, q0, q1, o0, o1, r, largest, k_ptr, v_ptr, stride_kt, stride_vt, first,
            second, length, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
            F, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, True, PRECISION, WIDE, UNIT, D1,
            BLOCK_K,
        )  # fmt: skip
    inside = rows < length
    if NORMALIZE:
        r_rows = r_ptr + pair.to(tl.int64) * length + rows
        r = divisor(r, largest, eps, r_rows, inside, NORMALIZE, UNIT)
        o0 = o0 / r[:, None]
        o1 = o1 / r[:, None]
    o_rows = o_ptr + at_rows(rows, stride_ot, WIDE)
    tl.store(o_rows + first[None, :], o0.to(o_ptr.dtype.element_ty), mask=inside[:, None])
    if D1 > 1:
        tl.store(o_rows + second[None, :], o1.to(o_ptr.dtype.element_ty), mask=inside[:, None])
