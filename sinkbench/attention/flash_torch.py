"""The fused softmax kernels that come with torch, below ``scaled_dot_product_attention``, for ``flash``.

Shapes: b sequence of the batch, h head, g kv head, q query, k key, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sinkbench.attention.flash import Kernel, Scores

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor]


def has_kernel(device: str, head_size: int, half: bool, window: bool) -> bool:
    """Whether there is a kernel.

    Args:
        half: the inputs are bf16 or fp16.
        window: with a sliding window.
    """
    if device == "cuda":
        return half and head_size % 8 == 0 and head_size <= 256
    return device == "cpu" and not window


def kernel_for(query_bhqd: Tensor, key_bgkd: Tensor, value_bgkd: Tensor, scores: Scores) -> Kernel:
    """Where ``has_kernel``: cuDNN's where torch itself would take it, which is where it is the faster one and
    can do the backward pass. It is not under ``train.deterministic``, as its gradients differ each time."""
    if not query_bhqd.is_cuda:
        return _Cpu()
    if scores.window is None:
        grouped = query_bhqd.shape[1] != key_bgkd.shape[1]
        taken = torch._fused_sdp_choice(
            *(query_bhqd, key_bgkd, value_bgkd, None, 0.0, scores.causal),
            scale=scores.scale,
            enable_gqa=grouped,
        )
        if taken == SDPBackend.CUDNN_ATTENTION.value:
            return _Cudnn()
    return _Flash()


class _Cudnn:
    """It takes the gradient and the output in the layout that it gives the output: dense, in the order of
    the query's dimensions."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, list[Any]]:
        output, lse, *rest = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, scores.causal, False, scale=scores.scale
        )
        return output, lse.view(query.shape[:3]), rest[:6]

    def backward(
        self, grad: Tensor, inputs: Inputs, output: Tensor, lse: Tensor, state: list[Any], scores: Scores
    ) -> Inputs:
        *lengths, seed, offset = state
        layout = torch.empty_like(inputs[0], device="meta")
        gradients: Inputs = aten._scaled_dot_product_cudnn_attention_backward(
            laid_out(grad, layout),
            *inputs,
            laid_out(output, layout),
            lse.contiguous()[..., None],
            *(seed, offset, None),
            *(*lengths, 0.0, scores.causal),
            scale=scores.scale,
        )
        return gradients


class _Flash:
    """FlashAttention-2. Its gradients are the same each time under ``torch.use_deterministic_algorithms``."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, list[Any]]:
        length = query.shape[2]
        output, lse, *rest = aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (query, key, value)),
            *(None, None, length, length, 0.0, *_mask(scores)),
            False,
            scale=scores.scale,
            **_window(scores),
        )
        return output.transpose(1, 2), lse, rest[:2]

    def backward(
        self, grad: Tensor, inputs: Inputs, output: Tensor, lse: Tensor, state: list[Any], scores: Scores
    ) -> Inputs:
        length = output.shape[2]
        query, key, value = aten._flash_attention_backward(
            *(x.transpose(1, 2) for x in (laid_out(grad, output), *inputs, output)),
            lse.contiguous(),
            *(None, None, length, length, 0.0, *_mask(scores), *state),
            scale=scores.scale,
            **_window(scores),
        )
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _mask(scores: Scores) -> list[bool]:
    """Whether all older keys are seen; a window says itself that no newer ones are."""
    return [scores.causal and scores.window is None]


def _window(scores: Scores) -> dict[str, int]:
    if scores.window is None:
        return {}
    return {"window_size_left": scores.window - 1, "window_size_right": 0}


class _Cpu:
    """It gets each kv head once for each of its query heads: not every torch has kernels that share them."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, None]:
        heads = query.shape[1]
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            _repeated(key, heads),
            _repeated(value, heads),
            is_causal=scores.causal,
            scale=scores.scale,
        )
        return output, lse, None

    def backward(
        self, grad: Tensor, inputs: Inputs, output: Tensor, lse: Tensor, state: None, scores: Scores
    ) -> Inputs:
        query, key, value = inputs
        heads, groups = query.shape[1], key.shape[1]
        of_query, of_key, of_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad.contiguous(), query, _repeated(key, heads), _repeated(value, heads), output, lse),
            *(0.0, scores.causal),
            scale=scores.scale,
        )
        return of_query, *(x.unflatten(1, (groups, -1)).sum(2) for x in (of_key, of_value))


def _repeated(x_bgtd: Tensor, heads: int) -> Tensor:
    per_group = heads // x_bgtd.shape[1]
    return x_bgtd if per_group == 1 else x_bgtd.repeat_interleave(per_group, 1)


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """The tensor with the strides of another of its shape, copied if need be."""
    same = all(
        size == 1 or mine == others
        for size, mine, others in zip(x.shape, x.stride(), like.stride(), strict=True)
    )
    return x if same else torch.empty_strided(x.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)
