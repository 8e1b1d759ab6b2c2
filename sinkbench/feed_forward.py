"""The kinds of feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "reglu": (F.relu, True),
    "swish": (F.silu, False),
    "gelu": (F.gelu, False),
    "gelu_tanh": (gelu_tanh, False),
    "relu": (F.relu, False),
    "none": (F.relu, False),
}
"""Activation and whether a second projection gates it (Shazeer 2002.05202)."""
