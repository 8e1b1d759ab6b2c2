"""Attention by the Triton kernels: softmax, where it has a position bias, and elementwise similarities, with
Triton functions that are given, or written from the similarity itself."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, Elementwise, Softmax, WeightRule
from sinkbench.attention import elementwise, sdpa
from sinkbench.attention.reference import Problem, scaled_and_biased

NO_FORM = ", which has no Triton form"


def missing(spec: AttentionSpec, head_size: int) -> list[str]:
    """What a declaration asks for that the kernels cannot do, its function aside; empty if they can."""
    softmax = isinstance(spec.rule, Softmax)
    lacks = {
        "the package triton, which is not installed": not is_installed(),
        "weights that need whole rows": not softmax and not isinstance(spec.rule, Elementwise),
        "a feature map": spec.feature_map is not None,
        "an extra slot": spec.extra_slot is not None and not softmax,
        f"a head size of {head_size}": not head_size_fits(head_size),
    }
    return [what for what, wanted in lacks.items() if wanted]


def is_installed() -> bool:
    """Whether there is Triton."""
    return importlib.util.find_spec("triton") is not None


def missing_function(rule: WeightRule) -> list[str]:
    """Why the similarity of an elementwise rule has no Triton functions; empty if it has."""
    if not isinstance(rule, Elementwise) or rule.fused is not None:
        return []
    try:
        elementwise.write(rule.function)
    except elementwise.NoTritonForm as obstacle:
        return [f"{obstacle}{NO_FORM}"]
    return []


def head_size_fits(head_size: int) -> bool:
    """Two powers of two from 16 on that add up to it, or one; at most 256."""
    first = 1 << (head_size.bit_length() - 1)
    second = head_size - first
    return first >= 16 and head_size <= 256 and (second == 0 or (second >= 16 and second & (second - 1) == 0))


def run(p: Problem) -> Tensor:
    """O [b, h, q, d]. A score bias of a softmax only counts against a sink, and extra terms join its sum
    afterwards, as in sdpa."""
    from sinkbench.attention import triton_elementwise

    tensors, rule, window = (p.query_bhqd, p.key_bgkd, p.value_bgkd), p.spec.rule, p.spec.window
    if isinstance(rule, Softmax):
        output, lse = triton_elementwise.softmax(
            *tensors,
            scale=p.scale,
            window=window,
            prefix=p.prefix,
            document_start_bt=p.document_start_bk,
            **position(p),
        )
        return scaled_and_biased(p, sdpa.with_more(p, output, lse))
    assert isinstance(rule, Elementwise)
    given = rule.fused(p.query_bhqd.dtype) if rule.fused is not None else None
    function, derivative = given or elementwise.load(rule.function)
    output = triton_elementwise.attend(
        *tensors,
        function=function,
        derivative=derivative,
        normalize=rule.normalize,
        eps=rule.eps,
        scale=p.scale,
        bias_h=score_bias(p),
        window=window,
        prefix=p.prefix,
        document_start_bt=p.document_start_bk,
        **position(p),
    )
    return scaled_and_biased(p, output)


def score_bias(p: Problem) -> Tensor | None:
    """What is added to all scores of a head, [h]."""
    bias = p.spec.score_bias
    if isinstance(bias, str):
        return p.parameters[bias]
    if bias is None:
        return None
    return p.query_bhqd.new_full((p.query_bhqd.shape[1],), bias, dtype=torch.float32)


def position(p: Problem) -> dict[str, Tensor]:
    """The position bias as the kernels take it: slopes [h], or a table [h, n] of the distances from the
    farthest key ahead, in a prefix, to the first key, or to where the bias stays as it is. Gradients go on
    through what computed them."""
    bias = p.position_bias
    if bias is None:
        return {}
    if bias.slope is not None:
        return {"slope_h": bias.slope(p.heads, p.position_parameters)}
    length = p.query_bhqd.shape[2]
    ahead = max(min(p.prefix, length) - 1, 0)
    last = length - 1 if bias.constant_from is None else min(bias.constant_from, length - 1)
    distance = torch.arange(-ahead, last + 1, device=p.query_bhqd.device)[None]
    return {"table_hn": bias.function(distance, p.heads, p.position_parameters)[:, 0]}
