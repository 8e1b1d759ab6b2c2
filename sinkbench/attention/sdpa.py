"""Softmax attention by torch's scaled_dot_product_attention."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sinkbench.api import AttentionSpec, Softmax
from sinkbench.attention.reference import Problem, allowed_qk


def missing(spec: AttentionSpec) -> list[str]:
    """What a declaration asks for that the fused softmax cannot do; empty if it can."""
    lacks = {
        "a similarity other than softmax": not isinstance(spec.rule, Softmax),
        "a sink logit": isinstance(spec.rule, Softmax) and spec.rule.sink_logit is not None,
        "a feature map": spec.feature_map is not None,
        "an extra slot": spec.extra_slot is not None,
        "an output scale or bias": spec.output_scale != 1.0 or spec.output_bias is not None,
    }
    return [what for what, wanted in lacks.items() if wanted]


def run(p: Problem) -> Tensor:
    """O [b, h, q, d]. A score bias that is the same for all keys leaves a softmax as it is, so it is not
    computed."""
    causal = p.aligned and p.spec.window is None and not p.prefix and p.position_bias is None
    mask = None if causal else _mask(p)
    return scaled_dot_product_attention(
        p.query_bhqd,
        p.key_bgkd,
        p.value_bgkd,
        attn_mask=mask,
        is_causal=causal,
        scale=p.scale,
        enable_gqa=p.query_bhqd.shape[1] != p.key_bgkd.shape[1],
    )


def _mask(p: Problem) -> Tensor:
    """Bool [q, k], or with a position bias the bias [1, h, q, k] with -inf where masked."""
    allowed = allowed_qk(p.position_q, p.position_k, p.spec.window, p.prefix)
    if p.position_bias is None:
        return allowed
    distance = p.position_q[:, None] - p.position_k[None, :]
    bias = p.position_bias.function(distance, p.heads, p.position_parameters)
    return bias.masked_fill(~allowed, float("-inf")).to(p.query_bhqd.dtype)[None]
