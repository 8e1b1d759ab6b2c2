"""One layer's attention in a transformers model, and what a forward pass shall do besides.

Shapes: b sequence, h head, g kv head, s position, q query, k key, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import and_masks, causal_mask_function

from sinkbench.api import BLOCK_ELEMENTS, AttentionSpec, Softmax
from sinkbench.attention import importance
from sinkbench.attention.importance import WeightSums
from sinkbench.attention.reference import Problem
from sinkbench.measure.hf_export import ExportedCall

Mask: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(sequence, head, query, key), int64 and broadcastable -> bool: may it be seen."""

Visible: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(query, key), int64 and broadcastable -> bool: may it still be seen."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The attention of one layer on one batch.

    Attributes:
        query_bhsd, key_bgsd, value_bgsd: after rotary, in the model's dtype.
        scale: factor on q.k.
        softcap: c of c tanh(score / c), applied before the mask (Gemma 2).
        sink_logit_h: one more logit of every row, without a value (gpt-oss).
        bias_bhk: added to the scores (ALiBi), already scaled.
        mask: what a query may see.
        weights_bhqk: the weights as the model computed them, if it did.
        leading: positions before the first token.
    """

    query_bhsd: Tensor
    key_bgsd: Tensor
    value_bgsd: Tensor
    scale: float
    softcap: float | None = None
    sink_logit_h: Tensor | None = None
    bias_bhk: Tensor | None = None
    mask: Mask = causal_mask_function
    weights_bhqk: Tensor | None = None
    leading: int = 0

    def rows(self, start: int, end: int) -> Tensor:
        """Weights of the queries start .. end - 1, float32 [b, h, q, k]: those that the model computed,
        or computed now in float32."""
        if self.weights_bhqk is not None:
            return self.weights_bhqk[:, :, start:end].float()
        query_bhqd = self.query_bhsd[:, :, start:end].float()
        score_bhqk = _times_kv(query_bhqd, self.key_bgsd.float().transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            score_bhqk = (score_bhqk / self.softcap).tanh_() * self.softcap
        if self.bias_bhk is not None:
            score_bhqk = score_bhqk + self.bias_bhk.float()[:, :, None]
        score_bhqk.masked_fill_(~self._visible(start, end), float("-inf"))
        if self.sink_logit_h is None:
            return score_bhqk.softmax(-1)
        sink = self.sink_logit_h.float()[:, None, None].expand(*score_bhqk.shape[:-1], 1)
        return torch.cat([score_bhqk, sink], -1).softmax(-1)[..., :-1]

    def _visible(self, start: int, end: int) -> Tensor:
        batch, _, length, _ = self.query_bhsd.shape
        device = self.query_bhsd.device
        sequence = torch.arange(batch, device=device)[:, None, None, None]
        query = torch.arange(start, end, device=device)[None, None, :, None]
        key = torch.arange(length, device=device)[None, None, None, :]
        return self.mask(sequence, sequence.new_zeros(()), query, key)

    def slot(self) -> None:
        """None has a slot: a learned logit is no key, and its rows sum to less than 1, as those of a run with
        ``sink_logit`` do."""

    def sums(self) -> WeightSums | None:
        """Sums of the weights by a kernel that never holds them; None if it cannot compute this attention."""
        more = (self.softcap, self.bias_bhk, self.sink_logit_h, self.weights_bhqk)
        spec = AttentionSpec(rule=Softmax())
        heads, length, head_size = self.query_bhsd.shape[1:]
        causal = self.mask is causal_mask_function and all(other is None for other in more)
        if not causal or importance.missing(spec, head_size):
            return None
        position = torch.arange(length, device=self.query_bhsd.device)
        return WeightSums(
            Problem(
                spec=spec,
                query_bhqd=self.query_bhsd,
                key_bgkd=self.key_bgsd,
                value_bgkd=self.value_bgsd,
                position_q=position,
                position_k=position,
                aligned=True,
                scale=self.scale,
                heads=torch.arange(heads, device=position.device),
            )
        )

    def blocks(self) -> Iterator[Tensor]:
        """``rows`` of all queries, a few at a time."""
        batch, heads, length, _ = self.query_bhsd.shape
        step = max(1, BLOCK_ELEMENTS // (batch * heads * length))
        for start in range(0, length, step):
            yield self.rows(start, min(start + step, length))

    def output(self) -> Tensor:
        """A V, [b, s, h, d] in the values' dtype, without ever holding all of A."""
        plain = self.softcap is None and self.sink_logit_h is None and self.bias_bhk is None
        if plain and self.mask is causal_mask_function:
            output = F.scaled_dot_product_attention(
                self.query_bhsd,
                self.key_bgsd,
                self.value_bgsd,
                is_causal=True,
                scale=self.scale,
                enable_gqa=self.query_bhsd.shape[1] != self.key_bgsd.shape[1],
            )
        else:
            value = self.value_bgsd
            output = torch.cat([_times_kv(rows.to(value.dtype), value) for rows in self.blocks()], dim=2)
        return output.transpose(1, 2).contiguous()


def _times_kv(left_bhqx: Tensor, right_bgxy: Tensor) -> Tensor:
    """Matrix product of every head with its kv head, [b, h, q, y]."""
    grouped: Tensor = left_bhqx.unflatten(1, (right_bgxy.shape[1], -1))
    return (grouped @ right_bgxy.unsqueeze(2)).flatten(1, 2)


@dataclass
class Watch:
    """What a forward pass shall do besides.

    Attributes:
        streaming: never hold a layer's whole attention weights.
        visible: a restriction of what queries see.
        keep: append to ``calls``.
        calls: the attention calls since the list was last emptied.
        masked: the model asked us for its mask.
    """

    streaming: bool = False
    visible: Visible | None = None
    keep: bool = True
    calls: list[AttentionCall | ExportedCall] = field(default_factory=list)
    masked: bool = False

    def restricted(self, mask: Mask) -> Mask:
        visible = self.visible
        if visible is None:
            return mask
        restricted: Mask = and_masks(mask, lambda sequence, head, query, key: visible(query, key))
        return restricted
