"""A whole model's forward pass and the sink metrics in numpy float64, from formulas alone.

Shapes: b sequence, h head, g kv head, q query position, k key position, s position, d head size,
n hidden size, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sinkbench.config import ModelConfig

Array: TypeAlias = npt.NDArray[Any]
ROPE_BASE = 10000.0
NORM_EPS = 1e-5
NORMALIZER_EPS = 1e-8


@dataclass
class Forward:
    """What each layer did, and the token losses [b, s] where there are targets."""

    weights_bhqk: list[Array] = field(default_factory=list)
    key_bgsd: list[Array] = field(default_factory=list)
    value_bgsd: list[Array] = field(default_factory=list)
    output_bsn: list[Array] = field(default_factory=list)
    losses_bs: Array | None = None


def forward(
    model: ModelConfig, tensors: Mapping[str, Any], tokens_bs: Array, targets_bs: Array | None = None
) -> Forward:
    """
    Args:
        tensors: of a checkpoint by name, layers along the first dimension.
    """
    parameters = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    result = Forward()
    length = tokens_bs.shape[1]
    x_bsn = parameters["embedding.word_embeddings.weight"][tokens_bs]
    if model.positional.name == "learned":
        x_bsn = x_bsn + parameters["embedding.position_embeddings.weight"][:length]
    prefix = "decoder.layers."
    for number in range(model.num_layers):
        layer = {
            name.removeprefix(prefix): tensor[number]
            for name, tensor in parameters.items()
            if name.startswith(prefix)
        }
        x_bsn = x_bsn + _attention(model, layer, _norm(layer, "norms.attention_input", x_bsn), result)
        if model.ffn != "none":
            x_bsn = x_bsn + _feed_forward(model.ffn, layer, _norm(layer, "norms.mlp_input", x_bsn))
        result.output_bsn.append(x_bsn)
    if targets_bs is not None:
        table = "embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"
        logits_bsv = _norm(parameters, "final_norm", x_bsn) @ parameters[table].T
        chosen_bs = np.take_along_axis(logits_bsv, targets_bs[..., None], -1)[..., 0]
        result.losses_bs = np.log(np.exp(logits_bsv).sum(-1)) - chosen_bs
    return result


def _norm(parameters: Mapping[str, Array], name: str, x: Array) -> Array:
    """RMSNorm, or LayerNorm where there is a bias."""
    gain, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    if bias is None:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS) * gain)
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt(x.var(-1, keepdims=True) + NORM_EPS) * gain + bias)


def _attention(model: ModelConfig, layer: Mapping[str, Array], x_bsn: Array, result: Forward) -> Array:
    """The fused projection holds, for each kv head, its queries, then its key, then its value."""
    d, kv_heads = model.head_dim, model.kv_heads
    per_group = model.num_attention_heads // kv_heads
    mixed = x_bsn @ layer["attention.linear_qkv.weight"].T
    mixed = mixed.reshape(*x_bsn.shape[:2], kv_heads, per_group + 2, d).transpose(0, 2, 3, 1, 4)
    query_bgpsd, key_bgsd, value_bgsd = mixed[:, :, :per_group], mixed[:, :, -2], mixed[:, :, -1]
    if model.positional.name == "rope":
        query_bgpsd, key_bgsd = _rotated(query_bgpsd), _rotated(key_bgsd)
    score = np.einsum("bgpqd,bgkd->bgpqk", query_bgpsd, key_bgsd) / math.sqrt(d)
    score_bhqk = score.reshape(len(x_bsn), model.num_attention_heads, *score.shape[-2:])
    bias = layer.get("attention.core.score_bias")
    if bias is not None:
        score_bhqk = score_bhqk + bias[:, None, None]
    weights_bhqk = _weights(model, score_bhqk)
    output_bhqd = weights_bhqk @ value_bgsd.repeat(per_group, axis=1)
    result.weights_bhqk.append(weights_bhqk)
    result.key_bgsd.append(key_bgsd)
    result.value_bgsd.append(value_bgsd)
    joined = output_bhqd.transpose(0, 2, 1, 3).reshape(*x_bsn.shape[:2], -1)
    return np.asarray(joined @ layer["attention.linear_proj.weight"].T)


def _rotated(x: Array) -> Array:
    """[..., s, d]: dimensions j and j + d/2 are a complex number, turned by s * base^(-2j/d)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] * ROPE_BASE ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def _weights(model: ModelConfig, score_bhqk: Array) -> Array:
    """Zero above the diagonal."""
    name, params = model.attention.name, model.attention.params
    if name == "sigmoid":
        weights = np.tril(1 / (1 + np.exp(-score_bhqk)))
        if not params.get("normalize", True):
            return weights
        return np.asarray(weights / (weights.sum(-1, keepdims=True) + NORMALIZER_EPS))
    weights = np.tril(np.exp(score_bhqk))
    one = {"softmax": 0, "softmax_off_by_one": 1}[name]
    return np.asarray(weights / (weights.sum(-1, keepdims=True) + one))


