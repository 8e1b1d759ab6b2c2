"""The ways to compute an attention, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from sinkbench.api import AttentionSpec, Softmax
from sinkbench.attention import reference
from sinkbench.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: local heads, all keys.

    Attributes:
        query_bhqd, key_bgkd, value_bgkd: the inputs.
        position_q, position_k: int64 positions in the sequence.
        aligned: queries and keys are the same positions, in order.
        bias_h, sink_h: the spec's score bias and sink logit for the local heads.
    """

    spec: AttentionSpec
    query_bhqd: Tensor
    key_bgkd: Tensor
    value_bgkd: Tensor
    position_q: Tensor
    position_k: Tensor
    aligned: bool
    scale: float
    bias_h: Tensor | None
    sink_h: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Attributes:
    missing: what a declaration asks for that this backend cannot do; empty if it can.
    run: computes O [b, h, q, d].
    """

    name: str
    missing: Callable[[AttentionSpec], list[str]]
    run: Callable[[Problem], Tensor]


def _run_eager(p: Problem) -> Tensor:
    return reference.attend(
        p.query_bhqd,
        p.key_bgkd,
        p.value_bgkd,
        rule=p.spec.rule,
        scale=p.scale,
        position_q=p.position_q,
        position_k=p.position_k,
        window=p.spec.window,
        bias_h=p.bias_h,
        sink_h=p.sink_h,
    )


def _missing_sdpa(spec: AttentionSpec) -> list[str]:
    missing = []
    if not isinstance(spec.rule, Softmax):
        missing.append("a similarity other than softmax")
    elif spec.rule.sink_logit is not None:
        missing.append("a sink logit")
    if spec.score_bias is not None:
        missing.append("a score bias")
    return missing


def _run_sdpa(p: Problem) -> Tensor:
    grouped = p.query_bhqd.shape[1] != p.key_bgkd.shape[1]
    causal = p.aligned and p.spec.window is None
    mask = None if causal else reference.allowed_qk(p.position_q, p.position_k, p.spec.window)
    return F.scaled_dot_product_attention(
        p.query_bhqd,
        p.key_bgkd,
        p.value_bgkd,
        attn_mask=mask,
        is_causal=causal,
        scale=p.scale,
        enable_gqa=grouped,
    )


BACKENDS = (
    Backend(name="sdpa", missing=_missing_sdpa, run=_run_sdpa),
    Backend(name="eager", missing=lambda spec: [], run=_run_eager),
)
"""Fastest first."""


def choose(spec: AttentionSpec, requested: str) -> Backend:
    """The fastest backend that can compute the declaration, or the requested one.

    Raises:
        RecipeError: the requested backend cannot; the message lists what it lacks.
    """
    for backend in BACKENDS:
        if requested not in ("auto", backend.name):
            continue
        missing = backend.missing(spec)
        if not missing:
            return backend
        if requested != "auto":
            raise RecipeError(
                "model.backend",
                f"{requested} cannot compute {' or '.join(missing)}, which model.attention declares",
                "write auto or eager",
            )
    raise AssertionError("the eager backend computes every declaration")
