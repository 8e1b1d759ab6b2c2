"""Value residual learning (ResFormer, Zhou et al. 2410.17897).

V'_l = a V_l + b V_1: every layer mixes the values of the first one into its own. The claim: it weakens the
sink, massive activations and value drain of later layers, and the same loss takes 16 % fewer parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sinkbench.api import (
    AttentionSpec,
    BuildContext,
    Heads,
    HeadTransform,
    ParameterSpec,
    Params,
    Plugin,
    Softmax,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor


class ValueResidualParams(Params):
    own: float = 0.5
    """a, at the start."""
    first: float = 0.5
    """b, at the start."""
    learned: bool = True
    """each layer learns its a and b, or they stay."""


def build(params: ValueResidualParams, context: BuildContext) -> AttentionSpec:
    def mix(heads: Heads, parameters: Mapping[str, Tensor]) -> Heads:
        assert heads.first_value is not None
        own = parameters.get("own", params.own)
        first = parameters.get("first", params.first)
        return replace(heads, value=own * heads.value + first * heads.first_value)

    declared = {
        "own": ParameterSpec(shape=(), mean=params.own),
        "first": ParameterSpec(shape=(), mean=params.first),
    }
    learned = declared if params.learned else {}
    return AttentionSpec(
        rule=Softmax(),
        parameters=learned,
        head_transform=HeadTransform(function=mix, parameters=tuple(learned), first_value=True),
    )


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    summary = "softmax over values mixed with those of the first layer"
    return [Plugin(name="value_residual", summary=summary, params=ValueResidualParams, build=build)]
