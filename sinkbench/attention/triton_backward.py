"""The backward kernels of attention; see ``triton_elementwise`` for the formulas and shapes."""

from __future__ import annotations

import triton
import triton.language as tl

from sinkbench.attention.triton_blocks import (
    at_rows,
    derive,
    distance_of,
    dot,
    far_keys,
    far_queries,
    key_range,
    load_block,
    load_documents,
    load_position,
    load_rows,
    look_up,
    place,
    query_range,
    rows_of,
    scores,
    store_by_distance,
)


@triton.jit
def divide_gradient(
    do_ptr, o_ptr, r_ptr, dlse_ptr, out_ptr, delta_ptr, lse_ptr,
    stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot,
    stride_outb, stride_outh, stride_outt, heads, length,
    NORMALIZE: tl.constexpr, OF_LSE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dO / r, which stands for dO in the rest of the backward pass, and D = sum_d (dO / r) O. For
    r = max(|z|, 1), D comes with the derivative sign(z) [|z| > 1]. For a softmax dO stays as it is, D is less
    the gradient of L, if it has one, which ``r_ptr`` holds, and L is written in the unit of the scores:
    infinite, so that no key has weight, for rows without any and beyond the end. Neighbours take the same
    positions of other heads, which lie together."""
    pair = tl.program_id(0)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    do_ptr += batch * stride_dob + head.to(tl.int64) * stride_doh
    o_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh
    out_ptr += batch * stride_outb + head.to(tl.int64) * stride_outh
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    at = pair.to(tl.int64) * length + rows
    r = tl.load(r_ptr + at, mask=inside, other=1.0)
    inverse = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZE == 1:
        inverse = 1.0 / r
    if NORMALIZE == 2:
        inverse = 1.0 / tl.maximum(tl.abs(r), 1.0)
    do0 = load_rows(do_ptr, rows, first, stride_dot, length, True, WIDE).to(tl.float32) * inverse[:, None]
    delta = tl.sum(do0 * load_rows(o_ptr, rows, first, stride_ot, length, True, WIDE).to(tl.float32), 1)
    out_rows = out_ptr + at_rows(rows, stride_outt, WIDE)
    if NORMALIZE != 3:
        tl.store(out_rows + first[None, :], do0.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if D1 > 1:
        do1 = (
            load_rows(do_ptr, rows, second, stride_dot, length, True, WIDE).to(tl.float32) * inverse[:, None]
        )
        delta += tl.sum(do1 * load_rows(o_ptr, rows, second, stride_ot, length, True, WIDE).to(tl.float32), 1)
        if NORMALIZE != 3:
            tl.store(out_rows + second[None, :], do1.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if NORMALIZE == 3:
        if OF_LSE:
            delta -= tl.load(dlse_ptr + at, mask=inside, other=0.0)
        no_weight = (r == float("-inf")) | (rows >= length)
        tl.store(lse_ptr + rows_of(pair, length) + rows, tl.where(no_weight, float("inf"), r * UNIT))
    if NORMALIZE == 2:
        delta *= tl.where(r > 1.0, 1.0, tl.where(r < -1.0, -1.0, 0.0))
    tl.store(delta_ptr + rows_of(pair, length) + rows, delta)


@triton.jit
def _backward_keys_block(
    at, keys, k0, k1, v0, v1, dk0, dk1, dv0, dv1, db, dslope,
    q_ptr, do_ptr, delta_ptr, lse_ptr, stride_qt, stride_dot, first, second,
    length, scale, bias, window, prefix, documents_ptr, position_ptr, slope, by_key, ahead,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr,
    POSITION: tl.constexpr, SLOPE_GRADIENT: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    rows = at + tl.arange(0, BLOCK_Q)
    lse = rows  # read for a softmax alone
    if NORMALIZE == 3:
        lse = tl.load(lse_ptr + rows)
    q0 = load_rows(q_ptr, rows, first, stride_qt, length, True, WIDE)
    do0 = load_rows(do_ptr, rows, first, stride_dot, length, True, WIDE)
    s = dot(k0, tl.trans(q0), None, PRECISION)
    dp = dot(v0, tl.trans(do0), None, PRECISION)
    if D1 > 1:
        q1 = load_rows(q_ptr, rows, second, stride_qt, length, True, WIDE)
        do1 = load_rows(do_ptr, rows, second, stride_dot, length, True, WIDE)
        s = dot(k1, tl.trans(q1), s, PRECISION)
        dp = dot(v1, tl.trans(do1), dp, PRECISION)
    since = load_documents(documents_ptr, rows, DOCUMENTS)
    s = scores(
        s, scale, bias, lse[None, :], rows[None, :], keys[:, None], since[None, :], at,
        position_ptr, slope, by_key, ahead, BIAS, NORMALIZE == 3, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    p, ds = derive(
        s, rows[None, :], keys[:, None], since[None, :], window, prefix,
        F, DF, WINDOW, PREFIX, DOCUMENTS, MASK,
    )  # fmt: skip
    if NORMALIZE:
        dp -= tl.load(delta_ptr + rows)[None, :]
    ds = ds * dp
    db += tl.sum(tl.sum(ds, 1), 0)
    if SLOPE_GRADIENT:
        distance = distance_of(rows[None, :], keys[:, None], since[None, :], by_key, PREFIX)
        dslope -= tl.sum(tl.sum(ds * distance, 1), 0)
    p = p.to(q0.dtype)
    ds = ds.to(q0.dtype)
    dv0 = dot(p, do0, dv0, PRECISION)
    dk0 = dot(ds, q0, dk0, PRECISION)
    if D1 > 1:
        dv1 = dot(p, do1, dv1, PRECISION)
        dk1 = dot(ds, q1, dk1, PRECISION)
    return dk0, dk1, dv0, dv1, db, dslope


@triton.jit
def backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, delta_ptr, lse_ptr, bias_ptr, position_ptr,
    documents_ptr, db_ptr, dslope_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dkb, stride_dkh, stride_dkt,
    heads, group, length, pairs, together, scale, window, prefix, ahead, count, constant_from,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr,
    POSITION: tl.constexpr, SLOPE_GRADIENT: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values, for the queries of one head: those of a kv head's
    other heads are added outside."""
    blocks = tl.cdiv(length, BLOCK_K)
    block, pair = place(blocks, pairs, together)  # the first keys have the most queries
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    do_ptr += batch * stride_dob + head.to(tl.int64) * stride_doh
    k_ptr += batch * stride_kb + (head // group).to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + (head // group).to(tl.int64) * stride_vh
    position_ptr += head.to(tl.int64) * count
    documents_ptr += rows_of(2 * batch, length)
    dk_ptr += batch * stride_dkb + head.to(tl.int64) * stride_dkh
    dv_ptr += batch * stride_dkb + head.to(tl.int64) * stride_dkh
    delta_ptr += rows_of(pair, length)
    lse_ptr += rows_of(pair, length)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    k0 = load_rows(k_ptr, keys, first, stride_kt, length, True, WIDE)
    v0 = load_rows(v_ptr, keys, first, stride_vt, length, True, WIDE)
    k1 = load_rows(k_ptr, keys, second, stride_kt, length, D1 > 1, WIDE)
    v1 = load_rows(v_ptr, keys, second, stride_vt, length, D1 > 1, WIDE)
    dk0 = tl.zeros([BLOCK_K, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_K, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_K, D1], tl.float32)
    db = 0.0
    dslope = 0.0
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head) * UNIT
    slope, by_key = load_position(position_ptr, POSITION, NORMALIZE == 3 and not WINDOW, UNIT)
    # Queries beyond the end, in the last block, have a gradient of 0.
    start, masked_end, unmasked_end, end = query_range(
        block, length, window, prefix, documents_ptr, WINDOW, PREFIX, DOCUMENTS, BLOCK_Q, BLOCK_K
    )
    far = unmasked_end
    if POSITION == 2 and not WINDOW:
        far = far_queries(block, masked_end, unmasked_end, constant_from, BLOCK_Q, BLOCK_K)
    for at in range(start, masked_end, BLOCK_Q):
        dk0, dk1, dv0, dv1, db, dslope = _backward_keys_block(
            at, keys, k0, k1, v0, v1, dk0, dk1, dv0, dv1, db, dslope, q_ptr, do_ptr, delta_ptr, lse_ptr,
            stride_qt, stride_dot, first, second,
            length, scale * UNIT, bias, window, prefix, documents_ptr, position_ptr, slope, by_key,
            ahead, F, DF, NORMALIZE, BIAS, POSITION, SLOPE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, True,
            PRECISION, WIDE, UNIT, D1, BLOCK_Q)  # fmt: skip
    for at in range(masked_end, far, BLOCK_Q):
        dk0, dk1, dv0, dv1, db, dslope = _backward_keys_block(
            at, keys, k0, k1, v0, v1, dk0, dk1, dv0, dv1, db, dslope, q_ptr, do_ptr, delta_ptr, lse_ptr,
            stride_qt, stride_dot, first, second,
            length, scale * UNIT, bias, window, prefix, documents_ptr, position_ptr, slope, by_key,
            ahead, F, DF, NORMALIZE, BIAS, POSITION, SLOPE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, False,
            PRECISION, WIDE, UNIT, D1, BLOCK_Q)  # fmt: skip
    if POSITION == 2 and not WINDOW:
        farthest = bias + UNIT * look_up(position_ptr, ahead + constant_from)
        for at in range(far, unmasked_end, BLOCK_Q):
            dk0, dk1, dv0, dv1, db, dslope = _backward_keys_block(
                at, keys, k0, k1, v0, v1, dk0, dk1, dv0, dv1, db, dslope, q_ptr, do_ptr, delta_ptr, lse_ptr,
                stride_qt, stride_dot, first, second,
                length, scale * UNIT, farthest, window, prefix, documents_ptr, position_ptr, slope,
                by_key, ahead, F, DF, NORMALIZE, True, 0, SLOPE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, False,
                PRECISION, WIDE, UNIT, D1, BLOCK_Q)  # fmt: skip
    if DOCUMENTS and not WINDOW:
        for at in range(unmasked_end, end, BLOCK_Q):
            dk0, dk1, dv0, dv1, db, dslope = _backward_keys_block(
                at, keys, k0, k1, v0, v1, dk0, dk1, dv0, dv1, db, dslope, q_ptr, do_ptr, delta_ptr, lse_ptr,
                stride_qt, stride_dot, first, second,
                length, scale * UNIT, bias, window, prefix, documents_ptr, position_ptr, slope, by_key,
                ahead, F, DF, NORMALIZE, BIAS, POSITION, SLOPE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, True,
                PRECISION, WIDE, UNIT, D1, BLOCK_Q)  # fmt: skip
    inside = (keys < length)[:, None]
    at_keys = at_rows(keys, stride_dkt, WIDE)
    tl.store(dk_ptr + at_keys + first[None, :], (dk0 * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at_keys + first[None, :], dv0.to(dv_ptr.dtype.element_ty), mask=inside)
    if D1 > 1:
        tl.store(dk_ptr + at_keys + second[None, :], (dk1 * scale).to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + at_keys + second[None, :], dv1.to(dv_ptr.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(db_ptr + pair.to(tl.int64) * blocks + block, db)
    if SLOPE_GRADIENT:
        tl.store(dslope_ptr + pair.to(tl.int64) * blocks + block, dslope)


@triton.jit
def _backward_queries_block(
    at, row, rows, since, q0, q1, do0, do1, dq0, dq1, delta, lse, k_ptr, v_ptr, dtable_ptr, steps,
    stride_kt, stride_vt, first, second, length, scale, bias, window, prefix, position_ptr, slope, by_key,
    ahead,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr,
    POSITION: tl.constexpr, TABLE_GRADIENT: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    keys = at + tl.arange(0, BLOCK_K)
    k0 = load_block(k_ptr, at, first, stride_kt, length, MASK, WIDE, BLOCK_K)
    v0 = load_block(v_ptr, at, first, stride_vt, length, MASK, WIDE, BLOCK_K)
    s = dot(q0, tl.trans(k0), None, PRECISION)
    dp = dot(do0, tl.trans(v0), None, PRECISION)
    if D1 > 1:
        k1 = load_block(k_ptr, at, second, stride_kt, length, MASK, WIDE, BLOCK_K)
        v1 = load_block(v_ptr, at, second, stride_vt, length, MASK, WIDE, BLOCK_K)
        s = dot(q1, tl.trans(k1), s, PRECISION)
        dp = dot(do1, tl.trans(v1), dp, PRECISION)
    s = scores(
        s, scale, bias, lse[:, None], rows[:, None], keys[None, :], since[:, None], at,
        position_ptr, slope, by_key, ahead, BIAS, NORMALIZE == 3, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    _, ds = derive(
        s, rows[:, None], keys[None, :], since[:, None], window, prefix,
        F, DF, WINDOW, PREFIX, DOCUMENTS, MASK,
    )  # fmt: skip
    if NORMALIZE:
        dp -= delta[:, None]
    ds = ds * dp
    if TABLE_GRADIENT:
        store_by_distance(dtable_ptr, ds, row - at, steps, BLOCK_Q, BLOCK_K)
    ds = ds.to(q0.dtype)
    dq0 = dot(ds, k0, dq0, PRECISION)
    if D1 > 1:
        dq1 = dot(ds, k1, dq1, PRECISION)
    return dq0, dq1


@triton.jit
def backward_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, delta_ptr, lse_ptr, bias_ptr, position_ptr, documents_ptr,
    dtable_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dqb, stride_dqh, stride_dqt,
    heads, group, length, pairs, together, scale, window, prefix, ahead, count, constant_from,
    steps,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr,
    POSITION: tl.constexpr, TABLE_GRADIENT: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of queries. TABLE_GRADIENT: also the sums of dS by distance, of each block of
    keys nearer than where the table ends; see ``store_by_distance``."""
    blocks = tl.cdiv(length, BLOCK_Q)
    number, pair = place(blocks, pairs, together)
    block = blocks - 1 - number
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    do_ptr += batch * stride_dob + head.to(tl.int64) * stride_doh
    dq_ptr += batch * stride_dqb + head.to(tl.int64) * stride_dqh
    k_ptr += batch * stride_kb + (head // group).to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + (head // group).to(tl.int64) * stride_vh
    position_ptr += head.to(tl.int64) * count
    documents_ptr += rows_of(2 * batch, length)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if TABLE_GRADIENT:
        program = pair.to(tl.int64) * blocks + block
        dtable_ptr += program * steps * (BLOCK_Q + BLOCK_K)
    since = load_documents(documents_ptr, rows, DOCUMENTS)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    q0 = load_rows(q_ptr, rows, first, stride_qt, length, True, WIDE)
    do0 = load_rows(do_ptr, rows, first, stride_dot, length, True, WIDE)
    q1 = load_rows(q_ptr, rows, second, stride_qt, length, D1 > 1, WIDE)
    do1 = load_rows(do_ptr, rows, second, stride_dot, length, D1 > 1, WIDE)
    dq0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    inside = rows < length
    delta = tl.zeros([BLOCK_Q], tl.float32)
    if NORMALIZE:
        delta = tl.load(delta_ptr + rows_of(pair, length) + rows)
    lse = tl.zeros([BLOCK_Q], tl.float32)
    if NORMALIZE == 3:
        lse = tl.load(lse_ptr + rows_of(pair, length) + rows)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head) * UNIT
    slope, by_key = load_position(position_ptr, POSITION, NORMALIZE == 3 and not WINDOW, UNIT)
    start, seen_by_all, unmasked, end = key_range(
        block, length, window, prefix, documents_ptr, WINDOW, PREFIX, DOCUMENTS, BLOCK_Q, BLOCK_K
    )
    if DOCUMENTS and not WINDOW:
        for at in range(start, seen_by_all, BLOCK_K):
            dq0, dq1 = _backward_queries_block(
                at, block * BLOCK_Q, rows, since, q0, q1, do0, do1, dq0, dq1, delta, lse, k_ptr, v_ptr,
                dtable_ptr, steps, stride_kt, stride_vt, first, second, length, scale * UNIT, bias, window,
                prefix, position_ptr, slope, by_key, ahead, F, DF, NORMALIZE, BIAS, POSITION,
                TABLE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, True, PRECISION, WIDE, UNIT, D1, BLOCK_Q,
                BLOCK_K)  # fmt: skip
        start = seen_by_all
    if POSITION == 2 and not WINDOW:
        near = far_keys(block, start, unmasked, constant_from, BLOCK_Q, BLOCK_K)
        farthest = bias + UNIT * look_up(position_ptr, ahead + constant_from)
        for at in range(start, near, BLOCK_K):
            dq0, dq1 = _backward_queries_block(
                at, block * BLOCK_Q, rows, since, q0, q1, do0, do1, dq0, dq1, delta, lse, k_ptr, v_ptr,
                dtable_ptr, steps, stride_kt, stride_vt, first, second, length, scale * UNIT, farthest,
                window, prefix, position_ptr, slope, by_key, ahead, F, DF, NORMALIZE, True, 0, False,
                WINDOW, PREFIX, DOCUMENTS, False, PRECISION, WIDE, UNIT, D1, BLOCK_Q, BLOCK_K)  # fmt: skip
        start = near
    for at in range(start, unmasked, BLOCK_K):
        dq0, dq1 = _backward_queries_block(
            at, block * BLOCK_Q, rows, since, q0, q1, do0, do1, dq0, dq1, delta, lse, k_ptr, v_ptr,
            dtable_ptr, steps, stride_kt, stride_vt, first, second, length, scale * UNIT, bias, window,
            prefix, position_ptr, slope, by_key, ahead, F, DF, NORMALIZE, BIAS, POSITION, TABLE_GRADIENT,
            WINDOW, PREFIX, DOCUMENTS, False, PRECISION, WIDE, UNIT, D1, BLOCK_Q, BLOCK_K)  # fmt: skip
    for at in range(unmasked, end, BLOCK_K):
        dq0, dq1 = _backward_queries_block(
            at, block * BLOCK_Q, rows, since, q0, q1, do0, do1, dq0, dq1, delta, lse, k_ptr, v_ptr,
            dtable_ptr, steps, stride_kt, stride_vt, first, second, length, scale * UNIT, bias, window,
            prefix, position_ptr, slope, by_key, ahead, F, DF, NORMALIZE, BIAS, POSITION, TABLE_GRADIENT,
            WINDOW, PREFIX, DOCUMENTS, True, PRECISION, WIDE, UNIT, D1, BLOCK_Q, BLOCK_K)  # fmt: skip
    dq_rows = dq_ptr + at_rows(rows, stride_dqt, WIDE)
    tl.store(dq_rows + first[None, :], (dq0 * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])
    if D1 > 1:
        tl.store(dq_rows + second[None, :], (dq1 * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])
