"""Causal softmax attention by torch's flash kernels, with a log-sum-exp that can be differentiated.

Those kernels give the log-sum-exp L of each row of scores, but their backward pass takes no gradient of it.
It computes dS = P (dP - D) with D the row's dO.O. A gradient dL adds P dL to dS, so that all it takes is
D - dL in place of D, and D is computed from the output that is handed over: O - dL dO / |dO|^2 does it.
Where dO is zero so is dL, of any loss of a function of gate(L) O + (1 - gate(L)) c.

Shapes: b sequence of the batch, h head, q query, k key, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def has_kernel(query_bhqd: Tensor) -> bool:
    """Whether there is a kernel for tensors such as these."""
    if query_bhqd.is_cuda:
        half = query_bhqd.dtype in (torch.bfloat16, torch.float16)
        return half and query_bhqd.shape[-1] % 8 == 0 and query_bhqd.shape[-1] <= 256
    return query_bhqd.device.type == "cpu"


def causal_attention(
    query_bhqd: Tensor, key_bhkd: Tensor, value_bhkd: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """O = softmax(scale q.k) V over the keys up to the query, and log sum exp(scale q.k) [b, h, q], float32
    (or float64). As many keys as queries, one key head for each query head."""
    result: tuple[Tensor, Tensor] = _Attention.apply(  # type: ignore[no-untyped-call]
        query_bhqd, key_bhkd, value_bhkd, scale
    )
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if query.is_cuda:
            output, lse, *rest = aten._scaled_dot_product_flash_attention(
                query, key, value, is_causal=True, scale=scale
            )
        else:
            output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, is_causal=True, scale=scale
            )
            rest = []
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale, ctx.rest = scale, rest[:6]
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, lse = ctx.saved_tensors
        handed_over = _with_gradient(output, grad_output, grad_lse)
        tensors = (grad_output.contiguous(), query, key, value, handed_over, lse)
        if query.is_cuda:
            *lengths, state, unused = ctx.rest
            gradients = aten._scaled_dot_product_flash_attention_backward(
                *tensors, *lengths, 0.0, True, state, unused, scale=ctx.scale
            )
        else:
            gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, 0.0, True, scale=ctx.scale
            )
        return (*gradients, None)


def _with_gradient(output: Tensor, grad_output: Tensor, grad_lse: Tensor) -> Tensor:
    """O - dL dO / |dO|^2, computed so that no square is lost below the least number."""
    wide = grad_output.to(grad_lse.dtype)
    largest = wide.abs().amax(-1, keepdim=True)
    unit = wide / largest.where(largest > 0, 1.0)
    square = unit.square().sum(-1, keepdim=True) * largest
    step = grad_lse[..., None] / square.where(square > 0, 1.0)
    return (output - step * unit).to(output.dtype)


def gated(
    output_bhqd: Tensor,
    lse_bhq: Tensor,
    slot_score_bhq: Tensor | None,
    slot_value: Tensor | None,
    sink_logit: Tensor | None,
) -> Tensor:
    """The output after more terms have joined the sum of the softmax.

    Args:
        slot_score_bhq, slot_value: score and value of one more key; the value is broadcastable to
            [b, h, q, d], None for zero.
        sink_logit: a term without a value, broadcastable to [b, h, q].
    """
    total = lse_bhq
    for more in (slot_score_bhq, sink_logit):
        if more is not None:
            total = torch.logaddexp(total, more)
    result = (lse_bhq - total).exp()[..., None] * output_bhqd
    if slot_score_bhq is not None and slot_value is not None:
        result = result + (slot_score_bhq - total).exp()[..., None] * slot_value
    return result.to(output_bhqd.dtype)
