"""The forward kernel of attention on Hopper: as ``triton_forward``, with the product of a block's weights and
values under way while the next block's weights are made."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from sinkbench.attention.hopper_blocks import (
    STAGES,
    add_product,
    barriers,
    block_of,
    fetch_one,
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
    under_way,
    waited,
)
from sinkbench.attention.triton_blocks import (
    divisor,
    far_keys,
    key_range,
    load_documents,
    load_position,
    look_up,
    place,
    rows_of,
    scores,
    visible,
    weigh,
)


@gluon.jit
def _weights(
    s, at, rows, since, r, largest, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
    F: gl.constexpr, NORMALIZE: gl.constexpr, BIAS: gl.constexpr, POSITION: gl.constexpr,
    WINDOW: gl.constexpr, PREFIX: gl.constexpr, DOCUMENTS: gl.constexpr, MASK: gl.constexpr,
    UNIT: gl.constexpr,
):  # fmt: skip
    """Weights of a block, the rows' sums and largest scores, and what a softmax's outputs fade by."""
    keys = at + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    s = scores(
        s, scale, bias, 0.0, rows[:, None], keys[None, :], since[:, None], at,
        position_ptr, slope, by_key, ahead, BIAS, False, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    seen = s
    if MASK:
        seen = visible(
            rows[:, None], keys[None, :], since[:, None], window, prefix, WINDOW, PREFIX, DOCUMENTS
        )
    return weigh(s, seen, r, largest, F, NORMALIZE, MASK)


@gluon.jit
def _times(part, by_row):
    return part * gl.convert_layout(by_row, gl.SliceLayout(1, part.type.layout))[:, None]


@gluon.jit
def _forward_block(
    n, start, count, batch, kv, rows, since, q, k_from, v_from, k_ring, v_ring, k_come, v_come, p, o, r,
    largest, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
    F: gl.constexpr, NORMALIZE: gl.constexpr, BIAS: gl.constexpr, POSITION: gl.constexpr,
    WINDOW: gl.constexpr, PREFIX: gl.constexpr, DOCUMENTS: gl.constexpr, MASK: gl.constexpr,
    UNIT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Weights of block n, and the outputs with the weights ``p`` of the block before it."""
    stage, last = n % STAGES, (n - 1) % STAGES
    mbarrier.wait(k_come.index(stage), n // STAGES & 1)
    s = product(q, turned(stage_of(k_ring, stage)), BLOCK_Q, BLOCK_K)
    mbarrier.wait(v_come.index(last), (n - 1) // STAGES & 1)
    o = add_product(p, matrices(stage_of(v_ring, last)), o)
    s = warpgroup_mma_wait(len(q), [s])
    meet()
    if n + STAGES < count:
        later = start + (n + STAGES) * BLOCK_K
        fetch_one(k_from, batch, kv, later, stage_of(k_ring, stage), k_come.index(stage))
    p, r, largest, fade = _weights(
        s, start + n * BLOCK_K, rows, since, r, largest, scale, bias, window, prefix, position_ptr, slope,
        by_key, ahead, F, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, MASK, UNIT,
    )  # fmt: skip
    p = p.to(k_from[0].dtype)
    o = waited(o)
    meet()
    if n - 1 + STAGES < count:
        later = start + (n - 1 + STAGES) * BLOCK_K
        fetch_one(v_from, batch, kv, later, stage_of(v_ring, last), v_come.index(last))
    if NORMALIZE == 3:
        o = [_times(part, fade) for part in o]
    return p, under_way(o), r, largest


@gluon.jit
def forward(
    q0, q1, k0, k1, v0, v1, o_ptr, r_ptr, bias_ptr, position_ptr, documents_ptr,
    stride_ob, stride_oh, stride_ot,
    heads, group, length, pairs, together, scale, eps, window, prefix, ahead, count, constant_from,
    F: gl.constexpr, NORMALIZE: gl.constexpr, BIAS: gl.constexpr, POSITION: gl.constexpr,
    WINDOW: gl.constexpr, PREFIX: gl.constexpr, DOCUMENTS: gl.constexpr, UNIT: gl.constexpr,
    PARTS: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """As ``triton_forward.forward``, of descriptors of blocks of queries, keys and values."""
    blocks = gl.cdiv(length, BLOCK_Q)
    number, pair = place(blocks, pairs, together)
    block = blocks - 1 - number  # longest rows first
    head, batch = pair % heads, pair // heads
    kv = head // group
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
    near = (near - start) // BLOCK_K
    unmasked = (unmasked - start) // BLOCK_K

    q_from, k_from, v_from = parts(q0, q1, PARTS), parts(k0, k1, PARTS), parts(v0, v1, PARTS)
    q_block, k_ring, v_ring = block_of(q_from), ring_of(k_from), ring_of(v_from)
    q_come, k_come, v_come = barriers(1), barriers(STAGES), barriers(STAGES)
    fetch_one(q_from, batch, head, block * BLOCK_Q, q_block, q_come.index(0))
    for n in gl.static_range(STAGES):
        if n < turns:
            at = start + n * BLOCK_K
            fetch_one(k_from, batch, kv, at, stage_of(k_ring, n), k_come.index(n))
            fetch_one(v_from, batch, kv, at, stage_of(v_ring, n), v_come.index(n))

    SCORES: gl.constexpr = result(BLOCK_K, gl.num_warps())
    rows = block * BLOCK_Q + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(1, SCORES))
    since = load_documents(documents_ptr, rows, DOCUMENTS)
    r = gl.zeros([BLOCK_Q], gl.float32, gl.SliceLayout(1, SCORES))
    largest = gl.full([BLOCK_Q], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    scale *= UNIT
    bias = 0.0
    if BIAS:
        bias = gl.load(bias_ptr + head) * UNIT
    slope, by_key = load_position(position_ptr, POSITION, NORMALIZE == 3 and not WINDOW, UNIT)
    mbarrier.wait(q_come.index(0), 0)
    q = in_registers(q_block, gl.DotOperandLayout(0, SCORES, 2))

    mbarrier.wait(k_come.index(0), 0)
    s = product(q, turned(stage_of(k_ring, 0)), BLOCK_Q, BLOCK_K)
    s = warpgroup_mma_wait(0, [s])
    meet()
    if turns > STAGES:
        fetch_one(k_from, batch, kv, start + STAGES * BLOCK_K, stage_of(k_ring, 0), k_come.index(0))
    p, r, largest, _ = _weights(
        s, start, rows, since, r, largest, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
        F, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, True, UNIT,
    )  # fmt: skip
    p = p.to(k_from[0].dtype)
    o = nothing(q_from, BLOCK_Q)
    if DOCUMENTS and not WINDOW:
        for n in range(1, seen_by_all):
            p, o, r, largest = _forward_block(
                n, start, turns, batch, kv, rows, since, q, k_from, v_from, k_ring, v_ring, k_come, v_come, p,
                o, r, largest, scale, bias, window, prefix, position_ptr, slope, by_key, ahead, F, NORMALIZE,
                BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, True, UNIT, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    if POSITION == 2 and not WINDOW:
        farthest = bias + UNIT * look_up(position_ptr, ahead + constant_from)
        for n in range(gl.maximum(seen_by_all, 1), near):
            p, o, r, largest = _forward_block(
                n, start, turns, batch, kv, rows, since, q, k_from, v_from, k_ring, v_ring, k_come, v_come, p,
                o, r, largest, scale, farthest, window, prefix, position_ptr, slope, by_key, ahead, F,
                NORMALIZE, True, 0, WINDOW, PREFIX, DOCUMENTS, False, UNIT, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    for n in range(gl.maximum(gl.maximum(seen_by_all, near), 1), unmasked):
        p, o, r, largest = _forward_block(
            n, start, turns, batch, kv, rows, since, q, k_from, v_from, k_ring, v_ring, k_come, v_come, p, o,
            r, largest, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
            F, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, False, UNIT, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    for n in range(gl.maximum(unmasked, 1), turns):
        p, o, r, largest = _forward_block(
            n, start, turns, batch, kv, rows, since, q, k_from, v_from, k_ring, v_ring, k_come, v_come, p, o,
            r, largest, scale, bias, window, prefix, position_ptr, slope, by_key, ahead,
            F, NORMALIZE, BIAS, POSITION, WINDOW, PREFIX, DOCUMENTS, True, UNIT, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    last = (turns - 1) % STAGES
    mbarrier.wait(v_come.index(last), (turns - 1) // STAGES & 1)
    o = waited(add_product(p, matrices(stage_of(v_ring, last)), o))
    release(q_come, 1)
    release(k_come, STAGES)
    release(v_come, STAGES)
    if NORMALIZE:
        r_rows = r_ptr + pair.to(gl.int64) * length + rows
        r = divisor(r, largest, eps, r_rows, rows < length, NORMALIZE, UNIT)
        o = [_times(part, 1.0 / r) for part in o]
    store(
        o_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh,
        stride_ot,
        o,
        block * BLOCK_Q,
        length,
        1.0,
    )
