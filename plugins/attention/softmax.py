"""Softmax attention: scaled by alpha, off by one, with a learned sink logit.

A = alpha exp(s) / (sum exp(s) + exp(z)) with s = q.k / sqrt(head size), over the keys a query may see.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from sinkbench.api import AttentionSpec, BuildContext, ParameterSpec, Plugin, Softmax, hookimpl

from ._options import AttentionParams, compose


class SoftmaxParams(AttentionParams):
    alpha: PositiveFloat = 1.0
    """factor on the weights, so that rows sum to it (Gu et al. 2410.10781)."""
    sink_logit: Literal["none", "learned"] = "none"
    """learned: a logit z per head joins the denominator, zero at the start (gpt-oss, OpenAI 2508.10925)."""


class OffByOneParams(AttentionParams):
    alpha: PositiveFloat = 1.0
    """factor on the weights."""


def build_softmax(params: SoftmaxParams, context: BuildContext) -> AttentionSpec:
    """z = -inf, or learned."""
    spec = AttentionSpec(rule=Softmax(), output_scale=params.alpha)
    if params.sink_logit == "learned":
        logit = {"sink_logit": ParameterSpec(shape=("heads",))}
        spec = AttentionSpec(
            rule=Softmax(sink_logit="sink_logit"), parameters=logit, output_scale=params.alpha
        )
    return compose(spec, params, context)


def build_off_by_one(params: OffByOneParams, context: BuildContext) -> AttentionSpec:
    """z = 0 (Miller, Attention Is Off By One, 2023)."""
    return compose(AttentionSpec(rule=Softmax(sink_logit=0.0), output_scale=params.alpha), params, context)


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    return [
        Plugin(
            name="softmax",
            summary="alpha softmax(q.k / sqrt d), with a learned sink logit or without",
            params=SoftmaxParams,
            build=build_softmax,
        ),
        Plugin(
            name="softmax_off_by_one",
            summary="exp(s) / (1 + sum exp(s)): a head may attend to nothing",
            params=OffByOneParams,
            build=build_off_by_one,
        ),
    ]
