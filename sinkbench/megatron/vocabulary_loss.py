"""Cross entropy over the vocabulary from hidden states, without the logits of all tokens at once.

Tokens go in parts. Of each part come the logits, the loss and the gradient of the logits, and from that at
once the part's gradient of the hidden states and its share of that of the weight: nothing of the size
[tokens, vocabulary] is ever held, and nothing is computed twice. With z = W h, L = log sum exp z and a factor
f for each token (its weight in the loss),

    loss = f (L - z_target + zeta L^2)        dloss/dz_v = f (softmax(z)_v (1 + 2 zeta L) - [v = target])

Under tensor parallelism each rank has rows of W; L and z_target come together from one all-gather a part.
Products are in the model's dtype, everything between them in float32 (float64 for float64), and the weight's
gradient adds up in float32.

Shapes: t token, n hidden size, v vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from sinkbench.attention import fused
from sinkbench.megatron.fusions import compiled
from sinkbench.megatron.sequence import Group
from sinkbench.megatron.weight_gradients import accumulate, add_product, product

PART_BYTES = 2**30
"""Of the logits held at once. At a vocabulary of 50,432 in bf16 that is 8,192 tokens, enough for a product
at full speed and little beside the model."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the loss of one output layer is computed.

    Attributes:
        group: tensor-parallel ranks, each with as many rows of the weight.
        z_loss: zeta.
        sequence_parallel: hidden states come as this rank's share of the positions.
        weight: whose buffer the gradient is added to; None: autograd gets it.
    """

    group: Group
    z_loss: float = 0.0
    sequence_parallel: bool = False
    weight: torch.nn.Parameter | None = None


def token_losses(
    hidden_sbn: Tensor, weight_vn: Tensor, targets_bs: Tensor, factors_bs: Tensor, setting: Setting
) -> Tensor:
    """The loss of each token times its factor, float32 [b, s], with gradients for hidden states and weight.

    What is made of it must be differentiated through its sum (times anything): the gradients are there
    before their own factor is known, which therefore has to be one for all tokens.

    Args:
        hidden_sbn: normed; under sequence parallelism this rank's share of s.
        weight_vn: this rank's rows of the output weight.
        targets_bs, factors_bs: of all s positions. A target outside the vocabulary has the logit 0.
    """
    if setting.sequence_parallel:
        hidden_sbn = tensor_parallel.gather_from_sequence_parallel_region(hidden_sbn, group=setting.group)
    elif setting.group.size() > 1:
        hidden_sbn = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_sbn, group=setting.group)
    s, b, n = hidden_sbn.shape
    losses_t: Tensor = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]
        hidden_sbn.reshape(s * b, n),
        weight_vn,
        targets_bs.t().reshape(-1),
        factors_bs.t().reshape(-1),
        setting,
        torch.is_grad_enabled(),
    )
    return losses_t.view(s, b).t()


class _VocabularyLoss(torch.autograd.Function):
    """Losses [t]; the gradients are made by the forward pass and scaled by the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_tn: Tensor,
        weight_vn: Tensor,
        target_t: Tensor,
        factor_t: Tensor,
        setting: Setting,
        with_gradients: bool,
    ) -> Tensor:
        for_hidden, for_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        gradients = _Gradients(
            hidden=torch.empty_like(hidden_tn) if for_hidden else None, for_weight=for_weight
        )
        losses_t = factor_t.new_empty(len(hidden_tn), dtype=_wide(hidden_tn.dtype))
        first = setting.group.rank() * len(weight_vn)
        with_gradients = for_hidden or for_weight
        rows = part_size(len(hidden_tn), len(weight_vn) * hidden_tn.element_size(), PART_BYTES)
        for part in _parts(len(hidden_tn), rows):
            hidden, factor = hidden_tn[part], factor_t[part].to(losses_t.dtype)
            logits_tv = torch.mm(hidden, weight_vn.t())
            local_target = target_t[part] - first
            losses_t[part], grad_tv = _losses_and_gradient(
                logits_tv, local_target, factor, setting, with_gradients
            )
            if grad_tv is not None:
                gradients.add(part, grad_tv, hidden, weight_vn)
        ctx.gradients = gradients
        ctx.weight_dtype, ctx.weight = weight_vn.dtype, setting.weight
        return losses_t

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_t,) = grads
        if len(grad_t) > 1 and grad_t.stride() != (0,):
            raise RuntimeError("the losses of the fused vocabulary loss can be differentiated only as a sum")
        scale, made = grad_t[0], ctx.gradients
        ctx.gradients = None
        hidden = None if made.hidden is None else made.hidden.mul_(scale.to(made.hidden.dtype))
        weight = made.weight
        if weight is not None and ctx.weight is not None:
            weight = accumulate(ctx.weight, weight, scale)
        elif weight is not None:
            weight = weight.mul_(scale).to(ctx.weight_dtype)
        return hidden, weight, None, None, None, None


