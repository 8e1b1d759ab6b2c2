"""Softpick (Zuhri et al. 2504.20966).

A_ij = relu(exp(s_ij) - 1) / (sum_k |exp(s_ik) - 1| + eps), over the keys a query may see.
The claim: 0 % sink rate and kurtosis 340 instead of 33510 at 340M parameters, with the loss of softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from sinkbench.api import AttentionSpec, BuildContext, Params, Plugin, Rows, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class SoftpickParams(Params):
    eps: PositiveFloat = 1e-6
    """added to the denominator."""


def build(params: SoftpickParams, context: BuildContext) -> AttentionSpec:
    def softpick(score: Tensor, allowed: Tensor) -> Tensor:
        # Times exp(-m) above and below, so that nothing overflows.
        m = score.masked_fill(~allowed, 0.0).amax(-1, keepdim=True).clamp(min=0.0).detach()
        shifted = ((score - m).exp() - (-m).exp()).masked_fill(~allowed, 0.0)
        return shifted.relu() / (shifted.abs().sum(-1, keepdim=True) + params.eps * (-m).exp())

    return AttentionSpec(rule=Rows(function=softpick))


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    summary = "relu(e^s - 1) over the sum of |e^s - 1|: rows need not sum to one"
    return [Plugin(name="softpick", summary=summary, params=SoftpickParams, build=build)]
