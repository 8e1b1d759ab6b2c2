"""Softmax attention with more terms in its sum, by kernels that compute the plain softmax.

    S_ij = scale q_i.k_j,  L = log sum_j exp S,  O = sum_j exp(S - L) v_j,  from the kernel
    s = scale q.k*, value v*: an extra slot;  z, without a value: a sink logit
    L' = log(exp L + exp s + exp z),  R = exp(L - L') O + exp(s - L') v*

The gradient of a softmax is dS_ij = A_ij (dR.v_j - dR.R) with A = exp(S - L'), whatever terms there are
beside the keys. A kernel's backward pass computes just this from the output and the log-sum-exp that it is
handed, so that it is handed R and L', and what is left is the gradient of the other terms:

    ds = exp(s - L') (dR.v* - dR.R),  dz = -exp(z - L') dR.R
    dq += scale ds k*,  dk* = scale sum ds q,  dv* = sum exp(s - L') dR

The first positions, where they see one another, are an attention of their own. It replaces the causal one in
their rows of R and L', and in the backward pass of that one an L' beyond all scores leaves them no weight.

Shapes: b sequence of the batch, h head, g kv head, q query, k key, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BEYOND_ALL_SCORES = 1e30
"""exp(S - this) is zero."""

Terms = tuple[Tensor | None, Tensor | None, Tensor | None]
"""k*, v* and z, as in ``More``."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Attributes:
    scale: factor on q.k.
    causal: over the keys up to the query rather than all.
    window: with ``causal``: over this many newest of them.
    """

    scale: float
    causal: bool = True
    window: int | None = None


class Kernel(Protocol):
    """A plain softmax over as many keys as queries, with as many query heads for each kv head."""

    def forward(
        self, query_bhqd: Tensor, key_bgkd: Tensor, value_bgkd: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Any]:
        """O [b, h, q, d] and L [b, h, q], float32 or float64, in memory of their own, and what ``backward``
        wants to see again."""

    def backward(
        self,
        grad_bhqd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        output_bhqd: Tensor,
        lse_bhq: Tensor,
        state: Any,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, in memory of their own."""


@dataclass(frozen=True, kw_only=True)
class More:
    """Terms beside the keys.

    Attributes:
        slot_key, slot_value: [h, d]; a value of None is zero.
        sink_logit: [h].
    """

    slot_key: Tensor | None = None
    slot_value: Tensor | None = None
    sink_logit: Tensor | None = None


def softmax(
    kernel: Kernel,
    query_bhqd: Tensor,
    key_bgkd: Tensor,
    value_bgkd: Tensor,
    scores: Scores,
    more: More,
    prefix: int = 0,
) -> Tensor:
    """R [b, h, q, d], as many keys as queries.

    Args:
        prefix: without a window: the first so many positions see one another.
    """
    if prefix >= query_bhqd.shape[2]:
        scores, prefix = replace(scores, causal=False), 0
    terms = (more.slot_key, more.slot_value, more.sink_logit)
    # One position sees itself in any case.
    call = (kernel, scores, prefix if prefix > 1 else 0)
    result: Tensor = _Softmax.apply(query_bhqd, key_bgkd, value_bgkd, *terms, *call)  # type: ignore[no-untyped-call]
    return result


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slot_key: Tensor | None,
        slot_value: Tensor | None,
        sink_logit: Tensor | None,
        kernel: Kernel,
        scores: Scores,
        prefix: int,
    ) -> Tensor:
        inputs = (query, key, value)
        output, lse, *states = kernel.forward(*inputs, scores)
        if prefix:
            within, within_lse, state = kernel.forward(*_first(inputs, prefix), replace(scores, causal=False))
            output[:, :, :prefix] = within
            lse[:, :, :prefix] = within_lse
            states.append(state)
        if slot_key is not None or sink_logit is not None:
            lse = _join(output, lse, query, (slot_key, slot_value, sink_logit), scores.scale)
        ctx.save_for_backward(*inputs, output, lse, slot_key, slot_value, sink_logit)
        ctx.kernel, ctx.scores, ctx.prefix, ctx.states = kernel, scores, prefix, states
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, *terms = ctx.saved_tensors
        grads = list(_backward(ctx, grad, (query, key, value), output, lse))
        of_terms: Gradients = (None, None, None)
        if any(ctx.needs_input_grad[3:6]) or terms[0] is not None:
            of_terms = _gradients(grad, output, lse, query, grads[0], tuple(terms), ctx.scores.scale)
        return (*grads, *of_terms, None, None, None)


