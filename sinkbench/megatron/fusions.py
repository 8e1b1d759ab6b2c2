"""Which parts of a step run fused, and how: one switch for each, with the plain form as the fallback.

Fused parts are ordinary functions under torch.compile, kernels in Triton, and fused optimizers. On a CPU the
graphs run as they are traced (backend "aot_eager"), without a compiler: there a fusion can be tested, but
gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sinkbench.config import FUSIONS, Config, Fusion

F = TypeVar("F", bound=Callable[..., Any])

_compiled: dict[tuple[Callable[..., Any], str], Callable[..., Any]] = {}


def chosen(config: Config, device: torch.device) -> frozenset[Fusion]:
    """The fusions of a run: all of them on a CUDA card, none elsewhere, unless the recipe says."""
    fused = config.train.fused
    if fused == "auto":
        return frozenset(FUSIONS if device.type == "cuda" else ())
    return frozenset(fused)


def compiled(function: F) -> F:
    """A function as torch compiles it for this host, at its first call with each kind of shape. The same
    function gives the same object, so that layers share what is compiled."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    key = (function, backend)
    if key not in _compiled:
        _compiled[key] = torch.compile(function, backend=backend)
    return _compiled[key]  # type: ignore[return-value]
