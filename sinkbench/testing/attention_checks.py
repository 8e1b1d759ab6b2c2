"""Checks of an attention's declaration on the plain-torch reference, in this process.

Shapes: b sequence of the batch, h head, g kv head, q query position, k key position, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, BuildContext, Elementwise, Heads, ParameterSpec, Rows, Softmax
from sinkbench.attention import reference
from sinkbench.attention.reference import Problem, allowed_qk
from sinkbench.testing.gradients import check_gradients
from sinkbench.testing.session import Check, Failed, Session, compare

LENGTH = 7
DOCUMENT_START = 3
"""Of the second document of a sequence."""
ATTENTION = frozenset({"attention"})


def make_problem(
    spec: AttentionSpec,
    context: BuildContext,
    *,
    batch: int = 2,
    length: int = LENGTH,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """Random queries, keys and values of the tiny model's heads, and parameters near their initial values."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64)
        return drawn.to(device=device, dtype=dtype)

    position = torch.arange(length, device=device)
    scale = spec.scale if spec.scale is not None else context.head_size**-0.5
    return Problem(
        spec=spec,
        query_bhqd=draw(batch, context.num_heads, length, context.head_size),
        key_bgkd=draw(batch, context.num_kv_heads, length, context.head_size),
        value_bgkd=draw(batch, context.num_kv_heads, length, context.head_size),
        position_q=position,
        position_k=position,
        aligned=True,
        scale=scale,
        heads=torch.arange(context.num_heads, device=device),
        parameters={
            name: parameter.mean + 0.1 * draw(*sizes_of(parameter, context))
            for name, parameter in spec.parameters.items()
        },
    )


def sizes_of(parameter: ParameterSpec, context: BuildContext) -> list[int]:
    """A declared shape in numbers."""
    named = {
        "heads": context.num_heads,
        "kv_heads": context.num_kv_heads,
        "head_size": context.head_size,
        "hidden": context.hidden_size,
    }
    return [named[size] if isinstance(size, str) else size for size in parameter.shape]


def spec_of(session: Session) -> tuple[AttentionSpec, BuildContext]:
    return cast(AttentionSpec, session.build()), session.declared.context


def shapes(session: Session) -> str:
    spec, context = spec_of(session)
    problem = make_problem(spec, context)
    expected = (2, context.num_heads, LENGTH, LENGTH)
    weights, slot = reference.weights(problem)
    _same_shape("attention weights", weights, expected)
    if slot is not None:
        _same_shape("weights of the extra slot", slot, expected[:3])
    _same_shape("the output", reference.attend(problem), tuple(problem.query_bhqd.shape))
    if isinstance(spec.rule, Elementwise):
        _check_elementwise(spec.rule.function)
    for name, part, like in _layer_functions(spec, context, torch.float32):
        found = part(like)
        _same_shape(name, found, _part_shape(name, like, found.dim() > like.dim(), context))
    return f"weights {list(expected)}"


def _check_elementwise(function: Callable[[Tensor], Tensor]) -> None:
    score = torch.linspace(-3, 3, 24).view(4, 6)
    value = function(score)
    _same_shape("the similarity of scores", value, (4, 6))
    compare(
        "the similarity of one score, alone instead of among others,",
        function(score[1:2, 3:4]),
        value[1:2, 3:4],
    )


