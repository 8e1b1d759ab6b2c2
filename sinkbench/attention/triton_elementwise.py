"""Fused causal attention with an elementwise similarity, in memory that grows with the length.

    S = scale Q K^T + b,  P = f(S) M,  r = sum P + eps (or 1),  O = P V / r
    dO' = dO / r,  D = sum_d dO' O (or 0),  dS = f'(S) M (dO' V^T - D)
    dV = P^T dO',  dQ = scale dS K,  dK = scale dS^T Q,  db = sum dS

No row maximum, so no rescaling: a block of keys is two matrix products and f. The backward pass takes
one kernel for keys and values and one for queries, so that no sum depends on the order of blocks:
gradients are deterministic.

A head size that is no power of two is taken as its two largest parts (96 = 64 + 32), each with products
of its own, instead of being padded.

Shapes: b sequence of the batch, h head, g kv head, t position, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(base, rows, columns, stride_row, length, PRESENT: tl.constexpr):
    """Rows of a [t, d] matrix as a block, zero beyond the end and for a part that is not present."""
    inside = (rows < length)[:, None] & PRESENT
    return tl.load(base + rows[:, None] * stride_row + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _forward_block(
    at, rows, q0, q1, o0, o1, r, k_ptr, v_ptr, stride_kt, stride_vt, first, second,
    length, scale, bias, window,
    F: tl.constexpr, NORMALIZE: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    keys = at + tl.arange(0, BLOCK_K)
    k0 = _load(k_ptr, keys, first, stride_kt, length, True)
    s = _dot(q0, tl.trans(k0), None, PRECISION)
    if D1 > 1:
        s = _dot(q1, tl.trans(_load(k_ptr, keys, second, stride_kt, length, True)), s, PRECISION)
    p = F(s * scale + bias)
    if MASK:
        allowed = rows[:, None] >= keys[None, :]
        if WINDOW:
            allowed = allowed & (rows[:, None] - keys[None, :] < window)
        p = tl.where(allowed, p, 0.0)
    if NORMALIZE:
        r += tl.sum(p, 1)
    p = p.to(q0.dtype)
    o0 = _dot(p, _load(v_ptr, keys, first, stride_vt, length, True), o0, PRECISION)
    if D1 > 1:
        o1 = _dot(p, _load(v_ptr, keys, second, stride_vt, length, True), o1, PRECISION)
    return o0, o1, r


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, r_ptr, bias_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    heads, group, length, scale, eps, window,
    F: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # longest rows first
    pair = tl.program_id(1)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    o_ptr += batch * stride_ob + head * stride_oh
    k_ptr += batch * stride_kb + (head // group) * stride_kh
    v_ptr += batch * stride_vb + (head // group) * stride_vh
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    q0 = _load(q_ptr, rows, first, stride_qt, length, True)
    q1 = _load(q_ptr, rows, second, stride_qt, length, D1 > 1)
    o0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    o1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    r = tl.zeros([BLOCK_Q], tl.float32)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head)
    start = 0
    unmasked = block * BLOCK_Q // BLOCK_K * BLOCK_K  # every query of the block sees these keys
    if WINDOW:
        start = tl.maximum(0, block * BLOCK_Q - window + 1) // BLOCK_K * BLOCK_K
        unmasked = start
    for at in range(start, unmasked, BLOCK_K):
        o0, o1, r = _forward_block(
            at, rows, q0, q1, o0, o1, r, k_ptr, v_ptr, stride_kt, stride_vt, first, second,
            length, scale, bias, window, F, NORMALIZE, WINDOW, False, PRECISION, D1, BLOCK_K,
        )  # fmt: skip
    for at in range(unmasked, tl.minimum(length, (block + 1) * BLOCK_Q), BLOCK_K):
        o0, o1, r = _forward_block(
            at, rows, q0, q1, o0, o1, r, k_ptr, v_ptr, stride_kt, stride_vt, first, second,
            length, scale, bias, window, F, NORMALIZE, WINDOW, True, PRECISION, D1, BLOCK_K,
        )  # fmt: skip
    inside = rows < length
    if NORMALIZE:
        r += eps
        o0 = o0 / r[:, None]
        o1 = o1 / r[:, None]
        tl.store(r_ptr + pair.to(tl.int64) * length + rows, r, mask=inside)
    o_rows = o_ptr + rows[:, None] * stride_ot
    tl.store(o_rows + first[None, :], o0.to(o_ptr.dtype.element_ty), mask=inside[:, None])
    if D1 > 1:
        tl.store(o_rows + second[None, :], o1.to(o_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _divide_gradient(
    do_ptr, o_ptr, r_ptr, out_ptr, delta_ptr,
    stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot,
    stride_outb, stride_outh, stride_outt, heads, length,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dO / r, which stands for dO in the rest of the backward pass, and D = sum_d (dO / r) O."""
    pair = tl.program_id(1)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    do_ptr += batch * stride_dob + head * stride_doh
    o_ptr += batch * stride_ob + head * stride_oh
    out_ptr += batch * stride_outb + head * stride_outh
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    inverse = 1.0 / tl.load(r_ptr + pair.to(tl.int64) * length + rows, mask=inside, other=1.0)
    do0 = _load(do_ptr, rows, first, stride_dot, length, True).to(tl.float32) * inverse[:, None]
    delta = tl.sum(do0 * _load(o_ptr, rows, first, stride_ot, length, True).to(tl.float32), 1)
    out_rows = out_ptr + rows[:, None] * stride_outt
    tl.store(out_rows + first[None, :], do0.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if D1 > 1:
        do1 = _load(do_ptr, rows, second, stride_dot, length, True).to(tl.float32) * inverse[:, None]
        delta += tl.sum(do1 * _load(o_ptr, rows, second, stride_ot, length, True).to(tl.float32), 1)
        tl.store(out_rows + second[None, :], do1.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(delta_ptr + pair.to(tl.int64) * length + rows, delta, mask=inside)


@triton.jit
def _backward_keys_block(
    at, keys, k0, k1, v0, v1, dk0, dk1, dv0, dv1, db,
    q_ptr, do_ptr, delta_ptr, stride_qt, stride_dot, first, second,
    length, scale, bias, window,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    rows = at + tl.arange(0, BLOCK_Q)
    q0 = _load(q_ptr, rows, first, stride_qt, length, True)
    do0 = _load(do_ptr, rows, first, stride_dot, length, True)
    s = _dot(k0, tl.trans(q0), None, PRECISION)
    dp = _dot(v0, tl.trans(do0), None, PRECISION)
    if D1 > 1:
        q1 = _load(q_ptr, rows, second, stride_qt, length, True)
        do1 = _load(do_ptr, rows, second, stride_dot, length, True)
        s = _dot(k1, tl.trans(q1), s, PRECISION)
        dp = _dot(v1, tl.trans(do1), dp, PRECISION)
    s = s * scale + bias
    p = F(s)
    ds = DF(s, p)
    if MASK:
        allowed = rows[None, :] >= keys[:, None]
        if WINDOW:
            allowed = allowed & (rows[None, :] - keys[:, None] < window)
        p = tl.where(allowed, p, 0.0)
        ds = tl.where(allowed, ds, 0.0)
    if NORMALIZE:
        dp -= tl.load(delta_ptr + rows, mask=rows < length, other=0.0)[None, :]
    ds = ds * dp
    db += tl.sum(tl.sum(ds, 1), 0)
    p = p.to(q0.dtype)
    ds = ds.to(q0.dtype)
    dv0 = _dot(p, do0, dv0, PRECISION)
    dk0 = _dot(ds, q0, dk0, PRECISION)
    if D1 > 1:
        dv1 = _dot(p, do1, dv1, PRECISION)
        dk1 = _dot(ds, q1, dk1, PRECISION)
    return dk0, dk1, dv0, dv1, db


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, delta_ptr, bias_ptr, db_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dkb, stride_dkh, stride_dkt,
    heads, group, length, scale, window,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values, for the queries of one head: those of a kv head's
    other heads are added outside."""
    block, pair = tl.program_id(0), tl.program_id(1)
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    do_ptr += batch * stride_dob + head * stride_doh
    k_ptr += batch * stride_kb + (head // group) * stride_kh
    v_ptr += batch * stride_vb + (head // group) * stride_vh
    dk_ptr += batch * stride_dkb + head * stride_dkh
    dv_ptr += batch * stride_dkb + head * stride_dkh
    delta_ptr += pair.to(tl.int64) * length
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    k0 = _load(k_ptr, keys, first, stride_kt, length, True)
    v0 = _load(v_ptr, keys, first, stride_vt, length, True)
    k1 = _load(k_ptr, keys, second, stride_kt, length, D1 > 1)
    v1 = _load(v_ptr, keys, second, stride_vt, length, D1 > 1)
    dk0 = tl.zeros([BLOCK_K, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_K, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_K, D1], tl.float32)
    db = 0.0
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head)
    start = block * BLOCK_K // BLOCK_Q * BLOCK_Q
    end = length
    if WINDOW:
        end = tl.minimum(length, (block + 1) * BLOCK_K + window)
    # From there on every query sees every key of the block. Queries beyond the end have a gradient of 0.
    masked_end = tl.minimum(end, tl.cdiv((block + 1) * BLOCK_K, BLOCK_Q) * BLOCK_Q)
    if WINDOW:
        masked_end = end
    for at in range(start, masked_end, BLOCK_Q):
        dk0, dk1, dv0, dv1, db = _backward_keys_block(
            at, keys, k0, k1, v0, v1, dk0, dk1, dv0, dv1, db, q_ptr, do_ptr, delta_ptr,
            stride_qt, stride_dot, first, second, length, scale, bias, window,
            F, DF, NORMALIZE, WINDOW, True, PRECISION, D1, BLOCK_Q)  # fmt: skip
    for at in range(masked_end, end, BLOCK_Q):
        dk0, dk1, dv0, dv1, db = _backward_keys_block(
            at, keys, k0, k1, v0, v1, dk0, dk1, dv0, dv1, db, q_ptr, do_ptr, delta_ptr,
            stride_qt, stride_dot, first, second, length, scale, bias, window,
            F, DF, NORMALIZE, WINDOW, False, PRECISION, D1, BLOCK_Q)  # fmt: skip
    inside = (keys < length)[:, None]
    at_keys = keys[:, None] * stride_dkt
    tl.store(dk_ptr + at_keys + first[None, :], (dk0 * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at_keys + first[None, :], dv0.to(dv_ptr.dtype.element_ty), mask=inside)
    if D1 > 1:
        tl.store(dk_ptr + at_keys + second[None, :], (dk1 * scale).to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + at_keys + second[None, :], dv1.to(dv_ptr.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(db_ptr + pair * tl.num_programs(0) + block, db)


@triton.jit
def _backward_queries_block(
    at, rows, q0, q1, do0, do1, dq0, dq1, delta, k_ptr, v_ptr, stride_kt, stride_vt,
    first, second, length, scale, bias, window,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    keys = at + tl.arange(0, BLOCK_K)
    k0 = _load(k_ptr, keys, first, stride_kt, length, True)
    v0 = _load(v_ptr, keys, first, stride_vt, length, True)
    s = _dot(q0, tl.trans(k0), None, PRECISION)
    dp = _dot(do0, tl.trans(v0), None, PRECISION)
    if D1 > 1:
        k1 = _load(k_ptr, keys, second, stride_kt, length, True)
        v1 = _load(v_ptr, keys, second, stride_vt, length, True)
        s = _dot(q1, tl.trans(k1), s, PRECISION)
        dp = _dot(do1, tl.trans(v1), dp, PRECISION)
    s = s * scale + bias
    ds = DF(s, F(s))
    if MASK:
        allowed = rows[:, None] >= keys[None, :]
        if WINDOW:
            allowed = allowed & (rows[:, None] - keys[None, :] < window)
        ds = tl.where(allowed, ds, 0.0)
    if NORMALIZE:
        dp -= delta[:, None]
    ds = ds * dp
    ds = ds.to(q0.dtype)
    dq0 = _dot(ds, k0, dq0, PRECISION)
    if D1 > 1:
        dq1 = _dot(ds, k1, dq1, PRECISION)
    return dq0, dq1


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, delta_ptr, bias_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    stride_dqb, stride_dqh, stride_dqt,
    heads, group, length, scale, window,
    F: tl.constexpr, DF: tl.constexpr, NORMALIZE: tl.constexpr, BIAS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, pair = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    do_ptr += batch * stride_dob + head * stride_doh
    dq_ptr += batch * stride_dqb + head * stride_dqh
    k_ptr += batch * stride_kb + (head // group) * stride_kh
    v_ptr += batch * stride_vb + (head // group) * stride_vh
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first, second = tl.arange(0, D0), D0 + tl.arange(0, D1)
    q0 = _load(q_ptr, rows, first, stride_qt, length, True)
    do0 = _load(do_ptr, rows, first, stride_dot, length, True)
    q1 = _load(q_ptr, rows, second, stride_qt, length, D1 > 1)
    do1 = _load(do_ptr, rows, second, stride_dot, length, D1 > 1)
    dq0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    inside = rows < length
    delta = tl.zeros([BLOCK_Q], tl.float32)
    if NORMALIZE:
        delta = tl.load(delta_ptr + pair.to(tl.int64) * length + rows, mask=inside, other=0.0)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + head)
    start = 0
    unmasked = block * BLOCK_Q // BLOCK_K * BLOCK_K
    if WINDOW:
        start = tl.maximum(0, block * BLOCK_Q - window + 1) // BLOCK_K * BLOCK_K
        unmasked = start
    for at in range(start, unmasked, BLOCK_K):
        dq0, dq1 = _backward_queries_block(
            at, rows, q0, q1, do0, do1, dq0, dq1, delta, k_ptr, v_ptr, stride_kt, stride_vt,
            first, second, length, scale, bias, window,
            F, DF, NORMALIZE, WINDOW, False, PRECISION, D1, BLOCK_K)  # fmt: skip
    for at in range(unmasked, tl.minimum(length, (block + 1) * BLOCK_Q), BLOCK_K):
        dq0, dq1 = _backward_queries_block(
            at, rows, q0, q1, do0, do1, dq0, dq1, delta, k_ptr, v_ptr, stride_kt, stride_vt,
            first, second, length, scale, bias, window,
            F, DF, NORMALIZE, WINDOW, True, PRECISION, D1, BLOCK_K)  # fmt: skip
    dq_rows = dq_ptr + rows[:, None] * stride_dqt
    tl.store(dq_rows + first[None, :], (dq0 * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])
    if D1 > 1:
        tl.store(dq_rows + second[None, :], (dq1 * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


def _split_head_size(head_size: int) -> tuple[int, int]:
    """Two powers of two that add up to the head size, the second 1 if none is needed."""
    first = 1 << (head_size.bit_length() - 1)
    return first, max(head_size - first, 1)


TILES = {
    "forward": {64: (128, 64, 4, 3), 96: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 4, 2)},
    "keys": {64: (64, 64, 4, 3), 96: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 64, 8, 1)},
    "queries": {64: (64, 64, 4, 3), 96: (64, 64, 4, 2), 128: (128, 64, 8, 3), 256: (64, 32, 8, 1)},
}
"""Queries, keys, warps and pipeline stages of a block, by kernel and largest head size, as measured on
an H100 (benchmarks/attention.py)."""


def _tiles(kernel: str, q: Tensor) -> dict[str, int]:
    by_size = TILES[kernel]
    block_q, block_k, warps, stages = by_size[min(size for size in by_size if size >= q.shape[-1])]
    if q.dtype == torch.float32:  # twice the bytes of shared memory
        block_q, block_k, stages = block_q // 2, block_k // 2, 1
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


def _precision(q: Tensor) -> str:
    """Products of float32 are not rounded to tf32."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _divided_gradient(grad: Tensor, out: Tensor, rows: Tensor, d0: int, d1: int) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = grad.shape
    divided, delta = torch.empty_like(out), torch.empty_like(rows)
    strides = (*grad.stride()[:3], *out.stride()[:3], *divided.stride()[:3])
    _divide_gradient[(triton.cdiv(length, 64), batch * heads)](
        grad, out, rows, divided, delta, *strides, heads, length, D0=d0, D1=d1, BLOCK=64
    )
    return divided, delta


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, function: Any, derivative: Any,
        normalize: bool, eps: float, scale: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        batch, heads, length, d = q.shape
        split = _split_head_size(d)
        # The output lies as [t, b, h, d], which the projection behind it reads without a copy.
        out = torch.empty(length, batch, heads, d, dtype=q.dtype, device=q.device).permute(1, 2, 0, 3)
        rows = torch.empty(
            (batch, heads, length) if normalize else (1,), dtype=torch.float32, device=q.device
        )
        bias32 = bias.float().contiguous() if bias is not None else rows
        tiles = _tiles("forward", q)
        grid = (triton.cdiv(length, tiles["BLOCK_Q"]), batch * heads)
        _forward[grid](
            q, k, v, out, rows, bias32, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            heads, heads // k.shape[1], length, scale, eps, window or 0,
            F=function, NORMALIZE=normalize, BIAS=bias is not None, WINDOW=window is not None,
            PRECISION=_precision(q), D0=split[0], D1=split[1], **tiles,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, bias, out if normalize else None, rows)
        ctx.settings = (function, derivative, normalize, scale, window, split)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, bias, out, rows = ctx.saved_tensors
        function, derivative, normalize, scale, window, (d0, d1) = ctx.settings
        (grad,) = grads
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        batch, heads, length, d = q.shape
        kv_heads = k.shape[1]
        delta = rows
        if normalize:
            grad, delta = _divided_gradient(grad, out, rows, d0, d1)
        dq = torch.empty(length, batch, heads, d, dtype=q.dtype, device=q.device).permute(1, 2, 0, 3)
        dk, dv = (
            torch.empty(length, batch, heads, d, dtype=q.dtype, device=q.device).permute(1, 2, 0, 3)
            for _ in range(2)
        )
        key_tiles, query_tiles = _tiles("keys", q), _tiles("queries", q)
        blocks = triton.cdiv(length, key_tiles["BLOCK_K"])
        has_bias = bias is not None
        bias32 = bias.float().contiguous() if has_bias else rows
        db = torch.empty(batch, heads, blocks if has_bias else 1, dtype=torch.float32, device=q.device)
        common: dict[str, Any] = {"F": function, "DF": derivative, "NORMALIZE": normalize, "BIAS": has_bias}
        common |= {"WINDOW": window is not None, "D0": d0, "D1": d1, "PRECISION": _precision(q)}
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
        sizes = (heads, heads // kv_heads, length, scale, window or 0)
        _backward_keys[(blocks, batch * heads)](
            q, k, v, grad, dk, dv, delta, bias32, db, *strides, *dk.stride()[:3], *sizes,
            **common, **key_tiles,
        )  # fmt: skip
        _backward_queries[(triton.cdiv(length, query_tiles["BLOCK_Q"]), batch * heads)](
            q, k, v, grad, dq, delta, bias32, *strides, *dq.stride()[:3], *sizes,
            **common, **query_tiles,
        )  # fmt: skip
        if heads != kv_heads:
            dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
        dbias = db.sum((0, 2)).to(bias.dtype) if has_bias else None
        return dq, dk, dv, dbias, None, None, None, None, None, None


def attend(
    query_bhtd: Tensor,
    key_bgtd: Tensor,
    value_bgtd: Tensor,
    *,
    function: Any,
    derivative: Any,
    normalize: bool,
    eps: float = 1e-8,
    scale: float,
    bias_h: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """O [b, h, t, d] of the inputs' dtype.

    Args:
        function: Triton function s -> f(s), float32.
        derivative: Triton function (s, f(s)) -> f'(s).
        normalize: divide each row by its sum + eps.
        scale: factor on q.k.
        bias_h: added to the scores of each head.
        window: a query sees this many newest keys.
    """
    output: Tensor = _Attention.apply(
        query_bhtd, key_bgtd, value_bgtd, bias_h, function, derivative, normalize, eps, scale, window
    )
    return output
