"""Prefix, window and biases in the fused kernel against the plain-torch reference in float64: on a card, or
in Triton's interpreter where the package is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench_plugins.attention import _triton, similarity  # noqa: E402

from sinkbench.api import AttentionSpec, Elementwise, ParameterSpec, ScoreBias  # noqa: E402
from sinkbench.attention import fused, reference, triton_elementwise, triton_tensors  # noqa: E402
from sinkbench.attention.reference import Problem  # noqa: E402
from tests.unit.attention_problem import converted  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
HEADS, GROUPS = 2, 1
NEAR, FAR = 7, 20
"""The table of the test has one entry for each distance between them, and one beyond each."""

SLOPE = ScoreBias(
    function=lambda distance, heads, p: -p["slope"][:, None, None] * distance.abs(),
    parameters={"slope": ParameterSpec(shape=("heads",))},
    slope=lambda heads, p: p["slope"],
)
TABLE = ScoreBias(
    function=lambda distance, heads, p: p["table"][:, distance.clamp(-NEAR, FAR) + NEAR],
    parameters={"table": ParameterSpec(shape=("heads", NEAR + FAR + 1))},
)
SIGMOID = Elementwise(function=similarity.sigmoid, normalize=True, fused=_triton.fused_sigmoid)
IDENTITY = Elementwise(function=lambda s: s, normalize="abs")
RELU = Elementwise(function=torch.relu, normalize=True)
ELU = Elementwise(function=similarity.elu_plus_one, fused=_triton.fused_elu)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where written functions go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SINKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_problem(
    rule: Elementwise,
    length: int,
    head_size: int,
    *,
    window: int | None = None,
    prefix: int = 0,
    bias: ScoreBias | None = None,
    **more: Any,
) -> Problem:
    generator = torch.Generator(DEVICE).manual_seed(length)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE)

    # Positions lie first in memory, as the projections write them, and only every other is used.
    q, k, v = (
        random(2 * length, 1, heads, head_size)[::2].permute(1, 2, 0, 3) for heads in (HEADS, GROUPS, GROUPS)
    )
    position = torch.arange(length, device=DEVICE)
    declared = {"bias": ParameterSpec(shape=("heads",))}
    spec = AttentionSpec(rule=rule, parameters=declared, score_bias="bias", window=window, **more)
    learned = {} if bias is None else {
        name: 0.3 * random(HEADS, *(size for size in parameter.shape[1:] if isinstance(size, int)))
        for name, parameter in bias.parameters.items()
    }  # fmt: skip
    return Problem(
        spec=spec,
        query_bhqd=q,
        key_bgkd=k,
        value_bgkd=v,
        position_q=position,
        position_k=position,
        aligned=True,
        scale=head_size**-0.5,
        heads=torch.arange(HEADS, device=DEVICE),
        parameters={"bias": random(HEADS)},
        position_bias=bias,
        position_parameters=learned,
        prefix=prefix,
    )


def output_and_gradients(
    run: Callable[[Problem], Tensor], p: Problem, dtype: torch.dtype
) -> dict[str, Tensor]:
    p = converted(p, lambda x: x.detach().to(dtype).requires_grad_())
    inputs = {"dq": p.query_bhqd, "dk": p.key_bgkd, "dv": p.value_bgkd}
    inputs |= {f"d{name}": x for name, x in {**p.parameters, **p.position_parameters}.items()}
    output = run(p)
    generator = torch.Generator(DEVICE).manual_seed(0)
    grad = torch.randn(output.shape, generator=generator, device=DEVICE).to(dtype)
    gradients = torch.autograd.grad(output, list(inputs.values()), grad)
    return {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}


def assert_as_reference(
    p: Problem,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    absolute: Mapping[str, float] | None = None,
) -> None:
    """On the inputs as the kernel gets them, since rounding a slope itself moves the scores of far keys.

    Args:
        tolerance: of each result, relative to its norm.
        absolute: what the norm of the error of a result may be beside that, by its name.
    """
    found = output_and_gradients(fused.run, p, dtype)
    exact = output_and_gradients(reference.attend, converted(p, lambda x: x.to(dtype)), torch.float64)
    for what, wanted in exact.items():
        error = (found[what].double() - wanted).norm()
        allowed = tolerance * wanted.norm().clamp(min=0.3) + (absolute or {}).get(what, 0.0)
        assert error < allowed, f"{what}: error {error:.1e} of {wanted.norm():.1e}, allowed {allowed:.1e}"


def test_prefix_and_table() -> None:
    assert_as_reference(make_problem(SIGMOID, 75, 32, prefix=40, bias=TABLE))


def test_prefix_window_and_slope() -> None:
    assert_as_reference(make_problem(ELU, 70, 48, prefix=20, window=9, bias=SLOPE))


@pytest.mark.full
@pytest.mark.parametrize("rule", [SIGMOID, IDENTITY], ids=["sigmoid", "identity"])
@pytest.mark.parametrize("bias", [None, SLOPE, TABLE], ids=["none", "slope", "table"])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("prefix", [0, 50, 500])
def test_every_mask(rule: Elementwise, bias: ScoreBias | None, window: int | None, prefix: int) -> None:
    length = 600 if CUDA else 90
    assert_as_reference(make_problem(rule, length, 32, window=window, prefix=prefix, bias=bias))


@pytest.mark.full
@pytest.mark.parametrize("head_size", [32, 48, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("length", [1, 65])
def test_every_size(head_size: int, length: int) -> None:
    p = make_problem(SIGMOID, length, head_size, prefix=5, bias=TABLE)
    assert_as_reference(p)
    if CUDA:
        assert_as_reference(p, torch.bfloat16, 2e-2)


@pytest.mark.full
def test_output_scale() -> None:
    assert_as_reference(make_problem(SIGMOID, 40, 32, output_scale=0.5))


def test_rows_without_weight() -> None:
    """relu of scores that are all below 0: rows of zeros, and no gradient but a finite one."""
    p = make_problem(RELU, 20, 32)
    p = replace(p, parameters={"bias": torch.full((HEADS,), -1e4, device=DEVICE)})
    for what, value in output_and_gradients(fused.run, p, torch.float32).items():
        assert not value.any(), what


@pytest.mark.full
@pytest.mark.parametrize("bias", [-30.0, -1e4, 1e4])
@pytest.mark.parametrize("normalize", [False, True, "abs"])
def test_extreme_scores(bias: float, normalize: bool | Literal["abs"]) -> None:
    """Rows that sum to nearly nothing: there the constant of the normaliser counts."""
    p = make_problem(replace(SIGMOID, normalize=normalize), 50, 32)
    assert_as_reference(replace(p, parameters={"bias": torch.full((HEADS,), bias, device=DEVICE)}))


def test_gradients_are_the_same_bits_each_time() -> None:
    p = make_problem(SIGMOID, 40, 32, prefix=9, bias=TABLE)
    first, second = (output_and_gradients(fused.run, p, torch.float32) for _ in range(2))
    for what, value in first.items():
        assert torch.equal(value, second[what]), what


@pytest.mark.full
def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """A head's last row may lie 2^31 elements behind its first."""
    length, head_size = 40, 16
    stride = 2**31 // (length - 2)
    if CUDA:
        storage = torch.empty(length * stride, device=DEVICE)
    else:  # of a file with holes
        storage = torch.from_file(str(tmp_path / "storage"), shared=True, size=length * stride)
    far = storage.as_strided((1, 1, length, head_size), (0, 0, stride, 1))
    near = torch.randn(1, 1, length, head_size, device=DEVICE)
    far.copy_(near)
    assert triton_tensors.is_wide(far)
    function, derivative = _triton.fused_sigmoid(torch.float32)

    def attend(key: Tensor) -> Tensor:
        return triton_elementwise.attend(
            near, key, key, function=function, derivative=derivative, normalize=True, scale=0.25
        )

    assert torch.equal(attend(far), attend(near))
