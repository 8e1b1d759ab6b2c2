"""How much weight keys receive, by a kernel that never holds the weights. Without it, callers sum blocks of
rows of ``reference.weights``.

Shapes: b sequence of the batch, h head, q query, k key, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, Elementwise, Softmax
from sinkbench.attention import elementwise, fused
from sinkbench.attention.reference import Problem, allowed_qk, parameter_or_constant, per_kv_head


def missing(spec: AttentionSpec, head_size: int) -> list[str]:
    """What a declaration asks for that the kernel cannot do; empty if it can."""
    lacks = {
        "the package triton, which is not installed": not fused.is_installed(),
        "weights that need whole rows": not isinstance(spec.rule, Softmax | Elementwise),
        "a feature map": spec.feature_map is not None,
        "an extra slot beside a sink token": spec.sink_token and spec.extra_slot is not None,
        f"a head size of {head_size}": not fused.head_size_fits(head_size),
    }
    return [what for what, wanted in lacks.items() if wanted] or fused.missing_function(spec.rule)


class WeightSums:
    """Sums of a layer's weights. Queries and keys are the same positions, in order.

    Args:
        p: ``visible`` is not heeded; of one document.
        leading: so many positions come before the first token (1 with a sink token). They count as keys of
            their rows, but are no rows or keys of the results. Not together with an extra slot.

    Attributes:
        row_bhq: the sum of each row, that of the extra slot included.
        slot_bhq: the weight of the extra slot, or of the sink token; None if there is neither.
    """

    def __init__(self, p: Problem, leading: int = 0) -> None:
        from sinkbench.attention.triton_importance import Scores

        self._leading = leading
        self._scores = Scores(
            query_bhtd=p.query_bhqd,
            key_bgtd=p.key_bgkd,
            scale=p.scale,
            function=_function(p),
            bias_h=fused.score_bias(p),
            window=p.spec.window,
            prefix=p.prefix,
            **fused.position(p),
        )
        total, absolute = self._scores.row_sums()
        slot = _score_of_slot(p)
        self._scale = scale = p.spec.output_scale
        self._softmax = absolute is None
        if absolute is None:
            total, row, slot = _softmax_rows(p, total, slot)
            factor, absolute = total, row
        else:
            factor, row, absolute, slot = _elementwise_rows(p, total, absolute, slot)
        self._factor = factor  # of softmax, what all scores are shifted by
        self._absolute = absolute  # None where all are 1
        if row is None:
            self.row_bhq = torch.full_like(total[..., leading:], scale)
        else:
            self.row_bhq = scale * row[..., leading:]
        self.slot_bhq = None if slot is None else scale * slot
        if leading:
            self.slot_bhq = self._weight_of_first(p)[..., leading:]

    def keys(self, count: int, proxy_eps: float) -> tuple[Tensor, Tensor]:
        """Of each of the first ``count`` keys, summed over the queries from it on, [b, h, k]: the weight A,
        and |A| / (sum of the row's |A| + proxy_eps)."""
        scale, size = self._scale, abs(self._scale)
        if self._softmax:
            # A row without weights, whose logarithm is -inf, is as one that does not count.
            raw = torch.nan_to_num(-self._factor, nan=math.nan, posinf=-math.inf, neginf=-math.inf)
            raw[..., : self._leading] = -math.inf
        else:
            raw = self._factor.clone()
            raw[..., : self._leading] = 0.0
        proxy = None
        if self._absolute is not None:
            proxy = size / (size * self._absolute + proxy_eps)
            if not self._softmax:
                proxy = proxy * raw.abs()
        of_keys, proxy_of_keys = self._scores.column_sums(raw, proxy, count, self._leading)
        if proxy_of_keys is None:
            proxy_of_keys = of_keys * (size / (size + proxy_eps))
        return scale * of_keys, proxy_of_keys

    def _weight_of_first(self, p: Problem) -> Tensor:
        """Of the key at position 0, [b, h, q]."""
        score = _score_of(p, p.key_bgkd[:, :, :1])
        if p.position_bias is not None:
            distance = p.position_q[:, None]
            score = score + p.position_bias.function(distance, p.heads, p.position_parameters)[..., 0]
        rule = p.spec.rule
        if isinstance(rule, Elementwise):
            weight = self._factor * rule.function(score)
        else:
            weight = (score - self._factor).exp()
        seen = allowed_qk(p.position_q, p.position_k[:1], p.spec.window, p.prefix)[:, 0]
        return self._scale * weight * seen


def _function(p: Problem) -> Any:
    """The similarity as an exact Triton function; None for softmax."""
    rule = p.spec.rule
    if not isinstance(rule, Elementwise):
        return None
    given = rule.fused(torch.float32) if rule.fused is not None else None
    return (given or elementwise.load(rule.function))[0]


def _score_of(p: Problem, key_bgkd: Tensor) -> Tensor:
    """Scores [b, h, q] with one key for each kv head, without a position bias."""
    key = key_bgkd.repeat_interleave(p.query_bhqd.shape[1] // key_bgkd.shape[1], 1).float()
    score = (p.query_bhqd.float() * key).sum(-1) * p.scale
    bias = fused.score_bias(p)
    return score if bias is None else score + bias.float()[:, None]


def _score_of_slot(p: Problem) -> Tensor | None:
    slot = p.spec.extra_slot
    return None if slot is None else _score_of(p, per_kv_head(p, p.parameters[slot.key]))


def _softmax_rows(
    p: Problem, lse: Tensor, slot: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What all scores are shifted by, the sums of rows, None where all are 1, and the weight of the slot."""
    assert isinstance(p.spec.rule, Softmax)
    total = lse if slot is None else torch.logaddexp(lse, slot)
    sink = parameter_or_constant(p, p.spec.rule.sink_logit, lse)
    row = None
    if sink is not None:
        keys, total = total, torch.logaddexp(total, sink[..., 0])
        row = (keys - total).exp()
    return total, row, None if slot is None else (slot - total).exp()


def _elementwise_rows(
    p: Problem, total: Tensor, absolute: Tensor, slot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Factors of the rows, their sums, those of absolute values, and the weight of the slot."""
    rule = p.spec.rule
    assert isinstance(rule, Elementwise)
    if slot is not None:
        slot = rule.function(slot)
        total, absolute = total + slot, absolute + slot.abs()
    factor = torch.ones_like(total)
    if rule.normalize:
        factor = 1 / (total.abs().clamp(min=1.0) if rule.normalize == "abs" else total + rule.eps)
    weight = None if slot is None else factor * slot
    return factor, factor * total, factor.abs() * absolute, weight
