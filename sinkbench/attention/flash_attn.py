"""Softmax attention by the packages of FlashAttention, for ``flash``: flash-attn-4, which ``auto`` takes
where it is installed, or flash-attn, whose kernels are those of torch and which is here to be asked for.

The functions below their public ones are called, as these take no output and log-sum-exp of a longer sum. All
of them have the length before the heads.

Shapes: b sequence of the batch, h head, g kv head, q query, k key, d head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec
from sinkbench.attention import gradient_room, sdpa
from sinkbench.attention.flash import Kernel, Scores
from sinkbench.attention.flash_torch import Inputs, laid_out
from sinkbench.attention.reference import Problem, scaled_and_biased
from sinkbench.packages import module_if_usable

FOUR, TWO = "flash_attn.cute.interface", "flash_attn.flash_attn_interface"


def missing(spec: AttentionSpec, head_size: int, *, half: bool) -> list[str]:
    """What a declaration asks for that neither package can do, or that there is none; empty if it can.

    Args:
        half: the inputs are bf16 or fp16.
    """
    lacks = {
        "float32 inputs": not half,
        f"a head size of {head_size}": head_size % 8 != 0 or head_size > 256,
    }
    found = [*sdpa.missing(spec), *(what for what, wanted in lacks.items() if wanted)]
    if not found and _kernel() is None:
        found.append("a softmax without the package flash-attn-4, for Hopper and later, or flash-attn")
    return found


def has_four() -> bool:
    """FlashAttention-4 is installed, and there is a card that it is for."""
    return _is_for_the_card() and _module(FOUR) is not None


def run(p: Problem) -> Tensor:
    """O [b, h, q, d]. As in sdpa, a score bias only counts against a sink."""
    kernel = _kernel()
    assert kernel is not None
    return scaled_and_biased(p, sdpa.through(kernel, p))


def _kernel() -> Kernel | None:
    if has_four():
        return _Four(_module(FOUR))
    two = _module(TWO)
    return None if two is None else _Two(two)


@cache
def _module(name: str) -> Any:
    return module_if_usable(name)


@cache
def _is_for_the_card() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


class _Four:
    """Of one version after another, so that what is returned beside the first two is not counted on."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, None]:
        query, key, value = _length_first(query, key, value)
        output, lse, *_ = self.module._flash_attn_fwd(
            *(query, key, value), out=torch.empty_like(query), return_lse=True, **_options(scores, None)
        )
        return output.transpose(1, 2), lse, None

    def backward(
        self, grad: Tensor, inputs: Inputs, output: Tensor, lse: Tensor, state: None, scores: Scores
    ) -> Inputs:
        room = gradient_room.take(*inputs[1:])
        of_key, of_value = (None, None) if room is None else _length_first(*room)
        query, key, value = self.module._flash_attn_bwd(
            *_length_first(*inputs, output, laid_out(grad, output)),
            lse.contiguous(),
            dk=of_key,
            dv=of_value,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_options(scores, None),
        )
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _Two:
    def __init__(self, module: Any) -> None:
        self.module = module

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, lse, _, random_state = self.module._wrapped_flash_attn_forward(
            *_length_first(query, key, value),
            return_softmax=False,
            **self._options(scores),
        )
        return output.transpose(1, 2), lse, random_state

    def backward(
        self, grad: Tensor, inputs: Inputs, output: Tensor, lse: Tensor, state: Tensor, scores: Scores
    ) -> Inputs:
        gradients = tuple(torch.empty_like(x) for x in _length_first(*inputs))
        self.module._wrapped_flash_attn_backward(
            *_length_first(laid_out(grad, output), *inputs, output),
            lse.contiguous(),
            *gradients,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=state,
            **self._options(scores),
        )
        query, key, value = _length_first(*gradients)
        return query, key, value

    @staticmethod
    def _options(scores: Scores) -> dict[str, Any]:
        return {**_options(scores, -1), "dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None}


def _length_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[b, t, h, d] from [b, h, t, d], or the other way."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _options(scores: Scores, endless: int | None) -> dict[str, Any]:
    """Args:
    endless: how a window without an end is written.
    """
    windowed = scores.window is not None
    return {
        "softmax_scale": scores.scale,
        "causal": scores.causal,
        "window_size_left": endless if scores.window is None else scores.window - 1,
        "window_size_right": 0 if windowed else endless,
    }
