"""The values of layer 1 on their way to later pipeline stages: they ride beside the hidden states.

Shapes: s local position, b sequence, n hidden size, g local kv head, d head size.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class FirstValue:
    """One tensor that a stage sends: [s, b, n + width]. Under sequence parallelism hidden states have this
    rank's share of the positions and values all of them, so that a share of those of all its heads rides
    along with each."""

    def __init__(self, config: TransformerConfig) -> None:
        self.hidden_size = config.hidden_size
        self.head_size = config.kv_channels
        self.parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        groups = config.num_query_groups // config.tensor_model_parallel_size
        self.width = self.parts * groups * self.head_size

    def join(self, hidden_sbn: Tensor, value_sbgd: Tensor) -> Tensor:
        value = value_sbgd.flatten(2).unflatten(0, (self.parts, -1))
        return torch.cat([hidden_sbn, value.permute(1, 2, 0, 3).flatten(2)], -1)

    def split(self, received: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and values."""
        hidden, value = received.split([self.hidden_size, self.width], -1)
        value = value.unflatten(-1, (self.parts, -1)).permute(2, 0, 1, 3).flatten(0, 1)
        return hidden, value.unflatten(-1, (-1, self.head_size))
