"""Softmax attention by torch's flash kernels, with a log-sum-exp that can be differentiated.

Those kernels give the log-sum-exp L of each row of scores, but their backward pass takes no gradient of it.
It computes dS = P (dP - D) with D the row's dO.O. A gradient dL adds P dL to dS, so that all it takes is
D - dL in place of D, and D is computed from the output that is handed over: O - dL dO / |dO|^2 does it.
Where dO is zero so is dL, of any loss of a function of gate(L) O + (1 - gate(L)) c.

Shapes: b sequence of the batch, h head, q query, k key, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def has_kernel(device: str, head_size: int, half: bool, window: bool) -> bool:
    """Whether there is a kernel.

    Args:
        half: the inputs are bf16 or fp16.
        window: with a sliding window.
    """
    if device == "cuda":
        return half and head_size % 8 == 0 and head_size <= 256
    return device == "cpu" and not window


def attention(
    query_bhqd: Tensor,
    key_bhkd: Tensor,
    value_bhkd: Tensor,
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """O = softmax(scale q.k) V, and log sum exp(scale q.k) [b, h, q], float32 (or float64). As many keys as
    queries, one key head for each query head.

    Args:
        causal: over the keys up to the query rather than all.
        window: with ``causal``: over this many newest of them; where ``has_kernel`` says so.
    """
    result: tuple[Tensor, Tensor] = _Attention.apply(  # type: ignore[no-untyped-call]
        query_bhqd, key_bhkd, value_bhkd, scale, causal, window
    )
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor]:
        rest: list[Any] = []
        if window is not None:
            output, lse, rest = _windowed(query, key, value, scale, window)
        elif query.is_cuda:
            output, lse, *rest = aten._scaled_dot_product_flash_attention(
                query, key, value, is_causal=causal, scale=scale
            )
        else:
            output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, is_causal=causal, scale=scale
            )
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale, ctx.causal, ctx.window, ctx.rest = scale, causal, window, rest[:6]
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        with_gradient = _compiled_with_gradient() if query.is_cuda else _with_gradient
        handed_over = with_gradient(output, grad_output, grad_lse)
        tensors = (grad_output.contiguous(), query, key, value, handed_over, lse)
        if ctx.window is not None:
            gradients = _windowed_backward(tensors, ctx.rest, ctx.scale, ctx.window)
        elif query.is_cuda:
            *lengths, state, unused = ctx.rest
            gradients = aten._scaled_dot_product_flash_attention_backward(
                *tensors, *lengths, 0.0, ctx.causal, state, unused, scale=ctx.scale
            )
        else:
            gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, 0.0, ctx.causal, scale=ctx.scale
            )
        return (*gradients, None, None, None)


def _windowed(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, list[Any]]:
    """Output, log-sum-exp and state of the kernel below torch's, which takes windows, with the length before
    the heads."""
    length = query.shape[2]
    output, lse, *rest = aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (query, key, value)),
        *(None, None, length, length, 0.0, False, False),
        scale=scale,
        window_size_left=window - 1,
        window_size_right=0,
    )
    return output.transpose(1, 2), lse, rest


def _windowed_backward(
    tensors: tuple[Tensor, ...], rest: list[Any], scale: float, window: int
) -> tuple[Tensor, ...]:
    *with_heads, lse = tensors
    length = lse.shape[2]
    state, unused = rest[:2]
    gradients = aten._flash_attention_backward(
        *(x.transpose(1, 2) for x in with_heads),
        lse,
        *(None, None, length, length, 0.0, False, state, unused),
        scale=scale,
        window_size_left=window - 1,
        window_size_right=0,
    )
    return tuple(x.transpose(1, 2) for x in gradients)


def _with_gradient(output: Tensor, grad_output: Tensor, grad_lse: Tensor) -> Tensor:
    """O - dL dO / |dO|^2, computed so that no square is lost below the least number."""
    wide = grad_output.to(grad_lse.dtype)
    largest = wide.abs().amax(-1, keepdim=True)
    unit = wide / largest.where(largest > 0, 1.0)
    square = unit.square().sum(-1, keepdim=True) * largest
    step = grad_lse[..., None] / square.where(square > 0, 1.0)
    return (output - step * unit).to(output.dtype)


@cache
def _compiled_with_gradient() -> Callable[..., Tensor]:
    return torch.compile(_with_gradient)


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
