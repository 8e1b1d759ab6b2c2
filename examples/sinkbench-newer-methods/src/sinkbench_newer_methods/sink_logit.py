"""A learned sink logit (gpt-oss, OpenAI 2508.10925).

A_ij = exp(s_ij) / (exp(z_h) + sum_k exp(s_ik)): each head learns how much weight goes to no token at all.
The claim: it enables a head to attend to nothing, as a sink does, without a token that serves as one.
"""

from __future__ import annotations

from sinkbench.api import AttentionSpec, BuildContext, ParameterSpec, Params, Plugin, Softmax, hookimpl


class SinkLogitParams(Params):
    initial: float = 0.0
    """z at the start; 0 begins as off-by-one."""


def build(params: SinkLogitParams, context: BuildContext) -> AttentionSpec:
    logit = ParameterSpec(shape=("heads",), mean=params.initial)
    return AttentionSpec(rule=Softmax(sink_logit="logit"), parameters={"logit": logit})


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    summary = "softmax whose denominator has a learned logit per head"
    return [Plugin(name="sink_logit", summary=summary, params=SinkLogitParams, build=build)]
