"""The one truth of an attention declaration: scores to weights, and weights to output.

The eager backend trains with it, probes measure with it, fused kernels are tested against it.

Shapes: b sequence of the batch, h head, g kv head, q query position, k key position, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sinkbench.api import AttentionSpec, Elementwise, Rows, ScoreBias, Softmax

BLOCK_ELEMENTS = 2**27
"""Scores held at once by ``attend``: beyond this, queries go in blocks whose scores are computed
again in the backward pass, so that memory grows with the length and not with its square."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: the heads of this rank, its queries, the keys and values of all positions.

    Attributes:
        spec: the declaration.
        query_bhqd, key_bgkd, value_bgkd: after rotary, before a feature map.
        position_q, position_k: int64 positions in the sequence.
        aligned: queries and keys are the same positions, in order.
        scale: factor on q.k.
        heads: int64 numbers of the heads in the whole model.
        parameters: the declared parameters; one that is split over heads has those heads' rows.
        position_bias: of the positional plugin, with ``position_parameters``.
        prefix: the first so many positions see one another.
        document_start_bk: integers [b, k] of all positions: where the document of each begins, in sequences
            of several. A query sees keys of its own document only. Not together with a prefix.
        visible: (position_q [q, 1], position_k [1, k]) -> bool: what of the rest a query may still see. For
            measurement: this reference heeds it, kernels do not.
    """

    spec: AttentionSpec
    query_bhqd: Tensor
    key_bgkd: Tensor
    value_bgkd: Tensor
    position_q: Tensor
    position_k: Tensor
    aligned: bool
    scale: float
    heads: Tensor
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    position_bias: ScoreBias | None = None
    position_parameters: Mapping[str, Tensor] = field(default_factory=dict)
    prefix: int = 0
    document_start_bk: Tensor | None = None
    visible: Callable[[Tensor, Tensor], Tensor] | None = None

    def in_float32(self) -> Problem:
        """The same problem for measurement."""
        return replace(
            self,
            query_bhqd=self.query_bhqd.float(),
            key_bgkd=self.key_bgkd.float(),
            value_bgkd=self.value_bgkd.float(),
        )


def allowed_qk(position_q: Tensor, position_k: Tensor, window: int | None = None, prefix: int = 0) -> Tensor:
    """Which key a query may see, bool [q, k]: itself and the past, at most ``window`` keys; within the
    prefix all of it."""
    distance = position_q[:, None] - position_k[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    if prefix:
        allowed = allowed | ((position_q < prefix)[:, None] & (position_k < prefix)[None, :])
    return allowed


def allowed_keys(p: Problem, position_q: Tensor) -> Tensor:
    """What ``allowed_qk`` allows these queries, bool [q, k], or [b, 1, q, k] where documents bound it."""
    allowed = allowed_qk(position_q, p.position_k, p.spec.window, p.prefix)
    if p.document_start_bk is None:
        return allowed
    start_bq = p.document_start_bk[:, position_q]
    return allowed & (p.position_k >= start_bq[:, None, :, None])


def weights(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Attention weights [b, h, q, k], zero where masked, and those of the extra slot [b, h, q], if
    there is one; float32, or float64 for such inputs."""
    p = mapped(problem)
    return _weights(p, p.query_bhqd, p.position_q)


def of_tokens(weight: Tensor, slot: Tensor | None, leading: int) -> tuple[Tensor, Tensor | None]:
    """What ``weights`` gives, by tokens alone: the weights of their keys, and what the sink token and the
    extra slot take of each row together; None where there is neither.

    Args:
        leading: keys before the first token: 1 with a sink token.
    """
    if not leading:
        return weight, slot
    first = weight[..., :leading].sum(-1)
    return weight[..., leading:], first if slot is None else first + slot


