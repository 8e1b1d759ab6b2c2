"""The terms beside the keys of a softmax, in two kernels; see ``flash`` for the formulas and names.

Each reads what it needs once: the forward one L, O and q, the backward one L', dR, R, q and dq. That is all
that such terms cost, as the kernels of the plain softmax do not know of them.

Shapes: b sequence of the batch, h head, q query, d head size, n block of queries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.flash import Gradients, Terms
from sinkbench.attention.triton_blocks import at_rows
from sinkbench.attention.triton_tensors import is_wide
from sinkbench.triton_math import exp

BLOCK = 32
"""Queries of a block."""
PROGRAMS, MOST_BLOCKS = 1024, 8
"""As many programs as keep a card busy, before they take several blocks for their sums."""


@triton.jit
def _load(base, rows, columns, stride, length, D: tl.constexpr, WIDE: tl.constexpr):
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    return tl.load(base + at_rows(rows, stride, WIDE) + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _load_vector(base, head, columns, D: tl.constexpr, PRESENT: tl.constexpr):
    """A head's row of [h, d], or zeros."""
    return tl.load(base + head * D + columns, mask=(columns < D) & PRESENT, other=0.0).to(tl.float32)


@triton.jit
def _add_exponentials(a, b):
    """log(exp a + exp b), where one may be minus infinity."""
    largest = tl.maximum(a, b)
    level = tl.where(largest == float("-inf"), 0.0, largest)
    return level + tl.log(exp(a - level) + exp(b - level))


