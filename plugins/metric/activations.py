"""Metrics of the residual stream: massive activations and outliers. The tensors are reduced in
``_activations``, imported when a metric is built."""

from __future__ import annotations

from pydantic import NonNegativeFloat

from sinkbench.api import BuildContext, Metric, Params, Plugin, hookimpl


class MassiveParams(Params):
    absolute: NonNegativeFloat = 100.0
    """|h| of a massive activation is above this."""
    relative: NonNegativeFloat = 1000.0
    """and at least so many times the sequence's median |h|."""


def _build_massive(params: MassiveParams, context: BuildContext) -> Metric:
    from ._activations import MassiveActivations

    return MassiveActivations(absolute=params.absolute, relative=params.relative)


def _build_outliers(params: Params, context: BuildContext) -> Metric:
    from ._activations import Outliers

    return Outliers()


@hookimpl
def sinkbench_metric() -> list[Plugin]:
    """The metrics of the residual stream."""
    return [
        Plugin(
            name="massive_activations",
            summary="activations far above the median, their dimensions and positions (Sun et al.)",
            params=MassiveParams,
            build=_build_massive,
        ),
        Plugin(
            name="outliers",
            summary="kurtosis and maximum infinity norm of the residual stream (Bondarenko et al.)",
            build=_build_outliers,
        ),
    ]
