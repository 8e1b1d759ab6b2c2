"""megatron's linear maps, whose tensor-parallel communication runs beside their own products.

Under sequence parallelism each rank has a share of the tokens between linear maps. megatron gathers the
shares and then multiplies, or multiplies and then scatters the sum: one waits for the other. Here

- what is gathered (inputs of a column-parallel map, gradients of a row-parallel one) is multiplied as it
  comes: this rank's own rows first, which need no other rank;
- what is scattered (outputs of a row-parallel map) goes in pieces: one is under way while the next is made.

A column-parallel map's backward pass is as megatron's, where both are beside products already. Parameters,
their names and what is saved for the backward pass are megatron's too. Sums over ranks are those of the
collectives, in an order that does not depend on time. Communication is launched before the product that it is
to run beside, for which a card takes work in that order alone with CUDA_DEVICE_MAX_CONNECTIONS=1.

Shapes: s position, b sequence, t = s b tokens of all ranks, n input size, m output size; of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import layers
from torch import Tensor

from sinkbench.megatron.sequence import Group
from sinkbench.megatron.weight_gradients import add_product, added, product

SCATTERED_PIECES = 4
"""More leave less of the last one to wait for, and make products of fewer rows. Four were 0.4 % faster than
two at 1.1B on two H200s."""
SMALLEST_PIECE = 2**23
"""Bytes of a piece of all ranks' rows, below which a collective takes its latency rather than its size."""


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Outputs split over ranks. Named as megatron's: by these names, measurements know linear maps."""

    def _forward_impl(
        self, input: Tensor, weight: torch.nn.Parameter, bias: Tensor | None = None, **options: Any
    ) -> Tensor:
        """What megatron's ``forward`` calls for the product."""
        deferred = options["grad_output_buffer"] is not None
        if not options["sequence_parallel"] or deferred or not weight.requires_grad:
            output: Tensor = super()._forward_impl(input, weight, bias=bias, **options)
            return output
        fused = self.gradient_accumulation_fusion
        overlapped: Tensor = _Column.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, fused, self.tp_group
        )
        return overlapped


