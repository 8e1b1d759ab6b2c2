"""The update by another package's FusedAdam, for which a stand-in is here, against torch's AdamW."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import transformer_engine as stand_in


class ApexFusedAdam(stand_in.FusedAdam):
    """Apex's walks what it has beside what it was made with, and so stops where either ends."""

    def __init__(self, params: Any, *, adam_w_mode: bool) -> None:
        super().__init__(params, adam_w_mode=adam_w_mode)
        self._made = [len(group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        own = self.param_groups
        pairs = zip(own, self._made, strict=False)
        self.param_groups = [{**group, "params": group["params"][:count]} for group, count in pairs]
        super().step()
        self.param_groups = own


@pytest.fixture
def fused_update(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``FusedUpdate`` with the packages, which megatron-core is not to find when it is imported."""
    from sinkbench.megatron import host

    host.prepare()
    from sinkbench.megatron.fused_adam import FusedUpdate

    for name, found in (("transformer_engine.pytorch", stand_in.FusedAdam), ("apex", ApexFusedAdam)):
        module: Any = ModuleType(f"{name}.optimizers")
        module.FusedAdam = found
        for parent in (name.partition(".")[0], name):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return FusedUpdate


def an_adamw() -> torch.optim.AdamW:
    """Of two groups of several parameters, with the state of one that has not stepped."""
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(size, generator=generator)) for size in (3, 4, 5, 6, 7)]
    groups: list[dict[str, Any]] = [
        {"params": parameters[:2], "weight_decay": 0.0},
        {"params": parameters[2:]},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    for parameter in parameters:
        zeros = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[parameter] = {"step": torch.zeros(()), **zeros}
    return adamw


def after(adamw: torch.optim.AdamW, update: Any, steps: int) -> list[list[Tensor]]:
    """Of each parameter, itself and its state."""
    parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        update()
    return [[parameter.detach(), *adamw.state[parameter].values()] for parameter in parameters]


@pytest.mark.parametrize("whose", ["te", "apex"])
def test_every_parameter_of_every_group_is_updated(whose: str, fused_update: Any) -> None:
    by_torch, by_package = an_adamw(), an_adamw()
    keys = [set(group) for group in by_package.param_groups]
    found = after(by_package, fused_update(by_package, whose), 3)
    torch.testing.assert_close(found, after(by_torch, by_torch.step, 3))
    assert [set(group) for group in by_package.param_groups] == keys, "what a checkpoint has of a group"
