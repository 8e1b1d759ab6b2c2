"""GPT-2 and OPT: LayerNorm, biases, learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinkbench.export.architecture import Architecture
from sinkbench.export.family import GELU_NAMES, GELUS, LAYER, Family, attention_names, require
from sinkbench.export.pieces import Piece, beginning, queries_keys_values, separate_heads, transposed, whole

_OPT_OFFSET = 2
"""Rows of OPT's position table before that of position 0."""


def _read_gpt2(config: Mapping[str, Any]) -> Architecture:
    activation = require(config, "activation_function", tuple(GELUS), "gelu_new")
    require(config, "scale_attn_weights", (True,), True)
    require(config, "scale_attn_by_inverse_layer_idx", (False,), False)
    heads, hidden = config["n_head"], config["n_embd"]
    return Architecture(
        num_layers=config["n_layer"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        ffn=GELUS[activation],
        ffn_hidden_size=config.get("n_inner") or 4 * hidden,
        linear_bias="all",
        vocab_size=config["vocab_size"],
        num_positions=config["n_positions"],
        tie_embeddings=config.get("tie_word_embeddings", True),
        norm="layernorm",
        eps=config.get("layer_norm_epsilon", 1e-5),
        learned_positions=True,
    )


def _classic(a: Architecture) -> bool:
    """LayerNorm, biases and learned positions, one kv head for each head: GPT-2 and OPT."""
    return (
        a.ffn in GELU_NAMES
        and a.norm == "layernorm"
        and a.learned_positions
        and a.linear_bias == "all"
        and not a.parallel_residual
        and a.num_heads == a.num_kv_heads
        and a.window is None
        and a.head_size * a.num_heads == a.hidden_size
    )


def _write_gpt2(a: Architecture) -> dict[str, Any] | None:
    if not _classic(a):
        return None
    return {
        "vocab_size": a.vocab_size,
        "n_embd": a.hidden_size,
        "n_inner": a.ffn_hidden_size,
        "n_layer": a.num_layers,
        "n_head": a.num_heads,
        "n_positions": a.num_positions,
        "activation_function": GELU_NAMES[a.ffn],
        "layer_norm_epsilon": a.eps,
        "tie_word_embeddings": a.tie_embeddings,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _gpt2_pieces(a: Architecture) -> list[Piece]:
    at = "transformer.h.{}."
    pieces = [
        whole("embedding.word_embeddings.weight", "transformer.wte.weight"),
        whole("embedding.position_embeddings.weight", "transformer.wpe.weight"),
    ]
    for kind in ("weight", "bias"):
        linear = transposed if kind == "weight" else whole
        pieces += [
            whole(f"{LAYER}norms.attention_input.{kind}", f"{at}ln_1.{kind}"),
            queries_keys_values(f"{LAYER}attention.linear_qkv.{kind}", f"{at}attn.c_attn.{kind}", a.heads),
            linear(f"{LAYER}attention.linear_proj.{kind}", f"{at}attn.c_proj.{kind}"),
            whole(f"{LAYER}norms.mlp_input.{kind}", f"{at}ln_2.{kind}"),
            linear(f"{LAYER}mlp.linear_fc1.{kind}", f"{at}mlp.c_fc.{kind}"),
            linear(f"{LAYER}mlp.linear_fc2.{kind}", f"{at}mlp.c_proj.{kind}"),
            whole(f"final_norm.{kind}", f"transformer.ln_f.{kind}"),
        ]
    return pieces + ([] if a.tie_embeddings else [whole("output_layer.weight", "lm_head.weight")])


def _read_opt(config: Mapping[str, Any]) -> Architecture:
    activation = require(config, "activation_function", tuple(GELUS), "relu")
    require(config, "do_layer_norm_before", (True,), True)
    require(config, "enable_bias", (True,), True)
    require(config, "layer_norm_elementwise_affine", (True,), True)
    require(config, "_remove_final_layer_norm", (False,), False)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    require(config, "word_embed_proj_dim", (hidden, None), None)
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        ffn=GELUS[activation],
        ffn_hidden_size=config["ffn_dim"],
        linear_bias="all",
        vocab_size=config["vocab_size"],
        num_positions=config["max_position_embeddings"],
        tie_embeddings=config.get("tie_word_embeddings", True),
        norm="layernorm",
        eps=1e-5,
        learned_positions=True,
    )


def _write_opt(a: Architecture) -> dict[str, Any] | None:
    if not _classic(a) or a.ffn != "relu" or a.eps != 1e-5:
        return None
    return {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "word_embed_proj_dim": a.hidden_size,
        "ffn_dim": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "max_position_embeddings": a.num_positions,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "dropout": 0.0,
        "tie_word_embeddings": a.tie_embeddings,
    }


def _opt_pieces(a: Architecture) -> list[Piece]:
    at, model = "model.decoder.layers.{}.", "model.decoder."
    positions = "embedding.position_embeddings.weight"
    pieces = [
        whole("embedding.word_embeddings.weight", f"{model}embed_tokens.weight"),
        beginning(positions, f"{model}embed_positions.weight", _OPT_OFFSET),
    ]
    for kind in ("weight", "bias"):
        pieces += [
            whole(f"{LAYER}norms.attention_input.{kind}", f"{at}self_attn_layer_norm.{kind}"),
            separate_heads(f"{LAYER}attention.linear_qkv.{kind}", attention_names(at, kind), a.heads),
            whole(f"{LAYER}attention.linear_proj.{kind}", f"{at}self_attn.out_proj.{kind}"),
            whole(f"{LAYER}norms.mlp_input.{kind}", f"{at}final_layer_norm.{kind}"),
            whole(f"{LAYER}mlp.linear_fc1.{kind}", f"{at}fc1.{kind}"),
            whole(f"{LAYER}mlp.linear_fc2.{kind}", f"{at}fc2.{kind}"),
            whole(f"final_norm.{kind}", f"{model}final_layer_norm.{kind}"),
        ]
    return pieces + ([] if a.tie_embeddings else [whole("output_layer.weight", "lm_head.weight")])


GPT2 = Family(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    read=_read_gpt2,
    write=_write_gpt2,
    pieces=_gpt2_pieces,
    ignored=("attn.bias", "attn.masked_bias"),
    prefix="transformer.",
)

OPT = Family(
    model_type="opt",
    class_name="OPTForCausalLM",
    read=_read_opt,
    write=_write_opt,
    pieces=_opt_pieces,
    prefix="model.",
)
