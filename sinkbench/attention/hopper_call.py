"""A call of the attention kernels for Hopper."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sinkbench.attention.hopper import parts
from sinkbench.attention.hopper_backward import backward_keys, backward_queries
from sinkbench.attention.hopper_blocks import result
from sinkbench.attention.hopper_forward import forward
from sinkbench.attention.hopper_table import table_gradient
from sinkbench.attention.tiles import Tiles
from sinkbench.attention.triton_call import SOFTMAX, Call
from sinkbench.attention.triton_tensors import pairs_in_cache

_log = logging.getLogger(__name__)

SWIZZLED_BYTES = 128
"""Of a row in shared memory, at most, in the order in which products do not wait for its banks."""


@gluon.jit
def _applied(target, F: gl.constexpr, DF: gl.constexpr, SIZE: gl.constexpr):
    layout: gl.constexpr = result(SIZE, gl.num_warps())
    s = gl.full([SIZE, SIZE], 0.5, gl.float32, layout)
    p = F(s)
    rows = gl.arange(0, SIZE, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout))
    gl.store(target + rows[:, None] * SIZE + columns[None, :], DF(s, p))


@cache
def compiles(function: Any, derivative: Any) -> bool:
    """Whether Triton functions of a similarity can be part of the kernels. Elementwise operations can; a
    tensor that a function makes itself has no layout here. Such functions are left to the Triton kernels, and
    a line goes to the log."""
    try:
        _applied.warmup(torch.float32, F=function, DF=derivative, SIZE=64, grid=(1,))
    except CompilationError as error:
        reason = " ".join(str(error.__cause__ or error).split())[-200:]
        _log.warning("%s is not computed by the kernels for Hopper: %s", function.__name__, reason)
        return False
    return True


def described(x_bhtd: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """The parts of a tensor in blocks of so many rows."""
    shape = [*x_bhtd.shape]
    # Of what there is one of, the stride does not matter, but it has to be one that can be.
    strides = [stride if size > 1 else shape[3] for size, stride in zip(shape, x_bhtd.stride(), strict=True)]
    bits = 8 * x_bhtd.element_size()
    found = [
        TensorDescriptor(x_bhtd, shape, strides, [1, 1, rows, columns], _swizzled(columns, bits))
        for columns in parts(shape[3])
    ]
    return found[0], found[1] if len(found) > 1 else None


def described_by_row(x_rt: Tensor, rows: int) -> TensorDescriptor:
    """Numbers of rows, float32 [b h, t], in blocks of so many."""
    return TensorDescriptor(x_rt, [*x_rt.shape], [*x_rt.stride()], [1, rows], _PLAIN)


@cache
def _swizzled(columns: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(min(SWIZZLED_BYTES, columns * bits // 8), bits, rank=4)


_PLAIN = gl.NVMMASharedLayout(0, 32, rank=2)


def switches_for(shared: Mapping[str, Any], head_size: int, chosen: Tiles) -> dict[str, Any]:
    """Of what Triton's kernels are compiled with, what these are, and sizes."""
    others = {"PRECISION", "WIDE", "D0", "D1"}
    kept = {name: value for name, value in shared.items() if name not in others}
    sizes = {name: value for name, value in chosen.options().items() if name != "num_stages"}
    return kept | sizes | {"PARTS": len(parts(head_size))}


class HopperCall(Call):
    """With the same arguments in the same order, but for the tensors that are read in blocks."""

    kernels = "hopper "
    table_by_itself = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._read: dict[tuple[int, int], tuple[TensorDescriptor, TensorDescriptor | None]] = {}

    def _described(self, x: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
        """Each once: to describe a tensor takes Python as long as to launch a kernel. The call's tensors stay
        while it does."""
        key = (id(x), rows)
        if key not in self._read:
            self._read[key] = described(x, rows)
        return self._read[key]

    def launch_forward(self, out: Tensor, chosen: Tiles) -> None:
        q, k, v, s = self.q, self.k, self.v, self.s
        batch, heads, length, _ = q.shape
        forward[(triton.cdiv(length, chosen.block_q) * batch * heads,)](
            *self._described(q, chosen.block_q), *self._described(k, chosen.block_k),
            *self._described(v, chosen.block_k),
            out, self.rows, self.bias, self.position, self.documents, *out.stride()[:3],
            heads, self.group, length, batch * heads, pairs_in_cache(k, v), s.scale, s.eps, *self.mask,
            F=s.function, **self._switches(chosen),
        )  # fmt: skip

    def launch_keys(
        self, grad: Tensor, by_row: Sequence[Tensor], into: Sequence[Tensor], slope: bool, chosen: Tiles
    ) -> None:
        q, s = self.q, self.s
        batch, heads, length, _ = q.shape
        dk, dv, db, dslope = into
        # D and the log-sum-exp, as far as there are any.
        needed = by_row[: {0: 0, SOFTMAX: 2}.get(s.normalize, 1)]
        numbers = [*(described_by_row(x, chosen.block_q) for x in needed), None, None][:2]
        backward_keys[(triton.cdiv(length, chosen.block_k) * batch * heads,)](
            *self._read_backward(grad, chosen), *numbers, dk, dv,
            self.bias, self.position, self.documents, db, dslope, *dk.stride()[:3],
            heads, self.group, length, batch * heads, pairs_in_cache(q, grad), s.scale, *self.mask,
            F=s.function, DF=s.derivative, SLOPE_GRADIENT=slope, **self._switches(chosen),
        )  # fmt: skip

    def launch_queries(
        self, grad: Tensor, by_row: Sequence[Tensor], dq: Tensor, dtable: Tensor, steps: int, chosen: Tiles
    ) -> None:
        k, v, s = self.k, self.v, self.s
        batch, heads, length, _ = self.q.shape
        backward_queries[(triton.cdiv(length, chosen.block_q) * batch * heads,)](
            *self._read_backward(grad, chosen), dq, *by_row,
            self.bias, self.position, self.documents, *dq.stride()[:3],
            heads, self.group, length, batch * heads, pairs_in_cache(k, v), s.scale, *self.mask,
            F=s.function, DF=s.derivative, SHARED=chosen.registers > 0, **self._switches(chosen),
        )  # fmt: skip

    def launch_table(self, grad: Tensor, by_row: Sequence[Tensor], blocks: Tensor, nearest: int) -> None:
        s, size = self.s, blocks.shape[-1]
        batch, heads, length, _ = self.q.shape
        chosen = Tiles(size, size, num_warps=4, num_stages=2)
        own = {"POSITION", "BLOCK_Q", "BLOCK_K"}
        switches = {name: value for name, value in self._switches(chosen).items() if name not in own}
        table_gradient[(blocks.shape[2], heads, blocks.shape[0])](
            *self._read_backward(grad, chosen), *by_row,
            self.bias, self.position, self.documents, blocks,
            batch, heads, self.group, length, s.scale, *self.mask, nearest,
            F=s.function, DF=s.derivative, BLOCK=size, **switches,
        )  # fmt: skip

    def _read_backward(self, grad: Tensor, chosen: Tiles) -> list[TensorDescriptor | None]:
        by_query, by_key = chosen.block_q, chosen.block_k
        read = ((self.q, by_query), (self.k, by_key), (self.v, by_key), (grad, by_query))
        return [part for x, rows in read for part in self._described(x, rows)]

    def _switches(self, chosen: Tiles) -> dict[str, Any]:
        return switches_for(self.switches, self.q.shape[-1], chosen)
