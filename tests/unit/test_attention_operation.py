"""The public operation: what it computes, what it takes, what it says of mistakes."""

from __future__ import annotations

import doctest
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sinkbench import api
from sinkbench.api import AttentionSpec, Elementwise, OutputGate, ParameterSpec, ScoreBias, Softmax, attention
from sinkbench.errors import PluginError, RecipeError

SINK = AttentionSpec(
    rule=Softmax(sink_logit="sink"), window=5, parameters={"sink": ParameterSpec(shape=("heads",))}
)


def tensors(
    heads: int = 4, kv_heads: int = 2, length: int = 9, size: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(2, heads, length, size, dtype=torch.float64, requires_grad=True),
        torch.randn(2, kv_heads, length, size, dtype=torch.float64, requires_grad=True),
        torch.randn(2, kv_heads, length, size, dtype=torch.float64, requires_grad=True),
    )


def falling(distance: Tensor, heads: Tensor, parameters: Any) -> Tensor:
    slope: Tensor = parameters["slope"].exp()
    return -slope[:, None, None] * distance.abs()


BIAS = ScoreBias(function=falling, parameters={"slope": ParameterSpec(shape=("heads",))})


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_as_written_out(backend: str, prefix: int) -> None:
    """Softmax over the newest five keys and the prefix, with a sink, and scores that fall with distance."""
    query, key, value = tensors()
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(4, dtype=torch.float64, requires_grad=True)
    output = attention(
        SINK,
        query,
        key,
        value,
        parameters={"sink": sink},
        position_bias=BIAS,
        position_parameters={"slope": slope},
        prefix=prefix,
        backend=backend,
    )
    distance = torch.arange(9)[:, None] - torch.arange(9)
    score = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    score = score - slope.exp()[:, None, None] * distance.abs()
    early = torch.arange(9) < prefix
    seen = ((distance >= 0) & (distance < 5)) | (early[:, None] & early)
    weight = score.exp() * seen
    weight = weight / (weight.sum(-1, keepdim=True) + sink.exp()[:, None, None])
    expected = weight @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output, expected)
    inputs = (query, key, value, sink, slope)
    found = torch.autograd.grad(output.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(found, wanted)


def test_a_gate_belongs_to_the_layer() -> None:
    """Its parameters need not be given."""
    gate = OutputGate(function=lambda x, weights: x @ weights["gate"].T, parameters=("gate",))
    parameters = {"gate": ParameterSpec(shape=("heads", "hidden"))}
    gated = AttentionSpec(rule=Softmax(), output_gate=gate, parameters=parameters)
    assert torch.equal(attention(gated, *tensors()), attention(AttentionSpec(rule=Softmax()), *tensors()))


def test_linear_attention_of_a_long_sequence() -> None:
    """Its scores would not fit into memory."""
    query, key, value = torch.randn(3, 1, 1, 2**17, 8)
    spec = AttentionSpec(rule=Elementwise(function=lambda score: score, normalize="abs"))
    output = attention(spec, query, key, value)
    last = (query[0, 0, -1] @ key[0, 0].T) * 8**-0.5
    expected = last @ value[0, 0] / last.sum().abs().clamp(min=1)
    torch.testing.assert_close(output[0, 0, -1], expected, rtol=1e-3, atol=1e-3)


def call(**changed: Any) -> Tensor:
    query, key, value = tensors()
    given: dict[str, Any] = {"spec": SINK, "query": query, "key": key, "value": value}
    return attention(**(given | {"parameters": {"sink": torch.zeros(4)}} | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": torch.zeros(2, 3, 9, 8)}, "have shapes [2, 4, 9, 8] and [2, 3, 9, 8] and [2, 2, 9, 8]"),
        (
            {"query": torch.zeros(2, 4, 9, 8, 1)},
            "give [b, h, t, d], [b, g, t, d] and [b, g, t, d], h a multiple",
        ),
        ({"query": torch.zeros(2, 4, 9, 8)}, "differ in dtype or device"),
        ({"query": torch.zeros(2, 4, 0, 8)}, "have shapes [2, 4, 0, 8]"),
        ({"parameters": {}}, "parameters has no sink; give a tensor for each that is declared"),
        ({"parameters": {"sink": torch.zeros(3)}}, "parameters: sink has shape [3]; it is declared as [4]"),
        ({"position_bias": BIAS}, "position_parameters has no slope"),
        ({"prefix": 10}, "prefix 10 of 9 positions; give 0 to as many"),
    ],
)
def test_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=re.escape(message)) as caught:
        call(**changed)
    assert str(caught.value).startswith("sinkbench.api.attention: ")


def test_a_backend_that_cannot() -> None:
    with pytest.raises(
        RecipeError, match=r"attention: backend: linear cannot compute weights that are no prod"
    ):
        call(backend="linear")
    with pytest.raises(
        RecipeError, match="there is no backend quick; write auto or one of flash, te, linear"
    ):
        call(backend="quick")


def test_the_example_of_its_documentation() -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(attention, "attention", globs=vars(api).copy())
    runner = doctest.DocTestRunner()
    runner.run(found)
    assert runner.summarize(verbose=False) == (0, 4)