@triton.jit
def _join(
    q_ptr, o_ptr, lse_ptr, total_ptr, key_ptr, value_ptr, sink_ptr,
    stride_qb, stride_qh, stride_qt, stride_ob, stride_oh, stride_ot, heads, length, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, SINK: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R in the place of O, and L'."""
    pair = tl.program_id(0)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    o_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh
    rows, columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = rows < length
    at = pair.to(tl.int64) * length + rows
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    total = lse
    o = _load(o_ptr, rows, columns, stride_ot, length, D, WIDE)
    if KEY:
        q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
        q = _load(q_ptr, rows, columns, stride_qt, length, D, WIDE)
        slot = scale * tl.sum(q * _load_vector(key_ptr, head, columns, D, True)[None, :], 1)
        total = _add_exponentials(total, slot)
    if SINK:
        total = _add_exponentials(total, tl.load(sink_ptr + head).to(tl.float32))
    level = tl.where(total == float("-inf"), 0.0, total)
    o *= exp(lse - level)[:, None]
    if KEY and VALUE:
        o += exp(slot - level)[:, None] * _load_vector(value_ptr, head, columns, D, True)[None, :]
    tl.store(total_ptr + at, total, mask=inside)
    to = o_ptr + at_rows(rows, stride_ot, WIDE) + columns[None, :]
    tl.store(to, o.to(o_ptr.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def _gradients(
    do_ptr, o_ptr, total_ptr, q_ptr, dq_ptr, key_ptr, value_ptr, sink_ptr, dkey_ptr, dvalue_ptr, dsink_ptr,
    stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot,
    stride_qb, stride_qh, stride_qt, stride_dqb, stride_dqh, stride_dqt, heads, length, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, SINK: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """What the slot's key adds to dq, and of each program, which takes BLOCKS blocks, a part of dk*, dv* and
    dz. Neighbours take the same positions of other heads, which lie together."""
    pair, program = tl.program_id(0), tl.program_id(1)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    do_ptr += batch * stride_dob + head.to(tl.int64) * stride_doh
    o_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh
    dq_ptr += batch * stride_dqb + head.to(tl.int64) * stride_dqh
    columns = tl.arange(0, WIDTH)
    key = _load_vector(key_ptr, head, columns, D, KEY)
    value = _load_vector(value_ptr, head, columns, D, VALUE)
    sink = 0.0
    if SINK:
        sink = tl.load(sink_ptr + head).to(tl.float32)
    of_key = tl.zeros([BLOCK, WIDTH], tl.float32)
    of_value = tl.zeros([BLOCK, WIDTH], tl.float32)
    of_sink = tl.zeros([BLOCK], tl.float32)
    for block in range(program * BLOCKS, (program + 1) * BLOCKS):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        inside = rows < length
        do = _load(do_ptr, rows, columns, stride_dot, length, D, WIDE)
        o = _load(o_ptr, rows, columns, stride_ot, length, D, WIDE)
        # Infinite beyond the end, and where there is nothing in the sum: no weight.
        total = tl.load(total_ptr + pair.to(tl.int64) * length + rows, mask=inside, other=float("inf"))
        total = tl.where(total == float("-inf"), float("inf"), total)
        if KEY:
            q = _load(q_ptr, rows, columns, stride_qt, length, D, WIDE)
            dq = _load(dq_ptr, rows, columns, stride_dqt, length, D, WIDE)
        mean = tl.sum(do * o, 1)
        if SINK:
            of_sink -= exp(sink - total) * mean
        if KEY:
            weight = exp(scale * tl.sum(q * key[None, :], 1) - total)
            change = scale * weight * (tl.sum(do * value[None, :], 1) - mean)
            dq += change[:, None] * key[None, :]
            to = dq_ptr + at_rows(rows, stride_dqt, WIDE) + columns[None, :]
            tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])
            of_key += change[:, None] * q
            if VALUE:
                of_value += weight[:, None] * do
    part = pair.to(tl.int64) * tl.num_programs(1) + program
    if SINK:
        tl.store(dsink_ptr + part, tl.sum(of_sink, 0))
    if KEY:
        tl.store(dkey_ptr + part * D + columns, tl.sum(of_key, 0), mask=columns < D)
    if VALUE:
        tl.store(dvalue_ptr + part * D + columns, tl.sum(of_value, 0), mask=columns < D)


def join(output_bhqd: Tensor, lse_bhq: Tensor, query_bhqd: Tensor, terms: Terms, scale: float) -> Tensor:
    """L' [b, h, q], float32; the output, whose heads are dense, becomes R."""
    query_bhqd = _dense(query_bhqd)
    lse, total = lse_bhq.contiguous(), torch.empty(lse_bhq.shape, dtype=torch.float32, device=lse_bhq.device)
    batch, heads, length, _ = output_bhqd.shape
    _join[batch * heads, triton.cdiv(length, BLOCK)](
        query_bhqd, output_bhqd, lse, total, *_pointers(terms, total),
        *query_bhqd.stride()[:3], *output_bhqd.stride()[:3], heads, length, scale,
        WIDE=is_wide(query_bhqd, output_bhqd), **_switches(terms, output_bhqd),
    )  # fmt: skip
    return total


def gradients(
    grad_bhqd: Tensor,
    output_bhqd: Tensor,
    total_bhq: Tensor,
    query_bhqd: Tensor,
    grad_query_bhqd: Tensor,
    terms: Terms,
    scale: float,
) -> Gradients:
    """dk*, dv* [h, d] and dz [h], of the terms' dtypes; what the slot's key adds to dq is added in place.

    Args:
        output_bhqd, total_bhq: R and L'.
    """
    key, value, sink = terms
    grad_bhqd, query_bhqd = _dense(grad_bhqd), _dense(query_bhqd)
    batch, heads, length, size = output_bhqd.shape
    count = triton.cdiv(length, BLOCK)
    blocks = max(min(batch * heads * count // PROGRAMS, MOST_BLOCKS), 1)
    programs = triton.cdiv(count, blocks)

    def parts(term: Tensor | None, *width: int) -> Tensor:
        shape = (1,) if term is None else (batch, heads, programs, *width)
        return torch.empty(shape, dtype=torch.float32, device=output_bhqd.device)

    shares = (parts(key, size), parts(value, size), parts(sink))
    tensors = (grad_bhqd, output_bhqd, query_bhqd, grad_query_bhqd)
    _gradients[batch * heads, programs](
        grad_bhqd, output_bhqd, total_bhq, query_bhqd, grad_query_bhqd, *_pointers(terms, total_bhq), *shares,
        *(stride for x in tensors for stride in x.stride()[:3]), heads, length, scale,
        WIDE=is_wide(*tensors), BLOCKS=blocks, **_switches(terms, output_bhqd),
    )  # fmt: skip
    found = (
        None if term is None else share.sum((0, 2)).to(term.dtype)
        for term, share in zip(terms, shares, strict=True)
    )
    of_key, of_value, of_sink = found
    return of_key, of_value, of_sink


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointers(terms: Terms, unused: Tensor) -> tuple[Tensor, ...]:
    return tuple(unused if term is None else term.contiguous() for term in terms)


def _switches(terms: Terms, output: Tensor) -> dict[str, Any]:
    key, value, sink = terms
    size = output.shape[-1]
    return {
        "KEY": key is not None,
        "VALUE": value is not None,
        "SINK": sink is not None,
        "D": size,
        "WIDTH": triton.next_power_of_2(size),
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