def attend(problem: Problem) -> Tensor:
    """O = A V. Returns [b, h, q, d] of the values' dtype."""
    p = mapped(problem)
    batch, heads, length, _ = p.query_bhqd.shape
    rows = max(1, BLOCK_ELEMENTS // (batch * heads * p.position_k.numel()))
    if length <= rows:
        output = _attend_block(p, p.query_bhqd, p.position_q)
    else:
        parts = [
            checkpoint(_attend_block, p, query, position, use_reentrant=False, preserve_rng_state=False)
            for query, position in zip(p.query_bhqd.split(rows, 2), p.position_q.split(rows), strict=True)
        ]
        output = torch.cat(parts, 2)
    return _biased(p, output)


def scaled_and_biased(p: Problem, output: Tensor) -> Tensor:
    """The output [b, h, q, d] of a kernel, with the declared scale and bias. The scale is part of ``weights``
    here."""
    if p.spec.output_scale != 1.0:
        output = output * p.spec.output_scale
    return _biased(p, output)


def _biased(p: Problem, output: Tensor) -> Tensor:
    bias = p.spec.output_bias
    return output if bias is None else output + per_head(p.parameters[bias]).to(output.dtype)


def mapped(p: Problem) -> Problem:
    """Queries, keys and the extra slot's key after the feature map, if there is one."""
    feature_map = p.spec.feature_map
    if feature_map is None:
        return p
    needed = {name: p.parameters[name] for name in feature_map.parameters}
    slot = p.spec.extra_slot
    mapped_slot = {} if slot is None else {slot.key: feature_map.function(p.parameters[slot.key], needed)}
    return replace(
        p,
        query_bhqd=feature_map.function(p.query_bhqd, needed),
        key_bgkd=feature_map.function(p.key_bgkd, needed),
        parameters={**p.parameters, **mapped_slot},
    )


def _attend_block(p: Problem, query_bhqd: Tensor, position_q: Tensor) -> Tensor:
    weight, slot = _weights(p, query_bhqd, position_q)
    output = _times_kv(weight.to(p.value_bgkd.dtype), p.value_bgkd)
    if slot is None or p.spec.extra_slot is None or p.spec.extra_slot.value is None:
        return output
    return output + slot.to(output.dtype)[..., None] * slot_value(p).to(output.dtype)


def _weights(p: Problem, query_bhqd: Tensor, position_q: Tensor) -> tuple[Tensor, Tensor | None]:
    score = _products(p, query_bhqd, p.key_bgkd)
    if p.position_bias is not None:
        distance = position_q[:, None] - p.position_k[None, :]
        score = score + p.position_bias.function(distance, p.heads, p.position_parameters)
    allowed = allowed_keys(p, position_q)
    if p.visible is not None:
        allowed = allowed & p.visible(position_q[:, None], p.position_k[None, :])
    slot = p.spec.extra_slot
    if slot is None:
        return p.spec.output_scale * _rule(p, score, allowed), None
    slot_score = _products(p, query_bhqd, per_kv_head(p, p.parameters[slot.key]).to(query_bhqd.dtype))
    allowed = torch.cat([allowed, allowed.new_ones(*allowed.shape[:-1], 1)], -1)
    weight = p.spec.output_scale * _rule(p, torch.cat([score, slot_score], -1), allowed)
    return weight[..., :-1], weight[..., -1]


def _products(p: Problem, query_bhqd: Tensor, key_bgkd: Tensor) -> Tensor:
    """scale q.k + bias. The product has the inputs' dtype, the result is float32 at least."""
    score = _times_kv(query_bhqd, key_bgkd.transpose(-1, -2))
    score = score.to(torch.promote_types(score.dtype, torch.float32)) * p.scale
    bias = parameter_or_constant(p, p.spec.score_bias, score)
    return score if bias is None else score + bias


def _rule(p: Problem, score: Tensor, allowed: Tensor) -> Tensor:
    rule = p.spec.rule
    if isinstance(rule, Softmax):
        score = score.masked_fill(~allowed, float("-inf"))
        sink = parameter_or_constant(p, rule.sink_logit, score)
        if sink is None:
            return score.softmax(-1)
        return torch.cat([score, sink.expand(*score.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
    if isinstance(rule, Elementwise):
        value = rule.function(score).masked_fill(~allowed, 0.0)
        if rule.normalize is False:
            return value
        total = value.sum(-1, keepdim=True)
        return value / (total.abs().clamp(min=1.0) if rule.normalize == "abs" else total + rule.eps)
    assert isinstance(rule, Rows)
    return rule.function(score, allowed)


def _times_kv(left_bhqx: Tensor, right_bgxy: Tensor) -> Tensor:
    """Matrix product of every head with its kv head, [b, h, q, y]."""
    grouped: Tensor = left_bhqx.unflatten(1, (right_bgxy.shape[1], -1))
    return (grouped @ right_bgxy.unsqueeze(2)).flatten(1, 2)


def parameter_or_constant(p: Problem, value: float | str | None, like: Tensor) -> Tensor | None:
    """A value per head as [h, 1, 1], in the dtype of the scores."""
    if value is None:
        return None
    if isinstance(value, str):
        return p.parameters[value].to(like.dtype)[:, None, None]
    return like.new_full((like.shape[1], 1, 1), value)


def per_kv_head(p: Problem, parameter: Tensor) -> Tensor:
    """[1, g, 1, d] from [g, d], or from [d] for one that all heads share."""
    groups = p.key_bgkd.shape[1]
    return parameter.expand(groups, parameter.shape[-1])[None, :, None, :]


def per_head(parameter: Tensor) -> Tensor:
    """[h, 1, d] or [1, d] against [b, h, q, d]."""
    return parameter[:, None, :] if parameter.dim() == 2 else parameter


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that stays on its device: a copy from the host would hold up each step, and a CUDA graph
    cannot have it."""
    return torch.tensor(values, dtype=dtype, device=device)


def slot_value(p: Problem) -> Tensor:
    """The extra slot's value for every head, broadcastable to [b, h, q, d]."""
    assert p.spec.extra_slot is not None
    value = p.spec.extra_slot.value
    if not isinstance(value, str):
        assert value is not None
        return constant(tuple(value), p.value_bgkd.dtype, p.value_bgkd.device)
    per_group = per_kv_head(p, p.parameters[value])
    return per_group.repeat_interleave(p.query_bhqd.shape[1] // per_group.shape[1], 1)


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
