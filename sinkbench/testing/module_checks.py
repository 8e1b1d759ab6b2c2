"""Checks of norms and of positions by themselves, in this process.

Shapes: s position, b sequence, n hidden size, h head, q query position, k key position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from sinkbench.api import NormalizationSpec, PositionalSpec
from sinkbench.testing.attention_checks import sizes_of
from sinkbench.testing.gradients import check_gradients
from sinkbench.testing.session import Check, Failed, Session, compare

NORM = frozenset({"normalization"})
POSITION = frozenset({"positional"})


def _norm(session: Session, dtype: torch.dtype) -> tuple[torch.nn.Module, Tensor]:
    """A norm with parameters other than their initial values, and an input [s, b, n]."""
    size = session.declared.context.hidden_size
    norm = cast(NormalizationSpec, session.build()).norm(size).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return norm, torch.randn(5, 2, size, generator=generator, dtype=torch.float64).to(dtype)


def norm_shapes(session: Session) -> str:
    norm, x = _norm(session, torch.float32)
    for name, parameter in norm.named_parameters():
        if tuple(parameter.shape) != x.shape[-1:]:
            raise Failed(f"parameter {name} has shape {list(parameter.shape)} instead of {[x.shape[-1]]}")
    if norm(x).shape != x.shape:
        raise Failed(f"the norm of {list(x.shape)} has shape {list(norm(x).shape)}")
    alone, among = norm(x[2:3, 1:]), norm(x)[2:3, 1:]
    return compare("the norm of one position, alone instead of among others,", alone, among)


def norm_dtypes(session: Session) -> str:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        norm, x = _norm(session, dtype)
        if norm(x).dtype != dtype:
            raise Failed(f"the norm of {dtype} is {norm(x).dtype}")
    return "float32, float64 and bfloat16 are kept"


def norm_gradient(session: Session) -> str:
    norm, x = _norm(session, torch.float64)
    parameters = dict(norm.named_parameters())

    def normed(values: Mapping[str, Tensor]) -> Tensor:
        named = {name: values[f"parameter {name}"] for name in parameters}
        result: Tensor = torch.func.functional_call(norm, named, (values["input"],))
        return result

    inputs = {"input": x[:2], **{f"parameter {name}": p.detach() for name, p in parameters.items()}}
    check_gradients("the norm", normed, inputs, list(inputs))
    return f"d norm / d {', '.join(inputs)} equal finite differences"


def position_shapes(session: Session) -> str:
    spec, context = cast(PositionalSpec, session.build()), session.declared.context
    seen = []
    position = torch.arange(context.num_positions)
    if spec.embedding is not None:
        added = spec.embedding()(position)
        if tuple(added.shape) != (context.num_positions, context.hidden_size):
            wanted = [context.num_positions, context.hidden_size]
            raise Failed(f"the embedding of positions has shape {list(added.shape)} instead of {wanted}")
        seen.append("embedding")
    if spec.rotary is not None:
        if not 0 < spec.rotary.fraction <= 1 or spec.rotary.base <= 0:
            raise Failed(f"rotary settings are base {spec.rotary.base}, fraction {spec.rotary.fraction}")
        seen.append("rotary")
    if spec.score_bias is not None:
        bias, heads = _score_bias(session), context.num_heads
        expected = (heads, context.num_positions, context.num_positions)
        if tuple(bias.shape) != expected or bias.dtype != torch.float32:
            raise Failed(
                f"the score bias is {bias.dtype} {list(bias.shape)} instead of float32 {list(expected)}"
            )
        upper = torch.arange(heads // 2, heads)
        compare("the score bias of the later half of the heads", _score_bias(session, upper), bias[upper])
        seen.append("score bias")
    return ", ".join(seen) or "no position anywhere"


def _score_bias(session: Session, heads: Tensor | None = None) -> Tensor:
    """[h, q, k] of the given heads as a tensor-parallel rank computes it."""
    spec, context = cast(PositionalSpec, session.build()), session.declared.context
    assert spec.score_bias is not None
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name, declared in spec.score_bias.parameters.items():
        whole = declared.mean + torch.randn(sizes_of(declared, context), generator=generator)
        split = declared.shape[:1] == ("heads",) and heads is not None
        parameters[name] = whole[heads] if split else whole
    position = torch.arange(context.num_positions)
    numbers = torch.arange(context.num_heads) if heads is None else heads
    return spec.score_bias.function(position[:, None] - position, numbers, parameters)


CHECKS = (
    Check(
        name="shapes",
        kinds=NORM,
        run=norm_shapes,
        usually="a reduction over more than the last dimension, or a parameter of another shape than [size]",
    ),
    Check(
        name="dtypes",
        kinds=NORM,
        run=norm_dtypes,
        usually="a computation in float32 whose result is not brought back: end in x.to(input.dtype)",
    ),
    Check(
        name="gradient",
        kinds=NORM,
        run=norm_gradient,
        usually="a hand-written backward, .detach(), or a conversion to float32 of float64 inputs",
    ),
    Check(
        name="shapes",
        kinds=POSITION,
        run=position_shapes,
        usually="the embedding is [positions, hidden size]; the bias is [heads, queries, keys] float32 for "
        "the heads that are given, not for all of the model",
    ),
)
