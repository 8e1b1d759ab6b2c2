"""Softmax in the fused kernels against the plain-torch reference in float64: on a card, or in Triton's
interpreter where the package is there."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench.api import AttentionSpec, ExtraSlot, ParameterSpec, ScoreBias, Softmax  # noqa: E402
from sinkbench.attention import fused, triton_elementwise  # noqa: E402
from sinkbench.attention.reference import Problem  # noqa: E402
from tests.unit.test_triton_masks import (  # noqa: E402
    FAR,
    HEADS,
    SIGMOID,
    SLOPE,
    TABLE,
    assert_as_reference,
    make_problem,
    output_and_gradients,
)

ENDING = replace(TABLE, constant_from=FAR)
LENGTH = 777 if CUDA else 150
"""Beyond the table, and no multiple of a block."""


def problem(length: int, head_size: int = 32, *, more: bool = False, **settings: Any) -> Problem:
    """With ``more`` there is a slot and a sink in the sum of the softmax."""
    p = make_problem(SIGMOID, length, head_size, **settings)
    spec = AttentionSpec(rule=Softmax(), window=p.spec.window)
    if not more:
        return replace(p, spec=spec, parameters={})
    spec = replace(
        spec,
        rule=Softmax(sink_logit="sink"),
        extra_slot=ExtraSlot(key="key", value="value"),
        parameters={
            "sink": ParameterSpec(shape=("heads",)),
            "key": ParameterSpec(shape=("head_size",)),
            "value": ParameterSpec(shape=("head_size",)),
        },
    )
    given = {name: torch.linspace(-1, 1, head_size, device=p.query_bhqd.device) for name in ("key", "value")}
    return replace(p, spec=spec, parameters=given | {"sink": p.parameters["bias"]})


def test_slope() -> None:
    assert_as_reference(problem(LENGTH, bias=SLOPE))


def test_table_that_ends_with_prefix_slot_and_sink() -> None:
    assert_as_reference(problem(LENGTH, more=True, bias=ENDING, prefix=40))


def test_table_with_window() -> None:
    assert_as_reference(problem(75, 48, bias=TABLE, window=33))


def test_a_table_that_ends_for_similarities() -> None:
    """Its last entry's gradient is that of all farther distances."""
    assert_as_reference(make_problem(SIGMOID, LENGTH, 32, bias=ENDING, prefix=40))
    p = make_problem(SIGMOID, LENGTH, 32, bias=ENDING)
    assert_as_reference(replace(p, spec=replace(p.spec, score_bias=None, parameters={}), parameters={}))


@pytest.mark.full
@pytest.mark.parametrize("bias", [None, SLOPE, TABLE, ENDING], ids=["none", "slope", "table", "ending"])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("prefix", [0, 50, 500])
def test_every_mask(bias: ScoreBias | None, window: int | None, prefix: int) -> None:
    """The weight of a single key is 1, and its gradient the difference of two equal numbers."""
    p = problem(LENGTH, window=window, prefix=prefix, bias=bias)
    assert_as_reference(p, tolerance=3e-4 if window == 1 else 2e-5)


@pytest.mark.full
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("bias", [SLOPE, ENDING], ids=["slope", "ending"])
def test_every_size(head_size: int, length: int, bias: ScoreBias) -> None:
    p = problem(length, head_size, more=True, bias=bias)
    assert_as_reference(p)
    if CUDA:
        assert_as_reference(p, torch.bfloat16, 2e-2)


@pytest.mark.parametrize("more", [False, True])
def test_scores_of_thousands(more: bool) -> None:
    """They are rounded by 2e-4 themselves. The gradient of a row whose weight is all on one key vanishes as a
    difference of products of value and gradient, about as large as the head size; what rounds those comes
    times scale and key, and is all that is left of it."""
    p = problem(70, bias=SLOPE, window=20, more=more)
    assert (p.query_bhqd[0, 0] @ p.key_bgkd[0, 0].T * p.scale).abs().max() > 2
    p = replace(p, scale=1000 * p.scale)
    rounded = 1e-6 * p.scale * p.key_bgkd.norm() * HEADS * p.query_bhqd.shape[3] ** 0.5
    assert_as_reference(p, tolerance=3e-3, absolute={"dq": float(rounded), "dk": float(rounded)})


def test_rows_without_weight() -> None:
    """Biases of minus infinity for all distances: rows of zeros, and no gradient but a finite one."""
    p = problem(20, bias=TABLE)
    table = torch.full_like(p.position_parameters["table"], float("-inf"))
    p = replace(p, position_parameters={"table": table})
    for what, value in output_and_gradients(fused.run, p, torch.float32).items():
        assert not value.any(), what


def test_log_sum_of_a_single_key() -> None:
    q, k, v = torch.randn(3, 1, HEADS, 1, 32, device="cuda" if CUDA else "cpu").unbind()
    output, log_sum = triton_elementwise.softmax(q, k, v, scale=0.5)
    torch.testing.assert_close(output, v)
    torch.testing.assert_close(log_sum, 0.5 * (q * k).sum(-1))


@pytest.mark.parametrize("unused", [0, 1], ids=["output", "log sum"])
def test_a_result_that_is_not_used(unused: int) -> None:
    """It has no gradient at all, which is as one of zeros."""
    device = "cuda" if CUDA else "cpu"
    inputs = [torch.randn(1, HEADS, 40, 32, device=device, requires_grad=True) for _ in range(3)]
    table = torch.randn(HEADS, 9, device=device, requires_grad=True)
    results = triton_elementwise.softmax(*inputs, scale=0.3, table_hn=table)
    grads = [torch.randn_like(result) for result in results]
    used = 1 - unused
    inputs.append(table)
    alone = torch.autograd.grad(results[used], inputs, grads[used], retain_graph=True)
    grads[unused].zero_()
    both = torch.autograd.grad(results, inputs, grads)
    for one, other in zip(alone, both, strict=True):
        torch.testing.assert_close(one, other)
