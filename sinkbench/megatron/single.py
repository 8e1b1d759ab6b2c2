"""A trained model in one process: no optimizer, no pipeline, for measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sinkbench.api import Batch
from sinkbench.megatron.parallel import Layout


class SingleModel:
    """Runs the whole model of one process as a stage of a pipeline would run."""

    def __init__(self, networks: Sequence[Any], layout: Layout) -> None:
        assert len(networks) == 1
        self.networks = list(networks)
        self.layout = layout
        self.networks[0].eval()

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Batch]) -> None:
        for batch in micro_batches:
            self.networks[0]({key: value for key, value in batch.items() if key != "targets"})
