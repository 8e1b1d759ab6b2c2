"""The attention kernels for Hopper against the formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper card")
if HOPPER:
    from sinkbench_plugins.attention import _triton

    from sinkbench.attention import hopper, triton_call, triton_elementwise, triton_tensors

TOLERANCE = 1e-2
"""Relative, of outputs and all gradients in 16 bits; more only where the Triton kernels err as much."""


@dataclass(frozen=True)
class Case:
    """Attributes:
    rule: sigmoid, elu, or softmax.
    normalize: of an elementwise rule.
    position: slope, table, or a table that ends after so many distances.
    """

    rule: str = "sigmoid"
    normalize: bool | Literal["abs"] = False
    heads: tuple[int, int] = (4, 2)
    length: int = 333
    head_size: int = 96
    bias: bool = False
    position: str | int | None = None
    window: int | None = None
    prefix: int = 0
    documents: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    scale: float = 0.2
    shift: float = field(default=0.0, kw_only=True)

    def __str__(self) -> str:
        default = Case()
        said = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        return "-".join(f"{name}={value}" for name, value in said.items()) or "default"


RULES: tuple[tuple[str, bool | Literal["abs"]], ...] = (
    ("sigmoid", False), ("sigmoid", True), ("sigmoid", "abs"), ("elu", False), ("elu", True),
    ("softmax", False),
)  # fmt: skip
CASES = [
    *(Case(rule, n, head_size=d) for rule, n in RULES for d in (32, 64, 80, 96, 128)),
    *(Case(rule, n, length=t) for rule, n in RULES[::2] for t in (1, 7, 63, 64, 65, 128, 1000, 2048)),
    *(Case(rule, n, position=p, bias=rule != "softmax") for rule, n in RULES for p in ("slope", "table", 40)),
    *(Case(rule, n, position=p, window=90) for rule, n in RULES[::3] for p in (None, "slope", 40)),
    *(Case(rule, n, position=p, prefix=100) for rule, n in RULES[::3] for p in (None, "slope", "table")),
    *(Case(rule, n, documents=(0, 5, 130, 200)) for rule, n in RULES),
    Case("softmax", position="slope", documents=(0, 1, 64, 65, 320)),
    Case("softmax", position=40, documents=(0, 100, 300), head_size=128),
    Case("sigmoid", True, documents=(0, 100), window=50, bias=True),
    Case("sigmoid", position=100, length=1500, head_size=128, bias=True),
    Case("softmax", position=128, length=1500, head_size=128),
    Case("softmax", position="slope", length=1500, head_size=128),
    *(Case(rule, n, dtype=torch.float16) for rule, n in RULES[::2]),
    *(Case(rule, n, scale=20.0) for rule, n in RULES[1::2]),
    *(Case(rule, n, bias=True, shift=-20.0) for rule, n in RULES[:2]),
]


class Inputs:
    """Random ones, positions first in memory and heads as slices of what is wider, as projections write."""

    def __init__(self, case: Case) -> None:
        heads, kv_heads = case.heads
        generator = torch.Generator("cuda").manual_seed(len(str(case)))

        def random(number: int) -> Tensor:
            wide = torch.randn(
                case.length, 2, number, 2 * case.head_size, generator=generator, device="cuda"
            ).to(case.dtype)
            return wide[..., case.head_size :].permute(1, 2, 0, 3)

        self.qkv = [random(n).requires_grad_() for n in (heads, kv_heads, kv_heads)]
        self.grad = random(heads)
        made = torch.randn(heads, case.length, generator=generator, device="cuda")
        self.bias = (made[:, 0] + case.shift).requires_grad_() if case.bias else None
        self.slope = (0.1 * made[:, 1 % case.length]).requires_grad_() if case.position == "slope" else None
        self.table = None
        if case.position == "table" or isinstance(case.position, int):
            size = case.length if case.position == "table" else min(case.position, case.length)
            ahead = torch.randn(heads, max(case.prefix - 1, 0), generator=generator, device="cuda")
            self.table = torch.cat([ahead, made[:, :size]], 1).requires_grad_()
        self.start = None
        if case.documents:
            begins = torch.tensor(case.documents, device="cuda")
            within = torch.arange(case.length, device="cuda")
            self.start = begins[torch.bucketize(within, begins, right=True) - 1].expand(2, -1).contiguous()

    @property
    def wanted(self) -> list[Tensor]:
        """What has gradients."""
        return [*self.qkv, *(x for x in (self.bias, self.slope, self.table) if x is not None)]


def by_formula(case: Case, given: Inputs) -> list[Tensor]:
    """Output and gradients in float64, with all scores at once."""
    exact = {id(x): x.detach().double().requires_grad_() for x in given.wanted}
    q, k, v = (exact[id(x)] for x in given.qkv)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) * case.scale
    within = torch.arange(case.length, device="cuda")
    distance = within[:, None] - within
    seen = distance >= 0
    if case.window is not None:
        seen = seen & (distance < case.window)
    if case.prefix:
        seen = seen | ((within[:, None] < case.prefix) & (within < case.prefix))
    seen = seen.expand(2, 1, -1, -1)
    if given.start is not None:
        seen = seen & (within >= given.start[:, None, :, None])
    if given.bias is not None:
        s = s + exact[id(given.bias)][:, None, None]
    if given.slope is not None:
        s = s - exact[id(given.slope)][:, None, None] * distance.abs()
    if given.table is not None:
        ahead = max(case.prefix - 1, 0)
        last = given.table.shape[1] - 1
        s = s + exact[id(given.table)][:, (distance + ahead).clamp(0, last)]
    if case.rule == "softmax":
        weight = s.masked_fill(~seen, float("-inf")).softmax(-1)
    else:
        weight = (s.sigmoid() if case.rule == "sigmoid" else torch.nn.functional.elu(s) + 1) * seen
        if case.normalize:
            total = weight.sum(-1, keepdim=True)
            weight = weight / (total.abs().clamp(min=1) if case.normalize == "abs" else total + 1e-8)
    output = weight @ v
    return [output, *torch.autograd.grad(output, list(exact.values()), given.grad.double())]


def by_kernels(case: Case, given: Inputs) -> list[Tensor]:
    shared: dict[str, Any] = {
        "scale": case.scale,
        "window": case.window,
        "prefix": case.prefix,
        "slope_h": given.slope,
        "table_hn": given.table,
        "document_start_bt": given.start,
    }
    if case.rule == "softmax":
        output, _ = triton_elementwise.softmax(*given.qkv, **shared)
    else:
        fused = _triton.fused_sigmoid if case.rule == "sigmoid" else _triton.fused_elu
        function, derivative = fused(case.dtype)
        output = triton_elementwise.attend(
            *given.qkv,
            function=function,
            derivative=derivative,
            normalize=case.normalize,
            bias_h=given.bias,
            **shared,
        )
    return [output, *torch.autograd.grad(output, given.wanted, given.grad)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed sizes of blocks, and results that hold what nobody wrote."""
    monkeypatch.setenv("SINKBENCH_AUTOTUNE", "0")
    monkeypatch.delenv("SINKBENCH_HOPPER", raising=False)
    empty = triton_tensors.by_position
    monkeypatch.setattr(triton_call, "by_position", lambda like: empty(like).fill_(float("nan")))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Inputs(case)
    assert hopper.can_read(*given.qkv, given.grad), hopper.missing()
    wanted = by_formula(case, given)
    errors = relative(by_kernels(case, given), wanted)
    if max(errors) >= TOLERANCE:  # as where a row's weights add up to nothing
        monkeypatch.setattr(hopper, "can_read", lambda *_: False)
        of_triton = relative(by_kernels(case, given), wanted)
        assert all(a < max(TOLERANCE, 1.3 * b) for a, b in zip(errors, of_triton, strict=True)), (
            f"errors {errors}, of the Triton kernels {of_triton}"
        )


def relative(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [
        float((a.double() - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(found, wanted, strict=True)
    ]


def test_the_same_bits_again() -> None:
    case = Case("softmax", position=40, length=700, head_size=128)
    given = Inputs(case)
    first = by_kernels(case, given)
    assert all(torch.equal(a, b) for a, b in zip(first, by_kernels(case, given), strict=True))


@pytest.mark.parametrize("tensor", ["float32", "large heads", "odd rows", "unaligned", "broadcast"])
def test_other_tensors_are_left_to_triton(tensor: str) -> None:
    q = torch.zeros(2, 4, 10, 96, dtype=torch.bfloat16, device="cuda")
    others = {
        "float32": q.float(),
        "large heads": torch.zeros(2, 4, 10, 256, dtype=torch.bfloat16, device="cuda"),
        "odd rows": torch.zeros(2, 4, 10, 97, dtype=torch.bfloat16, device="cuda")[..., :96],
        "unaligned": torch.zeros(2 * 4 * 10 * 96 + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(q),
        "broadcast": q[:, :1].expand(2, 4, 10, 96),
    }
    assert hopper.can_read(q)
    assert not hopper.can_read(others[tensor])
