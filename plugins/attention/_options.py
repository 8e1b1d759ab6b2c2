"""What every attention family composes with: window, bias vectors, summed heads, a sink token."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from sinkbench.api import AttentionSpec, BuildContext, ExtraSlot, ParameterSpec, Params

BIAS_STD = 0.02
"""Initial standard deviation of bias vectors, as in the code of Gu et al. (2410.10781)."""


class AttentionParams(Params):
    window: PositiveInt | None = None
    """a query sees this many newest keys, itself included; default: all."""
    kv_bias: Literal["none", "kv", "k", "v"] = "none"
    """learned bias vectors (Gu et al. 2410.10781). kv: one more key k* and value v* that every query
    sees. k: the same with a value that is not learned, v* = value_norm v'. v: a vector added to the
    output of each head."""
    kv_bias_shared: bool = False
    """one vector for all heads of a layer rather than one for each (keys and values: each kv head)."""
    value_norm: NonNegativeFloat = 0.0
    """m of the fixed value m v' that goes with kv_bias k."""
    value_direction: Literal["first", "uniform"] = "first"
    """v' of that value: (1, 0, ..., 0), or (1, ..., 1) / sqrt(head size)."""
    combine: Literal["concat", "sum"] = "concat"
    """heads are concatenated before the output projection, or added."""
    sink_token: bool = False
    """a learned token stands before every sequence, while training too (StreamingLLM, Xiao et al.
    2309.17453). It is a key as the others are: with a window, later queries do not see it, where
    StreamingLLM's cache keeps it."""

    @model_validator(mode="after")
    def _check_bias_vectors(self) -> AttentionParams:
        given = {"value_norm", "value_direction"} & self.model_fields_set
        if given and self.kv_bias != "k":
            which = " and ".join(sorted(given))
            raise ValueError(f"{which} has no effect with kv_bias: {self.kv_bias}; set kv_bias to k")
        if "value_direction" in given and self.value_norm == 0:
            raise ValueError("value_direction has no effect with value_norm: 0; set value_norm above 0")
        if self.kv_bias_shared and self.kv_bias == "none":
            raise ValueError("kv_bias_shared has no effect with kv_bias: none; set kv_bias to kv, k or v")
        return self


class RowParams(AttentionParams):
    normalize: bool = True
    """divide each row by its sum."""

    @model_validator(mode="after")
    def _check_key_bias(self) -> RowParams:
        if self.kv_bias == "k" and self.value_norm == 0 and not self.normalize:
            raise ValueError(
                "kv_bias: k has no effect without value_norm where rows are not normalised; set value_norm "
                "above 0, normalize to true, or kv_bias to kv"
            )
        return self


def compose(spec: AttentionSpec, params: AttentionParams, context: BuildContext) -> AttentionSpec:
    """A family's declaration with the options that all families share."""
    learned: dict[str, ParameterSpec] = {}

    def vector(name: str, heads: str) -> str:
        shape = ("head_size",) if params.kv_bias_shared else (heads, "head_size")
        learned[name] = ParameterSpec(shape=shape, std=BIAS_STD)
        return name

    slot, output_bias = None, None
    if params.kv_bias == "kv":
        slot = ExtraSlot(key=vector("key_bias", "kv_heads"), value=vector("value_bias", "kv_heads"))
    elif params.kv_bias == "k":
        slot = ExtraSlot(key=vector("key_bias", "kv_heads"), value=_fixed_value(params, context.head_size))
    elif params.kv_bias == "v":
        output_bias = vector("value_bias", "heads")
    return replace(
        spec,
        parameters={**spec.parameters, **learned},
        window=params.window,
        extra_slot=slot,
        output_bias=output_bias,
        combine=params.combine,
        sink_token=params.sink_token,
    )


def _fixed_value(params: AttentionParams, head_size: int) -> tuple[float, ...] | None:
    if params.value_norm == 0:
        return None
    if params.value_direction == "first":
        return (params.value_norm, *[0.0] * (head_size - 1))
    return (params.value_norm / head_size**0.5,) * head_size
