"""The gradient of a bias that is read from a table by the distance of query and key.

Blocks of scores at the same distance, along a diagonal of blocks, hold the same distances at the same places.
So one program sums dS over such a diagonal, without atomics, and what is left, a block for each diagonal, is
summed along its own diagonals in torch: memory grows with the length, and no sum depends on an order. Where
the table ends near, the kernel for queries has these sums of the few blocks that need them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sinkbench.attention.triton_blocks import dot, load_documents, load_rows, look_up, rows_of, visible


@triton.jit
def diagonal_blocks(diagonal, length, prefix, PREFIX: tl.constexpr, BLOCK: tl.constexpr):
    """First and end of the blocks of keys along a diagonal."""
    start = tl.maximum(0, -diagonal)
    end = tl.cdiv(length, BLOCK) - tl.maximum(0, diagonal)
    if PREFIX:  # ahead of the query there is nothing but the prefix
        end = tl.where(diagonal < 0, tl.minimum(end, tl.cdiv(prefix, BLOCK)), end)
    return start, end


@triton.jit
def table_gradient(
    q_ptr, k_ptr, v_ptr, do_ptr, delta_ptr, lse_ptr, bias_ptr, table_ptr, documents_ptr, out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    batches, heads, group, length, scale, window, prefix, ahead, count, constant_from, first_diagonal,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    PREFIX: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dS summed over every ``num_programs(2)``-th block of one diagonal in all sequences, [BLOCK, BLOCK]."""
    diagonal = first_diagonal + tl.program_id(0)
    head, part = tl.program_id(1), tl.program_id(2)
    group_head = (head // group).to(tl.int64)
    table_ptr += head.to(tl.int64) * count
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    within = tl.arange(0, BLOCK)
    bias = look_up(table_ptr, ahead + diagonal * BLOCK + within[:, None] - within[None, :]) * UNIT
    if BIAS:
        bias += tl.load(bias_ptr + head) * UNIT
    start, end = diagonal_blocks(diagonal, length, prefix, PREFIX, BLOCK)
    blocks = tl.maximum(end - start, 1)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(part, batches * (end - start), tl.num_programs(2)):
        batch, block = (i // blocks).to(tl.int64), start + i % blocks
        q = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
        do = do_ptr + batch * stride_dob + head.to(tl.int64) * stride_doh
        k = k_ptr + batch * stride_kb + group_head * stride_kh
        v = v_ptr + batch * stride_vb + group_head * stride_vh
        at = rows_of(batch * heads + head, length)
        rows, keys = (block + diagonal) * BLOCK + within, block * BLOCK + within
        q0 = load_rows(q, rows, first, stride_qt, length, True, WIDE)
        do0 = load_rows(do, rows, first, stride_dot, length, True, WIDE)
        k0 = load_rows(k, keys, first, stride_kt, length, True, WIDE)
        v0 = load_rows(v, keys, first, stride_vt, length, True, WIDE)
        s = dot(q0, tl.trans(k0), None, PRECISION)
        dp = dot(do0, tl.trans(v0), None, PRECISION)
        if D1 > 1:
            q1 = load_rows(q, rows, second, stride_qt, length, True, WIDE)
            do1 = load_rows(do, rows, second, stride_dot, length, True, WIDE)
            k1 = load_rows(k, keys, second, stride_kt, length, True, WIDE)
            v1 = load_rows(v, keys, second, stride_vt, length, True, WIDE)
            s = dot(q1, tl.trans(k1), s, PRECISION)
            dp = dot(do1, tl.trans(v1), dp, PRECISION)
        s = s * (scale * UNIT) + bias
        if NORMALIZE == 3:
            s -= tl.load(lse_ptr + at + rows)[:, None]
        if NORMALIZE:
            dp -= tl.load(delta_ptr + at + rows)[:, None]
        since = load_documents(documents_ptr + rows_of(2 * batch, length), rows, DOCUMENTS)
        seen = visible(
            rows[:, None], keys[None, :], since[:, None], window, prefix, WINDOW, PREFIX, DOCUMENTS
        )
        total += tl.where(seen, DF(s, F(s)) * dp, 0.0)
    program = (part * heads + head) * tl.num_programs(0) + tl.program_id(0)
    out = out_ptr + program.to(tl.int64) * BLOCK * BLOCK
    tl.store(out + within[:, None] * BLOCK + within[None, :], total)


def along_diagonals(blocks_hnrc: Tensor, first_diagonal: int, ahead: int, count: int) -> Tensor:
    """Sums of equal distances, [h, count], from distance ``-ahead`` on.

    Args:
        blocks_hnrc: for each diagonal of blocks from ``first_diagonal`` on, by query and key of a block.
    """
    heads, size = blocks_hnrc.shape[0], blocks_hnrc.shape[-1]
    # With the keys reversed a distance is an antidiagonal, and a row that is one element too long moves each
    # of them into a column.
    skewed = pad(blocks_hnrc.flip(-1), (0, size)).flatten(2)[..., : size * (2 * size - 1)]
    sums = skewed.unflatten(-1, (size, 2 * size - 1)).sum(2)
    halves = pad(sums, (0, 1)).unflatten(-1, (2, size))
    by_distance = pad(halves[:, :, 0], (0, 0, 0, 1)) + pad(halves[:, :, 1], (0, 0, 1, 0))
    nearest = first_diagonal * size - (size - 1)
    flat = by_distance.flatten(1)
    out = flat.new_zeros(heads, count)
    low, high = max(nearest, -ahead), min(nearest + flat.shape[1], count - ahead)
    out[:, low + ahead : high + ahead] = flat[:, low - nearest : high - nearest]
    return out


def places_by_distance(last: int, block_q: int, block_k: int) -> tuple[int, int, int]:
    """The shape of what ``triton_blocks.store_by_distance`` needs for the distances from 0 to ``last``."""
    runs = block_q // block_k + 1
    return -(-last // block_k) + runs, runs, block_k


def of_distances(sums_hnrc: Tensor, count: int) -> Tensor:
    """The sums of ``triton_blocks.store_by_distance`` at the distances from 0 on, [h, count]."""
    heads, steps, runs, size = sums_hnrc.shape
    total = sums_hnrc.new_zeros(heads, steps + runs - 1, size)
    for run in range(runs):
        total[:, run : run + steps] += sums_hnrc[:, :, run]
    return total.flatten(1)[:, (runs - 1) * size :][:, :count]
