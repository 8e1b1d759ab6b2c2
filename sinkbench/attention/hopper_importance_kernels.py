"""The kernels of ``triton_importance`` for Hopper. Several programs fit a multiprocessor: one waits for its
product while others sum weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from sinkbench.attention.hopper_blocks import (
    STAGES,
    async_load,
    barriers,
    block_of,
    expect,
    fetch,
    fetch_one,
    in_registers,
    matrices,
    meet,
    parts,
    product,
    release,
    result,
    ring_of,
    stage_of,
    turned,
)
from sinkbench.attention.triton_blocks import key_range, load_position, place, scores, visible
from sinkbench.attention.triton_importance_kernels import (
    add_weights,
    share_of_queries,
    store_column_sums,
    store_row_sums,
)
from sinkbench.triton_math import exp2


@gluon.jit
def _keys_at(n, masked, start, unmasked, BLOCK_K: gl.constexpr):
    """The keys of a row's n-th block: those that not all rows see come first."""
    return gl.where(n < masked, unmasked + n * BLOCK_K, start + (n - masked) * BLOCK_K)


@gluon.jit
def _row_sums_block(
    n, turns, masked, start, unmasked, batch, kv, rows, q, k_from, k_ring, come, total, absolute, largest,
    scale, bias, window, prefix, position_ptr, slope, ahead,
    F: gl.constexpr, SOFTMAX: gl.constexpr, BIAS: gl.constexpr, POSITION: gl.constexpr,
    WINDOW: gl.constexpr, PREFIX: gl.constexpr, MASK: gl.constexpr, LEVEL: gl.constexpr,
    UNIT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    stage = n % STAGES
    mbarrier.wait(come.index(stage), n // STAGES & 1)
    s = product(q, turned(stage_of(k_ring, stage)), BLOCK_Q, BLOCK_K)
    s = warpgroup_mma_wait(0, [s])
    meet()
    if n + STAGES < turns:
        there = _keys_at(n + STAGES, masked, start, unmasked, BLOCK_K)
        fetch_one(k_from, batch, kv, there, stage_of(k_ring, stage), come.index(stage))
    at = _keys_at(n, masked, start, unmasked, BLOCK_K)
    keys = at + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, s.type.layout))
    s = scores(
        s, scale, bias, 0.0, rows[:, None], keys[None, :], 0, at, position_ptr, slope, False, ahead,
        BIAS, False, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    seen = s
    if MASK:
        seen = visible(rows[:, None], keys[None, :], 0, window, prefix, WINDOW, PREFIX, False)
    return add_weights(s, seen, total, absolute, largest, F, SOFTMAX, MASK, LEVEL)


@gluon.jit
def row_sums(
    q0, q1, k0, k1, first_ptr, second_ptr, bias_ptr, position_ptr,
    heads, group, length, pairs, together, scale, window, prefix, ahead, count,
    F: gl.constexpr, SOFTMAX: gl.constexpr, BIAS: gl.constexpr, POSITION: gl.constexpr,
    WINDOW: gl.constexpr, PREFIX: gl.constexpr, UNIT: gl.constexpr, PARTS: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """As ``triton_importance_kernels.row_sums``, of descriptors of blocks."""
    blocks = gl.cdiv(length, BLOCK_Q)
    number, pair = place(blocks, pairs, together)
    block = blocks - 1 - number
    head, batch = pair % heads, pair // heads
    kv = head // group
    position_ptr += head.to(gl.int64) * count
    start, _, unmasked, end = key_range(
        block, length, window, prefix, 0, WINDOW, PREFIX, False, BLOCK_Q, BLOCK_K
    )
    masked = gl.cdiv(end - unmasked, BLOCK_K)
    turns = masked + (unmasked - start) // BLOCK_K

    q_from, k_from = parts(q0, q1, PARTS), parts(k0, k1, PARTS)
    q_block, k_ring = block_of(q_from), ring_of(k_from)
    own_come, come = barriers(1), barriers(STAGES)
    fetch_one(q_from, batch, head, block * BLOCK_Q, q_block, own_come.index(0))
    for i in gl.static_range(STAGES):
        if i < turns:
            there = _keys_at(i, masked, start, unmasked, BLOCK_K)
            fetch_one(k_from, batch, kv, there, stage_of(k_ring, i), come.index(i))

    SCORES: gl.constexpr = result(BLOCK_K, gl.num_warps())
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    rows = block * BLOCK_Q + gl.arange(0, BLOCK_Q, layout=ROWS)
    bias = 0.0
    if BIAS:
        bias = gl.load(bias_ptr + head) * UNIT
    slope, _ = load_position(position_ptr, POSITION, False, UNIT)
    total = gl.zeros([BLOCK_Q], gl.float32, ROWS)
    absolute = gl.zeros([BLOCK_Q], gl.float32, ROWS)
    largest = gl.full([BLOCK_Q], float("-inf"), gl.float32, ROWS)
    mbarrier.wait(own_come.index(0), 0)
    q = in_registers(q_block, gl.DotOperandLayout(0, SCORES, 2))
    for n in range(masked):
        total, absolute, largest = _row_sums_block(
            n, turns, masked, start, unmasked, batch, kv, rows, q, k_from, k_ring, come, total, absolute,
            largest, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, True, False, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    if not WINDOW:
        # As in the Triton kernel: no sum is too small, and only where one is too large are these keys looked
        # at for the largest score.
        so_far = total
        for n in range(masked, turns):
            total, absolute, largest = _row_sums_block(
                n, turns, masked, start, unmasked, batch, kv, rows, q, k_from, k_ring, come, total, absolute,
                largest, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, False, True, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
        if SOFTMAX:
            beyond = (total == float("inf")) | (largest == float("-inf"))
            again = gl.max(beyond.to(gl.int32), 0)
            total = gl.where(again > 0, so_far, total)
            meet()
            for n in range(turns, gl.where(again > 0, 2 * turns - masked, turns)):
                stage = n % STAGES
                at = start + (n - turns) * BLOCK_K
                fetch_one(k_from, batch, kv, at, stage_of(k_ring, stage), come.index(stage))
                mbarrier.wait(come.index(stage), n // STAGES & 1)
                s = product(q, turned(stage_of(k_ring, stage)), BLOCK_Q, BLOCK_K)
                s = warpgroup_mma_wait(0, [s])
                meet()
                keys = at + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, SCORES))
                more = scores(
                    s, scale * UNIT, bias, 0.0, rows[:, None], keys[None, :], 0, at, position_ptr, slope,
                    False, ahead, BIAS, False, POSITION, PREFIX, UNIT,
                )  # fmt: skip
                total, absolute, largest = add_weights(
                    more, more, total, absolute, largest, F, SOFTMAX, False, False
                )
    release(own_come, 1)
    release(come, STAGES)
    at_row = pair.to(gl.int64) * length + rows
    store_row_sums(total, absolute, largest, first_ptr, second_ptr, at_row, rows < length, SOFTMAX, UNIT)


@gluon.jit
def _fetch_rows(
    batch, head, pair, row, q_from, raw_from, proxy_from, q_ring, raw_ring, proxy_ring, come, stage,
    PROXY: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    barrier = come.index(stage)
    expect(q_from, 1, 4 * BLOCK_Q * (2 if PROXY else 1), barrier)
    fetch(q_from, batch, head, row, stage_of(q_ring, stage), barrier)
    async_load(raw_from, [pair, row], barrier, raw_ring.index(stage))
    if PROXY:
        async_load(proxy_from, [pair, row], barrier, proxy_ring.index(stage))


@gluon.jit
def _column_sums_block(
    n, turns, start, step, batch, head, pair, keys, k, q_from, raw_from, proxy_from, q_ring, raw_ring,
    proxy_ring, come, raw, proxy, scale, bias, window, prefix, position_ptr, slope, ahead,
    F: gl.constexpr, SOFTMAX: gl.constexpr, PROXY: gl.constexpr, BIAS: gl.constexpr,
    POSITION: gl.constexpr, WINDOW: gl.constexpr, PREFIX: gl.constexpr, MASK: gl.constexpr,
    UNIT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    stage = n % STAGES
    mbarrier.wait(come.index(stage), n // STAGES & 1)
    s = product(k, turned(stage_of(q_ring, stage)), BLOCK_K, BLOCK_Q)
    s = warpgroup_mma_wait(0, [s])
    BY_ROW: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    of_row = raw_ring.index(stage).reshape([BLOCK_Q]).load(BY_ROW)
    factor = of_row
    if PROXY:
        factor = proxy_ring.index(stage).reshape([BLOCK_Q]).load(BY_ROW)
    meet()
    if n + STAGES < turns:
        _fetch_rows(
            batch, head, pair, start + (n + STAGES) * step, q_from, raw_from, proxy_from, q_ring, raw_ring,
            proxy_ring, come, stage, PROXY, BLOCK_Q)  # fmt: skip
    at = start + n * step
    rows = at + gl.arange(0, BLOCK_Q, layout=BY_ROW)
    s = scores(
        s, scale, bias, 0.0, rows[None, :], keys[:, None], 0, at, position_ptr, slope, False, ahead,
        BIAS, False, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    # What is added takes an instruction less than what is subtracted.
    p = exp2(s + of_row[None, :]) if SOFTMAX else F(s)
    if MASK:
        seen = visible(rows[None, :], keys[:, None], 0, window, prefix, WINDOW, PREFIX, False)
        p = gl.where(seen & (rows[None, :] >= keys[:, None]), p, 0.0)
    raw += gl.sum(p, 1) if SOFTMAX else gl.sum(p * of_row[None, :], 1)
    if PROXY:
        proxy += gl.sum(gl.abs(p) * factor[None, :], 1)
    return raw, proxy


@gluon.jit
def column_sums(
    q0, q1, k0, k1, raw_from, proxy_from, bias_ptr, position_ptr, out_ptr,
    heads, group, length, pairs, together, columns, offset, scale, window, prefix, ahead, count,
    F: gl.constexpr, SOFTMAX: gl.constexpr, PROXY: gl.constexpr, BIAS: gl.constexpr,
    POSITION: gl.constexpr, WINDOW: gl.constexpr, PREFIX: gl.constexpr, UNIT: gl.constexpr,
    PARTS: gl.constexpr, REGISTERS: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """As ``triton_importance_kernels.column_sums``, of descriptors of blocks. REGISTERS: keys are read into
    them, which takes less time where as many programs fit."""
    block, pair = place(gl.cdiv(columns, BLOCK_K), pairs, together)
    part = gl.program_id(1)
    head, batch = pair % heads, pair // heads
    kv = head // group
    position_ptr += head.to(gl.int64) * count
    key = offset + block * BLOCK_K
    start, step, masked, end = share_of_queries(
        key, part, length, window, prefix, WINDOW, PREFIX, BLOCK_Q, BLOCK_K
    )
    turns = gl.cdiv(gl.maximum(end - start, 0), step)

    q_from, k_from = parts(q0, q1, PARTS), parts(k0, k1, PARTS)
    k_block, q_ring = block_of(k_from), ring_of(q_from)
    raw_ring = ring_of((raw_from,))[0]
    proxy_ring = ring_of((proxy_from,))[0] if PROXY else None
    own_come, come = barriers(1), barriers(STAGES)
    fetch_one(k_from, batch, kv, key, k_block, own_come.index(0))
    for i in gl.static_range(STAGES):
        if i < turns:
            _fetch_rows(
                batch, head, pair, start + i * step, q_from, raw_from, proxy_from, q_ring, raw_ring,
                proxy_ring, come, i, PROXY, BLOCK_Q)  # fmt: skip

    SCORES: gl.constexpr = result(BLOCK_Q, gl.num_warps())
    KEYS: gl.constexpr = gl.SliceLayout(1, SCORES)
    keys = key + gl.arange(0, BLOCK_K, layout=KEYS)
    bias = 0.0
    if BIAS:
        bias = gl.load(bias_ptr + head) * UNIT
    slope, _ = load_position(position_ptr, POSITION, False, UNIT)
    raw = gl.zeros([BLOCK_K], gl.float32, KEYS)
    proxy = gl.zeros([BLOCK_K], gl.float32, KEYS)
    mbarrier.wait(own_come.index(0), 0)
    k = in_registers(k_block, gl.DotOperandLayout(0, SCORES, 2)) if REGISTERS else matrices(k_block)
    for n in range(masked):
        raw, proxy = _column_sums_block(
            n, turns, start, step, batch, head, pair, keys, k, q_from, raw_from, proxy_from, q_ring, raw_ring,
            proxy_ring, come, raw, proxy, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, PROXY, BIAS, POSITION, WINDOW, PREFIX, True, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    if not WINDOW:
        for n in range(masked, turns):
            raw, proxy = _column_sums_block(
                n, turns, start, step, batch, head, pair, keys, k, q_from, raw_from, proxy_from, q_ring,
                raw_ring, proxy_ring, come, raw, proxy, scale * UNIT, bias, window, prefix, position_ptr,
                slope, ahead, F, SOFTMAX, PROXY, BIAS, POSITION, WINDOW, PREFIX, False,
                UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    release(own_come, 1)
    release(come, STAGES)
    within = block * BLOCK_K + gl.arange(0, BLOCK_K, layout=KEYS)
    store_column_sums(raw, proxy, out_ptr, within, part, pair, pairs, columns, PROXY)
