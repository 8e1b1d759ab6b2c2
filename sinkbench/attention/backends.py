"""The ways to compute an attention, and the choice between them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sinkbench.api import AttentionSpec
from sinkbench.attention import fused, reference, sdpa
from sinkbench.attention.reference import Problem
from sinkbench.errors import RecipeError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Use:
    """Where an attention is to be computed, and what comes to its declaration from elsewhere.

    Attributes:
        device: "cpu" or "cuda".
        split_sequence: queries are not the positions of the keys (context parallelism).
        position_bias: a positional plugin adds a bias to the scores.
        prefix: a loss plugin lets the first positions see one another.
    """

    device: str
    head_size: int
    split_sequence: bool = False
    position_bias: bool = False
    prefix: bool = False


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Attributes:
    missing: what a declaration in this use asks for that this backend cannot do; empty if it can.
    run: computes O [b, h, q, d].
    """

    name: str
    missing: Callable[[AttentionSpec, Use], list[str]]
    run: Callable[[Problem], Tensor]


def _missing_triton(spec: AttentionSpec, use: Use) -> list[str]:
    lacks = {
        "attention on a CPU": use.device == "cpu",
        "a sequence split by context parallelism": use.split_sequence,
    }
    found = [*(what for what, wanted in lacks.items() if wanted), *fused.missing(spec, use.head_size)]
    return found or fused.missing_function(spec.rule)  # which takes a second, so only where it decides


BACKENDS = (
    Backend(name="sdpa", missing=lambda spec, use: sdpa.missing(spec), run=sdpa.run),
    Backend(name="triton", missing=_missing_triton, run=fused.run),
    Backend(name="eager", missing=lambda spec, use: [], run=reference.attend),
)
"""Fastest first."""


def choose(spec: AttentionSpec, use: Use, requested: str) -> Backend:
    """The fastest backend that can compute the declaration, or the requested one.

    Raises:
        RecipeError: the requested backend cannot; the message lists what it lacks.
    """
    for backend in BACKENDS:
        if requested not in ("auto", backend.name):
            continue
        missing = backend.missing(spec, use)
        if not missing:
            return backend
        if requested == "auto" and missing[-1].endswith(fused.NO_FORM) and os.environ.get("RANK", "0") == "0":
            _log.warning("attention is computed in plain torch because of %s", missing[-1])
        if requested != "auto":
            raise RecipeError(
                "model.backend",
                f"{requested} cannot compute {' or '.join(missing)}, which model.attention declares",
                "write auto or eager",
            )
    raise AssertionError("the eager backend computes every declaration")
