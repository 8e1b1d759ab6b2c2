"""Measurements of the attention sink: importance of a key, norms, attention by trigger tokens.

The tensors are reduced in ``_measures``, imported when a metric is built, so that plugins can be
listed without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat

from sinkbench.api import BuildContext, Metric, Params, Plugin, hookimpl

if TYPE_CHECKING:
    from sinkbench.config import Config

Position = Annotated[int, Field(ge=1, le=64)]


class SinkParams(Params):
    eps: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    """thresholds on the importance of a key; default: measure.eps. The first one names the plain
    ``sink_1_raw``, the others ``sink_1_raw_eps0.2``."""
    k: Annotated[tuple[Position, ...], Field(min_length=1)] = (1,)
    """positions of the keys, from 1 to 64."""
    total: tuple[Position, ...] = ()
    """also the sum of the sink rates of the first so many positions."""
    proxy_eps: PositiveFloat = 1e-8
    """added to the row sum of |A| that the proxy divides by."""


def _check_sink(params: SinkParams, config: Config) -> list[str]:
    length = config.measure.length
    return [
        f"{name} {position} is above measure.length {length}; lower it or raise measure.length"
        for name, positions in (("k", params.k), ("total", params.total))
        for position in positions
        if position > length
    ]


def _build_sink(params: SinkParams, context: BuildContext) -> Metric:
    from ._measures import Sink

    return Sink(
        eps=params.eps or (context.config.measure.eps,),
        positions=params.k,
        totals=params.total,
        proxy_eps=params.proxy_eps,
    )


def _check_norms(params: Params, config: Config) -> list[str]:
    if config.measure.length < 2:
        return ["norms compares the first token with the others; set measure.length to 2 or more"]
    return []


def _build_norms(params: Params, context: BuildContext) -> Metric:
    from ._measures import Norms

    return Norms()


def _check_trigger(params: Params, config: Config) -> list[str]:
    if config.data.source != "bigram_backcopy":
        return [
            f"data.source {config.data.source} has no trigger tokens; "
            "use bigram_backcopy, or drop trigger from measure.metrics"
        ]
    return []


def _build_trigger(params: Params, context: BuildContext) -> Metric:
    from ._measures import Trigger

    return Trigger()


@hookimpl
def sinkbench_metric() -> list[Plugin]:
    """The metrics of this package."""
    return [
        Plugin(
            name="sink",
            summary="importance of a key and the share of heads that have a sink there, raw and proxy",
            params=SinkParams,
            build=_build_sink,
            check=_check_sink,
        ),
        Plugin(
            name="norms",
            summary="norms of hidden states, keys and values: first token against the others",
            build=_build_norms,
            check=_check_norms,
        ),
        Plugin(
            name="trigger",
            summary="attention to the first token from trigger and other tokens (Bigram-Backcopy)",
            build=_build_trigger,
            check=_check_trigger,
        ),
    ]
