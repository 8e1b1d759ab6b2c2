"""RMSNorm and LayerNorm before each sublayer and at the end of the stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sinkbench.api import BuildContext, NormalizationSpec, Params, Plugin, hookimpl

if TYPE_CHECKING:
    import torch


class NormParams(Params):
    eps: float = Field(default=1e-5, gt=0)
    """added to the mean square or the variance."""


def build_rmsnorm(params: NormParams, context: BuildContext) -> NormalizationSpec:
    import torch

    def norm(size: int) -> torch.nn.Module:
        return torch.nn.RMSNorm(size, eps=params.eps)

    return NormalizationSpec(norm=norm)


def build_layernorm(params: NormParams, context: BuildContext) -> NormalizationSpec:
    import torch

    def norm(size: int) -> torch.nn.Module:
        return torch.nn.LayerNorm(size, eps=params.eps)

    return NormalizationSpec(norm=norm)


@hookimpl
def sinkbench_normalization() -> list[Plugin]:
    return [
        Plugin(
            name="rmsnorm",
            summary="x / rms(x) with a gain (Zhang and Sennrich 1910.07467)",
            params=NormParams,
            build=build_rmsnorm,
        ),
        Plugin(
            name="layernorm",
            summary="(x - mean) / std with gain and bias (Ba et al. 1607.06450)",
            params=NormParams,
            build=build_layernorm,
        ),
    ]