def _same_shape(what: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise Failed(f"{what} has shape {list(x.shape)} instead of {list(expected)}")


def dtypes(session: Session) -> str:
    spec, context = spec_of(session)
    for dtype in (torch.float32, torch.float64):
        score = torch.linspace(-3, 3, 24, dtype=dtype).view(1, 1, 4, 6)
        if isinstance(spec.rule, Elementwise):
            _same_dtype("the similarity", spec.rule.function(score), dtype)
        if isinstance(spec.rule, Rows):
            allowed = torch.ones(4, 6, dtype=torch.bool).tril(2)
            _same_dtype("the rule's rows", spec.rule.function(score, allowed), dtype)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        problem = make_problem(spec, context, dtype=dtype)
        if spec.feature_map is not None:
            needed = {name: problem.parameters[name] for name in spec.feature_map.parameters}
            _same_dtype("the feature map", spec.feature_map.function(problem.query_bhqd, needed), dtype)
        _same_dtype("the output", reference.attend(problem), dtype)
    return "float32, float64 and bfloat16 are kept"


def _same_dtype(what: str, x: Tensor, expected: torch.dtype) -> None:
    if x.dtype != expected:
        raise Failed(f"{what} of {expected} is {x.dtype}")


def gradient(session: Session) -> str:
    spec, context = spec_of(session)
    problem = make_problem(spec, context, batch=1, length=4, dtype=torch.float64)
    inputs = {
        "query": problem.query_bhqd,
        "key": problem.key_bgkd,
        "value": problem.value_bgkd,
        **{f"parameter {name}": value for name, value in problem.parameters.items()},
    }
    used = _used_by_reference(spec)

    def attend(values: Mapping[str, Tensor]) -> Tensor:
        parameters = {name: values[f"parameter {name}"] for name in problem.parameters}
        return reference.attend(
            replace(
                problem,
                query_bhqd=values["query"],
                key_bgkd=values["key"],
                value_bgkd=values["value"],
                parameters=parameters,
            )
        )

    names = ["query", "key", "value", *(f"parameter {name}" for name in used)]
    check_gradients("the output", attend, inputs, names)
    for name, part, like in _layer_functions(spec, context, torch.float64):
        check_gradients(name, partial(_of_input, part), {"input": like}, ["input"])
    return f"d output / d {', '.join(names)} equal finite differences"


def _of_input(part: Callable[[Tensor], Tensor], values: Mapping[str, Tensor]) -> Tensor:
    return part(values["input"])


def _used_by_reference(spec: AttentionSpec) -> list[str]:
    """Declared parameters that the attention itself reads, not the layer's functions around it."""
    around: set[str] = set()
    for part in (spec.head_transform, spec.output_gate):
        around |= set(part.parameters) if part is not None else set()
    return [name for name in spec.parameters if name not in around]


LayerFunction = tuple[str, Callable[[Tensor], Tensor], Tensor]


def _layer_functions(spec: AttentionSpec, context: BuildContext, dtype: torch.dtype) -> list[LayerFunction]:
    """What a declaration does in the layer around the attention, as functions of one tensor: the output gate
    of the layer's input; the transformed query, key and value of all heads (query, key, value and those of
    the first layer, one after another)."""
    problem = make_problem(spec, context, length=3, batch=1, dtype=dtype)
    found: list[LayerFunction] = []
    generator = torch.Generator().manual_seed(1)
    if spec.output_gate is not None:
        gate = spec.output_gate
        needed = {name: problem.parameters[name] for name in gate.parameters}
        hidden = torch.randn(3, 1, context.hidden_size, generator=generator, dtype=torch.float64).to(dtype)
        found.append(("the output gate", lambda x: gate.function(x, needed), hidden))
    if spec.head_transform is not None:
        transform = spec.head_transform
        known = {name: problem.parameters[name] for name in transform.parameters}
        sizes = (context.num_heads, *[context.num_kv_heads] * 3)
        together = torch.randn(
            3, 1, sum(sizes), context.head_size, generator=generator, dtype=torch.float64
        ).to(dtype)

        def transformed(x: Tensor) -> Tensor:
            query, key, value, first = x.split(sizes, -2)
            heads = transform.function(
                Heads(
                    query=query, key=key, value=value, first_value=first if transform.first_value else None
                ),
                known,
            )
            return torch.cat([heads.query, heads.key, heads.value], -2)

        found.append(("the transformed heads", transformed, together))
    return found


def _part_shape(name: str, like: Tensor, per_element: bool, context: BuildContext) -> tuple[int, ...]:
    if name == "the transformed heads":
        return (*like.shape[:-2], like.shape[-2] - context.num_kv_heads, context.head_size)
    return (*like.shape[:-1], context.num_heads, *([context.head_size] if per_element else []))


def causality(session: Session) -> str:
    spec, context = spec_of(session)
    problem = make_problem(spec, context)
    weights, _ = reference.weights(problem)
    masked = ~allowed_qk(problem.position_q, problem.position_k, spec.window)
    leak = weights.masked_fill(~masked, 0.0).abs()
    if leak.max() > 0:
        place = [int(i) for i in torch.unravel_index(leak.argmax(), leak.shape)][-2:]
        raise Failed(
            f"query {place[0]} gives {leak.max():.3g} of its weight to key {place[1]}, which is masked"
        )
    at = LENGTH // 2
    later = torch.randn(1, generator=torch.Generator().manual_seed(2)).item() + 2.0
    changed = [x.clone() for x in (problem.query_bhqd, problem.key_bgkd, problem.value_bgkd)]
    for x in changed:
        x[:, :, at:] += later
    after = replace(problem, query_bhqd=changed[0], key_bgkd=changed[1], value_bgkd=changed[2])
    return compare(
        f"the output before position {at}, after a change of all tokens from there on,",
        reference.attend(after)[:, :, :at],
        reference.attend(problem)[:, :, :at],
    )


def determinism(session: Session) -> str:
    spec, context = spec_of(session)
    first, again = (reference.attend(make_problem(s, context)) for s in (spec, spec))
    rebuilt = reference.attend(make_problem(cast(AttentionSpec, session.build()), context))
    compare("the output computed again", again, first, relative=0, absolute=0)
    return compare("the output of a plugin built again", rebuilt, first, relative=0, absolute=0)


def batch_invariance(session: Session) -> str:
    spec, context = spec_of(session)
    problem = make_problem(spec, context)
    alone = replace(
        problem,
        query_bhqd=problem.query_bhqd[1:],
        key_bgkd=problem.key_bgkd[1:],
        value_bgkd=problem.value_bgkd[1:],
    )
    return compare(
        "the output of a sequence alone, beside another,",
        reference.attend(alone),
        reference.attend(problem)[1:],
    )


def documents(session: Session) -> str:
    spec, context = spec_of(session)
    problem = make_problem(spec, context)
    start = torch.zeros(2, LENGTH, dtype=torch.int32)
    start[1, DOCUMENT_START:] = DOCUMENT_START
    second = slice(DOCUMENT_START, None)
    alone = replace(
        problem,
        query_bhqd=problem.query_bhqd[1:, :, second],
        key_bgkd=problem.key_bgkd[1:, :, second],
        value_bgkd=problem.value_bgkd[1:, :, second],
        position_q=problem.position_q[second],
        position_k=problem.position_k[second],
    )
    return compare(
        "the output of a document alone, behind another in its sequence,",
        reference.attend(alone),
        reference.attend(replace(problem, document_start_bk=start))[1:, :, second],
    )


def measurement(session: Session) -> str:
    spec, context = spec_of(session)
    problem = make_problem(spec, context)
    weights, slot = reference.weights(problem)
    if not weights.isfinite().all():
        raise Failed(
            f"{int((~weights.isfinite()).sum())} of {weights.numel()} attention weights are not finite"
        )
    total = weights.sum(-1) if slot is None else weights.sum(-1) + slot
    row_sum = f"rows of attention weights sum to {total.min():.4g} .. {total.max():.4g}"
    rule, scale = spec.rule, spec.output_scale
    if isinstance(rule, Softmax):
        whole = torch.full_like(total, scale)
        if rule.sink_logit is None:
            compare("the sum of a row of weights", total, whole)
        elif (total > whole).any():
            raise Failed(f"{row_sum}, above {scale:g}")
    if isinstance(rule, Elementwise) and rule.normalize is True:
        if (total > (1 + 1e-3) * scale).any():
            raise Failed(f"{row_sum}, although rows are normalised")
        if (weights < 0).any():
            raise Failed(f"weights go down to {weights.min():.3g} in rows divided by their sum")
    return row_sum


CHECKS = (
    Check(
        name="shapes",
        kinds=ATTENTION,
        run=shapes,
        usually="a similarity that looks at its neighbours needs Rows, not Elementwise; a Rows function "
        "returns the shape of its scores",
    ),
    Check(
        name="dtypes",
        kinds=ATTENTION,
        run=dtypes,
        usually="a conversion or a constant tensor of a fixed dtype: use the input's, x.new_tensor(...)",
    ),
    Check(
        name="gradient",
        kinds=ATTENTION,
        run=gradient,
        usually="a hand-written backward, .detach() or torch.no_grad() in the function, or a conversion to "
        "float32",
    ),
    Check(
        name="causality",
        kinds=ATTENTION,
        run=causality,
        usually="a Rows function must return zero where allowed is false, and let masked scores change "
        "nothing",
    ),
    Check(
        name="determinism",
        kinds=ATTENTION,
        run=determinism,
        usually="random numbers, or state that a call changes",
    ),
    Check(
        name="batch invariance",
        kinds=ATTENTION,
        run=batch_invariance,
        usually="a sum or a maximum over the batch: reduce over the last dimension alone",
    ),
    Check(
        name="documents",
        kinds=ATTENTION,
        run=documents,
        usually="a Rows function that masks by itself: what a query may see is in allowed, for each sequence",
    ),
    Check(
        name="measurement",
        kinds=ATTENTION,
        run=measurement,
        usually="a similarity that may be negative or zero in a whole row: declare normalize='abs' or False",
    ),
)
