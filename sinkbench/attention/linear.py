"""Kernel attention in time that grows with the length: weights that are products of features, in chunks.

    O_i = s sum_{j <= i} (q_i.k_j) v_j / Z_i = s q_i (sum_{j <= i} k_j v_j^T) / Z_i

(Katharopoulos et al. 2006.16236). Within a chunk by its matrix of scores; the chunks before come as one
matrix, the sum of their k v^T. Factors of products have the inputs' dtype; products and sums are float32
(float64 for such inputs). On CUDA the Triton kernels of ``triton_linear`` compute it, on a CPU and where they
do not fit ``causal_sums`` in torch.

Shapes: b sequence of the batch, h head, g kv head, r head of a kv head, t position, n chunk, c position in
it, d size of the features, e head size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sinkbench.api import AttentionSpec, Elementwise
from sinkbench.attention import fused
from sinkbench.attention.reference import Problem, mapped, per_kv_head, scaled_and_biased, slot_value

_log = logging.getLogger(__name__)

CHUNK = 128
"""Of the sums by torch."""
LARGEST_SIZE = 256
"""Of features and heads in the kernels."""


def missing(spec: AttentionSpec) -> list[str]:
    """What a declaration asks for that sums over chunks cannot do; empty if they can."""
    elementwise = isinstance(spec.rule, Elementwise)
    lacks = {
        "weights that are no product of feature maps": not _is_score_itself(spec),
        "products in float32, which torch gives from 2.8 on": not hasattr(torch.ops.aten.bmm, "dtype"),
        "a window": elementwise and spec.window is not None,
        "a score bias": elementwise and spec.score_bias is not None,
    }
    return [what for what, wanted in lacks.items() if wanted]


def _is_score_itself(spec: AttentionSpec) -> bool:
    """The similarity gives back the very tensor of scores that it was given."""
    if not isinstance(spec.rule, Elementwise):
        return False
    score = torch.linspace(-2, 2, 5)
    result = spec.rule.function(score)
    return result is score and torch.equal(score, torch.linspace(-2, 2, 5))


def run(p: Problem) -> Tensor:
    """O [b, h, q, d]."""
    rule, slot = p.spec.rule, p.spec.extra_slot
    assert isinstance(rule, Elementwise)
    m = _mapped(p)
    query, groups = m.query_bhqd, m.key_bgkd.shape[1]
    in_kernels = _in_kernels(query, m.key_bgkd, m.value_bgkd)
    if in_kernels and slot is None:
        from sinkbench.attention import triton_linear

        output = triton_linear.attend(
            query, m.key_bgkd, m.value_bgkd, normalize=rule.normalize, eps=rule.eps, scale=p.scale
        )
        return scaled_and_biased(p, output)
    output, total = _sums(m, in_kernels)
    if slot is not None:
        key = per_kv_head(m, m.parameters[slot.key]).to(total.dtype)
        key = key.repeat_interleave(query.shape[1] // groups, 1)
        weight = p.scale * (query.to(total.dtype) * key).sum(-1, keepdim=True)
        total = total + weight
        # Its key is part of the graph whatever its value: every parameter has a gradient.
        output = output + weight * (0.0 if slot.value is None else slot_value(m))
    if rule.normalize == "abs":
        output = output / total.abs().clamp(min=1.0)
    elif rule.normalize:
        output = output / (total + rule.eps)
    return scaled_and_biased(p, output.to(p.value_bgkd.dtype))


def _mapped(p: Problem) -> Problem:
    """``mapped``, on CUDA with the feature map compiled: few passes over memory."""
    feature_map = p.spec.feature_map
    if feature_map is None or not p.query_bhqd.is_cuda:
        return mapped(p)
    function = _in_memory_order(_compiled_map(feature_map.function))
    return mapped(replace(p, spec=replace(p.spec, feature_map=replace(feature_map, function=function))))


Map = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@cache
def _compiled_map(function: Map) -> Map:
    return torch.compile(function, dynamic=False)


def _in_memory_order(function: Map) -> Map:
    """The map of x [..., d] with its dimensions as they lie in memory: a product of a transposed tensor would
    copy it."""

    def ordered(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        order = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
        back = sorted(range(x.dim() - 1), key=order.__getitem__)
        return function(x.permute(*order, -1), parameters).permute(*back, -1)

    return ordered


def _in_kernels(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the Triton kernels compute it. On a card it is said once why not."""
    if not query.is_cuda:
        return False
    lacks = kernels_lack(query, key, value)
    if lacks:
        _say(" and ".join(lacks))
    return not lacks


