"""The similarities as Triton functions, with their derivatives, for the fused kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sinkbench.triton_math import exp


@triton.jit
def sigmoid(s):
    return 1.0 / (1.0 + exp(-s))


@triton.jit
def sigmoid_by_tanh(s):
    """(1 + tanh(s/2)) / 2 with the hardware's tanh: one special-function operation instead of two. Its
    error of 2^-11 is below the rounding of bf16."""
    half = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [s * 0.5], dtype=tl.float32, is_pure=True, pack=1
    )
    return 0.5 * half + 0.5


@triton.jit
def sigmoid_derivative(s, p):
    return p - p * p  # one operation, rounded once


@triton.jit
def elu_plus_one(s):
    return tl.maximum(s, 0.0) + exp(tl.minimum(s, 0.0))


@triton.jit
def elu_plus_one_derivative(s, p):
    return exp(tl.minimum(s, 0.0))  # the compiler has it from p, or makes it without p


def fused_sigmoid(dtype: torch.dtype) -> tuple[Any, Any]:
    approximate = dtype == torch.bfloat16 and not triton.knobs.runtime.interpret
    return (sigmoid_by_tanh if approximate else sigmoid), sigmoid_derivative


def fused_elu(dtype: torch.dtype) -> tuple[Any, Any]:
    return elu_plus_one, elu_plus_one_derivative
