"""What the layers do on a batch: whole attention weights and activations from any parallel layout.

Hooks on the layers of this rank's pipeline stages hand each metric one layer at a time, heads gathered
over tensor-parallel ranks and positions over context-parallel ranks. Attention weights of short sequences are
held whole, a layer's at a time; those of longer ones are computed a few rows at a time when a metric asks, or
on a card only summed, by a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sinkbench.api import BLOCK_ELEMENTS, Batch, LayerCapture, Metric, Observation
from sinkbench.attention import importance, reference
from sinkbench.attention.importance import WeightSums
from sinkbench.attention.reference import Problem
from sinkbench.measure.observations import Values

if TYPE_CHECKING:
    from sinkbench.megatron.parallel import Layout

HELD_WEIGHTS = 2**26
"""Attention weights of a layer that are held at once, 256 MiB on each rank."""


class Recorder:
    """Collects the observations of every metric, layer by layer.

    Args:
        metrics: by name.
        micro_batches: the batches that are about to run, in order.
    """

    def __init__(self, metrics: dict[str, Metric], micro_batches: Sequence[Batch], layout: Layout) -> None:
        self.metrics = metrics
        self.micro_batches = micro_batches
        self.layout = layout
        self._observed: dict[int, list[dict[str, Observation]]] = {}
        self._core_inputs: dict[int, tuple[Any, ...]] = {}

    @contextmanager
    def attached(self, networks: Sequence[Any]) -> Iterator[None]:
        """Records every forward pass of the networks within the block."""
        handles = []
        for network in networks:
            for layer in network.decoder.layers:
                handles.append(layer.attention.core.register_forward_pre_hook(self._core_hook(layer)))
                handles.append(layer.register_forward_hook(self._layer_hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _core_hook(self, layer: Any) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            self._core_inputs[layer.layer_number] = inputs

        return hook

    def _layer_hook(self, layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        number = layer.layer_number
        seen = self._observed.setdefault(number, [])
        query, key, value, document_start = self._core_inputs.pop(number)
        core = layer.attention.core
        first = int(core.parts.spec.sink_token)
        weights = LayerWeights(self._problem(core, query, key, value, document_start), first, self._all_heads)
        output_sbn = output[0][..., : layer.config.hidden_size]  # values for the next stage may follow
        capture = LayerCapture(
            layer=number,
            weight_rows=weights.rows,
            slot_bhq=weights.slot_bhq,
            key_sums=weights.key_sums,
            query_bhsd=self._heads(query)[:, :, first:],
            key_bhsd=self._heads(key)[:, :, first:],
            value_bhsd=self._heads(value)[:, :, first:],
            input_bsn=self._hidden(kwargs["hidden_states"], layer.config.sequence_parallel)[:, first:],
            output_bsn=self._hidden(output_sbn, layer.config.sequence_parallel)[:, first:],
            batch=self.micro_batches[len(seen)],
        )
        seen.append({name: metric.observe(capture) for name, metric in self.metrics.items()})

    def _problem(self, core: Any, *inputs: Any) -> Problem:
        """The attention of this rank's heads at all positions."""
        from sinkbench.megatron.sequence import gather_context

        problem: Problem = core.problem(*inputs)
        whole = gather_context(problem.query_bhqd, self.layout.groups.cp, 2)
        return replace(problem, query_bhqd=whole, position_q=problem.position_k, aligned=True)

    def _all_heads(self, x_bh: Tensor) -> Tensor:
        from sinkbench.megatron.sequence import gather_shards

        return gather_shards(x_bh, self.layout.groups.tp, 1)

    def _heads(self, x_sbhd: Tensor) -> Tensor:
        return self._whole(x_sbhd.permute(1, 2, 0, 3).float())

    def _whole(self, x_bhs: Tensor) -> Tensor:
        """All heads and all positions of a tensor [b, h, s, ...]."""
        from sinkbench.megatron.sequence import gather_context, gather_shards

        groups = self.layout.groups
        return gather_context(gather_shards(x_bhs, groups.tp, 1), groups.cp, 2)

    def _hidden(self, x_sbn: Tensor, sequence_parallel: bool) -> Tensor:
        from sinkbench.megatron.sequence import gather_context, gather_shards

        groups = self.layout.groups
        if sequence_parallel:
            x_sbn = gather_shards(x_sbn, groups.tp, 0)
        return gather_context(x_sbn, groups.cp, 0).transpose(0, 1).float()

    def results(self, count: int) -> dict[str, Values]:
        """The results of each metric over the first ``count`` sequences and all layers, the same on every
        rank. Collective over pipeline stages."""
        local = {
            layer: {name: _concatenated([o[name] for o in seen], count) for name in self.metrics}
            for layer, seen in self._observed.items()
        }
        layers = _gathered(local, self.layout.groups.pp)
        return {
            name: metric.result([layers[number][name] for number in sorted(layers)])
            for name, metric in self.metrics.items()
        }


