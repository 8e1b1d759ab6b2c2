"""A whole model's forward pass and the sink metrics in numpy float64, from formulas alone.

Shapes: b sequence, h head, g kv head, q query position, k key position, s position, d head size,
n hidden size, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sinkbench.config import ModelConfig

Array: TypeAlias = npt.NDArray[Any]
ROPE_BASE = 10000.0
NORM_EPS = 1e-5
NORMALIZER_EPS = 1e-8
CORE = "attention.core."
"""What an attention's declared parameters are called in a layer."""


def _swish(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def _gelu(x: Array) -> Array:
    return np.asarray(x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


ACTIVATIONS = {
    "swiglu": _swish,
    "geglu": _gelu,
    "reglu": _relu,
    "swish": _swish,
    "gelu": _gelu,
    "relu": _relu,
}


@dataclass
class Forward:
    """What each layer did, and the token losses [b, s] where there are targets."""

    weights_bhqk: list[Array] = field(default_factory=list)
    key_bgsd: list[Array] = field(default_factory=list)
    value_bgsd: list[Array] = field(default_factory=list)
    projected_bgsd: list[Array] = field(default_factory=list)
    """Values as the projection gives them."""
    output_bsn: list[Array] = field(default_factory=list)
    losses_bs: Array | None = None
    row_sum_bhq: list[Array] = field(default_factory=list)
    """Of the weights, with that of a sink token."""

    def without_sink_token(self, leading: int) -> None:
        self.row_sum_bhq = [weights[:, :, leading:].sum(-1) for weights in self.weights_bhqk]
        self.weights_bhqk = [weights[:, :, leading:, leading:] for weights in self.weights_bhqk]
        self.key_bgsd = [key[:, :, leading:] for key in self.key_bgsd]
        self.value_bgsd = [value[:, :, leading:] for value in self.value_bgsd]
        self.output_bsn = [x[:, leading:] for x in self.output_bsn]


def forward(
    model: ModelConfig, tensors: Mapping[str, Any], tokens_bs: Array, targets_bs: Array | None = None
) -> Forward:
    """
    Args:
        tensors: of a checkpoint by name, layers along the first dimension.
    """
    parameters = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    result = Forward()
    x_bsn = parameters["embedding.word_embeddings.weight"][tokens_bs]
    sink_token = parameters.get("embedding.sink_token")
    leading = int(sink_token is not None)
    if sink_token is not None:
        x_bsn = np.concatenate([np.broadcast_to(sink_token, (len(x_bsn), 1, x_bsn.shape[-1])), x_bsn], 1)
    if model.positional.name == "learned":
        x_bsn = x_bsn + parameters["embedding.position_embeddings.weight"][: x_bsn.shape[1]]
    prefix = "decoder.layers."
    for number in range(model.num_layers):
        layer = {
            name.removeprefix(prefix): tensor[number]
            for name, tensor in parameters.items()
            if name.startswith(prefix)
        }
        x_bsn = _around(layer, "attention", x_bsn, partial(_attention, model, layer, result=result))
        if model.ffn != "none":
            x_bsn = _around(layer, "mlp", x_bsn, partial(_feed_forward, model.ffn, layer))
        result.output_bsn.append(x_bsn)
    if targets_bs is not None:
        x_bsn = x_bsn[:, leading:]
        if "final_norm.weight" in parameters:
            x_bsn = _norm(parameters, "final_norm", x_bsn)
        table = "embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"
        logits_bsv = x_bsn @ parameters[table].T
        chosen_bs = np.take_along_axis(logits_bsv, targets_bs[..., None], -1)[..., 0]
        result.losses_bs = np.log(np.exp(logits_bsv).sum(-1)) - chosen_bs
    result.without_sink_token(leading)
    return result


def _around(layer: Mapping[str, Array], name: str, x: Array, sublayer: Callable[[Array], Array]) -> Array:
    """A sublayer with the norms that the layer has: before it, after it, or after the addition."""
    before, after = f"norms.{name}_input", f"norms.{name}_output"
    if f"{before}.weight" not in layer:
        return _norm(layer, after, x + sublayer(x))
    added = sublayer(_norm(layer, before, x))
    return x + (_norm(layer, after, added) if f"{after}.weight" in layer else added)


def _norm(parameters: Mapping[str, Array], name: str, x: Array) -> Array:
    """RMSNorm, or LayerNorm where there is a bias."""
    gain, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    if bias is None:
        return np.asarray(_rms(x) * gain)
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt(x.var(-1, keepdims=True) + NORM_EPS) * gain + bias)


def _rms(x: Array) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS))


