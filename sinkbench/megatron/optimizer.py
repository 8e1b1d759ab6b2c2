"""AdamW over the distributed optimizer's shards, its schedule, and the repairs its checkpoints need."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sinkbench.config import Config
from sinkbench.megatron.settings import optimizer_config


def make_optimizer(config: Config, stages: list[Any]) -> ChainedOptimizer:
    """The optimizer of this rank's model chunks."""
    # None makes megatron leave one-dimensional parameters out of weight decay; {} decays all.
    overrides: dict[Any, Any] | None = {} if config.optim.weight_decay_on == "all" else None
    return get_megatron_optimizer(optimizer_config(config), stages, config_overrides=overrides)


def make_scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Learning rate by step; step 1 has lr/warmup_steps, where megatron's count would give 0."""
    optim, steps = config.optim, config.train.steps
    wsd = optim.schedule == "wsd"
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.end_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=max(steps, optim.warmup_steps + 1),
        lr_decay_style="WSD" if wsd else optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=(optim.decay_steps or max(1, steps // 10)) if wsd else None,
        lr_wsd_decay_style="linear" if wsd else None,
    )
    scheduler.step(1)
    return scheduler


@torch.no_grad()
def update(optimizer: ChainedOptimizer) -> tuple[float, bool]:
    """What megatron's ``step`` does, unless the gradient's norm is not finite: then parameters and
    optimizer state stay as they are. The norm is that of the whole model, so that all ranks agree.

    Returns:
        The norm before clipping, and whether there was an update.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, False
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm, True


def distributed_optimizers(optimizer: Any) -> list[DistributedOptimizer]:
    return [o for o in getattr(optimizer, "chained_optimizers", [optimizer]) if o.optimizer is not None]


def prepare_for_loading(optimizer: Any) -> None:
    """megatron-core 0.16.1 loads moments only into an optimizer that has stepped, and then misses the
    step count of torch's AdamW: give every shard empty moments, and let its own count stand."""
    give_moments(optimizer)
    for part in distributed_optimizers(optimizer):
        _keep_own_step(part)


def give_moments(optimizer: Any) -> None:
    """Those of an optimizer that has not stepped, which megatron-core 0.16.1 neither saves nor loads."""
    for part in distributed_optimizers(optimizer):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter.data)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data)


def _keep_own_step(part: DistributedOptimizer) -> None:
    original = part._set_main_param_and_optimizer_states
    if getattr(original, "keeps_own_step", False):
        return

    def set_states(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        main = part.optimizer.param_groups[group]["params"][order]
        step = part.optimizer.state[main]["step"]
        original(model_param, {"step": step, **tensors})

    set_states.keeps_own_step = True  # type: ignore[attr-defined]
    part._set_main_param_and_optimizer_states = set_states


def separate_steps(optimizer: Any) -> None:
    """After loading, megatron-core 0.16.1 lets all parameters share one step tensor, which AdamW would
    then advance once per parameter."""
    for part in distributed_optimizers(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone()
