"""AdamW's update by FusedAdam of Transformer Engine or NVIDIA Apex, on the state of torch's AdamW.

Torch's optimizer stays the one that has the state, which these would keep in another form. So checkpoints are
the same, and a run goes on with another implementation.
"""

from __future__ import annotations

from typing import Any, Literal

import megatron.core.optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from sinkbench.errors import HostError


def leave_it_to_torch() -> None:
    """Has megatron make torch's AdamW. It would take FusedAdam where a package with it can be imported."""
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False


class FusedUpdate:
    """What ``step`` of an AdamW with a state for each of its parameters does, in a few kernels.

    Raises:
        HostError: the package cannot be used.
    """

    def __init__(self, adamw: torch.optim.AdamW, whose: Literal["te", "apex"]) -> None:
        self._adamw = adamw
        # In the place of the parameters, which come with each call.
        nothing = torch.zeros(1, requires_grad=True, device=torch.cuda.current_device())
        self._fused = _load(whose)([nothing], adam_w_mode=True)

    @torch.no_grad()
    def __call__(self) -> None:
        fused, groups = self._fused, self._adamw.param_groups
        fused.param_groups, fused.state = groups, self._adamw.state
        steps: list[Tensor] = []
        for group in groups:
            own = [self._adamw.state[parameter]["step"] for parameter in group["params"]]
            group |= {"step": int(own[0]) if own else 0, "bias_correction": True}
            steps += own
        fused.step()
        for group in groups:
            del group["step"], group["bias_correction"]
        if steps:
            torch._foreach_add_(steps, 1.0)


def _load(whose: Literal["te", "apex"]) -> Any:
    try:
        if whose == "te":
            from transformer_engine.pytorch.optimizers import FusedAdam
        else:
            from apex.optimizers import FusedAdam
    except (ImportError, OSError) as error:
        problem = f"{whose} has no FusedAdam that can be imported ({error})"
        raise HostError("optim.implementation", problem, "install it, or write torch") from error
    return FusedAdam
