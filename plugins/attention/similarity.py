"""Elementwise similarities in the place of exp, normalised or not (Gu et al. 2410.10781)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from sinkbench.api import (
    AttentionSpec,
    BuildContext,
    Elementwise,
    ParameterSpec,
    Params,
    Plugin,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor


def sigmoid(score: Tensor) -> Tensor:
    return score.sigmoid()


class SigmoidParams(Params):
    normalize: bool = True
    """divide each row by its sum."""
    bias: Literal["none", "fixed", "learned"] = "none"
    """added to every score; learned: one per head."""
    bias_init: float | Literal["-log n"] = "-log n"
    """value of the bias at the start; -log n with n the sequence length (Ramapuram et al. 2409.04431)."""

    @model_validator(mode="after")
    def _check(self) -> SigmoidParams:
        if self.bias == "none" and "bias_init" in self.model_fields_set:
            raise ValueError("bias_init has no effect with bias: none; set bias to fixed or learned")
        return self


def build_sigmoid(params: SigmoidParams, context: BuildContext) -> AttentionSpec:
    rule = Elementwise(function=sigmoid, normalize=params.normalize)
    start = -math.log(context.seq_length) if params.bias_init == "-log n" else params.bias_init
    if params.bias == "learned":
        parameter = ParameterSpec(shape=("heads",), mean=start)
        return AttentionSpec(rule=rule, score_bias="score_bias", parameters={"score_bias": parameter})
    return AttentionSpec(rule=rule, score_bias=start if params.bias == "fixed" else None)


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    return [
        Plugin(
            name="sigmoid",
            summary="sigmoid(q.k / sqrt d + bias), rows normalised or not",
            params=SigmoidParams,
            build=build_sigmoid,
        )
    ]
