"""AdamW over the distributed optimizer's shards, its schedule, and the repairs its checkpoints need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from sinkbench.config import Config
from sinkbench.megatron import fused_adam, fusions
from sinkbench.megatron.fused_adam import KernelUpdate, Place
from sinkbench.megatron.settings import optimizer_config


def make_optimizer(config: Config, stages: list[Any]) -> ChainedOptimizer:
    """The optimizer of this rank's model chunks."""
    # None makes megatron leave one-dimensional parameters out of weight decay; {} decays all.
    overrides: dict[Any, Any] | None = {} if config.optim.weight_decay_on == "all" else None
    fused_adam.leave_it_to_torch()
    optimizer = get_megatron_optimizer(optimizer_config(config), stages, config_overrides=overrides)
    if config.optim.implementation != "torch":
        give_moments(optimizer)
        for part in distributed_optimizers(optimizer):
            part.optimizer.step = fused_adam.FusedUpdate(part.optimizer, config.optim.implementation)
        return optimizer
    device = next(stages[0].parameters()).device
    if "optimizer" in fusions.chosen(config, device) and fused_adam.has_kernel(device):
        give_moments(optimizer)
        for part in distributed_optimizers(optimizer):
            part.optimizer.step = KernelUpdate(part.optimizer, _places(part))
            part._copy_model_grads_to_main_grads = _nothing
    return optimizer


def _places(part: DistributedOptimizer) -> dict[Tensor, Place]:
    """megatron leaves out of the gradient's norm what another rank counts: copies of a parameter."""
    part._copy_model_grads_to_main_grads()
    counted = {gradient.data_ptr() for gradient in part.get_main_grads_for_grad_norm()}
    places = {}
    for main, model in _pairs(part):
        assert main.grad is not None
        places[main] = Place(gradient=main.grad, model=model, counts=main.grad.data_ptr() in counted)
    part.zero_grad()
    return places


def _nothing() -> None:
    """The kernel reads gradients where they are."""


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
        wsd_decay_steps=optim.wsd_decay_steps(steps) if wsd else None,
        lr_wsd_decay_style="linear" if wsd else None,
    )
    scheduler.step(1)
    return scheduler


@torch.no_grad()
def update(
    optimizer: ChainedOptimizer,
    acceptable: Tensor,
    divisor: Tensor,
    *,
    fused: bool,
    decided: Callable[[Tensor, Tensor], None],
) -> None:
    """What megatron's ``step`` does, unless the step is not acceptable or the gradient's norm is not finite:
    then parameters and optimizer state stay as they are. The norm is the whole model's, so all ranks agree.

    Args:
        acceptable: bool, on the device, the same on all ranks.
        divisor: of the gradients, which are sums, on the device.
        fused: division, clipping and update in one kernel, which itself heeds the decision: the host goes on
            at once. Otherwise it waits for the decision.
        decided: called before the update is given to the device, with the norm of the divided gradients
            before clipping and whether there is an update, both on the device.
    """
    optimizer.prepare_grads()
    parts = distributed_optimizers(optimizer)
    if not fused:
        _divide(parts, divisor)
    norm = _gradient_norm(parts)
    if fused:
        norm = norm / divisor
    accepted = acceptable & norm.isfinite()
    decided(norm, accepted)
    if not fused and not bool(accepted):
        return
    for part in parts:
        if not isinstance(part.optimizer.step, KernelUpdate):
            _choose(part, fused)
        if fused:
            _prepare_fused(part, norm, divisor, accepted)
        elif part.config.clip_grad > 0:
            _clip(part, float(norm))
    optimizer.step_with_ready_grads()


def _divide(parts: list[DistributedOptimizer], divisor: Tensor) -> None:
    for part in parts:
        _multiply(part, divisor.reciprocal())


def _clip(part: DistributedOptimizer, norm: float) -> None:
    """megatron's own takes Transformer Engine's or Apex's kernel where it finds one, on a CPU too, and
    otherwise two kernels for each gradient."""
    factor = part.config.clip_grad / (norm + 1e-6)
    if factor < 1:
        _multiply(part, factor)


