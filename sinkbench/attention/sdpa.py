"""Softmax attention by torch's fused kernels.

An extra slot and a sink logit are one more term each in the sum of the softmax. They join it afterwards,
as ``flash`` says, where there is a kernel that gives the log-sum-exp of the rows; else, with a mask, they are
one more key each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sinkbench.api import AttentionSpec, Softmax
from sinkbench.attention.flash import Kernel, More, Scores, fused, mix, softmax, weigh
from sinkbench.attention.flash_torch import has_kernel, kernel_for, laid_out
from sinkbench.attention.reference import (
    Problem,
    allowed_keys,
    constant,
    parameter_or_constant,
    per_kv_head,
    scaled_and_biased,
    slot_value,
)


def missing(spec: AttentionSpec) -> list[str]:
    """What a declaration asks for that the fused softmax cannot do; empty if it can."""
    lacks = {
        "a similarity other than softmax": not isinstance(spec.rule, Softmax),
        "a feature map": spec.feature_map is not None,
    }
    return [what for what, wanted in lacks.items() if wanted]


def has_more(spec: AttentionSpec) -> bool:
    """There are terms in the sum of the softmax beside the keys."""
    return spec.extra_slot is not None or (
        isinstance(spec.rule, Softmax) and spec.rule.sink_logit is not None
    )


def needs_mask(spec: AttentionSpec, *, bias: bool, prefix: bool, documents: bool, has_kernel: bool) -> bool:
    """Whether torch's kernels compute it with a mask of T x T only.

    Args:
        bias: there is a position bias.
        prefix: the first positions see one another.
        documents: a query sees its own document only.
        has_kernel: whether there is a flash kernel, with a window if the declaration has one.
    """
    windowed = spec.window is not None
    without_kernel = not has_kernel and (windowed or has_more(spec))
    return bias or documents or (windowed and prefix) or without_kernel


def run(p: Problem) -> Tensor:
    """O [b, h, q, d]. A score bias that is the same for all keys leaves a plain softmax as it is, so it is
    not computed there."""
    query = p.query_bhqd
    half = query.dtype in (torch.bfloat16, torch.float16)
    kernel = has_kernel(query.device.type, query.shape[-1], half, p.spec.window is not None)
    more = has_more(p.spec)
    masked = not p.aligned or needs_mask(
        p.spec,
        bias=p.position_bias is not None,
        prefix=p.prefix > 0,
        documents=p.document_start_bk is not None,
        has_kernel=kernel,
    )
    if masked:
        output = _masked_with_more(p) if more else _attend(p, p.key_bgkd, p.value_bgkd, _mask(p), False)
    elif more or p.spec.window is not None or (p.prefix and kernel):
        scores = Scores(scale=p.scale, window=p.spec.window)
        output = through(kernel_for(p.query_bhqd, p.key_bgkd, p.value_bgkd, scores), p)
    else:
        output = _plain(p)
    return scaled_and_biased(p, output)


def _plain(p: Problem) -> Tensor:
    """Causal. The queries of a prefix that sees itself see it and nothing else, so that they are an
    attention of their own."""
    output = _attend(p, p.key_bgkd, p.value_bgkd, None, True)
    if not p.prefix:
        return output
    first = replace(p, query_bhqd=p.query_bhqd[:, :, : p.prefix])
    within = _attend(first, p.key_bgkd[:, :, : p.prefix], p.value_bgkd[:, :, : p.prefix], None, False)
    return torch.cat([within, output[:, :, p.prefix :]], 2)


def through(kernel: Kernel, p: Problem) -> Tensor:
    """O [b, h, q, d] by a kernel of plain softmax, without the declared scale and bias of the output."""
    tensors = (p.query_bhqd, p.key_bgkd, p.value_bgkd)
    return softmax(kernel, *tensors, Scores(scale=p.scale, window=p.spec.window), _more(p), p.prefix)


def _attend(p: Problem, key_bgkd: Tensor, value_bgkd: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    output = scaled_dot_product_attention(
        p.query_bhqd,
        key_bgkd,
        value_bgkd,
        attn_mask=mask,
        is_causal=causal,
        scale=p.scale,
        enable_gqa=p.query_bhqd.shape[1] != p.key_bgkd.shape[1],
    )
    if output.is_cuda:
        output = _WithWrittenGradient.apply(output)  # type: ignore[no-untyped-call]
    return output


class _WithWrittenGradient(torch.autograd.Function):
    """Itself. Its gradient lies in memory as it does: cuDNN's kernels read what is broadcast, as the gradient
    of a sum over heads is, beyond its end."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.layout = torch.empty_like(output, device="meta")
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return laid_out(grads[0], ctx.layout)


