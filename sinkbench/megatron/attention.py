"""Self-attention and its core on megatron's tensor and context parallelism, from a declaration.

Shapes: s local position, b sequence, h local head, g local kv head, d head size, n hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from sinkbench.api import AttentionSpec, ParameterSpec
from sinkbench.attention import reference
from sinkbench.attention.backends import Backend, Problem
from sinkbench.megatron.sequence import gather_sequence, local_positions


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """O = A V for this rank's heads and queries; keys and values of all context-parallel ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: AttentionSpec,
        backend: Backend,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.spec = spec
        self.backend = backend
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.scale = config.kv_channels**-0.5 if spec.scale is None else spec.scale
        for name, parameter in spec.parameters.items():
            self.register_parameter(name, self._make(parameter))

    def _make(self, parameter: ParameterSpec) -> torch.nn.Parameter:
        config, tp = self.config, self.tp_group.size()
        sizes = {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_query_groups,
            "head_size": config.kv_channels,
            "hidden": config.hidden_size,
        }
        shape = [sizes[size] if isinstance(size, str) else size for size in parameter.shape]
        sharded = parameter.shape[:1] in (("heads",), ("kv_heads",))
        if sharded:
            shape[0] //= tp
        data = torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        result = torch.nn.Parameter(data)
        result.initial = (parameter.mean, parameter.std)  # type: ignore[attr-defined]
        if sharded:
            tensor_parallel.set_tensor_model_parallel_attributes(result, True, 0, 1)
        return result

    def parameter(self, name: str) -> Tensor:
        """A declared parameter, ready for use by local heads: the gradient of a replicated one is
        summed over the heads of all tensor-parallel ranks."""
        value: Tensor = getattr(self, name)
        if getattr(value, "tensor_model_parallel", False) or self.tp_group.size() == 1:
            return value
        summed: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(value, group=self.tp_group)
        return summed

    def problem(self, query_sbhd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor) -> Problem:
        """This rank's part of the attention: its queries, the keys and values of all positions."""
        cp = self.cp_group.size()
        device = query_sbhd.device
        position_q = local_positions(query_sbhd.shape[0] * cp, self.cp_group, device)
        position_k = position_q
        if cp > 1:
            key_sbgd = gather_sequence(key_sbgd, self.cp_group)
            value_sbgd = gather_sequence(value_sbgd, self.cp_group)
            position_k = torch.arange(key_sbgd.shape[0], device=device)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbhd, key_sbgd, value_sbgd))
        bias = self.spec.score_bias
        sink = getattr(self.spec.rule, "sink_logit", None)
        return Problem(
            spec=self.spec,
            query_bhqd=query,
            key_bgkd=key,
            value_bgkd=value,
            position_q=position_q,
            position_k=position_k,
            aligned=cp == 1,
            scale=self.scale,
            bias_h=self._per_head(bias, query),
            sink_h=self._per_head(sink, query),
        )

    def _per_head(self, value: float | str | None, query_bhqd: Tensor) -> Tensor | None:
        if value is None:
            return None
        if isinstance(value, str):
            return self.parameter(value)
        return query_bhqd.new_full((query_bhqd.shape[1],), value, dtype=torch.float32)

    def weights(self, problem: Problem) -> Tensor:
        """The attention weights of this rank's heads and queries, float32 [b, h, q, k]."""
        score = reference.scores(
            problem.query_bhqd.float(), problem.key_bgkd.float(), problem.scale, problem.bias_h
        )
        allowed = reference.allowed_qk(problem.position_q, problem.position_k, self.spec.window)
        return reference.weights(self.spec.rule, score, allowed, problem.sink_h)

    def forward(self, query_sbhd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor) -> Tensor:
        """Returns [s, b, h d]."""
        output_bhsd = self.backend.run(self.problem(query_sbhd, key_sbgd, value_sbgd))
        return output_bhsd.permute(2, 0, 1, 3).flatten(2)

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


class SelfAttention(MegatronModule):  # type: ignore[misc]
    """Projections and rotary embedding around the core. Heads are split over tensor-parallel ranks;
    each kv head's queries, key and value lie together in the fused projection, as in megatron."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: AttentionSpec,
        backend: Backend,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        tp = pg_collection.tp.size()
        self.local_groups = config.num_query_groups // tp
        self.queries_per_group = config.num_attention_heads // config.num_query_groups
        width = config.kv_channels * config.num_attention_heads
        linear: dict[str, Any] = {"config": config, "skip_bias_add": False, "bias": False}
        linear["tp_group"] = pg_collection.tp
        self.linear_qkv = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            width + 2 * config.kv_channels * config.num_query_groups,
            init_method=config.init_method,
            gather_output=False,
            **linear,
        )
        self.core = CoreAttention(config, spec, backend, pg_collection)
        self.linear_proj = tensor_parallel.RowParallelLinear(
            width,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **linear,
        )
        self.recompute_core = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def forward(self, hidden_sbn: Tensor, rotary: Tensor | None) -> Tensor:
        """hidden [s, b, n] (sequence parallel: this rank's share) -> the same shape.

        Args:
            rotary: cosine and sine of the local positions, [2, s, r/2], or None.
        """
        mixed, _ = self.linear_qkv(hidden_sbn)
        query, key, value = self._split(mixed)
        if rotary is not None:
            cos, sin = rotary[:, :, None, None]
            query, key = reference.rotate(query, cos, sin), reference.rotate(key, cos, sin)
        if self.recompute_core and self.training:
            context = tensor_parallel.checkpoint(self.core, False, query, key, value)
        else:
            context = self.core(query, key, value)
        output: Tensor = self.linear_proj(context)[0]
        return output

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = self.config.kv_channels
        grouped = mixed.unflatten(-1, (self.local_groups, (self.queries_per_group + 2) * d))
        query, key, value = grouped.split([self.queries_per_group * d, d, d], -1)
        return query.unflatten(-1, (self.queries_per_group, d)).flatten(2, 3), key, value