def kernels_lack(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Why the Triton kernels cannot compute the sums of these features and values; empty if they can."""
    dtypes, largest = {query.dtype, key.dtype, value.dtype}, max(query.shape[-1], value.shape[-1])
    known = {torch.float32, torch.bfloat16, torch.float16}
    lacks = {
        "the package triton is not installed": not fused.is_installed(),
        f"its tensors are {' and '.join(sorted(map(str, dtypes)))}": len(dtypes) > 1 or not dtypes <= known,
        f"its features or heads have {largest} dimensions": largest > LARGEST_SIZE,
    }
    return [what for what, there in lacks.items() if there]


@cache
def _say(why: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        _log.warning("kernel attention is computed by compiled torch, not by its Triton kernels, as %s", why)


def _sums(m: Problem, in_kernels: bool) -> tuple[Tensor, Tensor]:
    """scale sum_{j <= i} (q_i.k_j) v_j [b, h, t, e] and scale sum_{j <= i} q_i.k_j [b, h, t, 1]."""
    query, key, value = m.query_bhqd, m.key_bgkd, m.value_bgkd
    if in_kernels:
        from sinkbench.attention import triton_linear

        output, total = triton_linear.sums(query, key, value, scale=m.scale)
        return output, total[..., None]
    by_torch = _compiled() if query.is_cuda else causal_sums
    output, total = by_torch(query.unflatten(1, (key.shape[1], -1)), key, value, CHUNK)
    return output.flatten(1, 2) * m.scale, total.flatten(1, 2)[..., None] * m.scale


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(causal_sums, dynamic=False)


def causal_sums(
    query_bgrtd: Tensor, key_bgtd: Tensor, value_bgte: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """sum_{j <= i} (q_i.k_j) v_j [b, g, r, t, e], and sum_{j <= i} q_i.k_j [b, g, r, t].

    Args:
        chunk: positions whose scores are computed; the result does not depend on it.
    """
    length, per_group, dtype = key_bgtd.shape[2], query_bgrtd.shape[2], query_bgrtd.dtype
    wide = torch.promote_types(dtype, torch.float32)
    chunk = min(chunk, length)
    query, key, value = (_chunks(x, chunk) for x in (query_bgrtd, key_bgtd, value_bgte))
    query = query.movedim(2, 3).flatten(3, 4)  # [b, g, n, r c, d]
    within = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).tril().repeat(per_group, 1)
    score = _product(query, key.transpose(-1, -2)).masked_fill(~within, 0.0)
    output = _product(score.to(dtype), value)
    total = score.sum(-1)
    if length > chunk:
        state = _before(_product(key.transpose(-1, -2), value))
        output = output + _product(query, state.to(dtype))
        keys = _before(key.sum(-2, dtype=wide)[..., None]).squeeze(-1)
        total = total + (query.to(wide) * keys[..., None, :]).sum(-1)
    output = output.unflatten(3, (per_group, chunk)).movedim(3, 2).flatten(3, 4)
    total = total.unflatten(3, (per_group, chunk)).movedim(3, 2).flatten(3, 4)
    return output[..., :length, :], total[..., :length]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix products [..., x, z] of [..., x, y] and [..., y, z], in float32 for half precision: whether
    a signed sum is above 1 is lost in rounded scores."""
    result: Tensor = _Product.apply(left, right)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        wide = torch.promote_types(left.dtype, torch.float32)
        if left.is_cuda and left.dtype != wide:
            product: Tensor = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=wide)
            return product.view(*left.shape[:-1], right.shape[-1])
        return left.to(wide) @ right.to(wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        grad = grad.to(left.dtype)
        return grad @ right.transpose(-1, -2), left.transpose(-1, -2) @ grad


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[..., t, d] -> [..., n, c, d], with zeros after the end."""
    padded = pad(x, (0, 0, 0, -x.shape[-2] % chunk))
    return padded.view(*x.shape[:-2], -1, chunk, x.shape[-1])


def _before(x_bgn: Tensor) -> Tensor:
    """The sum of the chunks before each, [b, g, n, ...]. A product, as cumsum's gradient on a card is not
    deterministic; there are few chunks."""
    count = x_bgn.shape[2]
    before = torch.ones(count, count, dtype=x_bgn.dtype, device=x_bgn.device).tril(-1)
    return (before @ x_bgn.flatten(3)).view_as(x_bgn)
