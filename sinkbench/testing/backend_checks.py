"""Checks of the ways to compute an attention: the Triton functions that are written from a similarity, and
every backend that can compute the declaration here against the eager one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, Elementwise
from sinkbench.attention import elementwise, fused, reference
from sinkbench.attention.backends import BACKENDS, Backend, Use
from sinkbench.attention.reference import Problem
from sinkbench.testing.attention_checks import ATTENTION, make_problem, spec_of
from sinkbench.testing.session import Check, Session, Skipped, compare

FUSED = "model={head_size: 32, seq_length: 64}"
"""Sizes that every backend can do."""


def triton_functions(session: Session) -> str:
    spec, _ = spec_of(session)
    if not isinstance(spec.rule, Elementwise):
        raise Skipped("the rule is not elementwise")
    if spec.rule.fused is not None:
        raise Skipped("Triton functions are given; they are compared where there is a card")
    try:
        written = elementwise.write(spec.rule.function)
    except elementwise.NoTritonForm as obstacle:
        raise Skipped(f"no fused kernel: {obstacle}{fused.NO_FORM}") from obstacle
    lines = len(written.body.splitlines())
    return f"the function and its derivative were written in {lines} lines, and equal autograd in torch"


def backends(session: Session) -> str:
    _, resolved, declared = session.subject.declare(FUSED)
    chosen = session.subject.chosen(resolved)
    spec = cast(AttentionSpec, chosen.plugin.build(chosen.params, declared.context))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    use = Use(device=device, head_size=declared.context.head_size, half=False)
    missing = {b.name: b.missing(spec, use) for b in BACKENDS if b.name != "eager"}
    able = [b for b in BACKENDS if b.name != "eager" and not missing[b.name]]
    lacks = "; ".join(f"{name} cannot compute {' or '.join(why)}" for name, why in missing.items() if why)
    if not able:
        raise Skipped(f"eager alone computes it here: {lacks}")
    problem = make_problem(spec, declared.context, length=64, device=device)
    expected = _with_gradients(problem, reference.attend)
    for backend in able:
        _compare_backend(backend, problem, expected)
    return f"{', '.join(b.name for b in able)} as eager{'; ' + lacks if lacks else ''}"


def _compare_backend(backend: Backend, problem: Problem, expected: dict[str, Tensor]) -> None:
    for name, value in _with_gradients(problem, backend.run).items():
        size = float(expected[name].detach().abs().max())
        compare(
            f"{name} of {backend.name} against eager", value, expected[name], relative=0, absolute=2e-3 * size
        )


def _with_gradients(problem: Problem, attend: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
    tensors = {"query": problem.query_bhqd, "key": problem.key_bgkd, "value": problem.value_bgkd}
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    output = attend(
        replace(problem, query_bhqd=leaves["query"], key_bgkd=leaves["key"], value_bgkd=leaves["value"])
    )
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent)
    return {"the output": output, **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


CHECKS = (
    Check(
        name="triton functions",
        kinds=ATTENTION,
        run=triton_functions,
        usually="an error while the similarity is traced",
    ),
    Check(
        name="backends",
        kinds=ATTENTION,
        run=backends,
        usually="the Triton functions are not those of the plain-torch function",
    ),
)