class LayerWeights:
    """The attention weights of one layer, whole or never.

    Args:
        problem: of this rank's heads, all positions.
        leading: 1 with a sink token, whose weight is part of the slot's and which is no row or key otherwise.
        all_heads: [b, h, ...] of this rank's heads -> of all. Collective.

    Attributes:
        slot_bhq: as in LayerCapture.
        key_sums: as in LayerCapture; None if the weights are held or there is no kernel.
    """

    def __init__(self, problem: Problem, leading: int, all_heads: Callable[[Tensor], Tensor]) -> None:
        self._problem = problem
        self._leading = leading
        self._all_heads = all_heads
        self._held: Tensor | None = None
        self._sums: WeightSums | None = None
        self.key_sums: Callable[[int, float], tuple[Tensor, Tensor, Tensor]] | None = None
        batch, heads, length, head_size = problem.query_bhqd.shape
        if batch * heads * length**2 <= HELD_WEIGHTS:
            self._held, slot = self._computed(0, length - leading)
        elif (
            problem.query_bhqd.is_cuda
            and problem.document_start_bk is None
            and not importance.missing(problem.spec, head_size)
        ):
            self._sums = WeightSums(problem, leading)
            self.key_sums = self._summed
            slot = self._sums.slot_bhq
        else:
            there = leading or problem.spec.extra_slot is not None
            slot = torch.cat([self._slot(*block) for block in self._blocks()], -1) if there else None
        self.slot_bhq = None if slot is None else all_heads(slot)

    def rows(self, start: int, end: int) -> Tensor:
        """As LayerCapture.weight_rows. Collective."""
        if self._held is not None:
            return self._all_heads(self._held[:, :, start:end])
        return self._all_heads(self._computed(start, end)[0])

    def _computed(self, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        at = slice(start + self._leading, end + self._leading)
        problem = self._problem.in_float32()
        query, position = problem.query_bhqd[:, :, at], problem.position_q[at]
        rows = replace(problem, query_bhqd=query, position_q=position, aligned=False)
        return reference.of_tokens(*reference.weights(rows), self._leading)

    def _slot(self, start: int, end: int) -> Tensor:
        slot = self._computed(start, end)[1]
        assert slot is not None
        return slot

    def _blocks(self) -> Iterator[tuple[int, int]]:
        batch, heads, length, _ = self._problem.query_bhqd.shape
        step = max(1, BLOCK_ELEMENTS // (batch * heads * length))
        for start in range(0, length - self._leading, step):
            yield start, min(start + step, length - self._leading)

    def _summed(self, count: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        assert self._sums is not None
        raw, proxy = self._sums.keys(count, eps)
        return self._all_heads(raw), self._all_heads(proxy), self._all_heads(self._sums.row_bhq)


def _concatenated(observations: list[Observation], count: int) -> Observation:
    return {key: torch.cat([o[key] for o in observations])[:count].cpu() for key in observations[0]}


def _gathered(local: dict[int, Any], group: Any) -> dict[int, Any]:
    if group.size() == 1:
        return local
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, local, group=group)
    return {layer: value for part in parts for layer, value in part.items()}
