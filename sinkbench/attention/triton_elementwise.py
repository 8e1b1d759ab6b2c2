"""Fused causal attention with an elementwise similarity or a softmax, in memory that grows with the length.

    S = scale Q K^T + b + t_{i-j},  P = f(S) M,  z = sum P,  r = z + eps, max(|z|, 1) or 1,  O = P V / r
    dO' = dO / r,  D = sum_d dO' O (times sign(z) [|z| > 1] for the second r, or 0 for the third)
    dS = f'(S) M (dO' V^T - D),  dV = P^T dO',  dQ = scale dS K,  dK = scale dS^T Q
    db = sum dS,  dt_n = sum of dS at the distance n,  for t_n = -m |n|: dm = -sum dS |i - j|

    Softmax: L = log sum exp S over the keys seen,  P = exp(S - L) M,  O = P V,  D = sum_d dO O - dL

Without a softmax there is no row maximum, so no rescaling: a block of keys is two matrix products and f.
The backward pass of a softmax is that of f(S) = f'(S) = exp(S - L). It takes one kernel for keys and values
and one for queries, so that no sum depends on the order of blocks: gradients are the same bits in every run,
those of biases too. ``train.deterministic`` therefore only keeps the sizes of blocks from being tuned
(``tiles``), since other sizes are other orders of sums.

A head size that is no power of two is taken as its two largest parts (96 = 64 + 32), each with products
of its own, instead of being padded.

Shapes: b sequence of the batch, h head, g kv head, t position, d head size, n distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sinkbench.attention import hopper
from sinkbench.attention.triton_blocks import SLOPE, TABLE, itself, power_of_two
from sinkbench.attention.triton_call import SOFTMAX, Call, Settings
from sinkbench.attention.triton_tensors import bounds

NORMALIZERS: dict[bool | str, int] = {False: 0, True: 1, "abs": 2}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, position: Tensor | None,
        documents: Tensor | None, s: Settings,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        size = q.shape[:3] if s.normalize else (1,)
        rows = torch.empty(size, dtype=torch.float32, device=q.device)
        out = _call(s, q, k, v)(q, k, v, bias, position, documents, s, rows).outputs()
        ctx.save_for_backward(q, k, v, bias, position, documents, out if s.normalize else None, rows)
        ctx.settings = s
        ctx.set_materialize_grads(False)
        return (out, rows) if s.normalize == SOFTMAX else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_rows: Tensor | None = None) -> tuple[Any, ...]:
        q, k, v, bias, position, documents, out, rows = ctx.saved_tensors
        s: Settings = ctx.settings
        if grad is None:  # of the output of a softmax: its log-sum-exp alone was used
            grad = torch.zeros_like(out)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        call = _call(s, q, k, v, grad)(q, k, v, bias, position, documents, s, rows)
        by_row: Sequence[Tensor] = (rows, rows)
        if s.normalize:
            grad, *by_row = call.divided_gradient(grad, out, of_rows)
        dk, dv, db, dslope = call.gradients_of_keys(grad, by_row, ctx.needs_input_grad[4])
        dq, dtable = call.gradient_of_queries(grad, by_row, ctx.needs_input_grad[4])
        if q.shape[1] != k.shape[1]:
            dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
        dbias = None if bias is None else db.sum((0, 2)).to(bias.dtype)
        dposition = None
        if ctx.needs_input_grad[4]:
            if s.position == SLOPE:
                dposition = dslope.sum((0, 2))
            else:
                dposition = call.gradient_of_table(grad, by_row) if dtable is None else dtable
            if call.table_ends:
                # All of dS, which a softmax's weights leave in the log-sum-exp alone, less that of the rest.
                dposition[:, -1] = -dposition[:, :-1].sum(1)
                if s.normalize != SOFTMAX:
                    dposition[:, -1] += db.sum((0, 2))
                elif of_rows is not None:
                    dposition[:, -1] += of_rows.sum((0, 2))
        return dq, dk, dv, dbias, dposition, None, None


def _call(s: Settings, *tensors: Tensor) -> type[Call]:
    """The kernels for such tensors and functions."""
    for_hopper = hopper.can_read(*tensors) and hopper.takes(s.function, s.derivative)
    return hopper.call() if for_hopper else Call


def attend(
    query_bhtd: Tensor,
    key_bgtd: Tensor,
    value_bgtd: Tensor,
    *,
    function: Any,
    derivative: Any,
    normalize: bool | Literal["abs"],
    eps: float = 1e-8,
    scale: float,
    bias_h: Tensor | None = None,
    window: int | None = None,
    prefix: int = 0,
    slope_h: Tensor | None = None,
    table_hn: Tensor | None = None,
    document_start_bt: Tensor | None = None,
) -> Tensor:
    """O [b, h, t, d] of the inputs' dtype.

    Args:
        function: Triton function s -> f(s), float32.
        derivative: Triton function (s, f(s)) -> f'(s).
        normalize: divide each row by its sum + eps, or with "abs" by max(|sum|, 1).
        eps: of the normaliser.
        scale: factor on q.k.
        bias_h: added to the scores of each head.
        window: a query sees this many newest keys.
        prefix: the first so many positions see one another.
        slope_h: -slope |i - j| is added to the scores; not together with ``table_hn``.
        table_hn: what is added to the scores by the distance i - j, from max(prefix - 1, 0) positions ahead
            to t - 1 behind, or to where the rest is as the last.
        document_start_bt: where the document of each position begins: a query sees keys of its own only. Not
            together with a prefix.
    """
    if table_hn is not None and table_hn.requires_grad and bias_h is None:
        bias_h = table_hn.new_zeros(table_hn.shape[0])  # for the sum of dS, see the backward pass
    output: Tensor = _apply(
        (query_bhtd, key_bgtd, value_bgtd),
        bias_h,
        slope_h,
        table_hn,
        prefix,
        document_start_bt,
        function=function,
        derivative=derivative,
        normalize=NORMALIZERS[normalize],
        eps=eps,
        scale=scale,
        window=window,
    )
    return output


def softmax(
    query_bhtd: Tensor,
    key_bgtd: Tensor,
    value_bgtd: Tensor,
    *,
    scale: float,
    window: int | None = None,
    prefix: int = 0,
    slope_h: Tensor | None = None,
    table_hn: Tensor | None = None,
    document_start_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """O [b, h, t, d] of the inputs' dtype, and log sum exp of the scores [b, h, t], float32; both can be
    differentiated. Arguments as for ``attend``. A row without weights gives 0 and minus infinity."""
    output, log_sum = _apply(
        (query_bhtd, key_bgtd, value_bgtd),
        None,
        slope_h,
        table_hn,
        prefix,
        document_start_bt,
        function=power_of_two,
        derivative=itself,
        normalize=SOFTMAX,
        eps=0.0,
        scale=scale,
        window=window,
    )
    if slope_h is not None and window is None:
        # See ``load_position``: the kernels add as much to the rows of a rising slope.
        within = torch.arange(log_sum.shape[2], device=log_sum.device)
        if document_start_bt is not None:
            within = (within - document_start_bt)[:, None]
        log_sum = log_sum - slope_h.clamp(max=0.0).float()[:, None] * within
    return output, log_sum


def _apply(
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    slope: Tensor | None,
    table: Tensor | None,
    prefix: int,
    document_start_bt: Tensor | None,
    **settings: Any,
) -> Any:
    prefix = min(prefix, qkv[0].shape[2])
    position, kind = None, 0
    if slope is not None:
        position, kind = slope.float().contiguous(), SLOPE
    if table is not None:
        position, kind = table.float().contiguous(), TABLE
    s = Settings(prefix=prefix, ahead=max(prefix - 1, 0), position=kind, **settings)
    documents = None if document_start_bt is None else bounds(document_start_bt)
    return _Attention.apply(*qkv, bias, position, documents, s)
