"""Self-attention and its core on megatron's tensor and context parallelism, from a declaration.

Shapes: s local position, k position of the whole sequence, b sequence, h local head, g local kv head, d head
size, n hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from sinkbench.api import AttentionSpec, Heads, HeadTransform, OutputGate, ParameterSpec, ScoreBias
from sinkbench.attention import reference
from sinkbench.attention.backends import Backend
from sinkbench.attention.reference import Problem
from sinkbench.megatron.rotation import HeadLayout, split_and_rotate
from sinkbench.megatron.sequence import Group, gather_sequence, local_positions
from sinkbench.megatron.transformer_engine import LOCAL, Linears


def make_parameter(spec: ParameterSpec, config: TransformerConfig, tp_group: Group) -> torch.nn.Parameter:
    """A declared parameter, or this rank's share of one that is split over heads."""
    sizes = {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_query_groups,
        "head_size": config.kv_channels,
        "hidden": config.hidden_size,
    }
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    split = spec.shape[:1] in (("heads",), ("kv_heads",))
    if split:
        shape[0] //= tp_group.size()
    data = torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
    parameter = torch.nn.Parameter(data)
    parameter.initial = (spec.mean, spec.std)  # type: ignore[attr-defined]
    if split:
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


def for_heads(parameter: Tensor, tp_group: Group) -> Tensor:
    """A parameter as this rank's heads use it: the gradient of one that is not split over heads is
    summed over all tensor-parallel ranks."""
    if getattr(parameter, "tensor_model_parallel", False) or tp_group.size() == 1:
        return parameter
    summed: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(parameter, group=tp_group)
    return summed


@dataclass(frozen=True, kw_only=True)
class AttentionParts:
    """What the plugins of a recipe say of attention.

    Attributes:
        position_bias: of the positional plugin.
        prefix: of the loss plugin: the first so many positions see one another.
    """

    spec: AttentionSpec
    backend: Backend
    position_bias: ScoreBias | None = None
    prefix: int = 0


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _local_heads(count: int, rank: int, device: torch.device) -> Tensor:
    """The numbers of the heads of a tensor-parallel rank, which has ``count``, int64. All layers share it:
    nobody writes to it."""
    return torch.arange(rank * count, (rank + 1) * count, device=device)


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """O = A V for this rank's heads and queries; keys and values of all context-parallel ranks."""

    def __init__(
        self, config: TransformerConfig, parts: AttentionParts, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.parts = parts
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        scale = parts.spec.scale
        self.scale = config.kv_channels**-0.5 if scale is None else scale
        self.declared = self._register(parts.spec.parameters, "")
        bias = parts.position_bias
        self.position_declared = self._register(bias.parameters if bias else {}, "position_")

    def _register(self, declared: Mapping[str, ParameterSpec], prefix: str) -> dict[str, str]:
        """Makes the parameters; returns their attributes' names by their declared ones."""
        for name, parameter in declared.items():
            self.register_parameter(prefix + name, make_parameter(parameter, self.config, self.tp_group))
        return {name: prefix + name for name in declared}

    def _parameters_for_heads(self, declared: dict[str, str]) -> dict[str, Tensor]:
        return {name: for_heads(getattr(self, at), self.tp_group) for name, at in declared.items()}

    def parameters_named(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Declared parameters of the attention, as this rank's heads use them."""
        return self._parameters_for_heads({name: self.declared[name] for name in names})

    def problem(
        self,
        query_sbhd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        document_start_bk: Tensor | None = None,
    ) -> Problem:
        """This rank's part of the attention: its queries, the keys and values of all positions.

        Args:
            document_start_bk: of all positions, as in ``Problem``.
        """
        cp, device = self.cp_group.size(), query_sbhd.device
        position_q = local_positions(query_sbhd.shape[0] * cp, self.cp_group, device)
        position_k = position_q
        if cp > 1:
            key_sbgd = gather_sequence(key_sbgd, self.cp_group)
            value_sbgd = gather_sequence(value_sbgd, self.cp_group)
            position_k = torch.arange(key_sbgd.shape[0], device=device)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbhd, key_sbgd, value_sbgd))
        return Problem(
            spec=self.parts.spec,
            query_bhqd=query,
            key_bgkd=key,
            value_bgkd=value,
            position_q=position_q,
            position_k=position_k,
            aligned=cp == 1,
            scale=self.scale,
            heads=_local_heads(query.shape[1], self.tp_group.rank(), device),
            parameters=self._parameters_for_heads(self.declared),
            position_bias=self.parts.position_bias,
            position_parameters=self._parameters_for_heads(self.position_declared),
            prefix=self.parts.prefix,
            document_start_bk=document_start_bk,
        )

    def forward(
        self,
        query_sbhd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        document_start_bk: Tensor | None = None,
    ) -> Tensor:
        """Returns [s, b, h, d]."""
        problem = self.problem(query_sbhd, key_sbgd, value_sbgd, document_start_bk)
        output_bhsd = self.parts.backend.run(problem)
        return output_bhsd.permute(2, 0, 1, 3)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, object] | None = None,
    ) -> dict[str, object]:
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {k: 0 for k, v in state.items() if getattr(v, "tensor_model_parallel", False)}
        result: dict[str, object] = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
        return result


