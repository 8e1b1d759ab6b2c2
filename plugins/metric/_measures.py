"""The tensors behind the metric plugins of ``sinkbench_plugins.metric.sink``.

Shape suffixes: l layer, b sequence, h head (or kv head), s position, q query position, k key
position, d head size, n hidden size. Positions in names and keys of results count from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkbench.api import LayerCapture, Observation, PluginError

Result = dict[str, float | list[Any]]

SMALLEST_NORM = 1e-12
"""Divides the norm of the first token where all other norms are zero."""


def importance(weights_bhqk: Tensor) -> Tensor:
    """Importance of each key: alpha_k = 1/(T-k+1) sum_{i>=k} A[i,k] (Gu et al. 2410.10781).

    Args:
        weights_bhqk: attention weights, [b, h, T, T].

    Returns:
        alpha_bhk, float32. Queries before the key (a prefix that sees itself) do not count.
    """
    length = weights_bhqk.shape[-1]
    queries_k = torch.arange(length, 0, -1, device=weights_bhqk.device)
    return weights_bhqk.float().tril().sum(dim=-2) / queries_k


def normalized(weights_bhqk: Tensor, eps: float) -> Tensor:
    """The proxy of the paper for rows that do not sum to 1: |A_ij| / (sum_j |A_ij| + eps).

    A row of zeros stays zero.
    """
    absolute_bhqk = weights_bhqk.float().abs()
    return absolute_bhqk / (absolute_bhqk.sum(dim=-1, keepdim=True) + eps)


def exceeds(alpha: Tensor, eps: float) -> Tensor:
    """1[alpha > eps], but NaN where alpha is: a diverged model has no sink rate, not one of 0."""
    return torch.where(alpha.isnan(), alpha, (alpha > eps).to(alpha.dtype))


def stacked(layers: Sequence[Observation], key: str) -> Tensor:
    """One entry of every layer's observation: [l, b, ...]."""
    return torch.stack([layer[key] for layer in layers])


class Sink:
    """Importance of keys and sink rates, raw and proxy (Gu et al. 2410.10781).

    Floats, for each position k asked for (1 by default), in percent where named sink:
        sink_1_raw, sink_1_proxy: 100 * mean over layers, heads and sequences of 1[alpha_1 > eps];
            ``_eps0.2`` is appended for thresholds after the first.
        importance_1_raw, importance_1_proxy: mean of alpha_1 itself.
        row_sum: mean sum of a row of A; where it is nearly 0, the proxy means nothing.

    Lists:
        importance_raw, importance_proxy: [layer][head][key position], mean over sequences.
        sink_1_raw_heads, sink_1_proxy_heads: [layer][head], percent of sequences.
    """

    def __init__(self, *, eps: Sequence[float], positions: Sequence[int], proxy_eps: float) -> None:
        self.eps = tuple(eps)
        self.positions = tuple(positions)
        self.proxy_eps = proxy_eps

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to alpha_bhk, raw and proxy, and the mean row sum [b, h].

        Raises:
            PluginError: the sequences are shorter than a position asked for.
        """
        weights_bhqk = capture.weights_bhqk
        length = weights_bhqk.shape[-1]
        if max(self.positions) > length:
            raise PluginError(
                "metric sink",
                f"k {max(self.positions)} is beyond the {length} tokens of a probe sequence",
                "lower k or measure longer sequences",
            )
        return {
            "importance_raw": importance(weights_bhqk),
            "importance_proxy": importance(normalized(weights_bhqk, self.proxy_eps)),
            "row_sum": weights_bhqk.float().sum(dim=-1).mean(dim=-1),
        }

    def result(self, layers: Sequence[Observation]) -> Result:
        """Means over sequences, heads and layers."""
        result: Result = {"row_sum": stacked(layers, "row_sum").mean().item()}
        for kind in ("raw", "proxy"):
            alpha_lbhk = stacked(layers, f"importance_{kind}")
            result[f"importance_{kind}"] = alpha_lbhk.mean(dim=1).tolist()
            for k in self.positions:
                alpha_lbh = alpha_lbhk[..., k - 1]
                result[f"importance_{k}_{kind}"] = alpha_lbh.mean().item()
                for number, eps in enumerate(self.eps):
                    suffix = f"_eps{eps:g}" if number else ""
                    percent_lbh = 100 * exceeds(alpha_lbh, eps)
                    result[f"sink_{k}_{kind}{suffix}"] = percent_lbh.mean().item()
                    result[f"sink_{k}_{kind}_heads{suffix}"] = percent_lbh.mean(dim=1).tolist()
        return result


class Norms:
    """L2 norms of the first token against the mean of the others.

    The hidden state is the residual stream after a layer; keys and values are those the attention
    used, one per kv head. A ratio is ||x_1|| / mean_{t>1} ||x_t|| of a sequence, then averaged.

    Floats:
        activation_ratio: largest hidden-state ratio of any layer (massive activations,
            Sun et al. 2402.17762).
        key_norm_ratio, value_drain: key and value ratios, mean over layers, kv heads, sequences.

    Lists:
        activation_ratio_layers: [layer].
        key_norm_ratio_heads, value_drain_heads: [layer][kv head].
        hidden_norm_first, hidden_norm_rest: [layer]; key_norm_first, key_norm_rest,
            value_norm_first, value_norm_rest: [layer][kv head]; the norms themselves.
    """

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to the norm of the first position and the mean norm of the others.

        Raises:
            PluginError: the sequences have only one token.
        """
        if capture.output_bsn.shape[1] < 2:
            raise PluginError(
                "metric norms", "a probe sequence has no token but the first", "measure longer sequences"
            )
        observation = {}
        for name, vectors in (
            ("hidden", capture.output_bsn),
            ("key", capture.key_bhsd),
            ("value", capture.value_bhsd),
        ):
            norm_b_s = torch.linalg.vector_norm(vectors.float(), dim=-1)
            observation[f"{name}_norm_first"] = norm_b_s[..., 0]
            observation[f"{name}_norm_rest"] = norm_b_s[..., 1:].mean(dim=-1)
        return observation

    def result(self, layers: Sequence[Observation]) -> Result:
        """Means over sequences; the ratios of hidden states are not averaged over layers."""
        result: Result = {}
        ratio = {}
        for name in ("hidden", "key", "value"):
            first_lb = stacked(layers, f"{name}_norm_first")
            rest_lb = stacked(layers, f"{name}_norm_rest")
            ratio[name] = (first_lb / rest_lb.clamp_min(SMALLEST_NORM)).mean(dim=1)
            result[f"{name}_norm_first"] = first_lb.mean(dim=1).tolist()
            result[f"{name}_norm_rest"] = rest_lb.mean(dim=1).tolist()
        return result | {
            "activation_ratio": ratio["hidden"].max().item(),
            "activation_ratio_layers": ratio["hidden"].tolist(),
            "key_norm_ratio": ratio["key"].mean().item(),
            "key_norm_ratio_heads": ratio["key"].tolist(),
            "value_drain": ratio["value"].mean().item(),
            "value_drain_heads": ratio["value"].tolist(),
        }


