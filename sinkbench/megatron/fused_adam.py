"""AdamW's update by other kernels than torch's, on the state of torch's AdamW: by one Triton kernel, or by
FusedAdam of Transformer Engine or NVIDIA Apex.

Torch's optimizer stays the one that has the state, which these would keep in another form. So checkpoints are
the same, and a run goes on with another implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import megatron.core.optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from sinkbench.attention import fused
from sinkbench.errors import HostError

if TYPE_CHECKING:
    from sinkbench.megatron.triton_adamw import Table


def leave_it_to_torch() -> None:
    """Has megatron make torch's AdamW. It would take FusedAdam where a package with it can be imported."""
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False


def has_kernel(device: torch.device) -> bool:
    """Whether ``KernelUpdate`` runs there."""
    return device.type == "cuda" and fused.is_installed()


@dataclass(frozen=True, kw_only=True)
class Place:
    """What belongs to a parameter of the optimizer, in memory that stays.

    Attributes:
        gradient: float32.
        model: where the model has the parameter.
        counts: whether the gradient is part of the norm.
    """

    gradient: Tensor
    model: Tensor
    counts: bool


class KernelUpdate:
    """What ``step`` of a fused AdamW with a state for each of its parameters does, in one kernel, which also
    writes the model's parameters. As torch's it divides gradients by the optimizer's ``grad_scale``, and
    changes nothing where its ``found_inf`` is 1. Gradients it reads where they are, and leaves as they are.

    Args:
        places: of each parameter.
    """

    def __init__(self, adamw: torch.optim.AdamW, places: Mapping[Tensor, Place]) -> None:
        self._adamw = adamw
        self._places = places
        self._wrote = False
        self._table: Table | None = None
        self._addresses: list[int] = []

    def squares(self) -> Tensor:
        """The sum of the squares of the gradients that count, float32 []."""
        return self._current_table().squares()

    def __call__(self) -> None:
        from sinkbench.megatron.triton_adamw import Group

        adamw: Any = self._adamw
        names = ("lr", "betas", "eps", "weight_decay")
        groups = [
            Group(count=len(group["params"]), **{name: group[name] for name in names})
            for group in adamw.param_groups
        ]
        self._current_table().update(groups, adamw.grad_scale, adamw.found_inf)
        self._wrote = True

    def wrote(self) -> bool:
        """Whether the model's parameters are those of a step since the last call."""
        wrote, self._wrote = self._wrote, False
        return wrote

    def _current_table(self) -> Table:
        """Whatever replaces tensors, as loading a checkpoint does, needs a new one."""
        if self._table is None or self._addresses != self._found():
            self._table = self._tabulated()
            self._addresses = self._found()
        return self._table

    def _found(self) -> list[int]:
        """The addresses of all tensors. Looking states up by their parameters would take most of the time."""
        groups, states, places = self._adamw.param_groups, self._adamw.state.values(), self._places.values()
        return [
            *(parameter.data_ptr() for group in groups for parameter in group["params"]),
            *(tensor.data_ptr() for state in states for tensor in state.values()),
            *(tensor.data_ptr() for place in places for tensor in (place.gradient, place.model)),
        ]

    def _tabulated(self) -> Table:
        """All steps become elements of one tensor, on which the kernel counts."""
        from sinkbench.megatron.triton_adamw import Shard, Table

        shards, states = [], []
        for group in self._adamw.param_groups:
            group["fused"], group["foreach"] = True, False  # the form of torch's that goes on from here
            for parameter in group["params"]:
                state, place = self._adamw.state[parameter], self._places[parameter]
                shard = Shard(
                    parameter=parameter,
                    gradient=place.gradient,
                    exp_avg=state["exp_avg"],
                    exp_avg_sq=state["exp_avg_sq"],
                    model=None if place.model.data_ptr() == parameter.data_ptr() else place.model,
                    counts=place.counts,
                )
                shards.append(shard)
                states.append(state)
        steps = torch.zeros(len(states), dtype=torch.float32, device=torch.cuda.current_device())
        for state, step in zip(states, steps.unbind(), strict=True):
            state["step"] = step.copy_(state["step"])
        return Table(shards, steps)


class FusedUpdate:
    """What ``step`` of an AdamW with a state for each of its parameters does, in a few kernels.

    Raises:
        HostError: the package cannot be used.
    """

    def __init__(self, adamw: torch.optim.AdamW, whose: Literal["te", "apex"]) -> None:
        self._adamw = adamw
        # The parameters come with each call. But Apex goes no further than what it was made with: so many
        # groups, of so many parameters each.
        places = [{"params": [x.detach() for x in group["params"]]} for group in adamw.param_groups]
        self._fused = _load(whose)(places, adam_w_mode=True)

    @torch.no_grad()
    def __call__(self) -> None:
        update, groups = self._fused, self._adamw.param_groups
        update.param_groups, update.state = groups, self._adamw.state
        steps: list[Tensor] = []
        for group in groups:
            own = [self._adamw.state[parameter]["step"] for parameter in group["params"]]
            group |= {"step": int(own[0]) if own else 0, "bias_correction": True}
            steps += own
        update.step()
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
