"""Fused causal attention with an elementwise similarity or a softmax, in memory that grows with the length.

    S = scale Q K^T + b + t_{i-j},  P = f(S) M,  z = sum P,  r = z + eps, max(|z|, 1) or 1,  O = P V / r
    dO' = dO / r,  D = sum_d dO' O (times sign(z) [|z| > 1] for the second r, or 0 for the third)
    dS = f'(S) M (dO' V^T - D),  dV = P^T dO',  dQ = scale dS K,  dK = scale dS^T Q
    db = sum dS,  dt_n = sum of dS at the distance n,  for t_n = -m |n|: dm = -sum dS |i - j|

    Softmax: L = log sum exp S over the keys seen,  P = exp(S - L) M,  O = P V,  D = sum_d dO O - dL

Without a softmax there is no row maximum, so no rescaling: a block of keys is two matrix products and f.
The backward pass of a softmax is that of f(S) = f'(S) = exp(S - L). It takes one kernel for keys and values
and one for queries, so that no sum depends on the order of blocks: gradients are the same bits in every run,
those of biases too. ``train.deterministic`` therefore only keeps the sizes of blocks from being tuned
(``tiles``), since other sizes are other orders of sums.

A head size that is no power of two is taken as its two largest parts (96 = 64 + 32), each with products
of its own, instead of being padded.

Shapes: b sequence of the batch, h head, g kv head, t position, d head size, n distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from sinkbench.attention import tiles
from sinkbench.attention.tiles import Tiles
from sinkbench.attention.triton_backward import backward_keys, backward_queries, divide_gradient
from sinkbench.attention.triton_blocks import ROW_BLOCK, SLOPE, TABLE, itself, power_of_two
from sinkbench.attention.triton_forward import forward
from sinkbench.attention.triton_table import along_diagonals, of_distances, places_by_distance, table_gradient
from sinkbench.attention.triton_tensors import (
    bounds,
    by_position,
    is_wide,
    padded_table,
    pairs_in_cache,
    precision,
    split_head_size,
)

NORMALIZERS: dict[bool | str, int] = {False: 0, True: 1, "abs": 2}
SOFTMAX = 3
"""In the place of a normaliser."""
NEAR = 512
"""A table that ends so early has its gradient made in the kernel for queries, which then makes the products
that it needs only once; for a longer one that would take more memory than the inputs."""
TABLE_PROGRAMS = 264
"""Of the gradient of a table: two for each multiprocessor of an H100, which is what fits."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same in all kernels of a call.

    Attributes:
        normalize: of ``NORMALIZERS``, or SOFTMAX.
        position: 0, SLOPE or TABLE.
        ahead: distances of the table before 0.
    """

    function: Any
    derivative: Any
    normalize: int
    eps: float
    scale: float
    window: int | None
    prefix: int
    position: int
    ahead: int


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, position: Tensor | None,
        documents: Tensor | None, s: Settings,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        batch, heads, length, _ = q.shape
        out = by_position(q)
        size = (batch, heads, length) if s.normalize else (1,)
        rows = torch.empty(size, dtype=torch.float32, device=q.device)
        call = _Call(q, k, v, bias, position, documents, s, rows)

        def launch(chosen: Tiles) -> None:
            forward[(triton.cdiv(length, chosen.block_q) * batch * heads,)](
                q, k, v, out, rows, call.bias, call.position, call.documents,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                heads, call.group, length, batch * heads, pairs_in_cache(k, v), s.scale, s.eps, *call.mask,
                F=s.function, WIDE=is_wide(q, k, v, out), **call.switches, **chosen.options(),
            )  # fmt: skip

        launch(call.tiles("forward", launch))
        ctx.save_for_backward(q, k, v, bias, position, documents, out if s.normalize else None, rows)
        ctx.settings = s
        ctx.set_materialize_grads(False)
        return (out, rows) if s.normalize == SOFTMAX else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_rows: Tensor | None = None) -> tuple[Any, ...]:
        q, k, v, bias, position, documents, out, rows = ctx.saved_tensors
        s: Settings = ctx.settings
        if grad is None:  # of the output of a softmax: its log-sum-exp alone was used
            grad = torch.zeros_like(out)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        call = _Call(q, k, v, bias, position, documents, s, rows)
        by_row: Sequence[Tensor] = (rows, rows)
        if s.normalize:
            grad, *by_row = call.divided_gradient(grad, out, of_rows)
        dk, dv, db, dslope = call.gradients_of_keys(grad, by_row, ctx.needs_input_grad[4])
        dq, dtable = call.gradient_of_queries(grad, by_row, ctx.needs_input_grad[4])
        if q.shape[1] != k.shape[1]:
            dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
        dbias = None if bias is None else db.sum((0, 2)).to(bias.dtype)
        dposition = None
        if ctx.needs_input_grad[4]:
            if s.position == SLOPE:
                dposition = dslope.sum((0, 2))
            else:
                dposition = call.gradient_of_table(grad, by_row) if dtable is None else dtable
            if call.table_ends:
                # All of dS, which a softmax's weights leave in the log-sum-exp alone, less that of the rest.
                dposition[:, -1] = -dposition[:, :-1].sum(1)
                if s.normalize != SOFTMAX:
                    dposition[:, -1] += db.sum((0, 2))
                elif of_rows is not None:
                    dposition[:, -1] += of_rows.sum((0, 2))
        return dq, dk, dv, dbias, dposition, None, None


class _Call:
    """The arguments that the kernels of one call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, position: Tensor | None,
        documents: Tensor | None, s: Settings, rows: Tensor,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.s, self.rows = q, k, v, s, rows
        self.group = q.shape[1] // k.shape[1]
        self.bias = rows if bias is None else bias.float().contiguous()  # unused if there is none
        self.position = rows if position is None else position
        self.documents = rows if documents is None else documents
        self.last = 0  # distance of the table
        self.mask: tuple[int, ...] = (s.window or 0, s.prefix, 0, 1, 0)
        if position is not None and s.position == TABLE:
            self.position = padded_table(position, s.ahead, q.shape[2])
            self.last = position.shape[1] - 1 - s.ahead
            at_zero = s.ahead + ROW_BLOCK
            self.mask = (s.window or 0, s.prefix, at_zero, self.position.shape[1], self.last)
        self.table_ends = s.position == TABLE and self.last < q.shape[2] - 1
        d0, d1 = split_head_size(q.shape[-1])
        self.switches: dict[str, Any] = {
            "NORMALIZE": s.normalize,
            "BIAS": bias is not None,
            "POSITION": s.position,
            "WINDOW": s.window is not None,
            "PREFIX": s.prefix > 0,
            "DOCUMENTS": documents is not None,
            "PRECISION": precision(q),
            "UNIT": math.log2(math.e) if s.normalize == SOFTMAX else 1.0,
            "D0": d0,
            "D1": d1,
        }

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(stride for x in (self.q, self.k, self.v) for stride in x.stride()[:3])

    def tiles(self, kernel: str, launch: Callable[[Tiles], object]) -> Tiles:
        s = self.s
        masks = [mask for mask in ("WINDOW", "PREFIX", "DOCUMENTS") if self.switches[mask]]
        variant = {
            "mask": "+".join(masks).lower() or "causal",
            "function": f"{s.function.__module__}.{s.function.__name__}",
            "normalize": s.normalize,
            "position": s.position,
        }
        return tiles.choose(kernel, self.q, variant, launch, s.position, self.switches["DOCUMENTS"])

    def divided_gradient(
        self, grad: Tensor, out: Tensor, of_rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dO', and D and the log-sum-exp of each row, which have room for whole blocks; see the kernel.
        ``of_rows`` is the gradient of the log-sum-exp of a softmax, if it has one."""
        batch, heads, length, _ = grad.shape
        padded = triton.cdiv(length, ROW_BLOCK) * ROW_BLOCK
        delta, lse = torch.empty(2, batch * heads, padded, dtype=torch.float32, device=grad.device)
        divided = grad if self.s.normalize == SOFTMAX else torch.empty_like(out)
        strides = (*grad.stride()[:3], *out.stride()[:3], *divided.stride()[:3])
        switches = {name: self.switches[name] for name in ("NORMALIZE", "UNIT", "D0", "D1")}
        of_lse = self.rows if of_rows is None else of_rows.contiguous()
        divide_gradient[(batch * heads, padded // 64)](
            grad, out, self.rows, of_lse, divided, delta, lse, *strides, heads, length,
            OF_LSE=of_rows is not None, WIDE=is_wide(grad, out, divided), BLOCK=64, **switches,
        )  # fmt: skip
        return divided, delta, lse

    def gradients_of_keys(
        self, grad: Tensor, by_row: Sequence[Tensor], position: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dK and dV by query head, and of each block of keys the sums for the bias and the slope."""
        q, k, v, s = self.q, self.k, self.v, self.s
        batch, heads, length, _ = q.shape
        dk, dv = by_position(q), by_position(q)
        slope = position and s.position == SLOPE
        most = triton.cdiv(length, tiles.SMALLEST_BLOCK)
        db, dslope = (
            torch.empty((batch, heads, most) if wanted else (1, 1, 1), dtype=torch.float32, device=q.device)
            for wanted in (self.switches["BIAS"], slope)
        )

        def launch(chosen: Tiles) -> int:
            blocks: int = triton.cdiv(length, chosen.block_k)
            backward_keys[(blocks * batch * heads,)](
                q, k, v, grad, dk, dv, *by_row, self.bias, self.position, self.documents, db, dslope,
                *self.strides, *grad.stride()[:3], *dk.stride()[:3],
                heads, self.group, length, batch * heads, pairs_in_cache(q, grad), s.scale, *self.mask,
                F=s.function, DF=s.derivative, SLOPE_GRADIENT=slope, WIDE=is_wide(q, k, v, grad, dk),
                **self.switches, **chosen.options(),
            )  # fmt: skip
            return blocks

        blocks = launch(self.tiles("keys", launch))
        if self.switches["BIAS"]:
            db = db.flatten()[: batch * heads * blocks].view(batch, heads, blocks)
        if slope:
            dslope = dslope.flatten()[: batch * heads * blocks].view(batch, heads, blocks)
        return dk, dv, db, dslope

    def gradient_of_queries(
        self, grad: Tensor, by_row: Sequence[Tensor], position: bool
    ) -> tuple[Tensor, Tensor | None]:
        """dQ, and, if it is wanted and cheaper so, the gradient of a table."""
        q, k, v, s = self.q, self.k, self.v, self.s
        batch, heads, length, d = q.shape
        dq = by_position(q)
        of_table = position and self.table_ends and not s.prefix and self.last <= NEAR and d <= 128
        dtable = self.rows

        def launch(chosen: Tiles) -> None:
            nonlocal dtable
            blocks, steps = triton.cdiv(length, chosen.block_q), 0
            if of_table:
                places = places_by_distance(self.last, chosen.block_q, chosen.block_k)
                # A query near the beginning has no keys so far behind.
                dtable, steps = self.rows.new_zeros(batch, heads, blocks, *places), places[0]
            backward_queries[(blocks * batch * heads,)](
                q, k, v, grad, dq, *by_row, self.bias, self.position, self.documents, dtable,
                *self.strides, *grad.stride()[:3], *dq.stride()[:3],
                heads, self.group, length, batch * heads, pairs_in_cache(k, v), s.scale, *self.mask, steps,
                F=s.function, DF=s.derivative, TABLE_GRADIENT=of_table, WIDE=is_wide(q, k, v, grad, dq),
                **self.switches, **chosen.options(),
            )  # fmt: skip

        launch(self.tiles("queries", launch))
        return dq, of_distances(dtable.sum((0, 2)), self.last + 1) if of_table else None

    def gradient_of_table(self, grad: Tensor, by_row: Sequence[Tensor]) -> Tensor:
        q, k, v, s = self.q, self.k, self.v, self.s
        batch, heads, length, _ = q.shape
        # A diagonal of blocks holds the distances from size (n - 1) + 1 to size (n + 1) - 1.
        size = 32 if q.dtype == torch.float32 or q.shape[-1] > 128 else 64
        count = triton.cdiv(length, size)
        farthest = count - 1
        if s.window is not None:
            farthest = min(farthest, triton.cdiv(max(s.window, s.prefix) - 1, size))
        if self.table_ends:
            farthest = min(farthest, triton.cdiv(max(self.last - 1, 0), size))
        nearest = -triton.cdiv(max(s.prefix - 1, 0), size)
        nearest = max(nearest, 1 - count)
        diagonals = farthest - nearest + 1
        parts = min(max(TABLE_PROGRAMS // (diagonals * heads), 1), batch * count)
        grid = (diagonals, heads, parts)
        blocks = torch.empty(parts, heads, grid[0], size, size, dtype=torch.float32, device=q.device)
        switches = {name: value for name, value in self.switches.items() if name != "POSITION"}
        table_gradient[grid](
            q, k, v, grad, *by_row, self.bias, self.position, self.documents, blocks,
            *self.strides, *grad.stride()[:3],
            batch, heads, self.group, length, s.scale, *self.mask, nearest,
            F=s.function, DF=s.derivative, WIDE=is_wide(q, k, v, grad), BLOCK=size, **switches,
            num_warps=8 if q.dtype == torch.float32 else 4, num_stages=2 if q.shape[-1] <= 96 else 1,
        )  # fmt: skip
        return along_diagonals(blocks.sum(0), nearest, s.ahead, s.ahead + 1 + self.last)


def attend(
    query_bhtd: Tensor,
    key_bgtd: Tensor,
    value_bgtd: Tensor,
    *,
    function: Any,
    derivative: Any,
    normalize: bool | Literal["abs"],
    eps: float = 1e-8,
    scale: float,
    bias_h: Tensor | None = None,
    window: int | None = None,
    prefix: int = 0,
    slope_h: Tensor | None = None,
    table_hn: Tensor | None = None,
    document_start_bt: Tensor | None = None,
) -> Tensor:
    """O [b, h, t, d] of the inputs' dtype.

    Args:
        function: Triton function s -> f(s), float32.
        derivative: Triton function (s, f(s)) -> f'(s).
        normalize: divide each row by its sum + eps, or with "abs" by max(|sum|, 1).
        eps: of the normaliser.
        scale: factor on q.k.
        bias_h: added to the scores of each head.
        window: a query sees this many newest keys.
        prefix: the first so many positions see one another.
        slope_h: -slope |i - j| is added to the scores; not together with ``table_hn``.
        table_hn: what is added to the scores by the distance i - j, from max(prefix - 1, 0) positions ahead
            to t - 1 behind, or to where the rest is as the last.
        document_start_bt: where the document of each position begins: a query sees keys of its own only. Not
            together with a prefix.
    """
    if table_hn is not None and table_hn.requires_grad and bias_h is None:
        bias_h = table_hn.new_zeros(table_hn.shape[0])  # for the sum of dS, see the backward pass
    output: Tensor = _apply(
        (query_bhtd, key_bgtd, value_bgtd),
        bias_h,
        slope_h,
        table_hn,
        prefix,
        document_start_bt,
        function=function,
        derivative=derivative,
        normalize=NORMALIZERS[normalize],
        eps=eps,
        scale=scale,
        window=window,
    )
    return output


def softmax(
    query_bhtd: Tensor,
    key_bgtd: Tensor,
    value_bgtd: Tensor,
    *,
    scale: float,
    window: int | None = None,
    prefix: int = 0,
    slope_h: Tensor | None = None,
    table_hn: Tensor | None = None,
    document_start_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """O [b, h, t, d] of the inputs' dtype, and log sum exp of the scores [b, h, t], float32; both can be
    differentiated. Arguments as for ``attend``. A row without weights gives 0 and minus infinity."""
    output, log_sum = _apply(
        (query_bhtd, key_bgtd, value_bgtd),
        None,
        slope_h,
        table_hn,
        prefix,
        document_start_bt,
        function=power_of_two,
        derivative=itself,
        normalize=SOFTMAX,
        eps=0.0,
        scale=scale,
        window=window,
    )
    if slope_h is not None and window is None:
        # See ``load_position``: the kernels add as much to the rows of a rising slope.
        within = torch.arange(log_sum.shape[2], device=log_sum.device)
        if document_start_bt is not None:
            within = (within - document_start_bt)[:, None]
        log_sum = log_sum - slope_h.clamp(max=0.0).float()[:, None] * within
    return output, log_sum


def _apply(
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    slope: Tensor | None,
    table: Tensor | None,
    prefix: int,
    document_start_bt: Tensor | None,
    **settings: Any,
) -> Any:
    prefix = min(prefix, qkv[0].shape[2])
    position, kind = None, 0
    if slope is not None:
        position, kind = slope.float().contiguous(), SLOPE
    if table is not None:
        position, kind = table.float().contiguous(), TABLE
    s = Settings(prefix=prefix, ahead=max(prefix - 1, 0), position=kind, **settings)
    documents = None if document_start_bt is None else bounds(document_start_bt)
    return _Attention.apply(*qkv, bias, position, documents, s)
