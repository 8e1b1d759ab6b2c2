"""Watches attention modules that go around transformers' attention interface, and project queries, keys and
values at once: those of BLOOM and Falcon.

Short sequences go through the family's own attention, which hooks read. In long ones our attention takes the
place of it, since theirs holds all scores of a layer, [b, h, q, k], several times. In transformers 4 these
families build masks of their own, Falcon's with ALiBi in them; it is refused.

Shapes: b sequence, h head, g kv head, s position, q query, k key, d head size.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from sinkbench.errors import DataError
from sinkbench.measure.hf_call import AttentionCall, Watch

Arguments: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How an attention module with a fused projection ``query_key_value`` is read.

    Attributes:
        fields: (module, output of the projection, arguments of its forward) -> those of AttentionCall.
        corrected: arguments as the family's fused kernels understand them.
        adds_residual: its output is added to the residual stream within.
    """

    fields: Callable[[Any, Tensor, Arguments], Arguments]
    corrected: Callable[[Arguments], Arguments] = lambda arguments: arguments
    adds_residual: bool = False


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


FUSED = {
    "BloomAttention": Family(_bloom, adds_residual=True),
    "FalconAttention": Family(_falcon, _falcon_corrected),
}
"""By the class of the attention module."""


@contextmanager
def watching_fused(module: Any, watch: Watch) -> Iterator[None]:
    """Within the block, an attention module with a fused projection follows ``watch``.

    Raises:
        DataError: transformers is older than 5.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        problem = f"cannot be read with transformers {transformers.__version__}"
        raise DataError(type(module).__name__, problem, "install transformers 5 or later")
    family = FUSED[type(module).__name__]
    with (_replaced if watch.streaming else _hooked)(module, family, watch):
        yield


@contextmanager
def _replaced(module: Any, family: Family, watch: Watch) -> Iterator[None]:
    """The family's projections around our attention."""

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        arguments = _by_name(module, args, kwargs)
        fused = module.query_key_value(arguments["hidden_states"])
        mask = watch.restricted(causal_mask_function)
        call = AttentionCall(**family.fields(module, fused, arguments), mask=mask)
        if watch.keep:
            watch.calls.append(call)
        output = module.dense(call.output().flatten(2))
        return output + arguments["residual"] if family.adds_residual else output, None

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _by_name(module: Any, args: Any, kwargs: Arguments) -> Arguments:
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    arguments: Arguments = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
    arguments |= bound.get("kwargs", {})
    return arguments


@contextmanager
def _hooked(module: Any, family: Family, watch: Watch) -> Iterator[None]:
    """The family's own attention, which is corrected and read."""
    projected: list[Tensor] = []

    def before(_: Any, args: Any, kwargs: Arguments) -> tuple[tuple[()], Arguments]:
        return (), family.corrected(_by_name(module, args, kwargs))

    def after(_: Any, args: Any, arguments: Arguments, output: tuple[Tensor, Tensor]) -> None:
        fused = projected.pop()
        if not watch.keep:
            return
        mask = watch.restricted(causal_mask_function)
        fields = family.fields(module, fused, arguments)
        watch.calls.append(AttentionCall(**fields, mask=mask, weights_bhqk=output[1]))

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
