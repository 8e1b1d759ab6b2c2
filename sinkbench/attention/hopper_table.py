"""The gradient of a bias from a table on Hopper, along diagonals of blocks: see ``triton_table``."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from sinkbench.attention.hopper_blocks import (
    STAGES,
    barriers,
    fetch_two,
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
from sinkbench.attention.triton_blocks import load_documents, look_up, rows_of, visible
from sinkbench.attention.triton_table import diagonal_blocks


@gluon.jit
def _fetch(
    i, start, blocks, diagonal, head, kv, q_from, k_from, v_from, do_from, q_ring, k_ring, v_ring, do_ring,
    come, stage, BLOCK: gl.constexpr,
):  # fmt: skip
    """Has the i-th block of a diagonal, counted through all sequences, brought to a stage."""
    batch, block = i // blocks, start + i % blocks
    row = (block + diagonal) * BLOCK
    by_query, by_key = come.index(2 * stage), come.index(2 * stage + 1)
    fetch_two(q_from, do_from, batch, head, row, stage_of(q_ring, stage), stage_of(do_ring, stage), by_query)
    fetch_two(
        k_from, v_from, batch, kv, block * BLOCK, stage_of(k_ring, stage), stage_of(v_ring, stage), by_key
    )


@gluon.jit
def table_gradient(
    q0, q1, k0, k1, v0, v1, do0, do1, delta_ptr, lse_ptr, bias_ptr, table_ptr, documents_ptr, out_ptr,
    batches, heads, group, length, scale, window, prefix, ahead, count, constant_from, first_diagonal,
    F: gl.constexpr, DF: gl.constexpr, NORMALIZE: gl.constexpr, BIAS: gl.constexpr, WINDOW: gl.constexpr,
    PREFIX: gl.constexpr, DOCUMENTS: gl.constexpr, UNIT: gl.constexpr, PARTS: gl.constexpr,
    BLOCK: gl.constexpr,
):  # fmt: skip
    """As ``triton_table.table_gradient``, of descriptors of blocks."""
    diagonal = first_diagonal + gl.program_id(0)
    head, part = gl.program_id(1), gl.program_id(2)
    steps = gl.num_programs(2)
    kv = head // group
    table_ptr += head.to(gl.int64) * count
    SCORES: gl.constexpr = result(BLOCK, gl.num_warps())
    down = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, SCORES))
    across = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))
    bias = look_up(table_ptr, ahead + diagonal * BLOCK + down[:, None] - across[None, :]) * UNIT
    if BIAS:
        bias += gl.load(bias_ptr + head) * UNIT
    start, end = diagonal_blocks(diagonal, length, prefix, PREFIX, BLOCK)
    blocks = gl.maximum(end - start, 1)
    all_blocks = batches * gl.maximum(end - start, 0)

    q_from, k_from, v_from = parts(q0, q1, PARTS), parts(k0, k1, PARTS), parts(v0, v1, PARTS)
    do_from = parts(do0, do1, PARTS)
    q_ring, k_ring, v_ring, do_ring = ring_of(q_from), ring_of(k_from), ring_of(v_from), ring_of(do_from)
    come = barriers(2 * STAGES)
    for first in gl.static_range(STAGES):
        if part + first * steps < all_blocks:
            _fetch(
                part + first * steps, start, blocks, diagonal, head, kv, q_from, k_from, v_from, do_from,
                q_ring, k_ring, v_ring, do_ring, come, first, BLOCK)  # fmt: skip
    total = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)
    for i in range(part, all_blocks, steps):
        turn = (i - part) // steps
        stage, phase = turn % STAGES, turn // STAGES & 1
        mbarrier.wait(come.index(2 * stage), phase)
        mbarrier.wait(come.index(2 * stage + 1), phase)
        s = product(matrices(stage_of(q_ring, stage)), turned(stage_of(k_ring, stage)), BLOCK, BLOCK)
        dp = product(matrices(stage_of(do_ring, stage)), turned(stage_of(v_ring, stage)), BLOCK, BLOCK)
        s = warpgroup_mma_wait(PARTS, [s])
        batch, block = i // blocks, start + i % blocks
        rows, keys = (block + diagonal) * BLOCK + down, block * BLOCK + across
        at = rows_of(batch * heads + head, length)
        s = s * (scale * UNIT) + bias
        if NORMALIZE == 3:
            s -= gl.load(lse_ptr + at + rows)[:, None]
        since = load_documents(documents_ptr + rows_of(2 * batch, length), rows, DOCUMENTS)
        seen = visible(
            rows[:, None], keys[None, :], since[:, None], window, prefix, WINDOW, PREFIX, DOCUMENTS
        )
        ds = gl.where(seen, DF(s, F(s)), 0.0)
        dp = warpgroup_mma_wait(0, [dp])
        meet()  # all warps are done with this stage
        if i + STAGES * steps < all_blocks:
            _fetch(
                i + STAGES * steps, start, blocks, diagonal, head, kv, q_from, k_from, v_from, do_from,
                q_ring, k_ring, v_ring, do_ring, come, stage, BLOCK)  # fmt: skip
        if NORMALIZE:
            dp -= gl.load(delta_ptr + at + rows)[:, None]
        total += ds * dp
    release(come, 2 * STAGES)
    program = (part * heads + head) * gl.num_programs(0) + gl.program_id(0)
    out = out_ptr + program.to(gl.int64) * BLOCK * BLOCK
    gl.store(out + down[:, None] * BLOCK + across[None, :], total)
