"""A training step on megatron's pipeline schedules: micro-batches, gradients, update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sinkbench.api import Batch
from sinkbench.config import Config
from sinkbench.megatron.network import Network
from sinkbench.megatron.optimizer import make_optimizer, make_scheduler
from sinkbench.megatron.parallel import Layout
from sinkbench.megatron.sequence import local_positions


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Attributes:
    loss: mean over the global batch's weighted tokens.
    tokens: how many had a weight above 0.
    grad_norm: before clipping.
    """

    loss: float
    tokens: int
    grad_norm: float


class Engine:
    """The model chunks of this rank with their optimizer and schedule."""

    def __init__(self, config: Config, stages: Sequence[Any], layout: Layout) -> None:
        self.config = config
        self.layout = layout
        self.networks = list(stages)
        # Of the schedule, which takes the shape of what stages send from it.
        self._transformer = copy.copy(self.networks[0].config)
        self._transformer.hidden_size = self.networks[0].sent_size
        self.stages = [self._wrap(stage, index) for index, stage in enumerate(stages)]
        self.optimizer = make_optimizer(config, self.stages)
        self.scheduler = make_scheduler(config, self.optimizer)
        transformer = self._transformer
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = self.optimizer.scale_loss
        if config.parallel.overlap:
            no_sync = [stage.no_sync for stage in self.stages]
            start = [stage.start_grad_sync for stage in self.stages]
            transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            if len(self.stages) > 1:
                transformer.grad_sync_func = start
        self._forward_backward = get_forward_backward_func()

    def _wrap(self, stage: Network, index: int) -> Any:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.config.parallel.overlap,
            use_distributed_optimizer=True,
        )
        return DistributedDataParallel(
            config=self._transformer,
            ddp_config=ddp,
            module=stage,
            disable_bucketing=index > 0,
            pg_collection=self.layout.groups,
        )

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """One update from this data-parallel rank's micro-batches (after the loss's transform)."""
        for stage in self.stages:
            stage.train()
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, tokens = self._mean_loss(self._run(micro_batches, forward_only=False))
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return StepResult(loss=loss, tokens=tokens, grad_norm=float(grad_norm or 0.0))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> tuple[float, int]:
        """Mean token loss over the micro-batches of all data-parallel ranks, and their tokens."""
        for stage in self.stages:
            stage.eval()
        return self._mean_loss(self._run(micro_batches, forward_only=True))

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Batch]) -> None:
        """Runs the forward pass, without the output projection, for what hooks on the modules see."""
        for stage in self.stages:
            stage.eval()
        self._run(micro_batches, forward_only=True, forward_step=_forward_without_loss)

    def _run(
        self,
        micro_batches: Sequence[Batch],
        *,
        forward_only: bool,
        forward_step: Callable[[Any, Any], tuple[Tensor, Any]] | None = None,
    ) -> list[Tensor]:
        iterators = [iter(micro_batches) for _ in self.stages]
        size, length = micro_batches[0]["tokens"].shape
        reports: list[Tensor] = self._forward_backward(
            forward_step_func=forward_step or _forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.stages if len(self.stages) > 1 else self.stages[0],
            num_microbatches=len(micro_batches),
            seq_length=length + self.networks[0].leading,
            micro_batch_size=size,
            forward_only=forward_only,
        )
        return reports

    def _mean_loss(self, reports: list[Tensor]) -> tuple[float, int]:
        """Sums over micro-batches and data- and context-parallel ranks, from the last pipeline stage
        to all ranks."""
        groups = self.layout.groups
        zero = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        total = sum(reports, zero) if groups.pp.rank() == groups.pp.size() - 1 else zero
        dist.all_reduce(total, group=groups.dp_cp)
        if groups.pp.size() > 1:
            last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
            dist.broadcast(total, last, group=groups.pp)
        loss, tokens = total.tolist()
        return loss / max(tokens, 1.0), int(tokens)


def _forward_step(iterator: Any, stage: Any) -> tuple[Tensor, Any]:
    batch = next(iterator)
    return stage(batch), partial(_sum_loss, batch, stage)


def _forward_without_loss(iterator: Any, stage: Any) -> tuple[Tensor, Any]:
    batch = {key: value for key, value in next(iterator).items() if key != "targets"}
    return stage(batch), lambda output: (output, {})


def _sum_loss(batch: Batch, stage: Any, losses_bs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the schedule wants of the last stage: the sum to differentiate, the number of tokens to
    divide by, and a report (a new tensor: the schedule changes the first one in place)."""
    position = local_positions(batch["tokens"].shape[1], stage.module.cp_group, losses_bs.device)
    tokens = (batch["weights"][:, position] > 0).sum()
    loss = losses_bs.sum()
    report = torch.stack([losses_bs.detach().double().sum(), tokens.double()])
    return loss, tokens.int(), report
