"""Metrics that need forward passes of their own, so asked for by name: perplexity of streaming, loss
without the sink, damage by quantisation. They run in ``_forwards``, imported when one is built."""

from __future__ import annotations

from pydantic import PositiveInt

from sinkbench.api import BuildContext, ForwardMetric, Params, Plugin, hookimpl

FORWARD_PASSES = frozenset({"forward_passes"})
"""Only ``sinkbench measure`` makes them, no run."""


class StreamingParams(Params):
    cache: PositiveInt | None = None
    """tokens in the cache; default: half of a probe sequence."""
    first: PositiveInt = 4
    """first tokens that are kept."""


class SinkCutParams(Params):
    tokens: PositiveInt = 1
    """first tokens that later queries no longer see."""


def _build_streaming(params: StreamingParams, context: BuildContext) -> ForwardMetric:
    from ._forwards import StreamingPerplexity

    return StreamingPerplexity(cache=params.cache, first=params.first)


def _build_sink_cut(params: SinkCutParams, context: BuildContext) -> ForwardMetric:
    from ._forwards import SinkCut

    return SinkCut(tokens=params.tokens)


def _build_w8a8(params: Params, context: BuildContext) -> ForwardMetric:
    from ._forwards import W8A8

    return W8A8()


@hookimpl
def sinkbench_metric() -> list[Plugin]:
    """The metrics with forward passes of their own."""
    return [
        Plugin(
            name="streaming_perplexity",
            summary="perplexity with a small cache, with and without the first tokens (StreamingLLM)",
            params=StreamingParams,
            build=_build_streaming,
            requires=FORWARD_PASSES,
        ),
        Plugin(
            name="sink_cut",
            summary="change of the loss when later queries do not see the first tokens",
            params=SinkCutParams,
            build=_build_sink_cut,
            requires=FORWARD_PASSES,
        ),
        Plugin(
            name="w8a8",
            summary="change of perplexity under simulated 8-bit weights and activations",
            build=_build_w8a8,
            requires=FORWARD_PASSES,
        ),
    ]
