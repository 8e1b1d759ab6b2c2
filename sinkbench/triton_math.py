"""What the Triton functions of a similarity are made of: functions that Triton lacks, in float32 and near
zero as exact as torch's, and exponentials that are fast in the loops of the attention kernels."""

from __future__ import annotations

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    @triton.jit
    def exp2(x):
        return tl.exp2(x)

else:

    @triton.jit
    def exp2(x):
        """2^x, 0 where that is no normal number. ``tl.exp2`` calls a function of a library, and in the loop
        of the kernel for keys the compiler then runs each matrix product alone. ``tl.exp`` takes three more
        instructions for numbers that are not normal."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp(x):
    return exp2(x * 1.4426950408889634)


@triton.jit
def expm1(x):
    """exp(x) - 1, near zero by Kahan's correction of the rounding of exp(x)."""
    u = exp(x)
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
