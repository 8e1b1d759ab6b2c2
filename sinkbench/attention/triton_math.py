"""Functions that Triton lacks, in float32 and near zero as exact as torch's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1, near zero by Kahan's correction of the rounding of exp(x)."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u)))
    return tl.where(tl.abs(x) > 0.5, u - 1.0, near)


@triton.jit
def log1p(x):
    """log(1 + x), near zero by Kahan's correction of the rounding of 1 + x."""
    u = 1.0 + x
    near = tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))
    return tl.where(tl.abs(x) > 0.5, tl.log(u), near)


@triton.jit
def tanh(x):
    m = expm1(-2.0 * tl.abs(x))
    size = -m / (2.0 + m)
    return tl.where(x < 0.0, -size, size)
