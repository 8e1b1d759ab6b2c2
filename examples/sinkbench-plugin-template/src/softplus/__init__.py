"""Attention by the softplus of the scores instead of their exponential.

A = log(1 + exp(s)) / sum log(1 + exp(s)) with s = q.k / sqrt(head size), over the keys a query may see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkbench.api import AttentionSpec, BuildContext, Elementwise, Params, Plugin, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class SoftplusParams(Params):
    normalize: bool = True
    """divide each row by its sum."""


def similarity(score: Tensor) -> Tensor:
    """f(s), elementwise: its derivative and a fused kernel follow from it."""
    from torch.nn.functional import softplus

    return softplus(score)


def build(params: SoftplusParams, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=similarity, normalize=params.normalize))


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    return [
        Plugin(
            name="softplus",
            summary="log(1 + exp(s)), rows normalised or not",
            params=SoftplusParams,
            build=build,
        )
    ]
