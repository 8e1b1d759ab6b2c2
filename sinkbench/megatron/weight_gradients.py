"""Gradients of linear layers' weights that the product itself adds to megatron's float32 buffer.

Otherwise the product writes them in the weight's dtype, and another kernel adds them. megatron-core 0.16.1
knows this as ``gradient_accumulation_fusion`` and calls an extension of Apex for it. Where that is not
installed this module stands in for it: torch's own product adds bf16 factors to a float32 sum.
"""

from __future__ import annotations

import sys

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

_EXTENSION = "fused_weight_gradient_mlp_cuda"


def prepare() -> None:
    """Gives megatron the product to call, before its layers are made."""
    if not layers._grad_accum_fusion_available:
        layers._grad_accum_fusion_available = True
        # As a name of megatron's layers, and for its deferred products, which import it when they run.
        sys.modules[_EXTENSION] = layers.__dict__[_EXTENSION] = sys.modules[__name__]


def wgrad_gemm_accum_fp32(input_tn: Tensor, grad_output_tm: Tensor, total_mn: Tensor) -> None:
    """What megatron calls of the extension."""
    add_product(total_mn, grad_output_tm.t(), input_tn)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, of matrices; the sum in the total's dtype, which is that of the factors or float32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and _adds_to_wide_sums():
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, of matrices, in their dtype or float32: what ``add_product`` adds to zeros."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    if a.is_cuda and _adds_to_wide_sums():
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _adds_to_wide_sums() -> bool:
    """Since torch 2.10 the sum may have the output's dtype instead of the factors'."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 10)


def accumulate(weight: torch.nn.Parameter, gradient: Tensor, factor: Tensor) -> Tensor:
    """Adds the gradient times a factor to the weight's buffer; see ``added`` for what it returns."""
    weight.main_grad.addcmul_(gradient, factor)  # type: ignore[attr-defined]
    return added(weight)


def added(weight: torch.nn.Parameter) -> Tensor:
    """
    Returns:
        For a weight whose gradient is in its buffer, what autograd takes for it and megatron's hooks then
        pass over; its numbers mean nothing.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
