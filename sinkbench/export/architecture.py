"""A model in plain numbers, if that says all of it: what a recipe shares with models of other libraries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from sinkbench.api import AttentionSpec, Rotary, Softmax
from sinkbench.export.pieces import Heads
from sinkbench.model import Declarations


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Softmax attention, known norms before the sublayers, known positions.

    Attributes:
        vocab_size: rows of the vocabulary's tables.
        num_positions: longest sequence, and rows of learned positions.
        norm: kind of all norms.
        eps: of the norms.
        rotary: or learned positions, which are added; None for neither.
        window: a query sees this many newest keys; None for all.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn: str
    ffn_hidden_size: int
    linear_bias: str = "none"
    parallel_residual: bool = False
    vocab_size: int
    num_positions: int
    tie_embeddings: bool
    norm: Literal["rmsnorm", "layernorm"]
    eps: float
    rotary: Rotary | None = None
    learned_positions: bool = False
    window: int | None = None

    @property
    def heads(self) -> Heads:
        return Heads(self.num_heads, self.num_kv_heads, self.head_size)


def architecture_of(declared: Declarations) -> Architecture | None:
    """The architecture of a recipe, by what its plugins declare; None if it says less than all."""
    import torch

    model = declared.context.config.model
    attention, positional = declared.attention, declared.positional
    plain = AttentionSpec(rule=Softmax(), window=attention.window)
    scale = attention.scale if attention.scale is not None else model.head_dim**-0.5
    if replace(attention, scale=None) != plain or scale != model.head_dim**-0.5:
        return None
    norm = declared.normalization.norm(1)
    kinds: dict[type, Any] = {torch.nn.RMSNorm: "rmsnorm", torch.nn.LayerNorm: "layernorm"}
    kind = kinds.get(type(norm))
    embedding = positional.embedding() if positional.embedding is not None else None
    learned = type(embedding) is torch.nn.Embedding
    if (
        kind is None
        or declared.normalization.location != "pre"
        or positional.score_bias is not None
        or (embedding is not None and not learned)
        or (embedding is not None and positional.rotary is not None)
        or declared.loss.bidirectional_prefix
        or model.ffn == "none"
    ):
        return None
    assert model.ffn_hidden_size is not None
    return Architecture(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_kv_heads=model.kv_heads,
        head_size=model.head_dim,
        ffn=model.ffn,
        ffn_hidden_size=model.ffn_hidden_size,
        linear_bias=model.linear_bias,
        parallel_residual=model.parallel_residual,
        vocab_size=declared.padded_vocab_size,
        num_positions=model.seq_length,
        tie_embeddings=model.tie_embeddings,
        norm=kind,
        eps=norm.eps,  # type: ignore[arg-type]
        rotary=positional.rotary,
        learned_positions=learned,
        window=attention.window,
    )
