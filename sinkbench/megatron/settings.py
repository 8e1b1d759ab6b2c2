"""The recipe in megatron's words: TransformerConfig and optimizer configuration."""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import TypeAdapter, ValidationError

from sinkbench.config import MEGATRON_FIELDS, Config
from sinkbench.errors import RecipeError
from sinkbench.feed_forward import ACTIVATIONS
from sinkbench.megatron import fusions, weight_gradients

OF_EAGER_LOSS = frozenset(
    {
        "cross_entropy_fusion_impl",
        "cross_entropy_loss_fusion",
        "defer_embedding_wgrad_compute",
        "wgrad_deferral_limit",
    }
)
"""Those that take effect where train.fused has no loss."""


def dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """Raises RecipeError for a field under model.megatron of a wrong value, or without effect."""
    model, parallel = config.model, config.parallel
    fused = fusions.chosen(config, device)
    if "gradients" in fused:
        weight_gradients.prepare()
    activation, gated = ACTIVATIONS[model.ffn]
    fields: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size or model.hidden_size,
        activation_func=activation,
        gated_linear_unit=gated,
        add_bias_linear=model.linear_bias == "all",
        add_qkv_bias=model.linear_bias != "none",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # What runs fused is chosen in fusions.py. megatron's own fused loss rounds its gradient to bf16.
        cross_entropy_loss_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion="gradients" in fused,
        # Otherwise Transformer Engine writes over the sum of gradients in what megatron calls a step's first
        # micro-batch, which in a graph is each.
        disable_parameter_transpose_cache=True,
        # initialise.py fills the weights; megatron's initialisation only marks how they are split.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        calculate_per_token_loss=True,
        deterministic_mode=config.train.deterministic,
        params_dtype=dtype(config),
        pipeline_dtype=dtype(config),
        bf16=config.train.precision == "bf16",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        # Interleaving with batched point-to-point calls is silently wrong over gloo.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        **_recompute(config.train.recompute),
    )
    fields |= _passed_through(model.megatron)
    if model.linear_maps == "te" and fields.get("tp_comm_overlap"):
        problem = "Transformer Engine needs buffers for it, which are not made here"
        raise RecipeError("model.megatron.tp_comm_overlap", problem, "remove it")
    if "loss" in fused:
        for name in sorted(OF_EAGER_LOSS & model.megatron.keys()):
            remedy = "remove it, or leave loss out of train.fused"
            raise RecipeError(f"model.megatron.{name}", "has no effect on the fused loss", remedy)
    try:
        return TransformerConfig(**fields)
    except (ValueError, AssertionError) as error:
        if not model.megatron:
            raise
        remedy = f"change {', '.join(model.megatron)}"
        raise RecipeError("model.megatron", f"megatron-core refuses it ({error})", remedy) from error


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _recompute(what: str) -> dict[str, Any]:
    if what == "attention":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if what == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def _passed_through(fields: dict[str, Any]) -> dict[str, Any]:
    types = get_type_hints(TransformerConfig)
    assert fields.keys() <= MEGATRON_FIELDS  # see preflight
    for name in fields:
        _check_type(f"model.megatron.{name}", fields[name], types[name])
    return fields


def _check_type(where: str, value: Any, wanted: Any) -> None:
    """megatron-core takes any value and fails where it is used."""
    try:
        TypeAdapter(wanted).validate_python(value, strict=True)
    except ValidationError as error:
        raise RecipeError(where, f"{value!r} is wrong ({error.errors()[0]['msg']})", "change it") from error


def optimizer_config(config: Config) -> OptimizerConfig:
    optim = config.optim
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.end_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=config.train.precision == "bf16",
        params_dtype=dtype(config),
        use_distributed_optimizer=True,
    )