def _mask(p: Problem) -> Tensor:
    """Bool [1, 1, q, k], or with a position bias the bias [1, h, q, k] with -inf where masked; with documents
    for each sequence [b, ...]."""
    allowed = allowed_keys(p, p.position_q)
    allowed = allowed if allowed.dim() == 4 else allowed[None, None]
    if p.position_bias is None:
        return allowed
    distance = p.position_q[:, None] - p.position_k[None, :]
    bias = p.position_bias.function(distance, p.heads, p.position_parameters)
    return bias[None].masked_fill(~allowed, float("-inf")).to(p.query_bhqd.dtype)


def with_more(p: Problem, output: Tensor, lse: Tensor) -> Tensor:
    """The output [b, h, q, d] after the extra slot and the sink logit have joined the sum of the softmax,
    which lse [b, h, q] is the logarithm of."""
    if not has_more(p.spec):
        return output
    more = _more(p)
    weighed = fused(weigh, output)(lse, p.query_bhqd, more.slot_key, more.sink_logit, p.scale)
    return fused(mix, output)(output, weighed.kept, weighed.slot, more.slot_value)


def _more(p: Problem) -> More:
    heads, size = p.query_bhqd.shape[1], p.query_bhqd.shape[3]
    slot, key, value = p.spec.extra_slot, None, None
    if slot is not None:
        key = per_kv_head(p, p.parameters[slot.key]).repeat_interleave(heads // p.key_bgkd.shape[1], 1)[
            0, :, 0
        ]
        if slot.value is not None:
            value = slot_value(p).expand(1, heads, 1, size)[0, :, 0]
    wide = torch.promote_types(p.query_bhqd.dtype, torch.float32)
    logit = sink_logit(p, p.query_bhqd.new_empty((1, heads, 0), dtype=wide))
    return More(
        slot_key=key,
        slot_value=value,
        sink_logit=None if logit is None else logit[:, 0],
    )


def sink_logit(p: Problem, like: Tensor) -> Tensor | None:
    """[h, 1]. A bias on all scores is the same as its negative on the logit."""
    assert isinstance(p.spec.rule, Softmax)
    logit = parameter_or_constant(p, p.spec.rule.sink_logit, like)
    if logit is None:
        return None
    bias = parameter_or_constant(p, p.spec.score_bias, like)
    return (logit if bias is None else logit - bias)[..., 0]


def _masked_with_more(p: Problem) -> Tensor:
    """The slot and the sink as keys in front of the others."""
    batch, groups, _, size = p.key_bgkd.shape
    heads, length = p.query_bhqd.shape[1:3]
    nothing = p.key_bgkd.new_zeros(batch, groups, 1, size)
    keys, values, scores = [], [], []
    if (slot := p.spec.extra_slot) is not None:
        keys.append(per_kv_head(p, p.parameters[slot.key]).to(nothing.dtype).expand_as(nothing))
        values.append(_slot_value_per_group(p).to(nothing.dtype).expand_as(nothing))
        scores.append(p.query_bhqd.new_zeros(heads, 1))
    if (logit := sink_logit(p, p.query_bhqd)) is not None:
        keys.append(nothing)
        values.append(nothing)
        scores.append(logit)
    mask = _mask(p)
    if mask.dtype == torch.bool:
        mask = p.query_bhqd.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    first = torch.cat(scores, -1)[None, :, None].expand(len(mask), -1, length, -1)
    mask = torch.cat([first, mask.expand(-1, heads, -1, -1)], -1)
    return _attend(p, torch.cat([*keys, p.key_bgkd], 2), torch.cat([*values, p.value_bgkd], 2), mask, False)


def _slot_value_per_group(p: Problem) -> Tensor:
    """Broadcastable to [b, g, 1, d]."""
    assert p.spec.extra_slot is not None
    value = p.spec.extra_slot.value
    if value is None:
        return p.value_bgkd.new_zeros(())
    if isinstance(value, str):
        return per_kv_head(p, p.parameters[value])
    return constant(tuple(value), p.value_bgkd.dtype, p.value_bgkd.device)
