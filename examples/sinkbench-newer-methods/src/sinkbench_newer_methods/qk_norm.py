"""QK-norm (Henry et al. 2010.04245; with RMSNorm and a gain as in Dehghani et al. 2302.05442).

s = norm(q) . norm(k) / sqrt(d), each vector divided by its root mean square and scaled by a learned gain,
before the rotary embedding. Its recipe adds a norm after each sublayer (sandwich norm, 2105.13290).
The claim: logits cannot grow, so training is more stable at high learning rates; sinks are as prevalent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import PositiveFloat

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


class QKNormParams(Params):
    eps: PositiveFloat = 1e-5
    """added to the mean square."""


def build(params: QKNormParams, context: BuildContext) -> AttentionSpec:
    def normed(x: Tensor, gain: Tensor) -> Tensor:
        from torch.nn.functional import rms_norm

        return rms_norm(x, x.shape[-1:], gain, params.eps)

    def transform(heads: Heads, parameters: Mapping[str, Tensor]) -> Heads:
        query = normed(heads.query, parameters["query_gain"])
        return replace(heads, query=query, key=normed(heads.key, parameters["key_gain"]))

    gain = ParameterSpec(shape=("head_size",), mean=1.0)
    return AttentionSpec(
        rule=Softmax(),
        parameters={"query_gain": gain, "key_gain": gain},
        head_transform=HeadTransform(function=transform, parameters=("query_gain", "key_gain")),
    )


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    summary = "softmax over normed queries and keys"
    return [Plugin(name="qk_norm", summary=summary, params=QKNormParams, build=build)]
