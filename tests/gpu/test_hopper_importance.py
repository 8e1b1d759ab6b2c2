"""Importance's kernels for Hopper against the formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper card")
if HOPPER:
    from sinkbench_plugins.attention import _triton

    from sinkbench.attention import hopper
    from sinkbench.attention.triton_importance import Scores

SCALE = 0.2


@dataclass(frozen=True)
class Case:
    softmax: bool = True
    heads: tuple[int, int] = (4, 2)
    length: int = 333
    head_size: int = 96
    bias: bool = False
    position: str | None = None
    window: int | None = None
    prefix: int = 0
    columns: int = 64
    offset: int = 0
    far_above: bool = False
    """One of the first keys' scores exceed all others by more than a float32 exponential can hold."""

    def __str__(self) -> str:
        default = Case()
        said = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        return "-".join(f"{name}={value}" for name, value in said.items()) or "default"


CASES = [
    *(Case(s, head_size=d, columns=c) for s in (True, False) for d in (64, 96, 128) for c in (64, 333)),
    *(Case(s, length=t, columns=min(t, 300)) for s in (True, False) for t in (1, 7, 64, 65, 2048)),
    *(Case(s, position=p, bias=not s) for s in (True, False) for p in ("slope", "table")),
    *(Case(s, window=90, columns=333) for s in (True, False)),
    *(Case(s, prefix=100, columns=200) for s in (True, False)),
    Case(prefix=100, window=40, columns=200),
    Case(columns=100, offset=130),
    Case(far_above=True, length=500),
]


def inputs(case: Case) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(len(str(case)))
    heads, kv_heads = case.heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    query, key = (
        random(case.length, 2, n, case.head_size).bfloat16().permute(1, 2, 0, 3) for n in case.heads
    )
    if case.far_above:
        key[:, :, 3] = query.unflatten(1, (kv_heads, -1)).sum(2)[:, :, -1] * 40
    return {
        "query_bhtd": query,
        "key_bgtd": key,
        "scale": SCALE,
        "bias_h": random(heads) if case.bias else None,
        "window": case.window,
        "prefix": case.prefix,
        "slope_h": 0.1 * random(heads) if case.position == "slope" else None,
        "table_hn": random(heads, case.length) if case.position == "table" else None,
    }


def by_formula(case: Case, given: dict[str, Any], raw: Tensor, proxy: Tensor) -> list[Tensor]:
    q, k = given["query_bhtd"].double(), given["key_bgtd"].double()
    s = SCALE * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    within = torch.arange(case.length, device="cuda")
    distance = within[:, None] - within
    seen = distance >= 0
    own = seen.clone()
    if case.window is not None:
        seen = seen & (distance < case.window)
    if case.prefix:
        seen = seen | ((within[:, None] < case.prefix) & (within < case.prefix))
    if given["bias_h"] is not None:
        s = s + given["bias_h"][:, None, None]
    if given["slope_h"] is not None:
        s = s - given["slope_h"][:, None, None] * distance.abs()
    if given["table_hn"] is not None:
        s = s + given["table_hn"][:, distance.clamp(min=0)]
    columns = slice(case.offset, case.offset + case.columns)
    if case.softmax:
        s = s.masked_fill(~seen, float("-inf"))
        weight = (s + raw.double()[..., None]).exp() * own
        rows = [s.logsumexp(-1)]
        return [*rows, weight.sum(2)[..., columns], (weight * proxy[..., None]).sum(2)[..., columns]]
    f = s.sigmoid() * seen
    sums = [(f * own * factor.double()[..., None]).sum(2)[..., columns] for factor in (raw, proxy)]
    return [f.sum(-1), f.abs().sum(-1), *sums]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums(case: Case) -> None:
    given = inputs(case)
    assert hopper.can_read(given["query_bhtd"], given["key_bgtd"]), hopper.missing()
    layer = Scores(**given, function=None if case.softmax else _triton.sigmoid)
    total, absolute = layer.row_sums()
    raw = -total if case.softmax else torch.rand_like(total)
    proxy = torch.rand_like(total)
    columns = layer.column_sums(raw, proxy, case.columns, case.offset)
    found = [x for x in (total, absolute, *columns) if x is not None]
    tolerance = 1e-2 if case.far_above else 1e-3  # whose scores of thousands are rounded in float32
    for what, (a, b) in enumerate(zip(found, by_formula(case, given, raw, proxy), strict=True)):
        error = float((a.double() - b).norm() / b.norm().clamp(min=1e-3))
        assert error < tolerance, f"result {what}: relative error {error:.1e}"


def test_without_a_second_factor() -> None:
    given = inputs(Case())
    layer = Scores(**given, function=None)
    raw = -layer.row_sums()[0]
    first, none = layer.column_sums(raw, None, 64, 0)
    assert none is None
    assert torch.equal(first, layer.column_sums(raw, torch.ones_like(raw), 64, 0)[0])
