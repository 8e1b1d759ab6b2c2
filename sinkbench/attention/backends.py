"""The ways to compute an attention, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from sinkbench.api import AttentionSpec, Softmax
from sinkbench.attention import reference
from sinkbench.attention.reference import Problem
from sinkbench.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Attributes:
    missing: what a declaration asks for that this backend cannot do; empty if it can.
    run: computes O [b, h, q, d].
    """

    name: str
    missing: Callable[[AttentionSpec], list[str]]
    run: Callable[[Problem], Tensor]


def _missing_sdpa(spec: AttentionSpec) -> list[str]:
    lacks = {
        "a similarity other than softmax": not isinstance(spec.rule, Softmax),
        "a sink logit": isinstance(spec.rule, Softmax) and spec.rule.sink_logit is not None,
        "a feature map": spec.feature_map is not None,
        "an extra slot": spec.extra_slot is not None,
        "an output scale or bias": spec.output_scale != 1.0 or spec.output_bias is not None,
    }
    return [what for what, wanted in lacks.items() if wanted]


def _run_sdpa(p: Problem) -> Tensor:
    """A score bias that is the same for all keys leaves a softmax as it is, so it is not computed."""
    causal = p.aligned and p.spec.window is None and not p.prefix and p.position_bias is None
    mask = None if causal else _mask(p)
    return F.scaled_dot_product_attention(
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
    allowed = reference.allowed_qk(p.position_q, p.position_k, p.spec.window, p.prefix)
    if p.position_bias is None:
        return allowed
    distance = p.position_q[:, None] - p.position_k[None, :]
    bias = p.position_bias.function(distance, p.heads, p.position_parameters)
    return bias.masked_fill(~allowed, float("-inf")).to(p.query_bhqd.dtype)[None]


BACKENDS = (
    Backend(name="sdpa", missing=_missing_sdpa, run=_run_sdpa),
    Backend(name="eager", missing=lambda spec: [], run=reference.attend),
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