@dataclass(kw_only=True)
class _Gradients:
    """Those of the sum of the losses; None where there is none to make, and the weight's before its first
    part."""

    hidden: Tensor | None
    for_weight: bool
    weight: Tensor | None = None

    def add(self, part: slice, grad_tv: Tensor, hidden_tn: Tensor, weight_vn: Tensor) -> None:
        if self.hidden is not None:
            torch.mm(grad_tv, weight_vn, out=self.hidden[part])
        if self.weight is not None:
            add_product(self.weight, grad_tv.t(), hidden_tn)
        elif self.for_weight:
            self.weight = product(grad_tv.t(), hidden_tn, _wide(hidden_tn.dtype))


def part_size(tokens: int, bytes_per_token: int, part_bytes: int) -> int:
    """Tokens of one part: the largest power of two within the bytes, so that parts are alike in most
    batches and what is compiled for one serves all."""
    fitting = max(1, part_bytes // bytes_per_token)
    return min(tokens, 1 << (fitting.bit_length() - 1))


def _parts(tokens: int, rows: int) -> Iterator[slice]:
    for start in range(0, tokens, rows):
        yield slice(start, min(start + rows, tokens))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _losses_and_gradient(
    logits_tv: Tensor, local_target_t: Tensor, factor_t: Tensor, setting: Setting, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of a part, and the gradient of its logits in their dtype."""
    if setting.group.size() == 1 and with_gradient:
        # In one piece, so that the logits may be read from cache for the gradient.
        if logits_tv.is_cuda and fused.is_installed():
            from sinkbench.megatron import triton_vocabulary

            return triton_vocabulary.losses_and_gradient(logits_tv, local_target_t, factor_t, setting.z_loss)
        whole = _on_card(_alone, logits_tv)
        both: tuple[Tensor, Tensor] = whole(logits_tv, local_target_t, factor_t, setting.z_loss)
        return both
    partition_t, target_logit_t = _on_card(_statistics, logits_tv)(logits_tv, local_target_t)
    if setting.group.size() > 1:
        partition_t, target_logit_t = _over_ranks(partition_t, target_logit_t, setting.group)
    losses_t = _losses(partition_t, target_logit_t, factor_t, setting.z_loss)
    if not with_gradient:
        return losses_t, None
    gradient = _on_card(_gradient, logits_tv)
    return losses_t, gradient(logits_tv, partition_t, local_target_t, factor_t, setting.z_loss)


def _on_card(function: Callable[..., Any], example: Tensor) -> Callable[..., Any]:
    return compiled(function) if example.is_cuda else function


def _alone(logits_tv: Tensor, target_t: Tensor, factor_t: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    partition_t, target_logit_t = _statistics(logits_tv, target_t)
    losses_t = _losses(partition_t, target_logit_t, factor_t, z_loss)
    return losses_t, _gradient(logits_tv, partition_t, target_t, factor_t, z_loss)


def _statistics(logits_tv: Tensor, local_target_t: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp over this rank's vocabulary, and the target's logit, 0 if another rank has it."""
    size = logits_tv.shape[1]
    own = (local_target_t >= 0) & (local_target_t < size)
    found = logits_tv.gather(1, local_target_t.clamp(0, size - 1)[:, None])[:, 0]
    wide = logits_tv.to(_wide(logits_tv.dtype))
    return wide.logsumexp(1), torch.where(own, found.to(wide.dtype), 0.0)


def _over_ranks(partition_t: Tensor, target_logit_t: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The same over the whole vocabulary, alike on all ranks to the last bit."""
    own = torch.cat([partition_t, target_logit_t])
    gathered = own.new_empty(group.size() * len(own))
    dist.all_gather_into_tensor(gathered, own, group=group)
    partitions, target_logits = gathered.view(group.size(), 2, -1).unbind(1)
    return partitions.logsumexp(0), target_logits.sum(0)


def _losses(partition_t: Tensor, target_logit_t: Tensor, factor_t: Tensor, z_loss: float) -> Tensor:
    losses_t = partition_t - target_logit_t
    if z_loss:
        losses_t = losses_t + z_loss * partition_t.square()
    return losses_t * factor_t


def _gradient(
    logits_tv: Tensor, partition_t: Tensor, local_target_t: Tensor, factor_t: Tensor, z_loss: float
) -> Tensor:
    """Of the losses with respect to this rank's logits, in their dtype."""
    probability = torch.exp(logits_tv.to(partition_t.dtype) - partition_t[:, None])
    pull_t = factor_t * (1 + 2 * z_loss * partition_t) if z_loss else factor_t
    column_v = torch.arange(logits_tv.shape[1], device=logits_tv.device)
    at_target = column_v[None, :] == local_target_t[:, None]
    gradient = probability * pull_t[:, None] - torch.where(at_target, factor_t[:, None], 0.0)
    return gradient.to(logits_tv.dtype)
