"""RMSNorm and LayerNorm: before each sublayer f, after each residual addition, or around it.

pre: x + f(norm(x)), and a norm at the end; post: norm(x + f(x)); sandwich: x + norm(f(norm(x))), and a norm
at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sinkbench.api import BuildContext, NormalizationSpec, Params, Plugin, hookimpl

if TYPE_CHECKING:
    import torch


class NormParams(Params):
    eps: float = Field(default=1e-5, gt=0)
    """added to the mean square or the variance."""
    location: Literal["pre", "post", "sandwich"] = "pre"
    """before each sublayer, after each residual addition, or before and after each sublayer."""


def build_rmsnorm(params: NormParams, context: BuildContext) -> NormalizationSpec:
    import torch

    def norm(size: int) -> torch.nn.Module:
        return torch.nn.RMSNorm(size, eps=params.eps)

    return NormalizationSpec(norm=norm, location=params.location)


def build_layernorm(params: NormParams, context: BuildContext) -> NormalizationSpec:
    import torch

    def norm(size: int) -> torch.nn.Module:
        return torch.nn.LayerNorm(size, eps=params.eps)

    return NormalizationSpec(norm=norm, location=params.location)


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