class RowParallelLinear(tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """Inputs split over ranks."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, n] -> this rank's share of [s, b, m], and a bias, if adding it is left to the caller."""
        alone = self.tp_group.size() == 1 or self.explicit_expert_comm
        if not self.sequence_parallel or alone or not self.weight.requires_grad:
            plain: tuple[Tensor, Tensor | None] = super().forward(input_)
            return plain
        fused = self.gradient_accumulation_fusion
        output: Tensor = _Row.apply(input_, self.weight, fused, self.tp_group)  # type: ignore[no-untyped-call]
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None


class _Column(torch.autograd.Function):
    """A share of x [s, b, n] -> x W^T + bias [s, b, m] of all positions."""

    @staticmethod
    def forward(
        ctx: Any, share_sbn: Tensor, weight_mn: Tensor, bias_m: Tensor | None, fused: bool, group: Group
    ) -> Tensor:
        ctx.save_for_backward(share_sbn, weight_mn)
        ctx.fused, ctx.group, ctx.biased = fused, group, bias_m is not None
        share_tn = share_sbn.flatten(0, 1).contiguous()
        output_tm = share_tn.new_empty(group.size() * len(share_tn), len(weight_mn))
        for rows, x_tn in _arriving(share_tn, group):
            torch.mm(x_tn, weight_mn.t(), out=output_tm[rows])
        if bias_m is not None:
            output_tm += bias_m
        return output_tm.view(-1, *share_sbn.shape[1:-1], len(weight_mn))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        share_sbn, weight_mn = ctx.saved_tensors
        share_tn, grad_tm = share_sbn.flatten(0, 1).contiguous(), grads[0].flatten(0, 1).contiguous()
        x_tn = _gathered_buffer(share_tn, ctx.group)
        gathering = dist.all_gather_into_tensor(x_tn, share_tn, group=ctx.group, async_op=True)
        partial_tn = torch.mm(grad_tm, weight_mn)
        gathering.wait()
        grad_share_tn = torch.empty_like(share_tn)
        scattering = dist.reduce_scatter_tensor(grad_share_tn, partial_tn, group=ctx.group, async_op=True)
        of_weight = _WeightGradient(weight_mn, ctx.fused)
        of_weight.add(grad_tm, x_tn)
        of_bias = grad_tm.sum(0) if ctx.biased else None
        scattering.wait()
        return grad_share_tn.view_as(share_sbn), of_weight.result(), of_bias, None, None


class _Row(torch.autograd.Function):
    """x [s, b, n] of all positions -> a share of the sum over ranks of x W^T, [s, b, m]."""

    @staticmethod
    def forward(ctx: Any, x_sbn: Tensor, weight_mn: Tensor, fused: bool, group: Group) -> Tensor:
        ctx.save_for_backward(x_sbn, weight_mn)
        ctx.fused, ctx.group = fused, group
        size = group.size()
        assert len(x_sbn) % size == 0, "sequence parallelism splits positions evenly"
        x_rtn = x_sbn.flatten(0, 1).unflatten(0, (size, -1))  # r: the rank that gets the rows
        share_tm = x_rtn.new_empty(x_rtn.shape[1], len(weight_mn))
        under_way = []
        for piece in _pieces(share_tm, size, SCATTERED_PIECES):
            partial_rtm = share_tm.new_empty(size, *share_tm[piece].shape)
            for x_tn, partial_tm in zip(x_rtn[:, piece], partial_rtm, strict=True):
                torch.mm(x_tn, weight_mn.t(), out=partial_tm)
            work = dist.reduce_scatter_tensor(
                share_tm[piece], partial_rtm.flatten(0, 1), group=group, async_op=True
            )
            under_way.append((work, partial_rtm))  # which lives until the collective has read it
        for work, _ in under_way:
            work.wait()
        output_sbm: Tensor = share_tm.view(-1, *x_sbn.shape[1:-1], len(weight_mn))
        return output_sbm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_sbn, weight_mn = ctx.saved_tensors
        x_tn = x_sbn.flatten(0, 1)
        grad_x_tn = torch.empty_like(x_tn, memory_format=torch.contiguous_format)
        of_weight = _WeightGradient(weight_mn, ctx.fused)
        # The own rows' share of the weight's gradient too is made while the others come.
        for rows, grad_tm in _arriving(grads[0].flatten(0, 1).contiguous(), ctx.group):
            torch.mm(grad_tm, weight_mn, out=grad_x_tn[rows])
            of_weight.add(grad_tm, x_tn[rows])
        return grad_x_tn.view(x_sbn.shape), of_weight.result(), None, None


def _arriving(share_tn: Tensor, group: Group) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all ranks, and where they stand among all, as they come: this rank's own at once. They are to
    be used before the next are asked for, on the current stream.

    Two ranks exchange theirs whole, beside the product of the own half. With more ranks the own rows are a
    smaller part of the product; then the others come in pieces, each beside the product of the one before.
    """
    size, rank, count = group.size(), group.rank(), len(share_tn)
    whole = _gathered_buffer(share_tn, group)

    def start(piece: slice) -> tuple[Any, Tensor]:
        # Of a piece the rows of all ranks lie together.
        target = whole[size * piece.start : size * piece.stop]
        work = dist.all_gather_into_tensor(target, share_tn[piece], group=group, async_op=True)
        return work, target.unflatten(0, (size, -1))

    pieces = _pieces(share_tn, size, size // 2)
    work, came_rtn = start(pieces[0])
    yield slice(rank * count, (rank + 1) * count), share_tn
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        # Not earlier: on a card with one queue, products launched after it would wait for the piece before.
        later = start(following) if following is not None else None
        work.wait()
        for other in range(size):
            if other != rank:
                first = other * count
                yield slice(first + piece.start, first + piece.stop), came_rtn[other]
        if later is not None:
            work, came_rtn = later


def _gathered_buffer(share_tn: Tensor, group: Group) -> Tensor:
    """megatron's own, for the rows of all ranks. Its next user waits for what the stream was given before."""
    shape = [group.size() * len(share_tn), share_tn.shape[1]]
    buffer: Tensor = parallel_state.get_global_memory_buffer().get_tensor(shape, share_tn.dtype, "mpu")
    return buffer


def _pieces(share_tn: Tensor, ranks: int, most: int) -> list[slice]:
    """The rows of each rank's share, in as many pieces of about one size as are worth a collective each."""
    rows, nbytes = len(share_tn), ranks * share_tn.numel() * share_tn.element_size()
    count = max(1, min(most, rows, nbytes // SMALLEST_PIECE))
    return [slice(*edges) for edges in pairwise(rows * i // count for i in range(count + 1))]


class _WeightGradient:
    """The gradient of a weight [m, n], added up over rows in float32.

    Args:
        fused: it is added to megatron's buffer of the weight.
    """

    def __init__(self, weight_mn: Tensor, fused: bool) -> None:
        self._weight = weight_mn
        self._fused = fused
        self._total_mn: Tensor | None = None

    def add(self, grad_tm: Tensor, x_tn: Tensor) -> None:
        if self._fused:
            # The product that megatron itself calls: Apex's, or ours in its place.
            total_mn = self._weight.main_grad  # type: ignore[attr-defined]
            layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x_tn, grad_tm, total_mn)
        elif self._total_mn is None:
            wide = torch.promote_types(grad_tm.dtype, torch.float32)
            self._total_mn = product(grad_tm.t(), x_tn, wide)
        else:
            add_product(self._total_mn, grad_tm.t(), x_tn)

    def result(self) -> Tensor:
        """What autograd takes for it."""
        if self._fused:
            return added(self._weight)  # type: ignore[arg-type]
        assert self._total_mn is not None
        return self._total_mn.to(self._weight.dtype)
