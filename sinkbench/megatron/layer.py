"""One transformer layer for megatron's TransformerBlock, from the plugins' declarations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    get_transformer_layer_offset,
)
from torch import Tensor

from sinkbench.api import AttentionSpec, NormalizationSpec
from sinkbench.attention.backends import Backend
from sinkbench.megatron.attention import SelfAttention


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What the plugins of a recipe contribute to a layer."""

    attention: AttentionSpec
    backend: Backend
    normalization: NormalizationSpec
    ffn: bool


def make_norm(spec: NormalizationSpec, size: int, config: TransformerConfig) -> torch.nn.Module:
    """A plugin's norm on the model's device and dtype; its gradients are partial sums under sequence
    parallelism, where each rank sees its share of the positions."""
    norm = spec.norm(size).to(device=torch.cuda.current_device(), dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class Layer(MegatronModule, BaseTransformerLayer):  # type: ignore[misc]
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerParts,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, pg_collection.pp.rank()
        )
        norm = submodules.normalization
        self.attention_norm = make_norm(norm, config.hidden_size, config)
        self.attention = SelfAttention(config, submodules.attention, submodules.backend, pg_collection)
        self.mlp_norm = make_norm(norm, config.hidden_size, config) if submodules.ffn else None
        linears = MLPSubmodules(
            linear_fc1=tensor_parallel.ColumnParallelLinear,
            linear_fc2=tensor_parallel.RowParallelLinear,
        )
        self.mlp = MLP(config, linears, tp_group=pg_collection.tp) if submodules.ffn else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        context: None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, n] -> the same shape. TransformerBlock passes more arguments than a
        decoder needs; masks follow from positions."""
        attended = self.attention(self.attention_norm(hidden_states), rotary_pos_emb)
        hidden_states = hidden_states + self._dropout(attended)
        if self.mlp is not None:
            assert self.mlp_norm is not None
            hidden_states = hidden_states + self._dropout(self.mlp(self.mlp_norm(hidden_states))[0])
        return hidden_states, None

    def _dropout(self, x: Tensor) -> Tensor:
        probability = self.config.hidden_dropout
        return torch.nn.functional.dropout(x, probability, self.training) if probability else x


def layer_specs(parts: LayerParts, count: int) -> TransformerBlockSubmodules:
    """What TransformerBlock builds its layers from."""
    return TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=Layer, submodules=parts)] * count, layer_norm=None
    )
