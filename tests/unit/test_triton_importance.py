"""Sums of weights by the kernel against the plain-torch reference in float64: on a card, or in Triton's
interpreter where the package is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench.api import Elementwise, ExtraSlot, ParameterSpec, ScoreBias, Softmax, WeightRule  # noqa: E402
from sinkbench.attention import reference  # noqa: E402
from sinkbench.attention.importance import WeightSums  # noqa: E402
from sinkbench.attention.reference import Problem  # noqa: E402
from sinkbench.attention.tiles import Tiles  # noqa: E402
from sinkbench.attention.triton_importance import Scores  # noqa: E402
from tests.unit.test_triton_masks import ELU, HEADS, IDENTITY, SIGMOID, SLOPE, TABLE, make_problem  # noqa: E402

PROXY_EPS = 1e-8
RULES: dict[str, WeightRule] = {
    "softmax": Softmax(),
    "off by one": Softmax(sink_logit=0.0),
    "sink": Softmax(sink_logit="bias"),
    "sigmoid": SIGMOID,
    "elu": ELU,
    "identity": IDENTITY,
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where written functions go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SINKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def problem(rule: WeightRule, length: int, *, slot: bool = False, **more: Any) -> Problem:
    p = make_problem(SIGMOID, length, 32, **more)
    declared, parameters = dict(p.spec.parameters), dict(p.parameters)
    if slot:
        declared["slot"] = ParameterSpec(shape=("head_size",))
        parameters["slot"] = torch.linspace(-1, 1, 32, device=p.query_bhqd.device)
    spec = replace(p.spec, rule=rule, parameters=declared, extra_slot=ExtraSlot(key="slot") if slot else None)
    return replace(p, spec=spec, parameters=parameters)


def by_reference(p: Problem, count: int, leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Raw and proxy sums of the first keys, row sums, weights of the slot; in float64."""
    p = replace(
        p,
        query_bhqd=p.query_bhqd.double(),
        key_bgkd=p.key_bgkd.double(),
        parameters={name: x.double() for name, x in p.parameters.items()},
        position_parameters={name: x.double() for name, x in p.position_parameters.items()},
    )
    weights, slot = reference.weights(p)
    if leading:
        weights, slot = weights[:, :, 1:, 1:], weights[:, :, 1:, 0]
    row, absolute = weights.sum(-1), weights.abs().sum(-1)
    if slot is not None:
        row, absolute = row + slot, absolute + slot.abs()
    first = weights[..., :count].tril()
    proxy = first.abs() / (absolute[..., None] + PROXY_EPS)
    return first.sum(2), proxy.sum(2), row, slot


def assert_as_reference(p: Problem, count: int, leading: int = 0, tolerance: float = 1e-5) -> None:
    sums = WeightSums(p, leading)
    raw, proxy = sums.keys(count, PROXY_EPS)
    wanted = by_reference(p, count, leading)
    for what, a, b in zip(
        ("raw", "proxy", "row", "slot"), (raw, proxy, sums.row_bhq, sums.slot_bhq), wanted, strict=True
    ):
        assert (a is None) == (b is None), what
        if a is not None and b is not None:
            error = ((a.double() - b).abs() / b.abs().clamp(min=1.0)).max()
            assert a.shape == b.shape, what
            assert error < tolerance, f"{what}: {error:.1e}"


def test_softmax_with_slot_and_prefix() -> None:
    assert_as_reference(problem(Softmax(sink_logit="bias"), 40, slot=True, prefix=9, bias=TABLE), 20)


def test_sigmoid_with_sink_token() -> None:
    assert_as_reference(problem(SIGMOID, 41, bias=SLOPE), 40, leading=1)


@pytest.mark.full
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("extra", ["slot", "token", "neither"])
@pytest.mark.parametrize(
    ("bias", "window", "prefix"),
    [(None, None, 0), (SLOPE, 20, 0), (TABLE, None, 33), (TABLE, 1, 33)],
    ids=["causal", "slope and window", "table and prefix", "all"],
)
def test_every_kind(rule: str, extra: str, bias: ScoreBias | None, window: int | None, prefix: int) -> None:
    p = problem(RULES[rule], 70, slot=extra == "slot", bias=bias, window=window, prefix=prefix)
    assert_as_reference(p, 37, leading=int(extra == "token"))


@pytest.mark.full
@pytest.mark.parametrize("rule", ["softmax", "sigmoid"])
@pytest.mark.parametrize("length", [1, 31, 100])
def test_all_columns(rule: str, length: int) -> None:
    assert_as_reference(problem(RULES[rule], length), length)


@pytest.mark.full
@pytest.mark.parametrize(("score", "tolerance"), [(-1e4, 1e-5), (1e4, 3e-3)])
def test_extreme_scores(score: float, tolerance: float) -> None:
    """At 1e4 the scores themselves are rounded by 5e-4."""
    for rule in (Softmax(sink_logit=0.0), SIGMOID, Elementwise(function=torch.relu, normalize=True)):
        p = problem(rule, 40)
        level = torch.full((HEADS,), score, device=p.query_bhqd.device)
        assert_as_reference(replace(p, parameters={"bias": level}), 40, tolerance=tolerance)


def test_first_key_far_above_the_rest() -> None:
    """Its score is 2^288 times as likely as a row's own, more than float32 holds."""
    p = problem(Softmax(), 100)
    query, key = p.query_bhqd.clone() / 8, p.key_bgkd.clone() / 8
    query[..., 0], key[..., 0], key[:, :, 0, 0] = 10.0, 0.0, 20.0 / p.scale
    p = replace(p, query_bhqd=query, key_bgkd=key)
    weights, _ = reference.weights(p)
    assert weights[:, :, 1:, 1:].max() == 0.0
    assert_as_reference(p, 100, tolerance=1e-4)


@pytest.mark.parametrize("tiles", [None, Tiles(64, 128, 4, 2)], ids=["default", "given"])
def test_half_precision(tiles: Tiles | None) -> None:
    """In larger blocks, of few columns and of an odd number."""
    p = problem(Softmax(), 200)
    exact, rounded = Scores(**_scores(p)), Scores(**_scores(p, torch.float16))
    total, _ = exact.row_sums()
    assert (rounded.row_sums(tiles)[0] - total).abs().max() < 1e-2
    for columns, offset in ((40, 0), (199, 1)):
        wanted = exact.column_sums(-total, total.exp(), columns, offset)
        for a, b in zip(
            rounded.column_sums(-total, total.exp(), columns, offset, tiles), wanted, strict=True
        ):
            assert a is not None
            assert b is not None
            assert ((a - b) / b).abs().max() < 1e-2


def _scores(p: Problem, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"query_bhtd": p.query_bhqd.to(dtype), "key_bgtd": p.key_bgkd.to(dtype), "scale": p.scale}
