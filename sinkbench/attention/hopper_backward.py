"""The backward kernels of attention on Hopper: as ``triton_backward``, with products under way while weights
and the gradients of scores are made. The products that give a block's scores and its weights' gradients start
together, behind what is left of the last block's."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from sinkbench.attention.hopper_blocks import (
    STAGES,
    add_product,
    async_load,
    barriers,
    block_of,
    expect,
    fetch,
    fetch_two,
    in_registers,
    matrices,
    meet,
    nothing,
    parts,
    product,
    release,
    result,
    ring_of,
    stage_of,
    store,
    turned,
    waited,
)
from sinkbench.attention.triton_blocks import (
    derive,
    distance_of,
    far_keys,
    far_queries,
    key_range,
    load_documents,
    load_position,
    look_up,
    place,
    query_range,
    rows_of,
    scores,
)


@gluon.jit
def _fetch_queries(
    batch, head, pair, row, q_from, do_from, delta_from, lse_from, q_ring, do_ring, delta_ring, lse_ring,
    come, stage, NORMALIZE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """Has queries, gradients and what belongs to their rows brought to a stage."""
    barrier = come.index(stage)
    BY_ROW: gl.constexpr = 4 * BLOCK_Q * ((NORMALIZE > 0) + (NORMALIZE == 3))
    expect(q_from, 2, BY_ROW, barrier)
    fetch(q_from, batch, head, row, stage_of(q_ring, stage), barrier)
    fetch(do_from, batch, head, row, stage_of(do_ring, stage), barrier)
    if NORMALIZE > 0:
        async_load(delta_from, [pair, row], barrier, delta_ring.index(stage))
    if NORMALIZE == 3:
        async_load(lse_from, [pair, row], barrier, lse_ring.index(stage))


@gluon.jit
def _backward_keys_block(
    n, start, count, batch, head, pair, keys, k, v, q_from, do_from, delta_from, lse_from, q_ring, do_ring,
    delta_ring, lse_ring, come, dk, dv, db, dslope, scale, bias, window, prefix, documents_ptr, position_ptr,
    slope, by_key, ahead,
    F: gl.constexpr, DF: gl.constexpr, NORMALIZE: gl.constexpr, BIAS: gl.constexpr, POSITION: gl.constexpr,
    BIAS_GRADIENT: gl.constexpr, SLOPE_GRADIENT: gl.constexpr, WINDOW: gl.constexpr, PREFIX: gl.constexpr,
    DOCUMENTS: gl.constexpr, MASK: gl.constexpr, UNIT: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
):  # fmt: skip
    stage = n % STAGES
    at = start + n * BLOCK_Q
    mbarrier.wait(come.index(stage), n // STAGES & 1)
    q, do = stage_of(q_ring, stage), stage_of(do_ring, stage)
    s = product(k, turned(q), BLOCK_K, BLOCK_Q)
    dp = product(v, turned(do), BLOCK_K, BLOCK_Q)
    rows = at + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, s.type.tensor_type.layout))
    since = load_documents(documents_ptr, rows, DOCUMENTS)
    s = warpgroup_mma_wait(len(k), [s])
    meet()  # all warps are done with the last block
    later = n - 1 + STAGES
    if (n > 0) & (later < count):
        free = later % STAGES
        row = start + later * BLOCK_Q
        _fetch_queries(
            batch, head, pair, row, q_from, do_from, delta_from, lse_from, q_ring, do_ring, delta_ring,
            lse_ring, come, free, NORMALIZE, BLOCK_Q)  # fmt: skip
    BY_ROW: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    lse = rows  # read for a softmax alone
    if NORMALIZE == 3:
        lse = lse_ring.index(stage).reshape([BLOCK_Q]).load(BY_ROW)
    s = scores(
        s, scale, bias, lse[None, :], rows[None, :], keys[:, None], since[None, :], at,
        position_ptr, slope, by_key, ahead, BIAS, NORMALIZE == 3, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    p, ds = derive(
        s, rows[None, :], keys[:, None], since[None, :], window, prefix,
        F, DF, WINDOW, PREFIX, DOCUMENTS, MASK,
    )  # fmt: skip
    dv = add_product(p.to(q_from[0].dtype), matrices(do), dv)
    dp = warpgroup_mma_wait(len(dv), [dp])
    if NORMALIZE:
        dp -= delta_ring.index(stage).reshape([BLOCK_Q]).load(BY_ROW)[None, :]
    ds = ds * dp
    if BIAS_GRADIENT:
        db += gl.sum(ds, 1)
    if SLOPE_GRADIENT:
        distance = distance_of(rows[None, :], keys[:, None], since[None, :], by_key, PREFIX)
        dslope -= gl.sum(ds * distance, 1)
    dk = add_product(ds.to(q_from[0].dtype), matrices(q), dk)
    return dk, dv, db, dslope


@gluon.jit
def backward_keys(
    q0, q1, k0, k1, v0, v1, do0, do1, delta_from, lse_from, dk_ptr, dv_ptr, bias_ptr, position_ptr,
    documents_ptr, db_ptr, dslope_ptr, stride_dkb, stride_dkh, stride_dkt,
    heads, group, length, pairs, together, scale, window, prefix, ahead, count, constant_from,
    F: gl.constexpr, DF: gl.constexpr, NORMALIZE: gl.constexpr, BIAS: gl.constexpr,
    POSITION: gl.constexpr, SLOPE_GRADIENT: gl.constexpr, WINDOW: gl.constexpr, PREFIX: gl.constexpr,
    DOCUMENTS: gl.constexpr, UNIT: gl.constexpr, PARTS: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
):  # fmt: skip
    """As ``triton_backward.backward_keys``, of descriptors of blocks."""
    blocks = gl.cdiv(length, BLOCK_K)
    block, pair = place(blocks, pairs, together)  # the first keys have the most queries
    head, batch = pair % heads, pair // heads
    kv = head // group
    position_ptr += head.to(gl.int64) * count
    documents_ptr += rows_of(2 * batch, length)
    # Queries beyond the end, in the last block, have a gradient of 0.
    start, masked_end, unmasked_end, end = query_range(
        block, length, window, prefix, documents_ptr, WINDOW, PREFIX, DOCUMENTS, BLOCK_Q, BLOCK_K
    )
    far = unmasked_end
    if POSITION == 2 and not WINDOW:
        far = far_queries(block, masked_end, unmasked_end, constant_from, BLOCK_Q, BLOCK_K)
    # Blocks instead of queries from here on.
    turns = gl.cdiv(gl.maximum(end - start, 0), BLOCK_Q)
    masked_end = gl.minimum(turns, gl.cdiv(gl.maximum(masked_end - start, 0), BLOCK_Q))
    far = gl.minimum(turns, gl.cdiv(gl.maximum(far - start, 0), BLOCK_Q))
    unmasked_end = gl.minimum(turns, gl.cdiv(gl.maximum(unmasked_end - start, 0), BLOCK_Q))

    q_from, k_from, v_from = parts(q0, q1, PARTS), parts(k0, k1, PARTS), parts(v0, v1, PARTS)
    do_from = parts(do0, do1, PARTS)
    k_block, v_block = block_of(k_from), block_of(v_from)
    q_ring, do_ring = ring_of(q_from), ring_of(do_from)
    delta_ring = ring_of((delta_from,))[0] if NORMALIZE > 0 else None
    lse_ring = ring_of((lse_from,))[0] if NORMALIZE == 3 else None
    own_come, come = barriers(1), barriers(STAGES)
    fetch_two(k_from, v_from, batch, kv, block * BLOCK_K, k_block, v_block, own_come.index(0))
    for n in gl.static_range(STAGES):
        if n < turns:
            _fetch_queries(
                batch, head, pair, start + n * BLOCK_Q, q_from, do_from, delta_from, lse_from,
                q_ring, do_ring, delta_ring, lse_ring, come, n, NORMALIZE, BLOCK_Q)  # fmt: skip

    KEYS: gl.constexpr = gl.SliceLayout(1, result(BLOCK_Q, gl.num_warps()))
    keys = block * BLOCK_K + gl.arange(0, BLOCK_K, layout=KEYS)
    db = gl.zeros([BLOCK_K], gl.float32, KEYS)
    dslope = gl.zeros([BLOCK_K], gl.float32, KEYS)
    bias = 0.0
    if BIAS:
        bias = gl.load(bias_ptr + head) * UNIT
    slope, by_key = load_position(position_ptr, POSITION, NORMALIZE == 3 and not WINDOW, UNIT)
    k, v = matrices(k_block), matrices(v_block)
    mbarrier.wait(own_come.index(0), 0)
    dk, dv = nothing(k_from, BLOCK_K), nothing(v_from, BLOCK_K)
    for n in range(masked_end):
        dk, dv, db, dslope = _backward_keys_block(
            n, start, turns, batch, head, pair, keys, k, v, q_from, do_from, delta_from, lse_from, q_ring,
            do_ring, delta_ring, lse_ring, come, dk, dv, db, dslope, scale * UNIT, bias, window, prefix,
            documents_ptr, position_ptr, slope, by_key, ahead, F, DF, NORMALIZE, BIAS, POSITION, BIAS,
            SLOPE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, True, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    for n in range(masked_end, far):
        dk, dv, db, dslope = _backward_keys_block(
            n, start, turns, batch, head, pair, keys, k, v, q_from, do_from, delta_from, lse_from, q_ring,
            do_ring, delta_ring, lse_ring, come, dk, dv, db, dslope, scale * UNIT, bias, window, prefix,
            documents_ptr, position_ptr, slope, by_key, ahead, F, DF, NORMALIZE, BIAS, POSITION, BIAS,
            SLOPE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, False, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    if POSITION == 2 and not WINDOW:
        farthest = bias + UNIT * look_up(position_ptr, ahead + constant_from)
        for n in range(far, unmasked_end):
            dk, dv, db, dslope = _backward_keys_block(
                n, start, turns, batch, head, pair, keys, k, v, q_from, do_from, delta_from, lse_from, q_ring,
                do_ring, delta_ring, lse_ring, come, dk, dv, db, dslope, scale * UNIT, farthest, window,
                prefix, documents_ptr, position_ptr, slope, by_key, ahead, F, DF, NORMALIZE, True, 0, BIAS,
                SLOPE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, False, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    if DOCUMENTS and not WINDOW:
        for n in range(unmasked_end, turns):
            dk, dv, db, dslope = _backward_keys_block(
                n, start, turns, batch, head, pair, keys, k, v, q_from, do_from, delta_from, lse_from, q_ring,
                do_ring, delta_ring, lse_ring, come, dk, dv, db, dslope, scale * UNIT, bias, window, prefix,
                documents_ptr, position_ptr, slope, by_key, ahead, F, DF, NORMALIZE, BIAS, POSITION, BIAS,
                SLOPE_GRADIENT, WINDOW, PREFIX, DOCUMENTS, True, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    dk, dv = waited(dk), waited(dv)
    release(own_come, 1)
    release(come, STAGES)
    offset = batch.to(gl.int64) * stride_dkb + head.to(gl.int64) * stride_dkh
    store(dk_ptr + offset, stride_dkt, dk, block * BLOCK_K, length, scale)
    store(dv_ptr + offset, stride_dkt, dv, block * BLOCK_K, length, 1.0)
    if BIAS:
        gl.store(db_ptr + pair.to(gl.int64) * blocks + block, gl.sum(db, 0))
    if SLOPE_GRADIENT:
        gl.store(dslope_ptr + pair.to(gl.int64) * blocks + block, gl.sum(dslope, 0))


@gluon.jit
def _backward_queries_block(
    n, start, count, batch, kv, rows, since, q, do, k_from, v_from, k_ring, v_ring, come, dq, delta, lse,
    scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
    F: gl.constexpr, DF: gl.constexpr, NORMALIZE: gl.constexpr, BIAS: gl.constexpr,
    POSITION: gl.constexpr, WINDOW: gl.constexpr, PREFIX: gl.constexpr,
    DOCUMENTS: gl.constexpr, MASK: gl.constexpr, UNIT: gl.constexpr, SHARED: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    stage = n % STAGES
    at = start + n * BLOCK_K
    mbarrier.wait(come.index(stage), n // STAGES & 1)
    k, v = stage_of(k_ring, stage), stage_of(v_ring, stage)
    s = product(q, turned(k), BLOCK_Q, BLOCK_K)
    if SHARED:  # frees the registers of the last block's left side before more are needed
        dq = [warpgroup_mma_wait(len(q), [part]) for part in dq]
    dp = product(do, turned(v), BLOCK_Q, BLOCK_K)
    keys = at + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, s.type.tensor_type.layout))
    s = warpgroup_mma_wait(len(q), [s])
    meet()  # all warps are done with the last block
    later = n - 1 + STAGES
    if (n > 0) & (later < count):
        free = later % STAGES
        key = start + later * BLOCK_K
        fetch_two(
            k_from, v_from, batch, kv, key, stage_of(k_ring, free), stage_of(v_ring, free), come.index(free)
        )
    s = scores(
        s, scale, bias, lse[:, None], rows[:, None], keys[None, :], since[:, None], at,
        position_ptr, slope, by_key, ahead, BIAS, NORMALIZE == 3, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    _, ds = derive(
        s, rows[:, None], keys[None, :], since[:, None], window, prefix,
        F, DF, WINDOW, PREFIX, DOCUMENTS, MASK,
    )  # fmt: skip
    dp = warpgroup_mma_wait(0, [dp])
    if NORMALIZE:
        dp -= delta[:, None]
    ds = ds * dp
    return add_product(ds.to(k_from[0].dtype), matrices(k), dq)


@gluon.jit
def backward_queries(
    q0, q1, k0, k1, v0, v1, do0, do1, dq_ptr, delta_ptr, lse_ptr, bias_ptr, position_ptr, documents_ptr,
    stride_dqb, stride_dqh, stride_dqt,
    heads, group, length, pairs, together, scale, window, prefix, ahead, count, constant_from,
    F: gl.constexpr, DF: gl.constexpr, NORMALIZE: gl.constexpr, BIAS: gl.constexpr,
    POSITION: gl.constexpr, WINDOW: gl.constexpr, PREFIX: gl.constexpr,
    DOCUMENTS: gl.constexpr, UNIT: gl.constexpr, PARTS: gl.constexpr, SHARED: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """As ``triton_backward.backward_queries``, of descriptors of blocks. SHARED: queries and gradients stay
    in shared memory, which takes longer to read and leaves registers for a third program."""
    blocks = gl.cdiv(length, BLOCK_Q)
    number, pair = place(blocks, pairs, together)
    block = blocks - 1 - number
    head, batch = pair % heads, pair // heads
    kv = head // group
    row = block * BLOCK_Q
    position_ptr += head.to(gl.int64) * count
    documents_ptr += rows_of(2 * batch, length)
    start, seen_by_all, unmasked, end = key_range(
        block, length, window, prefix, documents_ptr, WINDOW, PREFIX, DOCUMENTS, BLOCK_Q, BLOCK_K
    )
    near = start
    if POSITION == 2 and not WINDOW:
        near = far_keys(block, seen_by_all, unmasked, constant_from, BLOCK_Q, BLOCK_K)
    # Blocks instead of keys from here on.
    turns = gl.cdiv(end - start, BLOCK_K)
    seen_by_all = (seen_by_all - start) // BLOCK_K
    near = gl.maximum(seen_by_all, (near - start) // BLOCK_K)
    unmasked = gl.maximum(near, (unmasked - start) // BLOCK_K)

    q_from, k_from, v_from = parts(q0, q1, PARTS), parts(k0, k1, PARTS), parts(v0, v1, PARTS)
    do_from = parts(do0, do1, PARTS)
    q_block, do_block = block_of(q_from), block_of(do_from)
    k_ring, v_ring = ring_of(k_from), ring_of(v_from)
    own_come, come = barriers(1), barriers(STAGES)
    fetch_two(q_from, do_from, batch, head, row, q_block, do_block, own_come.index(0))
    for n in gl.static_range(STAGES):
        if n < turns:
            at = start + n * BLOCK_K
            fetch_two(k_from, v_from, batch, kv, at, stage_of(k_ring, n), stage_of(v_ring, n), come.index(n))

    SCORES: gl.constexpr = result(BLOCK_K, gl.num_warps())
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    rows = row + gl.arange(0, BLOCK_Q, layout=ROWS)
    since = load_documents(documents_ptr, rows, DOCUMENTS)
    delta = gl.zeros([BLOCK_Q], gl.float32, ROWS)
    if NORMALIZE:
        delta = gl.load(delta_ptr + rows_of(pair, length) + rows)
    lse = gl.zeros([BLOCK_Q], gl.float32, ROWS)
    if NORMALIZE == 3:
        lse = gl.load(lse_ptr + rows_of(pair, length) + rows)
    bias = 0.0
    if BIAS:
        bias = gl.load(bias_ptr + head) * UNIT
    slope, by_key = load_position(position_ptr, POSITION, NORMALIZE == 3 and not WINDOW, UNIT)
    mbarrier.wait(own_come.index(0), 0)
    if SHARED:
        q, do = matrices(q_block), matrices(do_block)
    else:
        q = in_registers(q_block, gl.DotOperandLayout(0, SCORES, 2))
        do = in_registers(do_block, gl.DotOperandLayout(0, SCORES, 2))
    dq = nothing(q_from, BLOCK_Q)
    if DOCUMENTS and not WINDOW:
        for n in range(seen_by_all):
            dq = _backward_queries_block(
                n, start, turns, batch, kv, rows, since, q, do, k_from, v_from, k_ring, v_ring, come, dq,
                delta, lse, scale * UNIT, bias, window, prefix, position_ptr, slope, by_key,
                ahead, F, DF, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, True, UNIT, SHARED,
                BLOCK_Q, BLOCK_K)  # fmt: skip
    if POSITION == 2 and not WINDOW:
        farthest = bias + UNIT * look_up(position_ptr, ahead + constant_from)
        for n in range(seen_by_all, near):
            dq = _backward_queries_block(
                n, start, turns, batch, kv, rows, since, q, do, k_from, v_from, k_ring, v_ring, come, dq,
                delta, lse, scale * UNIT, farthest, window, prefix, position_ptr, slope,
                by_key, ahead, F, DF, NORMALIZE, True, 0, WINDOW, PREFIX, DOCUMENTS, False, UNIT, SHARED,
                BLOCK_Q, BLOCK_K)  # fmt: skip
    for n in range(near, unmasked):
        dq = _backward_queries_block(
            n, start, turns, batch, kv, rows, since, q, do, k_from, v_from, k_ring, v_ring, come, dq,
            delta, lse, scale * UNIT, bias, window, prefix, position_ptr, slope, by_key,
            ahead, F, DF, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, False, UNIT, SHARED,
            BLOCK_Q, BLOCK_K)  # fmt: skip
    for n in range(unmasked, turns):
        dq = _backward_queries_block(
            n, start, turns, batch, kv, rows, since, q, do, k_from, v_from, k_ring, v_ring, come, dq,
            delta, lse, scale * UNIT, bias, window, prefix, position_ptr, slope, by_key,
            ahead, F, DF, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, True, UNIT, SHARED,
            BLOCK_Q, BLOCK_K)  # fmt: skip
    dq = waited(dq)
    release(own_come, 1)
    release(come, STAGES)
    offset = batch.to(gl.int64) * stride_dqb + head.to(gl.int64) * stride_dqh
    store(dq_ptr + offset, stride_dqt, dq, row, length, scale)
