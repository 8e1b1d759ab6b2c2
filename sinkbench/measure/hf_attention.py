"""Watches the attention of a transformers model, and changes what its queries see.

Families that go through transformers' attention interface (nearly all) are given an attention function
and a mask function of ours, so that one place sees every family's queries, keys, values and masks.
BLOOM and Falcon, which do not, are read by hooks on their attention modules, our exports by ``hf_export``.

Shapes: b sequence, h head, g kv head, s position, q query, k key, d head size.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import and_masks, causal_mask_function, eager_mask

from sinkbench.api import BLOCK_ELEMENTS, AttentionSpec, Softmax
from sinkbench.attention import importance
from sinkbench.attention.importance import WeightSums
from sinkbench.attention.reference import Problem
from sinkbench.errors import DataError
from sinkbench.measure.hf_export import ExportedCall, is_export, watching_export

NAME = "sinkbench"
"""Of our attention and mask functions in transformers' registries."""

Mask: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(sequence, head, query, key), int64 and broadcastable -> bool: may it be seen."""

Visible: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(query, key), int64 and broadcastable -> bool: may it still be seen."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The attention of one layer on one batch.

    Attributes:
        query_bhsd, key_bgsd, value_bgsd: after rotary, in the model's dtype.
        scale: factor on q.k.
        softcap: c of c tanh(score / c), applied before the mask (Gemma 2).
        sink_logit_h: one more logit of every row, without a value (gpt-oss).
        bias_bhk: added to the scores (ALiBi), already scaled.
        mask: what a query may see.
        weights_bhqk: the weights as the model computed them, if it did.
        leading: positions before the first token.
    """

    query_bhsd: Tensor
    key_bgsd: Tensor
    value_bgsd: Tensor
    scale: float
    softcap: float | None = None
    sink_logit_h: Tensor | None = None
    bias_bhk: Tensor | None = None
    mask: Mask = causal_mask_function
    weights_bhqk: Tensor | None = None
    leading: int = 0

    def rows(self, start: int, end: int) -> Tensor:
        """Weights of the queries start .. end - 1, float32 [b, h, q, k]: those that the model computed,
        or computed now in float32."""
        if self.weights_bhqk is not None:
            return self.weights_bhqk[:, :, start:end].float()
        query_bhqd = self.query_bhsd[:, :, start:end].float()
        score_bhqk = _times_kv(query_bhqd, self.key_bgsd.float().transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            score_bhqk = (score_bhqk / self.softcap).tanh_() * self.softcap
        if self.bias_bhk is not None:
            score_bhqk = score_bhqk + self.bias_bhk.float()[:, :, None]
        score_bhqk.masked_fill_(~self._visible(start, end), float("-inf"))
        if self.sink_logit_h is None:
            return score_bhqk.softmax(-1)
        sink = self.sink_logit_h.float()[:, None, None].expand(*score_bhqk.shape[:-1], 1)
        return torch.cat([score_bhqk, sink], -1).softmax(-1)[..., :-1]

    def _visible(self, start: int, end: int) -> Tensor:
        batch, _, length, _ = self.query_bhsd.shape
        device = self.query_bhsd.device
        sequence = torch.arange(batch, device=device)[:, None, None, None]
        query = torch.arange(start, end, device=device)[None, None, :, None]
        key = torch.arange(length, device=device)[None, None, None, :]
        return self.mask(sequence, sequence.new_zeros(()), query, key)

    def slot(self) -> Tensor | None:
        """What the learned sink takes of every row, [b, h, q]: the rest to 1."""
        if self.sink_logit_h is None:
            return None
        return 1 - torch.cat([rows.sum(-1) for rows in self.blocks()], dim=-1)

    def sums(self) -> WeightSums | None:
        """Sums of the weights by a kernel that never holds them; None if it cannot compute this attention."""
        more = (self.softcap, self.bias_bhk, self.sink_logit_h, self.weights_bhqk)
        spec = AttentionSpec(rule=Softmax())
        heads, length, head_size = self.query_bhsd.shape[1:]
        causal = self.mask is causal_mask_function and all(other is None for other in more)
        if not causal or importance.missing(spec, head_size):
            return None
        position = torch.arange(length, device=self.query_bhsd.device)
        return WeightSums(
            Problem(
                spec=spec,
                query_bhqd=self.query_bhsd,
                key_bgkd=self.key_bgsd,
                value_bgkd=self.value_bgsd,
                position_q=position,
                position_k=position,
                aligned=True,
                scale=self.scale,
                heads=torch.arange(heads, device=position.device),
            )
        )

    def blocks(self) -> Iterator[Tensor]:
        """``rows`` of all queries, a few at a time."""
        batch, heads, length, _ = self.query_bhsd.shape
        step = max(1, BLOCK_ELEMENTS // (batch * heads * length))
        for start in range(0, length, step):
            yield self.rows(start, min(start + step, length))

    def output(self) -> Tensor:
        """A V, [b, s, h, d] in the values' dtype, without ever holding all of A."""
        plain = self.softcap is None and self.sink_logit_h is None and self.bias_bhk is None
        if plain and self.mask is causal_mask_function:
            output = F.scaled_dot_product_attention(
                self.query_bhsd,
                self.key_bgsd,
                self.value_bgsd,
                is_causal=True,
                scale=self.scale,
                enable_gqa=self.query_bhsd.shape[1] != self.key_bgsd.shape[1],
            )
        else:
            value = self.value_bgsd
            output = torch.cat([_times_kv(rows.to(value.dtype), value) for rows in self.blocks()], dim=2)
        return output.transpose(1, 2).contiguous()


def _times_kv(left_bhqx: Tensor, right_bgxy: Tensor) -> Tensor:
    """Matrix product of every head with its kv head, [b, h, q, y]."""
    grouped: Tensor = left_bhqx.unflatten(1, (right_bgxy.shape[1], -1))
    return (grouped @ right_bgxy.unsqueeze(2)).flatten(1, 2)


@dataclass
class Watch:
    """What a forward pass shall do besides.

    Attributes:
        streaming: never hold a layer's whole attention weights.
        visible: a restriction of what queries see.
        calls: the attention calls since the list was last emptied.
    """

    streaming: bool = False
    visible: Visible | None = None
    keep: bool = True
    fused: bool = False
    calls: list[AttentionCall | ExportedCall] = field(default_factory=list)

    def restricted(self, mask: Mask) -> Mask:
        visible = self.visible
        if visible is None:
            return mask
        restricted: Mask = and_masks(mask, lambda sequence, head, query, key: visible(query, key))
        return restricted


_WATCH: ContextVar[Watch] = ContextVar("sinkbench_watch")


class _LazyMask(Tensor):
    """Goes through a model in the place of its [b, 1, q, k] mask, and only knows its rule."""

    rule: Mask


@contextmanager
def watching(model: PreTrainedModel, watch: Watch) -> Iterator[None]:
    """Within the block, forward passes of the model, loaded with eager attention, follow ``watch``.

    Raises:
        DataError: on a forward pass, if the model's attention cannot be read.
    """
    if is_export(model):
        with watching_export(model, watch):
            yield
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    modules: list[Any] = [*model.modules()]
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    fused = [m for m in modules if type(m).__name__ in FUSED]
    watch.fused = bool(fused)
    with ExitStack() as stack:
        for module in fused:
            stack.enter_context(_hooked(module, watch))
        for config in configs:
            config._attn_implementation = NAME
        token = _WATCH.set(watch)
        try:
            yield
        finally:
            _WATCH.reset(token)
            for config, implementation in before:
                config._attn_implementation = implementation


def _mask(**arguments: Any) -> Tensor:
    """Stands for transformers.masking_utils.eager_mask."""
    watch = _WATCH.get()
    rule = watch.restricted(arguments.pop("mask_function", causal_mask_function))
    if watch.streaming and not watch.fused:
        mask = torch.empty(0).as_subclass(_LazyMask)
        mask.rule = rule
        return mask
    whole: Tensor = eager_mask(mask_function=rule, **arguments)
    return whole


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stands for the eager_attention_forward of the model's family."""
    watch = _WATCH.get()
    scale = arguments.get("scaling")
    call = {
        "query_bhsd": query,
        "key_bgsd": key,
        "value_bgsd": value,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": arguments.get("softcap"),
        "sink_logit_h": arguments.get("s_aux"),
    }
    if not watch.streaming:
        output, weights = _eager(module)(module, query, key, value, attention_mask, **arguments)
        if watch.keep:
            watch.calls.append(AttentionCall(**call, weights_bhqk=weights))
        return output, weights
    if not isinstance(attention_mask, _LazyMask):
        remedy = "measure lengths at which weights are kept whole"
        raise DataError(type(module).__name__, "makes a mask of its own", remedy)
    streamed = AttentionCall(**call, mask=attention_mask.rule)
    if watch.keep:
        watch.calls.append(streamed)
    return streamed.output(), None


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The family's own attention in plain torch."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise DataError(
            type(module).__name__, "has no eager attention that gives its weights", "measure another model"
        )
    eager: Callable[..., tuple[Tensor, Tensor]] = function
    return eager


# --- families outside the attention interface -----------------------------------------------------

Arguments: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How an attention module with a fused projection ``query_key_value`` is read.

    Attributes:
        fields: (module, output of the projection, arguments of its forward) -> those of AttentionCall.
        corrected: arguments as the family's fused kernels understand them.
    """

    fields: Callable[[Any, Tensor, Arguments], Arguments]
    corrected: Callable[[Arguments], Arguments] = lambda arguments: arguments


def _bloom(module: Any, fused: Tensor, arguments: Arguments) -> Arguments:
    query, key, value = module._reshape(fused)
    batch, heads, length, _ = query.shape
    return {
        "query_bhsd": query,
        "key_bgsd": key,
        "value_bgsd": value,
        "scale": module.inv_norm_factor,
        "bias_bhk": module.beta * arguments["alibi"].view(batch, heads, length),
    }


def _falcon(module: Any, fused: Tensor, arguments: Arguments) -> Arguments:
    query, key, value = (x.transpose(1, 2) for x in module._split_heads(fused))
    batch, heads, length, _ = query.shape
    bias = None
    if arguments["alibi"] is None:
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *arguments["position_embeddings"])
    elif _holds_alibi(arguments["attention_mask"], heads):
        # of the last query, which sees all keys
        bias = arguments["attention_mask"][:, :, -1]
    else:
        bias = arguments["alibi"].view(batch, heads, length) * module.inv_norm_factor
    # the new architecture repeats keys and values for every head
    copies = key.shape[1] // module.num_kv_heads
    return {
        "query_bhsd": query,
        "key_bgsd": key[:, ::copies],
        "value_bgsd": value[:, ::copies],
        "scale": module.inv_norm_factor,
        "bias_bhk": bias,
    }


def _holds_alibi(mask: Tensor, heads: int) -> bool:
    return mask.dim() == 4 and mask.shape[1] == heads > 1


def _falcon_corrected(arguments: Arguments) -> Arguments:
    """transformers 5 puts the bias into the mask, and its eager attention then adds it once more."""
    alibi = arguments["alibi"]
    if alibi is None or not _holds_alibi(arguments["attention_mask"], alibi.shape[1]):
        return arguments
    return arguments | {"alibi": torch.zeros_like(alibi)}


FUSED = {"BloomAttention": Family(_bloom), "FalconAttention": Family(_falcon, _falcon_corrected)}
"""By the class of the attention module."""


@contextmanager
def _hooked(module: Any, watch: Watch) -> Iterator[None]:
    """Appends a call at every forward pass of an attention module with a fused projection."""
    signature = inspect.signature(type(module).forward)
    family = FUSED[type(module).__name__]
    projected: list[Tensor] = []

    def before(_: Any, args: Any, kwargs: Arguments) -> tuple[tuple[()], Arguments]:
        bound = signature.bind(module, *args, **kwargs).arguments
        arguments = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
        return (), family.corrected(arguments | bound.get("kwargs", {}))

    def after(_: Any, args: Any, arguments: Arguments, output: tuple[Tensor, Tensor]) -> None:
        fused = projected.pop()
        if not watch.keep:
            return
        weights = None if watch.streaming else output[1]
        mask = watch.restricted(causal_mask_function)
        fields = family.fields(module, fused, arguments)
        watch.calls.append(AttentionCall(**fields, mask=mask, weights_bhqk=weights))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.query_key_value.register_forward_hook(lambda _, args, output: projected.append(output)),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