def _feed_forward(ffn: str, layer: Mapping[str, Array], x: Array) -> Array:
    """SwiGLU's first projection holds the gate, then what it gates."""
    hidden = x @ layer["mlp.linear_fc1.weight"].T
    if ffn == "swiglu":
        gate, value = np.split(hidden, 2, axis=-1)
        hidden = gate / (1 + np.exp(-gate)) * value
    else:
        assert ffn == "gelu"
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    return np.asarray(hidden @ layer["mlp.linear_fc2.weight"].T)


def sink_metrics(run: Forward, eps: float) -> dict[str, Array]:
    """Of the metric plugin ``sink``; the importance of key k is the mean of A[i, k] over i >= k."""
    metrics = {"row_sum": np.mean([weights.sum(-1) for weights in run.weights_bhqk])}
    for kind in ("raw", "proxy"):
        alpha_lbhk = []
        for weights in run.weights_bhqk:
            if kind == "proxy":
                weights = weights / (weights.sum(-1, keepdims=True) + 1e-8)
            length = weights.shape[-1]
            keys = [weights[..., k:, k].mean(-1) for k in range(length)]
            alpha_lbhk.append(np.stack(keys, -1))
        alpha = np.stack(alpha_lbhk)
        metrics[f"importance_{kind}"] = alpha.mean(1)
        metrics[f"importance_1_{kind}"] = alpha[..., 0].mean()
        metrics[f"sink_1_{kind}"] = 100 * (alpha[..., 0] > eps).mean()
        metrics[f"sink_1_{kind}_heads"] = 100 * (alpha[..., 0] > eps).mean(1)
    return metrics


def norm_metrics(run: Forward) -> dict[str, Array]:
    """Of the metric plugin ``norms``: the first token against the others."""
    metrics, ratio = {}, {}
    named = (("hidden", run.output_bsn), ("key", run.key_bgsd), ("value", run.value_bgsd))
    for name, vectors in named:
        norm_lb_s = np.sqrt((np.stack(vectors) ** 2).sum(-1))
        ratio[name] = (norm_lb_s[..., 0] / norm_lb_s[..., 1:].mean(-1)).mean(1)
        metrics[f"{name}_norm_tokens"] = norm_lb_s.mean(1)
        metrics[f"{name}_norm_first"] = norm_lb_s[..., 0].mean(1)
        metrics[f"{name}_norm_rest"] = norm_lb_s[..., 1:].mean((1, -1))
    return metrics | {
        "activation_ratio": ratio["hidden"].max(),
        "key_norm_ratio": ratio["key"].mean(),
        "value_drain": ratio["value"].mean(),
        "value_drain_heads": ratio["value"],
    }


def trigger_metrics(run: Forward, trigger_bs: Array) -> dict[str, Array]:
    """Of the metric plugin ``trigger``: the weight on key 1 of queries that are triggers, or not."""
    metrics = {}
    for name, chosen_bs in (("trigger", trigger_bs), ("nontrigger", ~trigger_bs)):
        sequences, queries = np.nonzero(chosen_bs[:, 1:])
        heads = [w[sequences, :, queries + 1, 0].mean(0) for w in run.weights_bhqk]
        metrics[f"first_token_attention_{name}_heads"] = np.stack(heads)
        metrics[f"first_token_attention_{name}"] = np.mean(heads)
    return metrics
