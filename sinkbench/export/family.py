"""What a model family of transformers is to the converters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sinkbench.api import Rotary
from sinkbench.errors import SinkbenchError
from sinkbench.export.architecture import Architecture
from sinkbench.export.pieces import Piece

LAYER = "decoder.layers."
"""Beginning of the stored names of the layers' tensors."""

GELUS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "swish",
}
"""Activations by transformers' names."""

GELU_NAMES = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu", "swish": "silu"}


class UnsupportedError(SinkbenchError):
    """A model that a recipe cannot describe."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attributes:
    model_type: of config.json.
    class_name: of the causal language model in transformers.
    read: config.json -> architecture; raises UnsupportedError.
    write: architecture -> config.json, or None if it does not fit.
    pieces: the model's tensors; the output projection is left out where it is the embedding.
    ignored: beginnings, after the layer's part, of names in old files that are no weights.
    prefix: of names, which some files lack.
    """

    model_type: str
    class_name: str
    read: Callable[[Mapping[str, Any]], Architecture]
    write: Callable[[Architecture], dict[str, Any] | None]
    pieces: Callable[[Architecture], list[Piece]]
    ignored: tuple[str, ...] = ()
    prefix: str = ""


def require(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    value = config.get(key, default)
    if value not in allowed:
        wanted = " or ".join(str(item) for item in allowed)
        raise UnsupportedError(
            "config.json", f"{key} is {value}, which sinkbench cannot compute", f"{key} must be {wanted}"
        )
    return value


def read_rotary(config: Mapping[str, Any], default: float) -> Rotary:
    """From the flat keys of transformers 4 or the ``rope_parameters`` of 5."""
    new = config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {}
    kind = new.get("rope_type") or old.get("rope_type") or old.get("type") or "default"
    if kind != "default":
        problem = f"rotary positions are scaled ({kind}), which sinkbench cannot compute"
        raise UnsupportedError("config.json", problem, "choose a model without rope_scaling")
    return Rotary(base=float(new.get("rope_theta") or config.get("rope_theta") or default))


def attention_names(at: str, kind: str) -> tuple[str, str, str]:
    """Of separate projections of queries, keys and values."""
    return (f"{at}self_attn.q_proj.{kind}", f"{at}self_attn.k_proj.{kind}", f"{at}self_attn.v_proj.{kind}")