class Trigger:
    """Attention to the first token from queries that are trigger tokens, and from the others
    (Bigram-Backcopy, Guo et al. 2410.13835). The first query, which sees only itself, is left out.

    Floats:
        first_token_attention_trigger, first_token_attention_nontrigger: mean weight A[i, 1] over
            such queries i of all sequences, over layers and heads.

    Lists:
        first_token_attention_trigger_heads, first_token_attention_nontrigger_heads: [layer][head].

    A probe set without such a query has no such mean: the keys are absent.
    """

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to the sum of A[i, 1] over either kind of query [b, h], and their count [b].

        Raises:
            PluginError: the batch does not say which tokens are triggers.
        """
        if "trigger" not in capture.batch:
            raise PluginError(
                "metric trigger",
                "the data source marks no trigger tokens",
                "set data.source to bigram_backcopy, or drop trigger from measure.metrics",
            )
        trigger_bs = capture.batch["trigger"].to(capture.weights_bhqk.device)
        first_bhq = capture.weights_bhqk[..., 1:, 0].float()
        observation = {}
        for name, chosen_bs in (("trigger", trigger_bs), ("nontrigger", ~trigger_bs)):
            chosen_bq = chosen_bs[:, 1:].to(first_bhq.dtype)
            observation[f"{name}_sum"] = (first_bhq * chosen_bq.unsqueeze(1)).sum(dim=-1)
            observation[f"{name}_count"] = chosen_bq.sum(dim=-1)
        return observation

    def result(self, layers: Sequence[Observation]) -> Result:
        """Every query counts the same, however many its sequence has."""
        result: Result = {}
        for name in ("trigger", "nontrigger"):
            count = layers[0][f"{name}_count"].sum()
            if count == 0:
                continue
            mean_lh = stacked(layers, f"{name}_sum").sum(dim=1) / count
            result[f"first_token_attention_{name}"] = mean_lh.mean().item()
            result[f"first_token_attention_{name}_heads"] = mean_lh.tolist()
        return result
