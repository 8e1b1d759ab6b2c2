"""Softmax attention and its off-by-one form."""

from __future__ import annotations

from sinkbench.api import AttentionSpec, BuildContext, Params, Plugin, Softmax, hookimpl


def build_softmax(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Softmax())


def build_off_by_one(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Softmax(sink_logit=0.0))


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    return [
        Plugin(name="softmax", summary="softmax(q.k / sqrt d)", build=build_softmax),
        Plugin(
            name="softmax_off_by_one",
            summary="exp(s) / (1 + sum exp(s)): a head may attend to nothing",
            build=build_off_by_one,
        ),
    ]
