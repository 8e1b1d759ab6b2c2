"""The sink probe: fixed held-out sequences through the model, metrics over every layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt
import torch

from sinkbench.api import Batch, BuildContext, DataTransform, Metric
from sinkbench.errors import PluginError
from sinkbench.measure.capture import Recorder
from sinkbench.measure.observations import Values, merged
from sinkbench.plugins import build, own_passes

if TYPE_CHECKING:
    from sinkbench.megatron.parallel import Layout
    from sinkbench.plugins import Chosen

MAX_BATCH = 64
"""Probe sequences per forward pass: bounds the memory of one layer's attention weights."""


class Model(Protocol):
    """A model in training (megatron.training.Engine) or alone (megatron.single.SingleModel)."""

    networks: list[Any]
    layout: Layout

    def forward(self, micro_batches: Sequence[Batch]) -> None: ...


def build_metrics(chosen: Sequence[Chosen], context: BuildContext) -> dict[str, Metric]:
    """The metrics of a run's probes by name.

    Raises:
        PluginError: one cannot be built, or needs forward passes of its own.
    """
    built: dict[str, Any] = {c.plugin.name: build(c, context) for c in chosen}
    for one in chosen:
        if not hasattr(built[one.plugin.name], "observe"):
            problem, _, remedy = own_passes(one.plugin.name).partition("; ")
            raise PluginError(one.path, problem, remedy)
    return built


class Probe:
    """Runs the metrics on a fixed set of sequences, alike under every parallel layout: data-parallel
    replicas all run the whole set, which is small against a step.

    Attributes:
        tokens_bs: the sequences as the model sees them.

    Args:
        sequences: arrays [count, length] by name, "tokens" among them.
        transforms: the recipe's; those made for probes are applied.
    """

    def __init__(
        self,
        metrics: dict[str, Metric],
        sequences: Mapping[str, npt.NDArray[Any]],
        model: Model,
        transforms: Sequence[DataTransform] = (),
    ) -> None:
        self.metrics = metrics
        self.model = model
        self.count = len(sequences["tokens"])
        whole = {name: torch.as_tensor(array) for name, array in sequences.items()}
        for change in transforms:
            whole = change.transform(whole) if change.on_probes else whole
        self.tokens_bs = whole["tokens"].to(model.layout.device)
        self.micro_batches = _split(whole, model.layout.groups.pp.size(), model.layout.device)

    def run(self) -> Values:
        """The results of all metrics, the same on all ranks. All ranks call it.

        Raises:
            PluginError: two metrics have a result of the same key.
        """
        return merged(self.by_metric())

    def by_metric(self) -> dict[str, Values]:
        """As ``run``, each metric's by themselves."""
        recorder = Recorder(self.metrics, self.micro_batches, self.model.layout)
        with recorder.attached(self.model.networks):
            self.model.forward(self.micro_batches)
        return recorder.results(self.count)


def _split(sequences: Batch, stages: int, device: torch.device) -> list[Batch]:
    """Equal micro-batches, a multiple of the pipeline stages as the interleaved schedule needs; the
    last sequence is repeated to fill them, and its repeats are not counted."""
    count = len(sequences["tokens"])
    parts = -(-max(stages, -(-count // MAX_BATCH)) // stages) * stages
    size = -(-count // parts)
    index = torch.arange(parts * size).clamp(max=count - 1)
    whole = {name: rows[index].to(device) for name, rows in sequences.items()}
    return [{name: x[i * size : (i + 1) * size] for name, x in whole.items()} for i in range(parts)]
