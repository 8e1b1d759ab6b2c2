"""The map of kernel_mlp, y = W2 relu(W1 x), in one pass over memory each way.

    h = relu(W1 x),  dh = W2^T dy where h > 0,  dx = W1^T dh,  dW1 = sum dh x^T,  dW2 = sum dy h^T

h is not kept. A fixed number of programs share the rows; the gradients of the weights are the sums of their
parts, in the same order each time.

Shapes: n row, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Of a block."""
PROGRAMS = 132
"""That share the rows: one for each multiprocessor of an H100."""


@triton.jit
def _block(base, first, rows, length, columns, size):
    """Places of rows from ``first`` on, and which of them there are."""
    inside = (rows < length - first)[:, None] & (columns < size)[None, :]
    return base + first.to(tl.int64) * size + (rows[:, None] * size + columns[None, :]), inside


@triton.jit
def _load(base, first, rows, length, columns, size):
    place, inside = _block(base, first, rows, length, columns, size)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _store(base, first, rows, length, columns, size, value):
    place, inside = _block(base, first, rows, length, columns, size)
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    x_ptr, first_ptr, second_ptr, y_ptr, length, D: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr
):
    columns, rows, zero = tl.arange(0, WIDTH), tl.arange(0, N), tl.program_id(0) * 0
    first = _load(first_ptr, zero, columns, D, columns, D)
    second = _load(second_ptr, zero, columns, D, columns, D)
    for block in range(tl.program_id(0), tl.cdiv(length, N), tl.num_programs(0)):
        at = block * N
        hidden = tl.dot(_load(x_ptr, at, rows, length, columns, D), tl.trans(first))
        hidden = tl.maximum(hidden, 0.0).to(first.dtype)
        _store(y_ptr, at, rows, length, columns, D, tl.dot(hidden, tl.trans(second)))


@triton.jit
def _backward(
    x_ptr, first_ptr, second_ptr, dy_ptr, dx_ptr, dfirst_ptr, dsecond_ptr, length,
    D: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dX, and of a program's rows dW1 and the transpose of dW2. Hidden layers are [d, n] here: so products
    fill two warp groups, and the sums fit into registers."""
    columns, rows, zero = tl.arange(0, WIDTH), tl.arange(0, N), tl.program_id(0) * 0
    first = _load(first_ptr, zero, columns, D, columns, D)
    second = _load(second_ptr, zero, columns, D, columns, D)
    dfirst = tl.zeros([WIDTH, WIDTH], tl.float32)
    dsecond = tl.zeros([WIDTH, WIDTH], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(length, N), tl.num_programs(0)):
        at = block * N
        x = _load(x_ptr, at, rows, length, columns, D)
        dy = _load(dy_ptr, at, rows, length, columns, D)
        hidden = tl.maximum(tl.dot(first, tl.trans(x)), 0.0).to(x.dtype)
        dhidden = tl.where(hidden > 0.0, tl.dot(tl.trans(second), tl.trans(dy)), 0.0).to(x.dtype)
        dfirst = tl.dot(dhidden, x, dfirst)
        dsecond = tl.dot(hidden, dy, dsecond)
        _store(dx_ptr, at, rows, length, columns, D, tl.dot(tl.trans(dhidden), first))
    # Not masked: a mask would be held in registers all the while.
    place = tl.program_id(0).to(tl.int64) * WIDTH * WIDTH + columns[:, None] * WIDTH + columns[None, :]
    tl.store(dfirst_ptr + place, dfirst)
    tl.store(dsecond_ptr + place, dsecond)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        x, first, second = (each.contiguous() for each in (x, first, second))
        ctx.save_for_backward(x, first, second)
        y = torch.empty_like(x)
        length = x.numel() // x.shape[-1]
        _forward[(min(2 * PROGRAMS, triton.cdiv(length, ROWS)),)](
            x, first, second, y, length, **_sizes(x), num_warps=4, num_stages=2
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, first, second = ctx.saved_tensors
        grad, d, sizes = grad.contiguous(), x.shape[-1], _sizes(x)
        length = x.numel() // d
        parts = (min(PROGRAMS, triton.cdiv(length, ROWS)), sizes["WIDTH"], sizes["WIDTH"])
        dfirst, dsecond = torch.empty(2, *parts, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        _backward[parts[:1]](
            x, first, second, grad, dx, dfirst, dsecond, length, **sizes, num_warps=8, num_stages=2
        )
        dfirst, dsecond = (each.sum(0)[:d, :d].to(x.dtype) for each in (dfirst, dsecond))
        return dx, dfirst, dsecond.T


def _sizes(x: Tensor) -> dict[str, int]:
    return {"D": x.shape[-1], "WIDTH": max(triton.next_power_of_2(x.shape[-1]), 16), "N": ROWS}


def mlp(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """y [..., d] of x [..., d] and weights [d, d] of its dtype, bf16 or fp16; d at most 128."""
    function: Any = _Mlp.apply
    output: Tensor = function(x, first, second)
    return output
