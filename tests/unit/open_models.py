"""Tiny randomly initialised models of every family that is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sinkbench.measure.hf_load import OpenModel
from sinkbench.measure.hf_place import Place, Trust

VOCABULARY, LAYERS, HEADS, WINDOW = 61, 2, 4, 5

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "gpt_neox": SIZES,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma2": {
        **GROUPED,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {**GROUPED, "num_hidden_layers": LAYERS, "sliding_window": WINDOW},
    "gpt_oss": {**GROUPED, **EXPERTS, "sliding_window": WINDOW},
    "mixtral": {**GROUPED, **EXPERTS},
    "falcon": {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": HEADS},
}
ONE_KEY_HEAD = {**GROUPED, "num_key_value_heads": 1}
FALCON_ALIBI = {**SIZES, "new_decoder_architecture": False, "multi_query": True, "alibi": True}
HYBRID = {**GROUPED, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}


def tiny_model(model_type: str, sizes: dict[str, Any], attention: str = "eager") -> Any:
    """A model with weights large enough that its attention is not flat."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes)
    config.initializer_range = 0.15
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def opened(model: Any, folder: Path = Path("tiny")) -> OpenModel:
    """The model as if it had been read from a folder."""
    return OpenModel(model=model, place=Place(target="tiny", folder=folder), trust=Trust())
