"""Elementwise similarities in the place of exp (Gu et al. 2410.10781).

A = f(s + bias) M / Z with s = q.k / sqrt(head size) and M the 0/1 mask; Z = 1, or the row's sum + 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from sinkbench.api import AttentionSpec, BuildContext, Elementwise, ParameterSpec, Plugin, hookimpl

from ._options import RowParams, compose

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SimilarityParams(RowParams):
    bias: Literal["none", "fixed", "learned"] = "none"
    """added to every score; learned: one per head."""
    bias_init: float | Literal["-log n"] = "-log n"
    """value of the bias at the start; -log n with n the sequence length (Ramapuram et al. 2409.04431)."""

    @model_validator(mode="after")
    def _check_bias(self) -> SimilarityParams:
        if self.bias == "none" and "bias_init" in self.model_fields_set:
            raise ValueError("bias_init has no effect with bias: none; set bias to fixed or learned")
        return self


def similarity(
    name: str, function: Callable[[Tensor], Tensor], fused: Callable[[torch.dtype], Any], formula: str
) -> Plugin:
    """The plugin of a similarity f with its Triton functions."""

    def build(params: SimilarityParams, context: BuildContext) -> AttentionSpec:
        rule = Elementwise(function=function, normalize=params.normalize, fused=fused)
        start = -math.log(context.seq_length) if params.bias_init == "-log n" else params.bias_init
        if params.bias == "learned":
            parameter = ParameterSpec(shape=("heads",), mean=start)
            spec = AttentionSpec(rule=rule, score_bias="score_bias", parameters={"score_bias": parameter})
        else:
            spec = AttentionSpec(rule=rule, score_bias=start if params.bias == "fixed" else None)
        return compose(spec, params, context)

    summary = f"{formula}, rows normalised or not"
    return Plugin(name=name, summary=summary, params=SimilarityParams, build=build)


def sigmoid(score: Tensor) -> Tensor:
    return score.sigmoid()


def elu_plus_one(score: Tensor) -> Tensor:
    from torch.nn.functional import elu

    return elu(score) + 1


def fused_sigmoid(dtype: torch.dtype) -> tuple[Any, Any]:
    from . import _triton

    return _triton.fused_sigmoid(dtype)


def fused_elu(dtype: torch.dtype) -> tuple[Any, Any]:
    from . import _triton

    return _triton.fused_elu(dtype)


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    return [
        similarity("sigmoid", sigmoid, fused_sigmoid, "sigmoid(q.k / sqrt d + bias)"),
        similarity("elu", elu_plus_one, fused_elu, "elu(q.k / sqrt d + bias) + 1"),
    ]