def _multiply(part: DistributedOptimizer, factor: Tensor | float) -> None:
    gradients = [x.grad for x in part.get_parameters() if x.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def _gradient_norm(parts: list[DistributedOptimizer]) -> Tensor:
    """Of the whole model, float32. megatron's own, without Apex, reads every parameter's to the host."""
    squares = torch.zeros((), dtype=torch.float32, device=torch.cuda.current_device())
    for part in parts:
        if isinstance(part.optimizer.step, KernelUpdate):
            squares += part.optimizer.step.squares()
        elif gradients := part.get_main_grads_for_grad_norm():
            squares += torch.stack(torch._foreach_norm(gradients)).square().sum()
    dist.all_reduce(squares)  # each rank has its own shards of its own part of the model
    return squares.sqrt()


def _choose(part: DistributedOptimizer, fused: bool) -> None:
    """Which of torch's forms of AdamW runs. The fused form counts steps on the parameters' device, the others
    on the host, where a checkpoint puts them."""
    for group in part.optimizer.param_groups:
        group["fused"], group["foreach"] = (True, False) if fused else (None, None)
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            if "step" in state:
                state["step"] = state["step"].to(parameter.device if fused else "cpu")


def _prepare_fused(part: DistributedOptimizer, norm: Tensor, divisor: Tensor, accepted: Tensor) -> None:
    """torch's fused AdamW divides gradients by ``grad_scale``, and does nothing where ``found_inf`` is 1."""
    inner, clip = part.optimizer, part.config.clip_grad
    excess = ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else torch.ones_like(norm)
    inner.grad_scale = excess * divisor
    inner.found_inf = (~accepted).float()


def copy_together(optimizer: ChainedOptimizer) -> None:
    """Lets the model's parameters be copied from the main ones in a few kernels, where megatron takes one
    for each parameter."""
    for part in distributed_optimizers(optimizer):
        part._copy_main_params_to_model_params = partial(_copy, _pairs(part), part.optimizer.step)


def _pairs(part: DistributedOptimizer) -> list[tuple[Tensor, Tensor]]:
    """Main parameters and their places in the model."""
    return [
        (main, _place_in_model(part, parameter))
        for mains, parameters in (
            (part.shard_fp32_from_float16_groups, part.model_float16_groups),
            (part.shard_fp32_groups, part.model_fp32_groups),
        )
        for main_group, group in zip(mains, parameters, strict=True)
        for main, parameter in zip(main_group, group, strict=True)
    ]


def _copy(pairs: list[tuple[Tensor, Tensor]], step: Any) -> None:
    """Unless the step was one of the kernel's, which has written both."""
    if pairs and not (isinstance(step, KernelUpdate) and step.wrote()):
        sources, targets = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources)


def _place_in_model(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> Tensor:
    """This rank's shard of a parameter, where all-gathers take it from."""
    place = part._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
    buffer, _, bucket = part.model_param_gbuf_map[parameter]
    data: Tensor = part.buffers[buffer].buckets[bucket].param_data.view(-1)[place.start : place.end]
    return data


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


def keep_settings(optimizer: Any, saved: dict[Any, Any]) -> None:
    """Puts this run's settings of parameter groups (rates, betas, eps, which weights decay) in the place of
    those that a checkpoint brings: megatron-core 0.16.1 takes a group's rates before its scheduler's, and
    finds no group that decays otherwise. Moments belong to parameters, and so to any groups.

    Args:
        saved: what the optimizer is about to load; changed in place. The step count stays.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [saved] if len(chained) == 1 else [state for _, state in sorted(saved.items())]
    for part, state in zip(chained, states, strict=True):
        if part.optimizer is None:
            continue
        groups = state["optimizer"]["param_groups"]
        step = {"step": groups[0]["step"]} if groups and "step" in groups[0] else {}  # one for all
        state["optimizer"]["param_groups"] = [
            {name: value for name, value in group.items() if name != "params"} | step
            for group in part.optimizer.param_groups
        ]


def separate_steps(optimizer: Any) -> None:
    """After loading, megatron-core 0.16.1 lets all parameters share one step tensor, which AdamW would
    then advance once per parameter."""
    for part in distributed_optimizers(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone()
