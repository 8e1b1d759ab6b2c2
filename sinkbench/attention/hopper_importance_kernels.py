"""The kernels of ``triton_importance`` for Hopper. Several programs fit a multiprocessor: one waits for its
product while others sum weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from sinkbench.attention.hopper_blocks import (
    STAGES,
    barriers,
    block_of,
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
def _sums_by_thread(p):
    """Sums [rows, 4] of p [rows, columns], in the layout of a product, each of columns that one thread has: a
    loop then exchanges nothing between threads."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _row_sums_block(
    n, turns, masked, start, unmasked, batch, kv, rows, q, k_from, k_ring, come, total, absolute, largest,
    scale, bias, window, prefix, position_ptr, slope, ahead,
    F: gl.constexpr, SOFTMAX: gl.constexpr, BIAS: gl.constexpr, POSITION: gl.constexpr,
    WINDOW: gl.constexpr, PREFIX: gl.constexpr, MASK: gl.constexpr, UNIT: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Without MASK, ``total`` and ``absolute`` are ``_sums_by_thread``, of weights beside ``largest``."""
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
    if MASK:
        seen = visible(rows[:, None], keys[None, :], 0, window, prefix, WINDOW, PREFIX, False)
        total, absolute, largest = add_weights(s, seen, total, absolute, largest, F, SOFTMAX, True, False)
    elif SOFTMAX:
        total += _sums_by_thread(exp2(s - largest[:, None]))
    else:
        p = F(s)
        total += _sums_by_thread(p)
        absolute += _sums_by_thread(gl.abs(p))
    return total, absolute, largest


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
            F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, True, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    if not WINDOW:
        # As in the Triton kernel: no sum is too small, and only where one is too large are these keys looked
        # at for the largest score.
        so_far = total
        more = _sums_by_thread(gl.zeros([BLOCK_Q, BLOCK_K], gl.float32, SCORES))
        more_absolute = more
        for n in range(masked, turns):
            more, more_absolute, largest = _row_sums_block(
                n, turns, masked, start, unmasked, batch, kv, rows, q, k_from, k_ring, come, more,
                more_absolute, largest, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                F, SOFTMAX, BIAS, POSITION, WINDOW, PREFIX, False, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
        total += gl.convert_layout(gl.sum(more, 1), ROWS)
        absolute += gl.convert_layout(gl.sum(more_absolute, 1), ROWS)
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
                s = scores(
                    s, scale * UNIT, bias, 0.0, rows[:, None], keys[None, :], 0, at, position_ptr, slope,
                    False, ahead, BIAS, False, POSITION, PREFIX, UNIT,
                )  # fmt: skip
                total, absolute, largest = add_weights(
                    s, s, total, absolute, largest, F, SOFTMAX, False, False
                )
    release(own_come, 1)
    release(come, STAGES)
    at_row = pair.to(gl.int64) * length + rows
    store_row_sums(total, absolute, largest, first_ptr, second_ptr, at_row, rows < length, SOFTMAX, UNIT)


@gluon.jit
def _column_sums_block(
    n, turns, start, step, batch, head, keys, k, q_from, raw_ptr, proxy_ptr, q_ring, come, raw, proxy,
    scale, bias, window, prefix, position_ptr, slope, ahead,
    F: gl.constexpr, SOFTMAX: gl.constexpr, PROXY: gl.constexpr, BIAS: gl.constexpr,
    POSITION: gl.constexpr, WINDOW: gl.constexpr, PREFIX: gl.constexpr, MASK: gl.constexpr,
    UNIT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    stage = n % STAGES
    at = start + n * step
    mbarrier.wait(come.index(stage), n // STAGES & 1)
    s = product(k, turned(stage_of(q_ring, stage)), BLOCK_K, BLOCK_Q)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, result(BLOCK_Q, gl.num_warps()))
    rows = at + gl.arange(0, BLOCK_Q, layout=BY_ROW)
    of_row = gl.load(raw_ptr + rows)
    factor = of_row
    if PROXY:
        factor = gl.load(proxy_ptr + rows)
    s = warpgroup_mma_wait(0, [s])
    meet()
    if n + STAGES < turns:
        there = start + (n + STAGES) * step
        fetch_one(q_from, batch, head, there, stage_of(q_ring, stage), come.index(stage))
    s = scores(
        s, scale, bias, 0.0, rows[None, :], keys[:, None], 0, at, position_ptr, slope, False, ahead,
        BIAS, False, POSITION, PREFIX, UNIT,
    )  # fmt: skip
    # What is added takes an instruction less than what is subtracted.
    p = exp2(s + of_row[None, :]) if SOFTMAX else F(s)
    if MASK:
        seen = visible(rows[None, :], keys[:, None], 0, window, prefix, WINDOW, PREFIX, False)
        p = gl.where(seen & (rows[None, :] >= keys[:, None]), p, 0.0)
    raw += _sums_by_thread(p if SOFTMAX else p * of_row[None, :])
    if PROXY:
        proxy += _sums_by_thread(gl.abs(p) * factor[None, :])
    return raw, proxy


@gluon.jit
def column_sums(
    q0, q1, k0, k1, raw_ptr, proxy_ptr, bias_ptr, position_ptr, out_ptr, rows_stride,
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
    raw_ptr += pair.to(gl.int64) * rows_stride
    if PROXY:
        proxy_ptr += pair.to(gl.int64) * rows_stride
    key = offset + block * BLOCK_K
    start, step, masked, end = share_of_queries(
        key, part, length, window, prefix, WINDOW, PREFIX, BLOCK_Q, BLOCK_K
    )
    turns = gl.cdiv(gl.maximum(end - start, 0), step)

    q_from, k_from = parts(q0, q1, PARTS), parts(k0, k1, PARTS)
    k_block, q_ring = block_of(k_from), ring_of(q_from)
    own_come, come = barriers(1), barriers(STAGES)
    fetch_one(k_from, batch, kv, key, k_block, own_come.index(0))
    for i in gl.static_range(STAGES):
        if i < turns:
            fetch_one(q_from, batch, head, start + i * step, stage_of(q_ring, i), come.index(i))

    SCORES: gl.constexpr = result(BLOCK_Q, gl.num_warps())
    KEYS: gl.constexpr = gl.SliceLayout(1, SCORES)
    keys = key + gl.arange(0, BLOCK_K, layout=KEYS)
    bias = 0.0
    if BIAS:
        bias = gl.load(bias_ptr + head) * UNIT
    slope, _ = load_position(position_ptr, POSITION, False, UNIT)
    raw = _sums_by_thread(gl.zeros([BLOCK_K, BLOCK_Q], gl.float32, SCORES))
    proxy = raw
    mbarrier.wait(own_come.index(0), 0)
    k = in_registers(k_block, gl.DotOperandLayout(0, SCORES, 2)) if REGISTERS else matrices(k_block)
    for n in range(masked):
        raw, proxy = _column_sums_block(
            n, turns, start, step, batch, head, keys, k, q_from, raw_ptr, proxy_ptr, q_ring, come, raw, proxy,
            scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
            F, SOFTMAX, PROXY, BIAS, POSITION, WINDOW, PREFIX, True, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    if not WINDOW:
        for n in range(masked, turns):
            raw, proxy = _column_sums_block(
                n, turns, start, step, batch, head, keys, k, q_from, raw_ptr, proxy_ptr, q_ring, come, raw,
                proxy, scale * UNIT, bias, window, prefix, position_ptr, slope, ahead,
                F, SOFTMAX, PROXY, BIAS, POSITION, WINDOW, PREFIX, False, UNIT, BLOCK_Q, BLOCK_K)  # fmt: skip
    release(own_come, 1)
    release(come, STAGES)
    raw = gl.convert_layout(gl.sum(raw, 1), KEYS)
    proxy = gl.convert_layout(gl.sum(proxy, 1), KEYS)
    within = block * BLOCK_K + gl.arange(0, BLOCK_K, layout=KEYS)
    store_column_sums(raw, proxy, out_ptr, within, part, pair, pairs, columns, PROXY)
