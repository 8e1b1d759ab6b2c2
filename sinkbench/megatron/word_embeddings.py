"""The table of token embeddings, split over tensor-parallel ranks by rows.

megatron's looks up [b, s, n] and copies it into [s, b, n], and torch makes a gradient of the whole table for
every micro-batch. Here rows come in the order that is wanted, and their gradients are added to megatron's
float32 sums one by one.

Shapes: b sequence, s position, n hidden size, t token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from sinkbench.attention import fused
from sinkbench.megatron.weight_gradients import added


class WordEmbeddings(VocabParallelEmbedding):  # type: ignore[misc]
    """
    Args:
        adds_gradients: the table's gradient goes to its ``main_grad``, without a deterministic order. Not for
            a table that is the output projection too, whose gradient autograd adds up.
    """

    def __init__(self, *args: Any, adds_gradients: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._adds_gradients = adds_gradients

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """[s, b, n], under sequence parallelism this rank's share of s."""
        rows_sb = tokens_bs.t()
        outside_sb = None
        if self.tp_group.size() > 1:
            rows_sb = rows_sb - self.vocab_start_index
            outside_sb = _outside(rows_sb, self.weight)
        words = self._look_up(rows_sb, outside_sb)
        if self.reduce_scatter_embeddings:
            shared: Tensor = reduce_scatter_to_sequence_parallel_region(words, group=self.tp_group)
            return shared
        whole: Tensor = reduce_from_tensor_model_parallel_region(words, group=self.tp_group)
        return whole

    def _look_up(self, rows_sb: Tensor, outside_sb: Tensor | None) -> Tensor:
        """Zero for rows of other ranks, which are ``outside`` of the table."""
        if self._adds_gradients and hasattr(self.weight, "main_grad"):
            words: Tensor = _LookUp.apply(rows_sb, outside_sb, self.weight)  # type: ignore[no-untyped-call]
            return words
        return _words(rows_sb, outside_sb, self.weight, ordered=self.deterministic_mode)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, outside: Tensor | None, weight: torch.nn.Parameter) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight = weight  # not a copy: the gradient is added to what it carries
        return _words(rows, outside, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        (rows,), (grad,) = ctx.saved_tensors, grads
        add_rows(ctx.weight.main_grad, rows.reshape(-1), grad.reshape(-1, grad.shape[-1]))
        return None, None, added(ctx.weight)


def _words(rows: Tensor, outside: Tensor | None, weight: Tensor, *, ordered: bool = False) -> Tensor:
    """
    Args:
        ordered: the gradient's sums have an order, which torch's embedding does not give them.
    """
    if outside is not None:
        rows = rows.masked_fill(outside, 0)
    words = weight[rows] if ordered else F.embedding(rows, weight)
    return words if outside is None else words.masked_fill(outside[..., None], 0.0)


def _outside(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows < 0) | (rows >= weight.shape[0])


def add_rows(total_vn: Tensor, rows_t: Tensor, gradient_tn: Tensor) -> None:
    """Adds each gradient to its row of the total; there is none for a row outside of it."""
    if total_vn.is_cuda and total_vn.dtype == torch.float32 and fused.is_installed():
        from sinkbench.megatron import triton_embedding

        triton_embedding.add_rows(total_vn, rows_t, gradient_tn)
        return
    outside = _outside(rows_t, total_vn)
    gradient_tn = gradient_tn.masked_fill(outside[:, None], 0.0).to(total_vn.dtype)
    total_vn.index_add_(0, rows_t.masked_fill(outside, 0), gradient_tn)
