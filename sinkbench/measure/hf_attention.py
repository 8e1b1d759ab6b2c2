"""Watches the attention of a transformers model, and changes what its queries see.

Families that go through transformers' attention interface (nearly all) are given an attention function
and a mask function of ours, so that one place sees every family's queries, keys, values and masks.
BLOOM and Falcon, which do not, are watched by ``hf_fused``, our exports by ``hf_export``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, eager_mask

from sinkbench.errors import DataError
from sinkbench.measure.hf_call import AttentionCall, Mask, Watch
from sinkbench.measure.hf_export import is_export, watching_export
from sinkbench.measure.hf_fused import FUSED, watching_fused

NAME = "sinkbench"
"""Of our attention and mask functions in transformers' registries."""

NOT_WATCHED = (
    "no attention of it goes through transformers' attention interface, so that none can be read",
    "measure a model of another family",
)

_WATCH: ContextVar[Watch] = ContextVar("sinkbench_watch")


class _LazyMask(Tensor):
    """Goes through a model in the place of its [b, 1, q, k] mask, and only knows its rule."""

    rule: Mask


def is_watched(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through transformers' interface, or is watched in another way."""
    fused = any(type(module).__name__ in FUSED for module in model.modules())
    return bool(model._supports_attention_backend) or fused or is_export(model)


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
    with ExitStack() as stack:
        for module in fused:
            stack.enter_context(watching_fused(module, watch))
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
    watch.masked = True
    rule = watch.restricted(arguments.pop("mask_function", causal_mask_function))
    if watch.streaming:
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
    if not watch.masked and (watch.streaming or watch.visible is not None):
        remedy = (
            "install transformers 5 or later, or keep to metrics of whole weights, without further passes"
        )
        raise DataError(type(module).__name__, "makes a mask of its own", remedy)
    if not watch.streaming:
        output, weights = _eager(module)(module, query, key, value, attention_mask, **arguments)
        if watch.keep:
            watch.calls.append(AttentionCall(**call, weights_bhqk=weights))
        return output, weights
    rule = getattr(attention_mask, "rule", None)
    if rule is None:  # a result of torch's functions on our mask
        problem = "works on its mask, which is not built in long sequences"
        raise DataError(type(module).__name__, problem, "give --attention whole, or measure another model")
    streamed = AttentionCall(**call, mask=rule)
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
