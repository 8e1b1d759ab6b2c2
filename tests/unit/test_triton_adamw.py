"""AdamW in one kernel against torch's in float64: on a card, or in Triton's interpreter where the package is
there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

DEVICE = "cuda" if CUDA else "cpu"
SIZES = ((5000, 1, 7, 4096), (33, 64))
"""Of the shards of two groups."""
DECAY = (0.1, 0.0)
STEPS = 20
ULP = 2.0**-23


class Problem:
    """Shards of random numbers whose arrays begin ``offset`` elements behind an aligned address."""

    def __init__(
        self, offset: int = 0, dtype: torch.dtype | None = None, sizes: Any = SIZES, **setting: Any
    ) -> None:
        from sinkbench.megatron.triton_adamw import Group, Shard, Table

        self.generator = torch.Generator().manual_seed(0)
        self.setting = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, **setting}

        def array(size: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size + offset, dtype=of, device=DEVICE)[offset:]

        flat = [size for group in sizes for size in group]
        self.shards = [
            Shard(
                parameter=array(size).copy_(0.02 * self.draw(size)),
                gradient=array(size),
                exp_avg=array(size),
                exp_avg_sq=array(size),
                model=None if dtype is None else array(size, dtype),
                counts=number != 1,
            )
            for number, size in enumerate(flat)
        ]
        self.groups = [
            Group(count=len(group), weight_decay=decay, **self.setting)
            for group, decay in zip(sizes, DECAY, strict=True)
        ]
        self.steps = torch.zeros(len(flat), device=DEVICE)
        self.table = Table(self.shards, self.steps)
        parameters = iter([x.parameter.cpu().double().requires_grad_() for x in self.shards])
        groups = [
            {"params": [next(parameters) for _ in group], "weight_decay": decay}
            for group, decay in zip(sizes, DECAY, strict=True)
        ]
        self.reference = torch.optim.AdamW(groups, **self.setting)
        self.parameters = [x for group in self.reference.param_groups for x in group["params"]]

    def draw(self, size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def step(self, divisor: float = 3.7, refused: bool = False) -> None:
        """Of both; the reference's is not refused."""
        for shard, parameter in zip(self.shards, self.parameters, strict=True):
            gradient = self.draw(len(parameter)) * self.draw(len(parameter)) ** 2
            shard.gradient.copy_(gradient)
            parameter.grad = gradient.double() / divisor
        scale, flag = torch.tensor(divisor, device=DEVICE), torch.tensor(float(refused), device=DEVICE)
        before = [shard.gradient.clone() for shard in self.shards]
        self.table.update(self.groups, scale, flag)
        assert all(torch.equal(x.gradient, y) for x, y in zip(self.shards, before, strict=True))
        if not refused:
            self.reference.step()

    def everything(self) -> list[Tensor]:
        return [self.steps.clone(), *(x.clone() for shard in self.shards for x in shard.arrays())]


@pytest.mark.parametrize("setting", [
    {}, {"betas": (0.0, 0.0)}, {"betas": (0.9, 0.999), "eps": 1e-3}
], ids=str)  # fmt: skip
@pytest.mark.parametrize("offset", [0, 2, 3])
def test_as_in_float64(offset: int, setting: dict[str, Any]) -> None:
    """After twenty updates parameters differ by the rounding of as many sums, and of the updates."""
    problem = Problem(offset, **setting)
    for _ in range(STEPS):
        problem.step()
    assert problem.steps.tolist() == [STEPS] * len(problem.shards)
    for shard, parameter in zip(problem.shards, problem.parameters, strict=True):
        state = problem.reference.state[parameter]
        expected = parameter.detach()
        # A gradient near zero loses digits to the moment it nearly cancels.
        torch.testing.assert_close(
            shard.exp_avg.cpu().double(), state["exp_avg"], rtol=8 * ULP, atol=40 * ULP
        )
        torch.testing.assert_close(
            shard.exp_avg_sq.cpu().double(), state["exp_avg_sq"], rtol=16 * ULP, atol=1e-30
        )
        torch.testing.assert_close(
            shard.parameter.cpu().double(), expected, rtol=STEPS * ULP, atol=STEPS * 1e-3 * 4 * ULP
        )


@pytest.mark.parametrize("beta", [0.95, 0.999])
def test_the_first_update_is_exact_to_two_bits(beta: float) -> None:
    """Of parameters that are 0, which have no rounding of their own."""
    problem = Problem(betas=(0.9, beta))
    for shard, parameter in zip(problem.shards, problem.parameters, strict=True):
        shard.parameter.zero_()
        parameter.data.zero_()
    problem.step()
    for shard, parameter in zip(problem.shards, problem.parameters, strict=True):
        torch.testing.assert_close(shard.parameter.cpu().double(), parameter.detach(), rtol=3 * ULP, atol=0)


@pytest.mark.parametrize("offset", [0, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_the_model_gets(dtype: torch.dtype, offset: int) -> None:
    problem = Problem(offset, dtype)
    problem.step()
    for shard in problem.shards:
        assert shard.model is not None
        expected = shard.parameter.to(dtype)
        if CUDA:
            assert torch.equal(shard.model, expected)
        else:  # the interpreter cuts bits off, where a card rounds
            torch.testing.assert_close(shard.model, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("before", [0, 2])
def test_a_refused_step_changes_nothing(before: int) -> None:
    problem = Problem(dtype=torch.float32)
    for _ in range(before):
        problem.step()
    kept = problem.everything()
    problem.step(divisor=float("nan"), refused=True)
    gradients = {x.gradient.data_ptr() for x in problem.shards}
    arrays = [x for shard in problem.shards for x in shard.arrays()]
    for old, new in zip(kept, [problem.steps, *arrays], strict=True):
        assert new.data_ptr() in gradients or torch.equal(old, new)
    problem.step()
    assert problem.steps.tolist() == [before + 1] * len(problem.shards)


def test_many_shards() -> None:
    """More than one program's worth of them, in the second group too."""
    problem = Problem(3, sizes=((8,) * 20, (5, 12) * 150))
    for _ in range(2):
        problem.step()
    assert problem.steps.tolist() == [2.0] * 320
    for shard, parameter in zip(problem.shards, problem.parameters, strict=True):
        torch.testing.assert_close(
            shard.parameter.cpu().double(), parameter.detach(), rtol=4 * ULP, atol=1e-9
        )


@pytest.mark.parametrize("offset", [0, 3])
def test_squares(offset: int) -> None:
    """Without those of the shard that does not count."""
    problem = Problem(offset)
    problem.step()
    counted = [shard.gradient.double().square().sum() for shard in problem.shards if shard.counts]
    assert len(counted) == len(problem.shards) - 1
    assert problem.shards[1].gradient.any()
    torch.testing.assert_close(problem.table.squares().double(), sum(counted), rtol=1e-6, atol=0)


def test_no_shards() -> None:
    """A rank may have none."""
    problem = Problem(sizes=((), ()))
    problem.table.update(problem.groups, *torch.zeros(2, device=DEVICE).unbind())
    assert problem.table.squares() == 0
