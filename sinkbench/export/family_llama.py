"""LLaMA 2 and 3, Mistral, Qwen2, SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinkbench.export.architecture import Architecture
from sinkbench.export.family import LAYER, Family, UnsupportedError, attention_names, read_rotary, require
from sinkbench.export.pieces import Heads, Piece, halves, separate_heads, whole


def _read_llama(config: Mapping[str, Any], bias: str, window: int | None) -> Architecture:
    require(config, "hidden_act", ("silu", "swish"), "silu")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        ffn="swiglu",
        ffn_hidden_size=config["intermediate_size"],
        linear_bias=bias,
        vocab_size=config["vocab_size"],
        num_positions=config.get("max_position_embeddings", 2048),
        tie_embeddings=config.get("tie_word_embeddings", False),
        norm="rmsnorm",
        eps=config.get("rms_norm_eps", 1e-6),
        rotary=read_rotary(config, 10000.0),
        window=window,
    )


def _read_llama_itself(config: Mapping[str, Any]) -> Architecture:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:
        problem = "only one of attention_bias and mlp_bias is set"
        raise UnsupportedError("config.json", problem, "both must be true or both false")
    return _read_llama(config, "all" if attention else "none", None)


def _read_mistral(config: Mapping[str, Any]) -> Architecture:
    return _read_llama(config, "none", config.get("sliding_window"))


def _read_qwen2(config: Mapping[str, Any]) -> Architecture:
    if config.get("use_sliding_window"):
        problem = "use_sliding_window is set, for some layers only"
        raise UnsupportedError("config.json", problem, "choose a model whose layers all see all keys")
    return _read_llama(config, "qkv", None)


def _llama_config(a: Architecture, biases: tuple[str, ...]) -> dict[str, Any] | None:
    rotary = a.rotary
    fits = (
        a.ffn == "swiglu"
        and a.norm == "rmsnorm"
        and rotary is not None
        and rotary.fraction == 1
        and not a.parallel_residual
        and a.linear_bias in biases
        and a.hidden_size % a.num_heads == 0
    )
    if not fits:
        return None
    assert rotary is not None
    return {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": a.num_positions,
        "rms_norm_eps": a.eps,
        "rope_theta": rotary.base,
        "tie_word_embeddings": a.tie_embeddings,
    }


def _write_llama(a: Architecture) -> dict[str, Any] | None:
    config = _llama_config(a, ("none", "all"))
    if config is None or a.window is not None:
        return None
    return config | {"attention_bias": a.linear_bias == "all", "mlp_bias": a.linear_bias == "all"}


def _write_mistral(a: Architecture) -> dict[str, Any] | None:
    config = _llama_config(a, ("none",))
    return None if config is None or a.window is None else config | {"sliding_window": a.window}


def _write_qwen2(a: Architecture) -> dict[str, Any] | None:
    fits = a.window is None and a.head_size * a.num_heads == a.hidden_size
    config = _llama_config(a, ("qkv",)) if fits else None
    return None if config is None else config | {"use_sliding_window": False}


def llama_pieces(a: Architecture) -> list[Piece]:
    return [
        whole("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *layer_matrices(a.linear_bias, a.ffn, a.heads),
        whole(f"{LAYER}norms.attention_input.weight", "model.layers.{}.input_layernorm.weight"),
        whole(f"{LAYER}norms.mlp_input.weight", "model.layers.{}.post_attention_layernorm.weight"),
        whole("final_norm.weight", "model.norm.weight"),
        *([] if a.tie_embeddings else [whole("output_layer.weight", "lm_head.weight")]),
    ]


def layer_matrices(linear_bias: str, ffn: str, heads: Heads, summed: bool = False) -> list[Piece]:
    """Weights and biases of a layer's linear maps."""
    at = "model.layers.{}."
    pieces: list[Piece] = []
    everywhere = linear_bias == "all"
    for kind in ("weight", "bias"):
        if kind == "weight" or linear_bias != "none":
            pieces.append(
                separate_heads(f"{LAYER}attention.linear_qkv.{kind}", attention_names(at, kind), heads)
            )
        if kind == "weight" or (everywhere and not summed):
            pieces.append(whole(f"{LAYER}attention.linear_proj.{kind}", f"{at}self_attn.o_proj.{kind}"))
        if ffn != "none" and (kind == "weight" or everywhere):
            gate, up = f"{at}mlp.gate_proj.{kind}", f"{at}mlp.up_proj.{kind}"
            stored = f"{LAYER}mlp.linear_fc1.{kind}"
            gated = ffn in ("swiglu", "geglu", "reglu")
            pieces.append(halves(stored, gate, up) if gated else whole(stored, up))
            pieces.append(whole(f"{LAYER}mlp.linear_fc2.{kind}", f"{at}mlp.down_proj.{kind}"))
    return pieces


LLAMA = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    read=_read_llama_itself,
    write=_write_llama,
    pieces=llama_pieces,
    ignored=("self_attn.rotary_emb.inv_freq",),
)

MISTRAL = Family(
    model_type="mistral",
    class_name="MistralForCausalLM",
    read=_read_mistral,
    write=_write_mistral,
    pieces=llama_pieces,
)

QWEN2 = Family(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    read=_read_qwen2,
    write=_write_qwen2,
    pieces=llama_pieces,
)
