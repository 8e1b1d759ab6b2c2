"""Rotary, learned absolute and no positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from sinkbench.api import BuildContext, Params, Plugin, PositionalSpec, Rotary, hookimpl

if TYPE_CHECKING:
    import torch


class RopeParams(Params):
    base: float = Field(default=10000.0, gt=1)
    """theta of the frequencies base^(-2i/d)."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """leading share of the head size that is rotated."""


def build_rope(params: RopeParams, context: BuildContext) -> PositionalSpec:
    return PositionalSpec(rotary=Rotary(base=params.base, fraction=params.fraction))


def build_none(params: Params, context: BuildContext) -> PositionalSpec:
    return PositionalSpec()


def build_learned(params: Params, context: BuildContext) -> PositionalSpec:
    import torch

    def embedding() -> torch.nn.Module:
        table = torch.nn.Embedding(context.seq_length, context.hidden_size)
        # As the token embeddings of the paper's code.
        torch.nn.init.normal_(table.weight, std=math.sqrt(2 / 5 / context.hidden_size))
        return table

    return PositionalSpec(embedding=embedding)


@hookimpl
def sinkbench_positional() -> list[Plugin]:
    return [
        Plugin(
            name="rope",
            summary="rotary embedding of queries and keys (Su et al. 2104.09864)",
            params=RopeParams,
            build=build_rope,
        ),
        Plugin(name="none", summary="no position information (NoPE)", build=build_none),
        Plugin(name="learned", summary="a learned vector per position, added", build=build_learned),
    ]
