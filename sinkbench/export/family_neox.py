"""GPT-NeoX, which Pythia is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinkbench.api import Rotary
from sinkbench.export.architecture import Architecture
from sinkbench.export.family import GELU_NAMES, GELUS, LAYER, Family, read_rotary, require
from sinkbench.export.pieces import Piece, whole


def _read_neox(config: Mapping[str, Any]) -> Architecture:
    activation = require(config, "hidden_act", ("gelu", "gelu_new", "relu", "silu"), "gelu")
    require(config, "attention_bias", (True,), True)
    new = config.get("rope_parameters") or {}
    fraction = new.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    rotary = read_rotary({"rope_theta": config.get("rotary_emb_base"), **config}, 10000.0)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        ffn=GELUS[activation],
        ffn_hidden_size=config["intermediate_size"],
        linear_bias="all",
        parallel_residual=config.get("use_parallel_residual", True),
        vocab_size=config["vocab_size"],
        num_positions=config["max_position_embeddings"],
        tie_embeddings=config.get("tie_word_embeddings", False),
        norm="layernorm",
        eps=config.get("layer_norm_eps", 1e-5),
        rotary=Rotary(base=rotary.base, fraction=fraction),
    )


def _write_neox(a: Architecture) -> dict[str, Any] | None:
    rotary = a.rotary
    fits = (
        a.ffn in ("gelu", "relu", "swish")
        and a.norm == "layernorm"
        and a.linear_bias == "all"
        and a.num_heads == a.num_kv_heads
        and a.window is None
        and a.head_size * a.num_heads == a.hidden_size
        and rotary is not None
        and int(a.head_size * rotary.fraction) % 2 == 0
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
        "hidden_act": GELU_NAMES[a.ffn],
        "max_position_embeddings": a.num_positions,
        "layer_norm_eps": a.eps,
        "rotary_pct": rotary.fraction,
        "rotary_emb_base": rotary.base,
        "rope_theta": rotary.base,
        "use_parallel_residual": a.parallel_residual,
        "tie_word_embeddings": a.tie_embeddings,
    }


def _neox_pieces(a: Architecture) -> list[Piece]:
    at = "gpt_neox.layers.{}."
    pieces = [whole("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight")]
    for kind in ("weight", "bias"):
        pieces += [
            whole(f"{LAYER}norms.attention_input.{kind}", f"{at}input_layernorm.{kind}"),
            whole(f"{LAYER}attention.linear_qkv.{kind}", f"{at}attention.query_key_value.{kind}"),
            whole(f"{LAYER}attention.linear_proj.{kind}", f"{at}attention.dense.{kind}"),
            whole(f"{LAYER}norms.mlp_input.{kind}", f"{at}post_attention_layernorm.{kind}"),
            whole(f"{LAYER}mlp.linear_fc1.{kind}", f"{at}mlp.dense_h_to_4h.{kind}"),
            whole(f"{LAYER}mlp.linear_fc2.{kind}", f"{at}mlp.dense_4h_to_h.{kind}"),
            whole(f"final_norm.{kind}", f"gpt_neox.final_layer_norm.{kind}"),
        ]
    return pieces + ([] if a.tie_embeddings else [whole("output_layer.weight", "embed_out.weight")])


GPT_NEOX = Family(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    read=_read_neox,
    write=_write_neox,
    pieces=_neox_pieces,
    ignored=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)
