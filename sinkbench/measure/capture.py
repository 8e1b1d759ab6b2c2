"""What the layers do on a batch: whole attention weights and activations from any parallel layout.

Hooks on the layers of this rank's pipeline stages hand each metric one layer at a time, heads gathered
over tensor-parallel ranks and positions over context-parallel ranks, so that memory holds a single
layer's attention weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sinkbench.api import Batch, LayerCapture, Metric, Observation
from sinkbench.attention import reference

if TYPE_CHECKING:
    from sinkbench.megatron.parallel import Layout


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
        self._core_inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

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
        def hook(module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            self._core_inputs[layer.layer_number] = inputs

        return hook

    def _layer_hook(self, layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        number = layer.layer_number
        seen = self._observed.setdefault(number, [])
        query, key, value = self._core_inputs.pop(number)
        spec = layer.attention.core.parts.spec
        weights, slot = self._weights(layer.attention.core, query, key, value)
        if spec.sink_token:
            weights, slot = weights[:, :, 1:, 1:], weights[:, :, 1:, 0]
        first = int(spec.sink_token)
        output_sbn = output[0][..., : layer.config.hidden_size]  # values for the next stage may follow
        capture = LayerCapture(
            layer=number,
            weight_rows=lambda start, end: weights[:, :, start:end],
            slot_bhq=slot,
            query_bhsd=self._heads(query)[:, :, first:],
            key_bhsd=self._heads(key)[:, :, first:],
            value_bhsd=self._heads(value)[:, :, first:],
            input_bsn=self._hidden(kwargs["hidden_states"], layer.config.sequence_parallel)[:, first:],
            output_bsn=self._hidden(output_sbn, layer.config.sequence_parallel)[:, first:],
            batch=self.micro_batches[len(seen)],
        )
        seen.append({name: metric.observe(capture) for name, metric in self.metrics.items()})

    def _weights(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, slot = reference.weights(core.problem(query, key, value).in_float32())
        return self._whole(weights), None if slot is None else self._whole(slot)

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

    def results(self, count: int) -> dict[str, float | list[Any]]:
        """The metrics over the first ``count`` sequences and all layers, the same on every rank.
        Collective over pipeline stages."""
        local = {
            layer: {name: _concatenated([o[name] for o in seen], count) for name in self.metrics}
            for layer, seen in self._observed.items()
        }
        layers = _gathered(local, self.layout.groups.pp)
        results: dict[str, float | list[Any]] = {}
        for name, metric in self.metrics.items():
            results |= metric.result([layers[number][name] for number in sorted(layers)])
        return results


def _concatenated(observations: list[Observation], count: int) -> Observation:
    return {key: torch.cat([o[key] for o in observations])[:count].cpu() for key in observations[0]}


def _gathered(local: dict[int, Any], group: Any) -> dict[int, Any]:
    if group.size() == 1:
        return local
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, local, group=group)
    return {layer: value for part in parts for layer, value in part.items()}