def _backward(
    ctx: Any, grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, but for what goes through an extra slot."""
    kernel, scores, prefix = ctx.kernel, ctx.scores, ctx.prefix
    if not prefix:
        grads: tuple[Tensor, Tensor, Tensor] = kernel.backward(
            grad, inputs, output, lse, ctx.states[0], scores
        )
        return grads
    rest = lse.clone()
    rest[:, :, :prefix].fill_(BEYOND_ALL_SCORES)
    grads = kernel.backward(grad, inputs, output, rest, ctx.states[0], scores)
    grad, output, lse = _first((grad, output, lse), prefix)
    scores = replace(scores, causal=False)
    within = kernel.backward(grad, _first(inputs, prefix), output, lse.contiguous(), ctx.states[1], scores)
    grads[0][:, :, :prefix] = within[0]
    for whole, part in zip(grads[1:], within[1:], strict=True):
        whole[:, :, :prefix] += part
    return grads


def _first(tensors: tuple[Tensor, Tensor, Tensor], prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (x[:, :, :prefix] for x in tensors)
    return first, second, third


class Weighed(NamedTuple):
    """L', and the weights of O and of v* in R, all [b, h, q]; None without a slot."""

    total: Tensor
    kept: Tensor
    slot: Tensor | None


def weigh(
    lse_bhq: Tensor,
    query_bhqd: Tensor,
    slot_key_hd: Tensor | None,
    sink_logit_h: Tensor | None,
    scale: float,
) -> Weighed:
    """The first of the two steps to R, along the rows."""
    total, score, slot = lse_bhq, None, None
    if slot_key_hd is not None:
        score = _score_of_slot(query_bhqd, slot_key_hd, total.dtype) * scale
        total = torch.logaddexp(total, score)
    if sink_logit_h is not None:
        total = torch.logaddexp(total, sink_logit_h[:, None].to(total.dtype))
    if score is not None:
        slot = (score - total).exp()
    return Weighed(total, (lse_bhq - total).exp(), slot)


def _score_of_slot(query_bhqd: Tensor, slot_key_hd: Tensor, dtype: torch.dtype) -> Tensor:
    return (query_bhqd.to(dtype) * slot_key_hd[:, None].to(dtype)).sum(-1)


def mix(
    output_bhqd: Tensor, kept_bhq: Tensor, slot_bhq: Tensor | None, slot_value_hd: Tensor | None
) -> Tensor:
    """R [b, h, q, d] from O."""
    result = kept_bhq[..., None] * output_bhqd
    if slot_bhq is not None and slot_value_hd is not None:
        result = result + slot_bhq[..., None] * slot_value_hd[:, None]
    return result.to(output_bhqd.dtype)


def _join(output: Tensor, lse: Tensor, query: Tensor, terms: Terms, scale: float) -> Tensor:
    """L'; the output becomes R."""
    if output.is_cuda:
        from sinkbench.attention import triton_terms

        return triton_terms.join(output, lse, query, terms, scale)
    slot_key, slot_value, sink_logit = terms
    weighed = weigh(lse, query, slot_key, sink_logit, scale)
    output.copy_(mix(output, weighed.kept, weighed.slot, slot_value))
    return weighed.total


def _gradients(
    grad: Tensor,
    output: Tensor,
    total: Tensor,
    query: Tensor,
    grad_query: Tensor,
    terms: Terms,
    scale: float,
) -> Gradients:
    """dk*, dv* and dz; what the slot's key adds to dq is added in place."""
    if output.is_cuda:
        from sinkbench.attention import triton_terms

        return triton_terms.gradients(grad, output, total, query, grad_query, terms, scale)
    slot_key, slot_value, sink_logit = terms
    wide = grad.to(total.dtype)
    mean = (wide * output).sum(-1)
    of_key = of_value = of_sink = None
    if sink_logit is not None:
        weight = (sink_logit[:, None].to(total.dtype) - total).exp()
        of_sink = -(weight * mean).sum((0, 2)).to(sink_logit.dtype)
    if slot_key is not None:
        score = _score_of_slot(query, slot_key, total.dtype) * scale
        weight = (score - total).exp()
        direct = 0.0 if slot_value is None else (wide * slot_value[:, None]).sum(-1)
        change = (scale * weight * (direct - mean))[..., None]
        grad_query.copy_(grad_query + change * slot_key[:, None])
        of_key = (change * query).sum((0, 2)).to(slot_key.dtype)
        if slot_value is not None:
            of_value = (weight[..., None] * wide).sum((0, 2)).to(slot_value.dtype)
    return of_key, of_value, of_sink


def fused(function: _Function, like: Tensor) -> _Function:
    """The function; on a card compiled. What goes along the rows and what goes along their elements are
    functions of their own, as the compiler would else compute the row's part for each element."""
    return _compiled(function) if like.is_cuda else function


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
