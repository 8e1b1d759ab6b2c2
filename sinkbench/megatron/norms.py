"""Norms of a recipe's plugin, or the same ones by Transformer Engine or NVIDIA Apex.

These have RMSNorm and LayerNorm as torch defines them, with a gain, which keeps its name and initial value.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from sinkbench.api import NormalizationSpec
from sinkbench.errors import HostError, RecipeError

By = Literal["local", "te", "apex"]


def choose(asked: By | None, backend: str, spec: NormalizationSpec, size: int) -> By:
    """Whose norms a recipe gets, from what it says of ``model.norms`` and ``model.backend``.

    Raises:
        RecipeError: it asks for another's, who do not have that of its plugin.
    """
    norm = spec.norm(size)
    if asked is None:
        return "te" if backend == "te" and _is_theirs(norm) else "local"
    if asked != "local" and not _is_theirs(norm):
        problem = f"{asked} has torch's RMSNorm and LayerNorm with a gain, and not {type(norm).__name__}"
        raise RecipeError("model.norms", problem, "write local")
    return asked


def _is_theirs(norm: torch.nn.Module) -> bool:
    parameters = {torch.nn.RMSNorm: {"weight"}, torch.nn.LayerNorm: {"weight", "bias"}}.get(type(norm))
    return {name for name, _ in norm.named_parameters()} == parameters and norm.eps is not None


def made(norm: torch.nn.Module, by: By) -> torch.nn.Module:
    """The plugin's norm, or one that does the same.

    Raises:
        HostError: the package cannot be used.
    """
    if by == "local":
        return norm
    name = type(norm).__name__
    theirs: torch.nn.Module = _class(name, by)(*norm.normalized_shape, eps=norm.eps)  # type: ignore[misc]
    with torch.no_grad():
        for parameter, value in norm.named_parameters():
            theirs.get_parameter(parameter).copy_(value)
    return theirs


def _class(name: str, by: By) -> Any:
    if by == "te":
        from sinkbench.megatron.transformer_engine import load

        # Without the state of a quantised output, of which a checkpoint without them knows nothing.
        module = torch.nn.Module
        nothing = {"get_extra_state": module.get_extra_state, "set_extra_state": module.set_extra_state}
        return type(name, (getattr(load(), name),), nothing)
    try:
        from apex import normalization
    except ImportError as error:
        raise HostError("apex", f"cannot be imported ({error})", "install it, or write local") from error
    return getattr(normalization, f"Fused{name}")
