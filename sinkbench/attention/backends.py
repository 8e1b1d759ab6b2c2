"""The ways to compute an attention, and the choice between them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sinkbench.api import AttentionSpec, Softmax
from sinkbench.attention import (
    flash_attn,
    flash_torch,
    flex,
    fused,
    linear,
    reference,
    sdpa,
    transformer_engine,
)
from sinkbench.attention.reference import Problem
from sinkbench.errors import RecipeError

_log = logging.getLogger(__name__)

DOCUMENTS = "a document mask"


@dataclass(frozen=True, kw_only=True)
class Use:
    """Where an attention is to be computed, and what comes to its declaration from elsewhere.

    Attributes:
        device: "cpu" or "cuda".
        split_sequence: queries are not the positions of the keys (context parallelism).
        position_bias: a positional plugin adds a bias to the scores.
        learned_bias: that bias has parameters.
        prefix: a loss plugin lets the first positions see one another.
        documents: queries see keys of their own document only.
        half: queries, keys and values are bf16 or fp16.
        deterministic: the same gradients bit for bit, each time.
        replayed: from a CUDA graph, so that what launches cost does not count.
    """

    device: str
    head_size: int
    split_sequence: bool = False
    position_bias: bool = False
    learned_bias: bool = False
    prefix: bool = False
    documents: bool = False
    half: bool = True
    deterministic: bool = False
    replayed: bool = False


def _always(spec: AttentionSpec, use: Use) -> bool:
    return True


def _never(spec: AttentionSpec, use: Use) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Attributes:
    missing: what a declaration in this use asks for that this backend cannot do; empty if it can.
    run: computes O [b, h, q, d].
    preferred: whether ``auto`` takes it where it can do the job.
    """

    name: str
    missing: Callable[[AttentionSpec, Use], list[str]]
    run: Callable[[Problem], Tensor]
    preferred: Callable[[AttentionSpec, Use], bool] = _always


def _missing_flash(spec: AttentionSpec, use: Use) -> list[str]:
    lacks = {
        "attention on a CPU": use.device == "cpu",
        "a sequence split by context parallelism": use.split_sequence,
        "a position bias": use.position_bias,
        "a window with a bidirectional prefix": spec.window is not None and use.prefix,
        DOCUMENTS: use.documents,
    }
    found = [what for what, wanted in lacks.items() if wanted]
    return found or flash_attn.missing(spec, use.head_size, half=use.half)


def _missing_te(spec: AttentionSpec, use: Use) -> list[str]:
    lacks = {
        "attention on a CPU": use.device == "cpu",
        "a sequence split by context parallelism": use.split_sequence,
        "a position bias": use.position_bias,
        "a bidirectional prefix": use.prefix,
        DOCUMENTS: use.documents,
    }
    found = [what for what, wanted in lacks.items() if wanted]
    return found or transformer_engine.missing(spec, use.head_size, half=use.half)


def _is_fastest_replayed(spec: AttentionSpec, use: Use) -> bool:
    """FlashAttention-4 is the fastest softmax on a card at the usual head sizes, but slow to launch: a small
    model's step that launches it takes longer than one with cuDNN's."""
    usual = 64 <= use.head_size <= 128
    return use.replayed and usual and not use.deterministic and flash_attn.has_four()


def _missing_flex(spec: AttentionSpec, use: Use) -> list[str]:
    lacks = {
        "attention on a CPU, where it holds T x T scores": use.device == "cpu",
        "a sequence split by context parallelism": use.split_sequence,
        "the same gradient of a learned position bias each time": use.deterministic and use.learned_bias,
    }
    return [*(what for what, wanted in lacks.items() if wanted), *flex.missing(spec, use.head_size)]


def _sdpa_needs_a_mask(spec: AttentionSpec, use: Use) -> bool:
    kernel = flash_torch.has_kernel(use.device, use.head_size, use.half, spec.window is not None)
    return sdpa.needs_mask(
        spec,
        bias=use.position_bias,
        prefix=use.prefix,
        documents=use.documents,
        has_kernel=kernel,
    )


def _is_faster_in_triton(spec: AttentionSpec, use: Use) -> bool:
    """Than other backends: a similarity, and a softmax for which torch has no cuDNN kernel, but a mask of
    T x T or FlashAttention-2."""
    if not isinstance(spec.rule, Softmax) or _sdpa_needs_a_mask(spec, use):
        return True
    flash_2 = spec.window is not None or use.deterministic
    return flash_2 and use.device != "cpu" and use.head_size <= 128


def _missing_linear(spec: AttentionSpec, use: Use) -> list[str]:
    lacks = {
        "a sequence split by context parallelism": use.split_sequence,
        "a position bias": use.position_bias,
        "a bidirectional prefix": use.prefix,
        DOCUMENTS: use.documents,
    }
    return [*(what for what, wanted in lacks.items() if wanted), *linear.missing(spec)]


def _missing_triton(spec: AttentionSpec, use: Use) -> list[str]:
    lacks = {
        "attention on a CPU": use.device == "cpu",
        "a sequence split by context parallelism": use.split_sequence,
    }
    found = [*(what for what, wanted in lacks.items() if wanted), *fused.missing(spec, use.head_size)]
    return found or fused.missing_function(spec.rule)  # which takes a second, so only where it decides


BACKENDS = (
    Backend(
        name="flash",
        missing=_missing_flash,
        run=flash_attn.run,
        preferred=_is_fastest_replayed,
    ),
    # The kernels of cuDNN that torch has as well.
    Backend(name="te", missing=_missing_te, run=transformer_engine.run, preferred=_never),
    Backend(name="linear", missing=_missing_linear, run=linear.run),
    Backend(
        name="triton",
        missing=_missing_triton,
        run=fused.run,
        preferred=_is_faster_in_triton,
    ),
    Backend(name="flex", missing=_missing_flex, run=flex.run, preferred=_sdpa_needs_a_mask),
    Backend(name="sdpa", missing=lambda spec, use: sdpa.missing(spec), run=sdpa.run),
    Backend(name="eager", missing=lambda spec, use: [], run=reference.attend),
)
"""Fastest first, where preferred."""


def choose(spec: AttentionSpec, use: Use, requested: str, *, where: str = "model.backend") -> Backend:
    """The fastest backend that can compute the declaration, or the requested one.

    Args:
        requested: the name of a backend, or "auto".
        where: what an error calls the request.

    Raises:
        RecipeError: there is no such backend, or it cannot; the message lists what it lacks.
    """
    if requested != "auto":
        return _named(spec, use, requested, where)
    for backend in BACKENDS:
        if not backend.preferred(spec, use):
            continue
        missing = backend.missing(spec, use)
        if not missing:
            return backend
        if missing[-1].endswith(fused.NO_FORM) and os.environ.get("RANK", "0") == "0":
            _log.warning("attention is computed in plain torch because of %s", missing[-1])
    raise AssertionError("the eager backend computes every declaration")


def _named(spec: AttentionSpec, use: Use, name: str, where: str) -> Backend:
    known = {backend.name: backend for backend in BACKENDS}
    if name not in known:
        raise RecipeError(where, f"there is no backend {name}", f"write auto or one of {', '.join(known)}")
    missing = known[name].missing(spec, use)
    if missing:
        raise RecipeError(
            where,
            f"{name} cannot compute {' or '.join(missing)}, which the attention needs here",
            "write auto or eager",
        )
    return known[name]
