"""Metrics of attention heads beside their weights: angles, norms, outputs. The tensors are reduced in
``_heads``, imported when a metric is built."""

from __future__ import annotations

from sinkbench.api import BuildContext, Metric, Params, Plugin, hookimpl


def _build_qk_split(params: Params, context: BuildContext) -> Metric:
    from ._heads import QKSplit

    return QKSplit()


def _build_head_output(params: Params, context: BuildContext) -> Metric:
    from ._heads import HeadOutput

    return HeadOutput()


@hookimpl
def sinkbench_metric() -> list[Plugin]:
    """The metrics of heads."""
    return [
        Plugin(
            name="qk_split",
            summary="angle and norms of queries and keys: the first key against the others",
            build=_build_qk_split,
        ),
        Plugin(
            name="head_output",
            summary="norm of each head's output at the first token and at the others",
            build=_build_head_output,
        ),
    ]
