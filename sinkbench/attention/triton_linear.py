"""Fused causal kernel attention, weights q.k without a function, in time that grows with the length.

    A_ij = q_i.k_j for j <= i,  z_i = scale sum_j A_ij,  r = z + eps, max(|z|, 1) or 1,  c = scale / r
    O_i = c_i (sum_{j in chunk} A_ij v_j + q_i S),  S = sum_{j before the chunk} k_j v_j^T
    z_i = scale (sum_{j in chunk} A_ij + q_i.s),  s = sum_{j before the chunk} k_j

    G_ij = c_i (dO_i.v_j - D_i) for j <= i,  D_i = dO_i.O_i (times sign(z) [|z| >= 1] for the second r)
    dQ_i = sum_{j in chunk} G_ij k_j + c_i (S dO_i - D_i s)
    dK_j = sum_{i in chunk} G_ij q_i + R v_j - u,  R = sum_{i after the chunk} q_i (c_i dO_i)^T
    dV_j = sum_{i in chunk} c_i A_ij dO_i + R^T k_j,  u = sum_{i after the chunk} c_i D_i q_i

A program for each block of S goes along the chunks and writes S before each; then one for each chunk
computes the rest. The backward pass computes S again and R in the same way, so that no sum depends on the
order of programs, and only the inputs, O and z are kept for it. Factors of products have the inputs' dtype,
S and R too, once summed; sums, z, s and u are float32.

Shapes: b sequence of the batch, h head, g kv head, t position, d size of the features, e head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sinkbench.attention import tiles
from sinkbench.attention.tiles import Tiles
from sinkbench.attention.triton_elementwise import NORMALIZERS
from sinkbench.attention.triton_linear_kernels import gradients, outputs, row_terms, running_sums
from sinkbench.attention.triton_tensors import is_wide, precision

SMALLEST_SIZE = 16
"""What a product takes; less is padded."""
STATE_BLOCK = 64
"""Features and columns of the states that one program sums."""
SMALLEST_CHUNK = 32
"""The states of shorter ones would be many times the inputs."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same in all kernels of a call.

    Attributes:
        normalize: of ``NORMALIZERS``.
        sums: the output stays float32, and the rows' sums are returned too.
    """

    normalize: int
    eps: float
    scale: float
    sums: bool

    @property
    def rows(self) -> bool:
        """Whether the sums of rows are needed."""
        return self.sums or self.normalize > 0


def attend(
    query_bhtd: Tensor,
    key_bgtd: Tensor,
    value_bgte: Tensor,
    *,
    normalize: bool | str,
    eps: float,
    scale: float,
) -> Tensor:
    """O [b, h, t, e] of the inputs' dtype.

    Args:
        normalize: divide each row by its sum + eps, or with "abs" by max(|sum|, 1).
        scale: factor on q.k.
    """
    settings = Settings(normalize=NORMALIZERS[normalize], eps=eps, scale=scale, sums=False)
    output: Tensor = _apply(query_bhtd, key_bgtd, value_bgte, settings)
    return output


def sums(query_bhtd: Tensor, key_bgtd: Tensor, value_bgte: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """scale sum_{j <= i} (q_i.k_j) v_j [b, h, t, e] and scale sum_{j <= i} q_i.k_j [b, h, t], float32; both
    can be differentiated."""
    settings = Settings(normalize=0, eps=0.0, scale=scale, sums=True)
    result: tuple[Tensor, Tensor] = _apply(query_bhtd, key_bgtd, value_bgte, settings)
    return result


def _apply(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Any:
    function: Any = _Linear.apply
    return function(q, k, v, settings)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, s: Settings) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, total = _Call(q, k, v, s).outputs()
        kept = (out, total) if s.normalize else (None, None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.settings = s
        return (out, total) if s.sums else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_total: Tensor) -> tuple[Any, ...]:
        q, k, v, out, total = ctx.saved_tensors
        call = _Call(q, k, v, ctx.settings)
        grad = grad.to(q.dtype)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        if out is not None:
            factor, delta = call.row_terms(grad, out, total)
        elif of_total:
            # z has no part in O here, and a gradient of its own.
            delta = -call.s.scale * of_total[0].contiguous()
            factor = torch.full_like(delta, call.s.scale)
        else:
            factor = delta = q  # not read
        return *call.gradients(grad, factor, delta), None


class _Call:
    """The arguments that the kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, s: Settings) -> None:
        self.q, self.k, self.v, self.s = q, k, v, s
        self.heads, self.groups, self.length = q.shape[1], k.shape[1], q.shape[2]
        self.pairs = q.shape[0] * self.heads
        self.group = self.heads // self.groups
        self.switches: dict[str, Any] = {
            "D": q.shape[-1],
            "E": v.shape[-1],
            "ROWS": s.rows,
            "PRECISION": precision(q),
        }
        # Products of float32 take no tensor cores but many registers.
        self.widest = 32 if q.dtype == torch.float32 else 128

    def empty(self, like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """[b, h, t, size] that lies as [t, b, h, size], which the projections read without a copy."""
        batch, heads, length, _ = like.shape
        made = torch.empty(length, batch, heads, size, dtype=dtype, device=like.device)
        return made.permute(1, 2, 0, 3)

    def columns(self, size: int) -> int:
        """Of the result, in one program."""
        padded: int = triton.next_power_of_2(size)
        return min(max(padded, SMALLEST_SIZE), self.widest)

    def blocks(self, chosen: Tiles) -> dict[str, int]:
        """The sizes of a chunk's kernels: ``block_q`` positions, ``block_k`` features at a time."""
        options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
        block = min(chosen.block_k, self.columns(max(self.q.shape[-1], self.v.shape[-1])))
        return {"C": max(chosen.block_q, SMALLEST_CHUNK), "BLOCK": block, **options}

    def tiles(self, kernel: str, launch: tiles.Launch) -> Tiles:
        s = self.s
        variant = {
            "value_size": self.v.shape[-1],
            "group": self.group,
            "normalize": s.normalize,
            "sums": s.sums,
        }
        return tiles.choose(kernel, self.q, variant, launch)

    def running_sums(
        self, x: Tensor, y: Tensor, chunk: int, terms: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """S [b, g, n, d, e] and s [b, g, n, d] before each chunk, of keys and values; or of queries and the
        output's gradient, whose rows have terms, R and u after each."""
        d, e = x.shape[-1], y.shape[-1]
        chunks = triton.cdiv(self.length, chunk)
        shape = (x.shape[0], self.groups, chunks, d)
        state = torch.empty(*shape, e, dtype=x.dtype, device=x.device)
        total = torch.empty(shape, dtype=torch.float32, device=x.device)
        block = min(self.columns(max(d, e)), STATE_BLOCK)
        blocks = triton.cdiv(d, block)
        grid = (blocks * triton.cdiv(e, block) + (blocks if self.s.rows else 0), x.shape[0] * self.groups)
        running_sums[grid](
            x, y, *(terms or (total, total)), state, total, *x.stride()[:3], *y.stride()[:3],
            self.groups, 1 if terms is None else self.group, self.length, chunks, self.s.scale,
            BACKWARD=terms is not None, WIDE=is_wide(x, y), C=chunk, BLOCK=block, **self.switches,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        return state, total

    def outputs(self) -> tuple[Tensor, Tensor]:
        """O, or what is not divided yet, and z; or something unused, where no row needs it."""
        q, k, v, s = self.q, self.k, self.v, self.s
        e = v.shape[-1]
        out = self.empty(q, e, torch.float32 if s.sums else q.dtype)
        size = q.shape[:3] if s.rows else (1,)
        total = torch.empty(size, dtype=torch.float32, device=q.device)
        columns = self.columns(e)

        def launch(chosen: Tiles) -> None:
            blocks = self.blocks(chosen)
            state, keys = self.running_sums(k, v, blocks["C"])
            grid = (triton.cdiv(self.length, blocks["C"]), self.pairs, triton.cdiv(e, columns))
            outputs[grid](
                q, k, v, out, total, state, keys,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                self.heads, self.group, self.length, s.scale, s.eps,
                NORMALIZE=s.normalize, WIDE=is_wide(q, k, v, out), COLUMNS=columns,
                **self.switches, **blocks,
            )  # fmt: skip

        launch(self.tiles("linear", launch))
        return out, total

    def row_terms(self, grad: Tensor, out: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """c and c D [b, h, t]."""
        factor, delta = torch.empty_like(total), torch.empty_like(total)
        columns = max(triton.next_power_of_2(out.shape[-1]), SMALLEST_SIZE)
        row_terms[(triton.cdiv(self.length, 32), self.pairs)](
            grad, out, total, factor, delta, *grad.stride()[:3], *out.stride()[:3],
            self.heads, self.length, self.s.scale, self.s.eps,
            E=out.shape[-1], NORMALIZE=self.s.normalize, WIDE=is_wide(grad, out), C=32, COLUMNS=columns,
        )  # fmt: skip
        return factor, delta

    def gradients(self, grad: Tensor, factor: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK and dV."""
        q, k, v = self.q, self.k, self.v
        d, e = q.shape[-1], v.shape[-1]
        dq, dk, dv = (self.empty(x, x.shape[-1], x.dtype) for x in (q, k, v))
        columns = self.columns(max(d, e))
        tasks = 2 * triton.cdiv(d, columns) + triton.cdiv(e, columns)
        inputs = (q, k, v, grad, dq, dk, dv)

        def launch(chosen: Tiles) -> None:
            blocks = self.blocks(chosen)
            before, keys = self.running_sums(k, v, blocks["C"])
            after, queries = self.running_sums(q, grad, blocks["C"], (factor, delta))
            gradients[(tasks, triton.cdiv(self.length, blocks["C"]), self.pairs)](
                *inputs, factor, delta, before, keys, after, queries,
                *(stride for x in inputs for stride in x.stride()[:3]),
                self.heads, self.group, self.length, self.s.scale,
                WIDE=is_wide(*inputs), COLUMNS=columns, **self.switches, **blocks,
            )  # fmt: skip

        launch(self.tiles("linear gradients", launch))
        return dq, dk, dv
