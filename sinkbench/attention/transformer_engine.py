"""Softmax attention by Transformer Engine, which takes cuDNN's fused kernels, or flash-attn where that is
installed and faster.

``auto`` passes over it: torch brings cuDNN's kernels too. It is here to be asked for. What its kernels cannot
do, it would compute with T x T scores; that way is closed, so that such a call is an error.

Shapes: b sequence of the batch, h head, g kv head, s position, d head size.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, Softmax
from sinkbench.attention import sdpa
from sinkbench.attention.reference import Problem, scaled_and_biased
from sinkbench.environment import set_within
from sinkbench.errors import RecipeError
from sinkbench.packages import module_if_usable

PACKAGE = "transformer_engine"
UNFUSED = "NVTE_UNFUSED_ATTN"


def missing(spec: AttentionSpec, head_size: int, *, half: bool) -> list[str]:
    """What a declaration asks for that it cannot do, or that it is not there; empty if it can.

    Args:
        half: the inputs are bf16 or fp16.
    """
    lacks = {
        "an extra slot": spec.extra_slot is not None,
        "float32 inputs": not half,
        f"a head size of {head_size}": head_size % 8 != 0 or head_size > 256,
    }
    found = [*sdpa.missing(spec), *(what for what, wanted in lacks.items() if wanted)]
    if found:
        return found
    module = _module()
    if module is None:
        return [f"a softmax without the package {PACKAGE}"]
    if _has_sink(spec) and "softmax_type" not in inspect.signature(module.DotProductAttention).parameters:
        return ["a sink logit before Transformer Engine 2.8"]
    return []


def _has_sink(spec: AttentionSpec) -> bool:
    return isinstance(spec.rule, Softmax) and spec.rule.sink_logit is not None


def run(p: Problem) -> Tensor:
    """O [b, h, q, d]. As in sdpa, a score bias only counts against a sink.

    Raises:
        RecipeError: there is no fused kernel for these tensors on this card.
    """
    query, key, value = (x.permute(2, 0, 1, 3) for x in (p.query_bhqd, p.key_bgkd, p.value_bgkd))
    heads, size = query.shape[2:]
    attention = _attention(
        heads,
        key.shape[2],
        size,
        p.scale,
        p.spec.window,
        _has_sink(p.spec),
        torch.are_deterministic_algorithms_enabled(),
    )
    sink = sdpa.sink_logit(p, query.new_empty((1, heads, 0), dtype=torch.float32))
    held = {} if sink is None else {"softmax_offset": sink[:, 0]}
    try:
        # The way with T x T scores is closed for the call alone: megatron, which sets the variable too,
        # insists on its own value when it makes a model.
        with set_within(UNFUSED, "0"):
            output_sbn: Tensor = torch.func.functional_call(attention, held, (query, key, value))
    except ValueError as error:
        if "backend" not in str(error):
            raise
        problem = f"te has no fused kernel for this attention on this card ({error})"
        raise RecipeError("model.backend", problem, "write auto") from error
    return scaled_and_biased(p, output_sbn.unflatten(-1, (heads, size)).permute(1, 2, 0, 3))


@cache
def _module() -> Any:
    return module_if_usable(f"{PACKAGE}.pytorch")


@cache
def _attention(
    heads: int, groups: int, size: int, scale: float, window: int | None, sink: bool, deterministic: bool
) -> Any:
    """The module of a kind of call. It has no state of its own: its sink logit is handed over with a call.

    Args:
        deterministic: as torch's setting is, which the module reads when it is made.
    """
    options = {"softmax_type": "learnable"} if sink else {}
    return _module().DotProductAttention(
        heads,
        size,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None if window is None else (window - 1, 0),
        softmax_scale=scale,
        **options,
    )