def _attention(model: ModelConfig, layer: Mapping[str, Array], x_bsn: Array, *, result: Forward) -> Array:
    """The fused projection holds, for each kv head, its queries, then its key, then its value."""
    d, kv_heads = model.head_dim, model.kv_heads
    per_group = model.num_attention_heads // kv_heads
    mixed = x_bsn @ layer["attention.linear_qkv.weight"].T
    mixed = mixed.reshape(*x_bsn.shape[:2], kv_heads, per_group + 2, d).transpose(0, 2, 3, 1, 4)
    query_bgpsd, key_bgsd, value_bgsd = mixed[:, :, :per_group], mixed[:, :, -2], mixed[:, :, -1]
    learned = {k.removeprefix(CORE): v for k, v in layer.items() if k.startswith(CORE)}
    if model.attention.name == "qk_norm":
        query_bgpsd = _rms(query_bgpsd) * learned["query_gain"]
        key_bgsd = _rms(key_bgsd) * learned["key_gain"]
    result.projected_bgsd.append(value_bgsd)
    if model.attention.name == "value_residual":
        value_bgsd = learned["own"] * value_bgsd + learned["first"] * result.projected_bgsd[0]
    if model.positional.name == "rope":
        query_bgpsd, key_bgsd = _rotated(query_bgpsd), _rotated(key_bgsd)
    score = np.einsum("bgpqd,bgkd->bgpqk", query_bgpsd, key_bgsd) / math.sqrt(d)
    score_bhqk = score.reshape(len(x_bsn), model.num_attention_heads, *score.shape[-2:])
    bias = learned.get("score_bias")
    if bias is not None:
        score_bhqk = score_bhqk + bias[:, None, None]
    weights_bhqk = _weights(model, score_bhqk, learned)
    output_bhqd = weights_bhqk @ value_bgsd.repeat(per_group, axis=1)
    if model.attention.name == "gated":
        subscripts = "bsn,hn->bhs" if learned["gate"].ndim == 2 else "bsn,hdn->bhsd"
        gate = 1 / (1 + np.exp(-np.einsum(subscripts, x_bsn, learned["gate"])))
        output_bhqd = output_bhqd * (gate[..., None] if gate.ndim == 3 else gate)
    result.weights_bhqk.append(weights_bhqk)
    result.key_bgsd.append(key_bgsd)
    result.value_bgsd.append(value_bgsd)
    joined = output_bhqd.transpose(0, 2, 1, 3).reshape(*x_bsn.shape[:2], -1)
    if model.attention.params.get("combine") == "sum":
        joined = output_bhqd.sum(1)
    return np.asarray(joined @ layer["attention.linear_proj.weight"].T)


def _rotated(x: Array) -> Array:
    """[..., s, d]: dimensions j and j + d/2 are a complex number, turned by s * base^(-2j/d)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] * ROPE_BASE ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def _weights(model: ModelConfig, score_bhqk: Array, learned: Mapping[str, Array]) -> Array:
    """Zero above the diagonal."""
    name, params = model.attention.name, model.attention.params
    if name == "sigmoid":
        weights = np.tril(1 / (1 + np.exp(-score_bhqk)))
        if not params.get("normalize", True):
            return weights
        return np.asarray(weights / (weights.sum(-1, keepdims=True) + NORMALIZER_EPS))
    if name == "softpick":
        less_one = np.tril(np.exp(score_bhqk) - 1)
        return np.asarray(np.maximum(less_one, 0) / (np.abs(less_one).sum(-1, keepdims=True) + 1e-6))
    weights = np.tril(np.exp(score_bhqk))
    logit = {"softmax_off_by_one": np.zeros(1), "sink_logit": learned.get("logit")}.get(name)
    more = 0 if logit is None else np.exp(logit)[:, None, None]
    return np.asarray(weights / (weights.sum(-1, keepdims=True) + more))


def _feed_forward(ffn: str, layer: Mapping[str, Array], x: Array) -> Array:
    """A gated block's first projection holds the gate, then what it gates."""
    hidden = x @ layer["mlp.linear_fc1.weight"].T
    if ffn.endswith("glu"):
        gate, value = np.split(hidden, 2, axis=-1)
        hidden = ACTIVATIONS[ffn](gate) * value
    else:
        hidden = ACTIVATIONS[ffn](hidden)
    return np.asarray(hidden @ layer["mlp.linear_fc2.weight"].T)


def sink_metrics(run: Forward, eps: float) -> dict[str, Array]:
    """Of the metric plugin ``sink``; the importance of key k is the mean of A[i, k] over i >= k."""
    metrics = {"row_sum": np.asarray(np.mean(run.row_sum_bhq))}
    for kind in ("raw", "proxy"):
        alpha_lbhk = []
        for weights, row_sum in zip(run.weights_bhqk, run.row_sum_bhq, strict=True):
            if kind == "proxy":
                weights = weights / (row_sum[..., None] + 1e-8)
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
