"""Kernel attention: a dot product of feature maps in the place of exp (Gu et al. 2410.10781).

A = phi(q).phi(k) / sqrt(head size) M / Z with phi after rotary, M the 0/1 mask. Z = 1; or normalised, the
row's sum + 1e-8 for elu, whose scores are positive, and max(|sum|, 1) for identity and MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from sinkbench.api import (
    AttentionSpec,
    BuildContext,
    Elementwise,
    FeatureMap,
    ParameterSpec,
    Plugin,
    hookimpl,
)

from ._options import RowParams, compose

if TYPE_CHECKING:
    from torch import Tensor


class KernelParams(RowParams):
    normalize: bool = True
    """divide each row by its sum; that of identity and MLP by max(|sum|, 1)."""


def score_itself(score: Tensor) -> Tensor:
    return score


def rule(params: KernelParams, normaliser: Literal[True, "abs"]) -> Elementwise:
    return Elementwise(function=score_itself, normalize=normaliser if params.normalize else False)


def build_identity(params: KernelParams, context: BuildContext) -> AttentionSpec:
    """phi(x) = x: linear attention."""
    return compose(AttentionSpec(rule=rule(params, "abs")), params, context)


def build_elu(params: KernelParams, context: BuildContext) -> AttentionSpec:
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2006.16236)."""
    from torch.nn.functional import elu

    def phi(x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        return elu(x) + 1

    spec = AttentionSpec(rule=rule(params, True), feature_map=FeatureMap(function=phi))
    return compose(spec, params, context)


def build_mlp(params: KernelParams, context: BuildContext) -> AttentionSpec:
    """phi(x) = W2 relu(W1 x), both of the head size, shared by q and k and by the heads of a layer."""
    import torch
    from torch.nn.functional import linear

    # Of float32 and of larger heads the kernel's sums would not fit into registers.
    fused = find_spec("triton") is not None and context.head_size <= 128
    half = (torch.bfloat16, torch.float16)

    def in_one_kernel(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        from . import _triton_mlp

        return _triton_mlp.mlp(x, first, second)

    # torch's compiler, which the core runs maps through, is not to look inside.
    opaque: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compiler.disable(in_one_kernel)

    def phi(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        first, second = weights["kernel_1"].to(x.dtype), weights["kernel_2"].to(x.dtype)
        if fused and x.is_cuda and x.dtype in half:
            return opaque(x, first, second)
        return linear(linear(x, first).relu(), second)

    # As the linear layers of the paper's code.
    weight = ParameterSpec(shape=("head_size", "head_size"), std=(0.4 / context.head_size) ** 0.5)
    spec = AttentionSpec(
        rule=rule(params, "abs"),
        feature_map=FeatureMap(function=phi, parameters=("kernel_1", "kernel_2")),
        parameters={"kernel_1": weight, "kernel_2": weight},
    )
    return compose(spec, params, context)


@hookimpl
def sinkbench_attention() -> list[Plugin]:
    builders = {
        "kernel_identity": (build_identity, "q.k / sqrt d: linear attention"),
        "kernel_elu": (build_elu, "phi(q).phi(k) / sqrt d with phi = elu + 1"),
        "kernel_mlp": (build_mlp, "phi(q).phi(k) / sqrt d with phi a two-layer MLP"),
    }
    return [
        Plugin(name=name, summary=f"{formula}, rows normalised or not", params=KernelParams, build=build)
        for name, (build, formula) in builders.items()
    ]
