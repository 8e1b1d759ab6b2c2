"""The kernels of kernel attention against float64: on a card, or in Triton's interpreter if it is there."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench.api import AttentionSpec, Elementwise, ExtraSlot, FeatureMap, ParameterSpec  # noqa: E402
from sinkbench.attention import linear, reference, triton_linear  # noqa: E402
from sinkbench.attention.reference import Problem  # noqa: E402

Normalize = Literal[True, False, "abs"]
Shape = tuple[int, int, int, int, int, int]
DEVICE = "cuda" if CUDA else "cpu"
NORMALIZERS: tuple[Normalize, ...] = (False, True, "abs")
SMALL: list[Shape] = [(1, 1, 1, 1, 16, 16), (1, 4, 2, 17, 8, 24), (1, 2, 1, 70, 32, 32)]
"""Sequences, heads, kv heads, length, size of the features, head size."""
LARGE: list[Shape] = (
    [
        (2, 4, 2, 128, 64, 64),
        (2, 4, 1, 300, 96, 96),
        (1, 2, 2, 300, 128, 128),
        (1, 2, 1, 150, 256, 256),
        (1, 3, 1, 1000, 80, 40),
    ]
    if CUDA
    else [(1, 2, 1, 128, 64, 64), (1, 1, 1, 300, 96, 96), (1, 1, 1, 70, 128, 128), (1, 1, 1, 40, 256, 256)]
)
SHAPES = [*SMALL, *(pytest.param(shape, marks=[] if CUDA else [pytest.mark.full]) for shape in LARGE)]
DTYPES = [(torch.float32, 1e-5)] + ([(torch.bfloat16, 1e-2)] if CUDA else [])
SLOT = ExtraSlot(key="key", value="value")


def itself(score: Tensor) -> Tensor:
    return score


def positive(x: Tensor, _: Any) -> Tensor:
    return x.square()


def make_problem(
    shape: Shape, normalize: Normalize, dtype: torch.dtype, slot: ExtraSlot | None = None
) -> Problem:
    """Queries, keys and values are parts of one tensor in which positions lie first. Normalised by their sum,
    weights are positive."""
    batch, heads, groups, length, features, head_size = shape
    generator = torch.Generator(DEVICE).manual_seed(length + features)
    mixed = torch.randn(length, batch, heads + 2 * groups, 256, generator=generator, device=DEVICE).to(dtype)
    q, k, v = (x.permute(1, 2, 0, 3) for x in mixed.split([heads, groups, groups], 2))
    position = torch.arange(length, device=DEVICE)
    spec = AttentionSpec(
        rule=Elementwise(function=itself, normalize=normalize),
        feature_map=FeatureMap(function=positive) if normalize is True else None,
        extra_slot=slot,
        parameters={} if slot is None else dict.fromkeys(("key", "value"), ParameterSpec(shape=(features,))),
    )
    return Problem(
        spec=spec,
        query_bhqd=q[..., :features],
        key_bgkd=k[..., :features],
        value_bgkd=v[..., :head_size],
        position_q=position,
        position_k=position,
        aligned=True,
        scale=head_size**-0.5,
        heads=torch.arange(heads, device=DEVICE),
        parameters={name: mixed[0, 0, 0, :features].clone() for name in spec.parameters},
    )


def results(run: Any, p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and all gradients, of the problem in a dtype."""
    inputs = {"query": p.query_bhqd, "key": p.key_bgkd, "value": p.value_bgkd}
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    parameters = {f"slot's {name}": x.to(dtype).requires_grad_() for name, x in p.parameters.items()}
    output = run(
        replace(
            p,
            query_bhqd=inputs["query"],
            key_bgkd=inputs["key"],
            value_bgkd=inputs["value"],
            parameters=dict(zip(p.parameters, parameters.values(), strict=True)),
        )
    )
    inputs |= parameters
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    grads = torch.autograd.grad(output, list(inputs.values()), direction)
    return {"output": output.detach(), **dict(zip(inputs, grads, strict=True))}


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for what, value in found.items():
        exact = wanted[what]
        assert value.shape == exact.shape
        # The gradients of a single key's normalised weight are differences of equal numbers.
        error = float((value.double() - exact).norm() / exact.norm().clamp(min=1.0))
        assert error < tolerance, f"{what}: relative error {error:.1e}"


@pytest.fixture
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """``linear.run`` takes the kernels, in the interpreter too."""
    monkeypatch.setattr(linear, "_in_kernels", lambda *_: True)


@pytest.mark.usefixtures("in_kernels")
@pytest.mark.parametrize("normalize", NORMALIZERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_output_and_gradients(
    shape: Shape, normalize: Normalize, dtype: torch.dtype, tolerance: float
) -> None:
    p = make_problem(shape, normalize, dtype)
    compare(results(linear.run, p, dtype), results(reference.attend, p, torch.float64), tolerance)


@pytest.mark.usefixtures("in_kernels")
@pytest.mark.parametrize("normalize", [False, "abs"], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_an_extra_slot(normalize: Normalize, dtype: torch.dtype, tolerance: float) -> None:
    """It joins sums that both have gradients."""
    p = make_problem((1, 2, 1, 40, 16, 16), normalize, dtype, SLOT)
    compare(results(linear.run, p, dtype), results(reference.attend, p, torch.float64), tolerance)


def test_sums_are_those_of_torch() -> None:
    p = make_problem((1, 4, 2, 40, 16, 32), False, torch.float32)
    inputs = [x.detach().clone().requires_grad_() for x in (p.query_bhqd, p.key_bgkd, p.value_bgkd)]
    query, key, value = inputs
    by_torch = linear.causal_sums(query.unflatten(1, (2, 2)), key, value, 16)
    wanted = [x.flatten(1, 2) for x in by_torch]
    found = triton_linear.sums(query, key, value, scale=1.0)
    torch.testing.assert_close(list(found), wanted, rtol=1e-4, atol=1e-4)
    directions = [torch.randn(x.shape[::-1], device=DEVICE).permute(*reversed(range(x.dim()))) for x in found]
    grads = torch.autograd.grad(found, inputs, directions)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, inputs, directions), rtol=1e-4, atol=1e-4)


def test_inputs_of_any_strides() -> None:
    """Features that do not lie next to one another are copied; a gradient may be one number for all."""
    transposed = [torch.randn(1, 2, 16, 20, device=DEVICE).transpose(-1, -2) for _ in range(3)]
    found = []
    for inputs in (transposed, [x.contiguous() for x in transposed]):
        given = [x.detach().requires_grad_() for x in inputs]
        output = triton_linear.attend(given[0], given[1], given[2], normalize="abs", eps=0.0, scale=0.3)
        found.append([output, *torch.autograd.grad(output.sum(), given)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not CUDA, reason="takes a card")
def test_a_long_sequence_and_the_same_bits_each_time() -> None:
    p = make_problem((1, 1, 1, 65536, 64, 64), "abs", torch.bfloat16)
    once, again = (results(linear.run, p, torch.bfloat16) for _ in range(2))
    for name in once:
        assert torch.equal(once[name], again[name]), name
    query, key, value = (x.double() for x in (p.query_bhqd, p.key_bgkd, p.value_bgkd))
    score = p.scale * (query[:, :, -1:] @ key.transpose(-1, -2))
    expected = (score @ value / score.sum(-1, keepdim=True).abs().clamp(min=1.0))[:, :, 0]
    error = (once["output"][:, :, -1].double() - expected).norm() / expected.norm()
    assert error < 1e-2, f"relative error {error:.1e}"
