"""The one truth of an attention declaration: scores to weights, and weights to output.

The eager backend trains with it, probes measure with it, fused kernels are tested against it.

Shapes: b sequence of the batch, h head, g kv head, q query position, k key position, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sinkbench.api import Elementwise, Rows, Softmax, WeightRule

BLOCK_ELEMENTS = 2**27
"""Scores held at once by ``attend``: beyond this, queries go in blocks whose scores are computed
again in the backward pass, so that memory grows with the length and not with its square."""


def allowed_qk(position_q: Tensor, position_k: Tensor, window: int | None) -> Tensor:
    """Which key a query may see: itself and the past, at most ``window`` keys. Bool [q, k]."""
    distance = position_q[:, None] - position_k[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def weights(rule: WeightRule, score_bhqk: Tensor, allowed: Tensor, sink_h: Tensor | None = None) -> Tensor:
    """A row of scores becomes a row of attention weights.

    Args:
        rule: the declared rule.
        score_bhqk: scaled and biased scores, float32 or float64.
        allowed: bool, broadcastable to the scores; weights are zero elsewhere.
        sink_h: the sink logit of each head, for a Softmax that declares one.

    Returns:
        A_bhqk of the scores' dtype.
    """
    if isinstance(rule, Softmax):
        return _softmax(score_bhqk.masked_fill(~allowed, float("-inf")), sink_h)
    if isinstance(rule, Elementwise):
        value = rule.function(score_bhqk).masked_fill(~allowed, 0.0)
        return value / (value.sum(-1, keepdim=True) + rule.eps) if rule.normalize else value
    assert isinstance(rule, Rows)
    return rule.function(score_bhqk, allowed)


def _softmax(score_bhqk: Tensor, sink_h: Tensor | None) -> Tensor:
    if sink_h is None:
        return score_bhqk.softmax(-1)
    sink = sink_h.to(score_bhqk.dtype)[None, :, None, None].expand(*score_bhqk.shape[:-1], 1)
    return torch.cat([score_bhqk, sink], -1).softmax(-1)[..., :-1]


def scores(query_bhqd: Tensor, key_bgkd: Tensor, scale: float, bias_h: Tensor | None = None) -> Tensor:
    """scale q.k + bias for every head. The product has the inputs' dtype, the result is float32
    (float64 for float64 inputs)."""
    groups = key_bgkd.shape[1]
    query: Tensor = query_bhqd.unflatten(1, (groups, -1))
    score = (query @ key_bgkd.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    score = score.to(torch.promote_types(score.dtype, torch.float32)) * scale
    return score if bias_h is None else score + bias_h.to(score.dtype)[:, None, None]


def attend(
    query_bhqd: Tensor,
    key_bgkd: Tensor,
    value_bgkd: Tensor,
    *,
    rule: WeightRule,
    scale: float,
    position_q: Tensor,
    position_k: Tensor,
    window: int | None = None,
    bias_h: Tensor | None = None,
    sink_h: Tensor | None = None,
) -> Tensor:
    """O = A V. Returns [b, h, q, d] of the values' dtype."""

    def block(query: Tensor, position: Tensor) -> Tensor:
        allowed = allowed_qk(position, position_k, window)
        weight = weights(rule, scores(query, key_bgkd, scale, bias_h), allowed, sink_h)
        grouped: Tensor = weight.to(value_bgkd.dtype).unflatten(1, (value_bgkd.shape[1], -1))
        return (grouped @ value_bgkd.unsqueeze(2)).flatten(1, 2)

    batch, heads, length, _ = query_bhqd.shape
    rows = max(1, BLOCK_ELEMENTS // (batch * heads * position_k.numel()))
    if length <= rows:
        return block(query_bhqd, position_q)
    parts = [
        checkpoint(block, query, position, use_reentrant=False, preserve_rng_state=False)
        for query, position in zip(query_bhqd.split(rows, 2), position_q.split(rows), strict=True)
    ]
    return torch.cat(parts, 2)


def rotation(position_s: Tensor, rotated: int, base: float) -> Tensor:
    """Cosine and sine of every position's angles, float32 [2, s, rotated / 2]."""
    exponent = torch.arange(0, rotated, 2, dtype=torch.float32, device=position_s.device) / rotated
    angle = position_s.float()[:, None] * base**-exponent
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2104.09864) of a head's first dimensions, halves rotated.

    Args:
        x: [..., d].
        cos, sin: broadcastable to [..., r/2], for r <= d rotated dimensions.
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
