"""A training step on megatron's pipeline schedules: micro-batches, gradients, update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sinkbench.api import Batch
from sinkbench.config import Config
from sinkbench.health import Health
from sinkbench.megatron import fusions, step_graph
from sinkbench.megatron.host_copies import HostCopies
from sinkbench.megatron.network import Network
from sinkbench.megatron.optimizer import (
    copy_together,
    make_optimizer,
    make_scheduler,
    update,
)
from sinkbench.megatron.parallel import Layout
from sinkbench.megatron.sequence import local_positions
from sinkbench.megatron.step_graph import CudaRecorder, StepGraphs


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The same on all ranks.

    Attributes:
        loss: mean over the global batch's weighted tokens, NaN if there are none.
        tokens: how many had a weight above 0.
        grad_norm: before clipping.
        updated: whether the parameters were; if not, neither was the optimizer's state.
        stop: whether any rank asked to stop.
    """

    loss: float
    tokens: int
    grad_norm: float
    updated: bool
    stop: bool


class Engine:
    """The model chunks of this rank with their optimizer and schedule."""

    def __init__(self, config: Config, stages: Sequence[Any], layout: Layout) -> None:
        self.config = config
        self.layout = layout
        self.networks = list(stages)
        # Of the schedule, which takes the shape of what stages send from it.
        self._transformer = copy.copy(self.networks[0].config)
        self._transformer.hidden_size = self.networks[0].sent_size
        self.graphs: StepGraphs | None = None
        recorder = CudaRecorder(alone=layout.world_size == 1) if step_graph.wanted(config, layout) else None
        if recorder is not None:
            self.graphs = StepGraphs(self._pass, must=config.train.cuda_graph is True, record=recorder)
        with recorder.hooks() if recorder is not None else nullcontext():
            self.stages = [self._wrap(stage, index) for index, stage in enumerate(stages)]
        for stage in self.stages:
            stage.train()
        self.optimizer = make_optimizer(config, self.stages)
        fused = "optimizer" in fusions.chosen(config, layout.device)
        # FusedAdam's kernels, of other packages, heed no decision of the card's.
        self._fused_update = fused and config.optim.implementation == "torch"
        self._recorded_buffers: list[Tensor] = []
        self._tokens: Tensor | None = None
        """Of the whole batch, once its gradients are summed: what they are still to be divided by."""
        if fused:
            copy_together(self.optimizer)
        self.scheduler = make_scheduler(config, self.optimizer)
        self.health = Health(config.train)
        self.copies = HostCopies(layout.device)
        self._numbers = _ToHost(5, layout.device)
        transformer = self._transformer
        transformer.finalize_model_grads_func = self._finalize_gradients
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

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        *,
        wants_stop: Callable[[], bool] = lambda: False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """One update from this data-parallel rank's micro-batches (after the loss's transform). There is
        none if ``health`` refuses the loss, as it does NaN, or the gradient's norm is not finite; the
        schedule goes on. On a card the update may still run afterwards: parameters and optimizer state are
        those after it for whatever is given to the current stream.

        Args:
            wants_stop: whether this rank asks the run to stop; asked once its gradients are under way.
            meanwhile: called once all of the step's work is given to the device, before its numbers are read.
        """
        self._set_training(True)
        self._zero_gradients()
        reports = self._gradients(micro_batches)
        totals = self._totals(reports, stop=wants_stop())
        acceptable = self.health.acceptable(totals[0])
        self.copies.hold_back()
        assert self._tokens is not None

        def decided(norm: Tensor, updated: Tensor) -> None:
            self._numbers.send(torch.hstack([totals, norm, updated]))

        update(self.optimizer, acceptable, self._tokens, fused=self._fused_update, decided=decided)
        self.scheduler.step(1)
        meanwhile()
        # The only time in a step that the host waits for the device, and not for the update: the next step
        # is given to the device meanwhile.
        loss, tokens, votes, norm, was_updated = self._numbers.receive()
        return StepResult(
            loss=loss, tokens=int(tokens), grad_norm=norm, updated=was_updated > 0, stop=votes > 0
        )

    def _set_training(self, training: bool) -> None:
        """Of all modules, if they are not: they are hundreds, and the device waits for a step to begin."""
        for stage, network in zip(self.stages, self.networks, strict=True):
            if network.training != training:
                stage.train(training)

    def _zero_gradients(self) -> None:
        """Those in megatron's buffers. Of the optimizer's ``zero_grad`` nothing is left to do: its own are
        taken from the buffers anew in every step."""
        for stage in self.stages:
            stage.zero_grad_buffer()
            for parameter in stage.params_with_grad:
                parameter.grad = None

    def _begin_again(self) -> None:
        """A step of which some has run: a pass that failed may have left a bucket waiting for gradients."""
        for stage in self.stages:
            for group in (*stage.bucket_groups, *stage.expert_parallel_bucket_groups):
                group.grad_reduce_handle = None
        self._zero_gradients()

    def _gradients(self, micro_batches: Sequence[Batch]) -> list[Tensor]:
        """Adds up and reduces those of a step; what the last stage reports."""
        if self.graphs is None or not self.graphs.ready(micro_batches, self._begin_again):
            return self._run(micro_batches, forward_only=False)
        report, self._tokens = self.graphs.run(micro_batches)
        return [report]

    def _pass(self, batch: Batch, tokens_before: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """A micro-batch of a step without pipeline stages by itself, as ``StepGraphs`` records it."""

        def finish(stages: list[Any], tokens: Tensor, **options: Any) -> None:
            self._tokens = tokens_before + tokens
            if last:
                self._finalize_gradients(stages, self._tokens, **options)

        (stage,), schedule = self.stages, self._transformer
        usual = schedule.finalize_model_grads_func, schedule.no_sync_func
        # To the schedule any micro-batch that comes alone is a last one.
        schedule.finalize_model_grads_func, schedule.no_sync_func = finish, None
        try:
            with nullcontext() if last else stage.no_sync():
                (report,) = self._run([batch], forward_only=False)
        finally:
            schedule.finalize_model_grads_func, schedule.no_sync_func = usual
        # Replays go on with megatron's buffers of this pass, where a larger probe leads to larger ones.
        for buffer in parallel_state.get_global_memory_buffer().buffer.values():
            if not any(buffer is kept for kept in self._recorded_buffers):
                self._recorded_buffers.append(buffer)
        assert self._tokens is not None
        return report, self._tokens

    def _finalize_gradients(
        self, stages: list[Any], tokens: Tensor | None, pg_collection: Any = None, **options: Any
    ) -> None:
        """megatron's, without the division by the tokens of the whole batch: there it would wait for their
        number, and pass over all gradients."""
        finalize_model_grads(stages, None, pg_collection=pg_collection, **options)
        assert tokens is not None
        groups = self.layout.groups
        dist.broadcast(tokens, src=dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
        dist.all_reduce(tokens, group=groups.dp_cp)
        self._tokens = tokens.clamp(min=1)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> tuple[float, int]:
        """Mean token loss over the micro-batches of all data-parallel ranks, NaN if none has a weight above
        0, and their tokens."""
        self._set_training(False)
        loss, tokens, _ = self._totals(self._run(micro_batches, forward_only=True)).tolist()
        return loss, int(tokens)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Batch]) -> None:
        """Runs the forward pass, without the output projection, for what hooks on the modules see."""
        self._set_training(False)
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

    def _totals(self, reports: list[Tensor], *, stop: bool = False) -> Tensor:
        """Mean loss and tokens over all micro-batches, and how many ranks ask to stop, float64 [3], on all
        ranks: one sum over the job, to which the last pipeline stage brings the losses, each once."""
        groups = self.layout.groups
        total = torch.full((3,), float(stop), dtype=torch.float64, device=self.layout.device)
        brings = groups.pp.rank() == groups.pp.size() - 1 and groups.tp.rank() == 0
        total[:2] = sum(reports[1:], reports[0]) if brings else 0.0
        dist.all_reduce(total)
        total[0] /= total[1]
        return total


class _ToHost:
    """A few numbers on their way from the device. The host waits for them alone, and not for what the device
    was given after them."""

    def __init__(self, count: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._sent = torch.cuda.Event() if cuda else None
        self._numbers = torch.empty(count, dtype=torch.float64, pin_memory=cuda)

    def send(self, numbers: Tensor) -> None:
        """Float64; those of the time before have been received."""
        self._numbers.copy_(numbers, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def receive(self) -> list[float]:
        if self._sent is not None:
            self._sent.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


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
