"""Triton functions written from plain-torch similarities: f and f' against autograd, and what has no form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sinkbench.api import AttentionSpec, Elementwise
from sinkbench.attention import backends, elementwise, fused
from sinkbench.attention.backends import Use
from tests.unit import new_similarities


def two_sided(score: Tensor) -> Tensor:
    return torch.where(score > 0, score + 1, 1 / (1 - score))


def clamped(score: Tensor) -> Tensor:
    return score.clamp(-1, 2) + torch.sigmoid(score) * torch.tensor(2.0)


def exponential(score: Tensor) -> Tensor:
    return 2**score + 3.0 ** (-score.abs())


def in_place(score: Tensor) -> Tensor:
    return score.mul(2).add_(1)


def constant(score: Tensor) -> Tensor:
    return torch.ones_like(score)


def itself(score: Tensor) -> Tensor:
    return score


HAVE_A_FORM = (
    new_similarities.softsign_squared,
    new_similarities.log_power,
    new_similarities.gaussian_slope,
    two_sided,
    clamped,
    exponential,
    in_place,
    constant,
    itself,
    functional.softplus,
    functional.silu,
    functional.mish,
    functional.gelu,
    functional.selu,
    functional.leaky_relu,
    functional.hardsigmoid,
    functional.logsigmoid,
    functional.tanhshrink,
)


@pytest.mark.parametrize("function", HAVE_A_FORM, ids=lambda f: f.__name__)
def test_value_and_derivative(function: Callable[[Tensor], Tensor]) -> None:
    score = torch.linspace(-8, 8, 640, dtype=torch.float64).view(4, 160).requires_grad_()
    expected = function(score)
    gradient = torch.zeros_like(score)
    if expected.requires_grad:
        (gradient,) = torch.autograd.grad(expected.sum(), score)
    ours, derivative = elementwise.run_in_torch(elementwise.write(function).body)
    single = score.detach().float()
    value = ours(single)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(derivative(single, value).double(), gradient, rtol=1e-5, atol=2e-6)


def row_softmax(score: Tensor) -> Tensor:
    return score.softmax(-1)


def by_its_mean(score: Tensor) -> Tensor:
    return score - score.mean(-1, keepdim=True)


def by_position(score: Tensor) -> Tensor:
    return score * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def branching(score: Tensor) -> Tensor:
    return score if score.max() > 0 else -score


def special(score: Tensor) -> Tensor:
    return score.lgamma()


def low(score: Tensor) -> Tensor:
    return score.bfloat16().float()


def shuffled(score: Tensor) -> Tensor:
    return score + torch.randn_like(score)


HAVE_NONE: dict[Callable[[Tensor], Tensor], str] = {
    row_softmax: "the operation aten._softmax.default",
    by_its_mean: "the operation aten.mean.dim",
    by_position: "a tensor of several constants",
    branching: "a function that cannot be traced (RuntimeError: ",
    special: "the operation aten.lgamma.default",
    low: "a conversion to torch.bfloat16",
    shuffled: "the operation aten.randn_like.default",
}


@pytest.mark.parametrize("function", HAVE_NONE, ids=lambda f: f.__name__)
def test_what_has_no_form_is_named(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(elementwise.NoTritonForm) as caught:
        elementwise.write(function)
    assert str(caught.value).startswith(HAVE_NONE[function])


def test_a_wrong_form_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(elementwise._UNARY, "cos", "tl.sin({0})")

    def wave(score: Tensor) -> Tensor:
        return score.cos()

    with pytest.raises(elementwise.NoTritonForm, match="its value differs in Triton"):
        elementwise.write(wave)


CARD = Use(device="cuda", head_size=64)


def spec(function: Callable[[Tensor], Tensor], **options: Any) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=function, **options))


def test_a_card_gets_the_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: name)  # type: ignore[attr-defined]
    assert backends.choose(spec(new_similarities.log_power), CARD, "auto").name == "triton"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert backends.choose(spec(special), CARD, "auto").name == "eager"
    (record,) = caplog.records
    assert record.getMessage() == (
        "attention is computed in plain torch because of the operation aten.lgamma.default, "
        "which has no Triton form"
    )


def test_a_cpu_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(function: Callable[[Tensor], Tensor]) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(elementwise, "write", untouched)
    assert backends.choose(spec(special), Use(device="cpu", head_size=64), "auto").name == "eager"
