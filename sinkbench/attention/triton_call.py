"""A call of the attention kernels: their arguments, and one launch after another.

Shapes: b sequence of the batch, h head, g kv head, t position, d head size, n distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sinkbench.attention import gradient_room, tiles
from sinkbench.attention.tiles import Tiles
from sinkbench.attention.triton_backward import backward_keys, backward_queries, divide_gradient
from sinkbench.attention.triton_blocks import ROW_BLOCK, SLOPE, TABLE
from sinkbench.attention.triton_forward import forward
from sinkbench.attention.triton_table import along_diagonals, of_distances, places_by_distance, table_gradient
from sinkbench.attention.triton_tensors import (
    by_position,
    is_wide,
    padded_table,
    pairs_in_cache,
    precision,
    split_head_size,
)

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
        normalize: 1 for the sum + eps, 2 for max(|sum|, 1), 0 for nothing, or SOFTMAX.
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


class Call:
    """The arguments that the kernels of one call share."""

    kernels = ""
    """What the names of their block sizes begin with."""
    table_by_itself = False
    """Whether even the gradient of a table that ends near is made by a kernel of its own."""

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

    def tiles(self, kernel: str, launch: Callable[[Tiles], object], slope_gradient: bool = False) -> Tiles:
        s = self.s
        masks = [mask for mask in ("WINDOW", "PREFIX", "DOCUMENTS") if self.switches[mask]]
        variant = {
            "mask": "+".join(masks).lower() or "causal",
            "function": f"{s.function.__module__}.{s.function.__name__}",
            "normalize": s.normalize,
            "position": s.position,
            "slope gradient": slope_gradient,
        }
        name = self.kernels + kernel
        return tiles.choose(name, self.q, variant, launch, s.position, self.switches["DOCUMENTS"])

    def outputs(self) -> Tensor:
        """O [b, h, t, d]; what its rows were divided by goes to ``rows``."""
        out = by_position(self.q)

        def launch(chosen: Tiles) -> None:
            self.launch_forward(out, chosen)

        launch(self.tiles("forward", launch))
        return out

    def launch_forward(self, out: Tensor, chosen: Tiles) -> None:
        q, k, v, s = self.q, self.k, self.v, self.s
        batch, heads, length, _ = q.shape
        forward[(triton.cdiv(length, chosen.block_q) * batch * heads,)](
            q, k, v, out, self.rows, self.bias, self.position, self.documents,
            *self.strides, *out.stride()[:3],
            heads, self.group, length, batch * heads, pairs_in_cache(k, v), s.scale, s.eps, *self.mask,
            F=s.function, WIDE=is_wide(q, k, v, out), **self.switches, **chosen.options(),
        )  # fmt: skip

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
        q, s = self.q, self.s
        batch, heads, length, _ = q.shape
        room = gradient_room.take(self.k, self.v) if self.group == 1 else None
        dk, dv = (by_position(q), by_position(q)) if room is None else room
        slope = position and s.position == SLOPE
        most = triton.cdiv(length, tiles.SMALLEST_BLOCK)
        db, dslope = (
            torch.empty((batch, heads, most) if wanted else (1, 1, 1), dtype=torch.float32, device=q.device)
            for wanted in (self.switches["BIAS"], slope)
        )

        def launch(chosen: Tiles) -> int:
            self.launch_keys(grad, by_row, (dk, dv, db, dslope), slope, chosen)
            blocks: int = triton.cdiv(length, chosen.block_k)
            return blocks

        blocks = launch(self.tiles("keys", launch, slope))
        if self.switches["BIAS"]:
            db = db.flatten()[: batch * heads * blocks].view(batch, heads, blocks)
        if slope:
            dslope = dslope.flatten()[: batch * heads * blocks].view(batch, heads, blocks)
        return dk, dv, db, dslope

    def launch_keys(
        self, grad: Tensor, by_row: Sequence[Tensor], into: Sequence[Tensor], slope: bool, chosen: Tiles
    ) -> None:
        q, k, v, s = self.q, self.k, self.v, self.s
        batch, heads, length, _ = q.shape
        dk, dv, db, dslope = into
        backward_keys[(triton.cdiv(length, chosen.block_k) * batch * heads,)](
            q, k, v, grad, dk, dv, *by_row, self.bias, self.position, self.documents, db, dslope,
            *self.strides, *grad.stride()[:3], *dk.stride()[:3],
            heads, self.group, length, batch * heads, pairs_in_cache(q, grad), s.scale, *self.mask,
            F=s.function, DF=s.derivative, SLOPE_GRADIENT=slope, WIDE=is_wide(q, k, v, grad, dk),
            **self.switches, **chosen.options(),
        )  # fmt: skip

    def gradient_of_queries(
        self, grad: Tensor, by_row: Sequence[Tensor], position: bool
    ) -> tuple[Tensor, Tensor | None]:
        """dQ, and, if it is wanted and cheaper so, the gradient of a table."""
        q, s = self.q, self.s
        batch, heads, length, d = q.shape
        dq = by_position(q)
        near = self.table_ends and not s.prefix and self.last <= NEAR and d <= 128
        of_table = position and near and not self.table_by_itself
        dtable = self.rows

        def launch(chosen: Tiles) -> None:
            nonlocal dtable
            steps = 0
            if of_table:
                places = places_by_distance(self.last, chosen.block_q, chosen.block_k)
                blocks, steps = triton.cdiv(length, chosen.block_q), places[0]
                # A query near the beginning has no keys so far behind.
                dtable = self.rows.new_zeros(batch, heads, blocks, *places)
            self.launch_queries(grad, by_row, dq, dtable, steps, chosen)

        launch(self.tiles("queries", launch))
        return dq, of_distances(dtable.sum((0, 2)), self.last + 1) if of_table else None

    def launch_queries(
        self, grad: Tensor, by_row: Sequence[Tensor], dq: Tensor, dtable: Tensor, steps: int, chosen: Tiles
    ) -> None:
        """With steps, also the gradient of a table."""
        q, k, v, s = self.q, self.k, self.v, self.s
        batch, heads, length, _ = q.shape
        backward_queries[(triton.cdiv(length, chosen.block_q) * batch * heads,)](
            q, k, v, grad, dq, *by_row, self.bias, self.position, self.documents, dtable,
            *self.strides, *grad.stride()[:3], *dq.stride()[:3],
            heads, self.group, length, batch * heads, pairs_in_cache(k, v), s.scale, *self.mask, steps,
            F=s.function, DF=s.derivative, TABLE_GRADIENT=steps > 0, WIDE=is_wide(q, k, v, grad, dq),
            **self.switches, **chosen.options(),
        )  # fmt: skip

    def gradient_of_table(self, grad: Tensor, by_row: Sequence[Tensor]) -> Tensor:
        """By blocks of scores at the same distance, in a kernel of its own."""
        q, s = self.q, self.s
        heads, length = q.shape[1:3]
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
        programs = min(max(TABLE_PROGRAMS // (diagonals * heads), 1), q.shape[0] * count)
        blocks = torch.empty(programs, heads, diagonals, size, size, dtype=torch.float32, device=q.device)
        self.launch_table(grad, by_row, blocks, nearest)
        return along_diagonals(blocks.sum(0), nearest, s.ahead, s.ahead + 1 + self.last)

    def launch_table(self, grad: Tensor, by_row: Sequence[Tensor], blocks: Tensor, nearest: int) -> None:
        """Blocks [programs, h, diagonals, size, size] of dS, from the nearest diagonal on."""
        q, k, v, s = self.q, self.k, self.v, self.s
        batch, heads, length, _ = q.shape
        switches = {name: value for name, value in self.switches.items() if name != "POSITION"}
        table_gradient[(blocks.shape[2], heads, blocks.shape[0])](
            q, k, v, grad, *by_row, self.bias, self.position, self.documents, blocks,
            *self.strides, *grad.stride()[:3],
            batch, heads, self.group, length, s.scale, *self.mask, nearest,
            F=s.function, DF=s.derivative, WIDE=is_wide(q, k, v, grad), BLOCK=blocks.shape[-1], **switches,
            num_warps=8 if q.dtype == torch.float32 else 4, num_stages=2 if q.shape[-1] <= 96 else 1,
        )  # fmt: skip