class SummedProjection(MegatronModule):  # type: ignore[misc]
    """Projects the sum of all heads' outputs, [s, b, h, d] -> [s, b, n]."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        shape = (config.hidden_size, config.kv_channels)
        data = torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(data)

    def forward(self, heads_sbhd: Tensor) -> Tensor:
        partial = torch.nn.functional.linear(heads_sbhd.sum(2), for_heads(self.weight, self.tp_group))
        if self.config.sequence_parallel:
            scattered: Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                partial, group=self.tp_group
            )
            return scattered
        reduced: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(
            partial, group=self.tp_group
        )
        return reduced


class SelfAttention(MegatronModule):  # type: ignore[misc]
    """Projections and rotary embedding around the core. Heads are split over tensor-parallel ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        parts: AttentionParts,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        fused: bool = False,
        linears: Linears = LOCAL,
    ) -> None:
        super().__init__(config=config)
        self.fused = fused
        self.is_first = layer_number == 1
        self.transform = parts.spec.head_transform
        self.gate = parts.spec.output_gate
        self.tp_group = pg_collection.tp
        self.heads = HeadLayout(
            groups=config.num_query_groups // pg_collection.tp.size(),
            queries=config.num_attention_heads // config.num_query_groups,
            size=config.kv_channels,
        )
        width = config.kv_channels * config.num_attention_heads
        linear: dict[str, Any] = {"config": config, "skip_bias_add": False, "is_expert": False}
        linear["tp_group"] = pg_collection.tp
        self.linear_qkv = linears.column(
            config.hidden_size,
            width + 2 * config.kv_channels * config.num_query_groups,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_qkv_bias,
            **linear,
        )
        self.core = CoreAttention(config, parts, pg_collection)
        if parts.spec.combine == "sum":
            self.linear_proj = SummedProjection(config, pg_collection)
        else:
            self.linear_proj = linears.row(
                width,
                config.hidden_size,
                init_method=config.output_layer_init_method,
                input_is_parallel=True,
                bias=config.add_bias_linear,
                **linear,
            )
        on_card = self.linear_qkv.weight.is_cuda
        self.rotate = torch.compile(reference.rotate) if on_card else reference.rotate
        self.recompute_core = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def forward(
        self,
        hidden_sbn: Tensor,
        rotary: Tensor | None,
        first_value: Tensor | None = None,
        document_start_bk: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [s, b, n] (sequence parallel: this rank's share) -> the same shape, and the values of layer
        1 for the next layer, if the attention uses them.

        Args:
            rotary: cosine and sine of the local positions, [2, s, r/2], or None.
            first_value: the values of layer 1 [s, b, g, d], for layers after it.
            document_start_bk: of all positions, as in ``Problem``.
        """
        mixed, _ = self.linear_qkv(hidden_sbn)
        if self.fused and self.transform is None and rotary is not None:
            cos, sin = rotary[:, :, None, None]
            query, key, value = split_and_rotate(mixed, cos, sin, self.heads)
        else:
            query, key, value = self.heads.split(mixed)
            if self.transform is not None:
                if self.transform.first_value and self.is_first:
                    first_value = value
                query, key, value = self._transformed(
                    self.transform, Heads(query=query, key=key, value=value, first_value=first_value)
                )
            if rotary is not None:
                cos, sin = rotary[:, :, None, None]
                query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        if self.recompute_core and self.training:
            attended: Tensor = tensor_parallel.checkpoint(
                self.core, False, query, key, value, document_start_bk
            )
        else:
            attended = self.core(query, key, value, document_start_bk)
        if self.gate is not None:
            attended = attended * self._factor(self.gate, hidden_sbn)
        if isinstance(self.linear_proj, SummedProjection):
            output: Tensor = self.linear_proj(attended)
        else:
            output = self.linear_proj(attended.flatten(2))[0]
        return output, first_value

    def _transformed(self, transform: HeadTransform, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        changed = transform.function(heads, self.core.parameters_named(transform.parameters))
        dtype = heads.query.dtype
        return changed.query.to(dtype), changed.key.to(dtype), changed.value.to(dtype)

    def _factor(self, gate: OutputGate, hidden_sbn: Tensor) -> Tensor:
        """The gate of this rank's heads, [s, b, h, d] or [s, b, h, 1]. Its gradient with respect to the
        input is summed over ranks, as a column-parallel projection's is."""
        if self.config.sequence_parallel:
            hidden_sbn = tensor_parallel.gather_from_sequence_parallel_region(hidden_sbn, group=self.tp_group)
        elif self.tp_group.size() > 1:
            hidden_sbn = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_sbn, group=self.tp_group)
        factor = gate.function(hidden_sbn, self.core.parameters_named(gate.parameters)).to(hidden_sbn.dtype)
        return factor[..., None] if factor.dim() == hidden_sbn.dim() else factor
