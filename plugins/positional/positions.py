"""Where a model learns of positions: rotation, an added embedding, a bias on scores, nowhere.

A bias is a function of the distance i - j of query i and key j; within a prefix that sees itself, keys
may lie ahead of the query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, model_validator

from sinkbench.api import (
    BuildContext,
    ParameterSpec,
    Params,
    Plugin,
    PositionalSpec,
    Rotary,
    ScoreBias,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sinkbench.config import Config


class RopeParams(Params):
    base: float = Field(default=10000.0, gt=1)
    """theta of the frequencies base^(-2i/d)."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """leading share of the head size that is rotated."""


class AbsoluteParams(Params):
    base: float = Field(default=10000.0, gt=1)
    """of the frequencies base^(-2i/n)."""


class BucketParams(Params):
    buckets: int = Field(default=32, ge=2)
    """the nearer half of them hold one distance each, the others grow logarithmically."""
    max_distance: int = Field(default=128, ge=2)
    """from here on all distances share the last bucket."""

    @model_validator(mode="after")
    def _check(self) -> BucketParams:
        if self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"max_distance {self.max_distance} lies within the {self.buckets // 2} single distances; "
                "raise it or lower buckets"
            )
        return self


class T5Params(BucketParams):
    init_std: PositiveFloat = 0.02
    """of the biases at the start."""


def build_rope(params: RopeParams, context: BuildContext) -> PositionalSpec:
    return PositionalSpec(rotary=Rotary(base=params.base, fraction=params.fraction))


def check_rope(params: RopeParams, config: Config) -> list[str]:
    size = config.model.head_dim
    if size * params.fraction >= 2:
        return []
    if size < 2:
        return [f"head size {size} has no pair to rotate; choose a larger one, or positional none"]
    least = math.ceil(2000 / size) / 1000
    return [f"fraction {params.fraction} rotates no pair of head size {size}; raise it to {least} or above"]


def build_none(params: Params, context: BuildContext) -> PositionalSpec:
    return PositionalSpec()


def build_learned(params: Params, context: BuildContext) -> PositionalSpec:
    import torch

    def embedding() -> torch.nn.Module:
        table = torch.nn.Embedding(context.num_positions, context.hidden_size)
        # As the token embeddings of the paper's code.
        torch.nn.init.normal_(table.weight, std=math.sqrt(2 / 5 / context.hidden_size))
        return table

    return PositionalSpec(embedding=embedding)


def build_absolute(params: AbsoluteParams, context: BuildContext) -> PositionalSpec:
    """cat(sin(p f), cos(p f)) with f_i = base^(-2i/n), added unscaled (Vaswani et al. 1706.03762, whose
    sines and cosines alternate)."""

    def embedding() -> torch.nn.Module:
        from ._modules import Sinusoidal

        return Sinusoidal(context.hidden_size, params.base)

    return PositionalSpec(embedding=embedding)


def check_absolute(params: AbsoluteParams, config: Config) -> list[str]:
    size = config.model.hidden_size
    return [f"model.hidden_size {size} is odd; absolute positions need an even one"] if size % 2 else []


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/h), 2^(-16/h), ...; for h that is no power of two, those of the next lower one and every
    other of the next higher (Press et al. 2108.12409)."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return slopes + between


def build_alibi(params: Params, context: BuildContext) -> PositionalSpec:
    """-slope_h |i - j|, in float32 (the paper's code rounds distances to bf16)."""
    slopes = alibi_slopes(context.num_heads)

    @cache
    def of_all_heads(device: torch.device) -> Tensor:
        """Kept there: a copy to a card would hold up each step."""
        import torch

        with torch.inference_mode(False):
            return torch.tensor(slopes, device=device)

    def slope(heads: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return of_all_heads(heads.device)[heads]

    def bias(distance_qk: Tensor, heads: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return -slope(heads, parameters)[:, None, None] * distance_qk.abs().float()

    return PositionalSpec(score_bias=ScoreBias(function=bias, slope=slope))


def bucket(distance_qk: Tensor, params: BucketParams) -> Tensor:
    """The T5 bucket of a distance, 0 for keys ahead (Raffel et al. 1910.10683): with n buckets, of which
    m = n/2 single distances, d below m and min(n-1, m + floor(log(d/m) / log(max/m) (n-m))) from m on."""
    import torch

    single = params.buckets // 2
    rest = params.buckets - single
    growth = (distance_qk.clamp(min=single) / single).log() / math.log(params.max_distance / single)
    far = (single + (growth * rest).long()).clamp(max=params.buckets - 1)
    return torch.where(distance_qk < single, distance_qk.clamp(min=0), far)


def build_t5(params: T5Params, context: BuildContext) -> PositionalSpec:
    """A learned bias for each head and bucket of distances, one set a layer (T5 has one for all)."""

    def bias(distance_qk: Tensor, _: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        return learned["bias"][:, bucket(distance_qk, params)].float()

    table = ParameterSpec(shape=("heads", params.buckets), std=params.init_std)
    score_bias = ScoreBias(function=bias, parameters={"bias": table}, constant_from=params.max_distance)
    return PositionalSpec(score_bias=score_bias)


def build_relative_reference(params: BucketParams, context: BuildContext) -> PositionalSpec:
    """The number of the bucket itself, not a bias learned for it, added to the score.

    This is what the code of Gu et al. (2410.10781) does where the paper says relative positions. It
    favours far keys by up to e^31 and explains the paper's loss of 5.45: it is here for that row of the
    table alone. Use t5 for relative positions.
    """

    def bias(distance_qk: Tensor, heads: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        return bucket(distance_qk, params).float().expand(len(heads), -1, -1)

    return PositionalSpec(score_bias=ScoreBias(function=bias, constant_from=params.max_distance))


@hookimpl
def sinkbench_positional() -> list[Plugin]:
    return [
        Plugin(
            name="rope",
            summary="rotary embedding of queries and keys (Su et al. 2104.09864)",
            params=RopeParams,
            build=build_rope,
            check=check_rope,
        ),
        Plugin(name="none", summary="no position information (NoPE)", build=build_none),
        Plugin(name="learned", summary="a learned vector per position, added", build=build_learned),
        Plugin(
            name="absolute",
            summary="sines and cosines of the position, added",
            params=AbsoluteParams,
            build=build_absolute,
            check=check_absolute,
        ),
        Plugin(
            name="alibi",
            summary="scores fall with the distance, by a slope per head (Press et al. 2108.12409)",
            build=build_alibi,
        ),
        Plugin(
            name="t5",
            summary="a learned bias per head and bucket of distances (Raffel et al. 1910.10683)",
            params=T5Params,
            build=build_t5,
        ),
        Plugin(
            name="relative_reference",
            summary="the bucket's number added to scores, as the paper's code does; use t5 instead",
            params=BucketParams,
            build=build_relative_reference,
        ),
    ]
