"""Elementwise similarities by the Triton kernel: with Triton functions that are given, or written from the
similarity itself."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, Elementwise, WeightRule
from sinkbench.attention import elementwise
from sinkbench.attention.reference import Problem

NO_FORM = ", which has no Triton form"


def missing(spec: AttentionSpec, head_size: int) -> list[str]:
    """What a declaration asks for that the kernel cannot do, its function aside; empty if it can."""
    rule = spec.rule
    lacks = {
        "the package triton, which is not installed": importlib.util.find_spec("triton") is None,
        "weights that need whole rows": not isinstance(rule, Elementwise),
        "a normaliser other than the row's sum": isinstance(rule, Elementwise) and rule.normalize == "abs",
        "a feature map": spec.feature_map is not None,
        "an extra slot": spec.extra_slot is not None,
        "an output scale or bias": spec.output_scale != 1.0 or spec.output_bias is not None,
        f"a head size of {head_size}": not _head_size_fits(head_size),
    }
    return [what for what, wanted in lacks.items() if wanted]


def missing_function(rule: WeightRule) -> list[str]:
    """Why the similarity of an elementwise rule has no Triton functions; empty if it has."""
    if not isinstance(rule, Elementwise) or rule.fused is not None:
        return []
    try:
        elementwise.write(rule.function)
    except elementwise.NoTritonForm as obstacle:
        return [f"{obstacle}{NO_FORM}"]
    return []


def _head_size_fits(head_size: int) -> bool:
    """Two powers of two from 16 on that add up to it, or one; at most 256."""
    first = 1 << (head_size.bit_length() - 1)
    second = head_size - first
    return first >= 16 and head_size <= 256 and (second == 0 or (second >= 16 and second & (second - 1) == 0))


def run(p: Problem) -> Tensor:
    """O [b, h, q, d]."""
    from sinkbench.attention import triton_elementwise

    rule, bias = p.spec.rule, p.spec.score_bias
    assert isinstance(rule, Elementwise)
    given = rule.fused(p.query_bhqd.dtype) if rule.fused is not None else None
    function, derivative = given or elementwise.load(rule.function)
    bias_h: Tensor | None = None
    if isinstance(bias, str):
        bias_h = p.parameters[bias]
    elif bias is not None:
        bias_h = p.query_bhqd.new_full((p.query_bhqd.shape[1],), bias, dtype=torch.float32)
    return triton_elementwise.attend(
        p.query_bhqd,
        p.key_bgkd,
        p.value_bgkd,
        function=function,
        derivative=derivative,
        normalize=bool(rule.normalize),
        eps=rule.eps,
        scale=p.scale,
        bias_h=bias_h,
        window=p.spec.window,
    )
