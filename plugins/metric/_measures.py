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

POSITIONS_KEPT = 64
"""Positions of which results by position tell: beyond, importance is a mean over too few queries."""


class Importance:
    """Sums over a layer's queries, a block of rows at a time: alpha_k = 1/(T-k+1) sum_{i>=k} A[i,k]
    (Gu et al. 2410.10781). Queries before the key (a prefix that sees itself) do not count.

    Args:
        positions: the first so many keys are kept.
        proxy_eps: the proxy is of |A_ij| / (sum_j |A_ij| + eps): the paper's for rows that do not sum
            to 1. The weight of an extra slot is part of its row; a row of zeros stays zero.
    """

    def __init__(self, positions: int, proxy_eps: float) -> None:
        self.positions = positions
        self.proxy_eps = proxy_eps

    def of(self, capture: LayerCapture) -> Observation:
        """importance_raw and importance_proxy [b, h, k], and row_sum [b, h], the mean sum of a row."""
        length = capture.query_bhsd.shape[2]
        kept = min(self.positions, length)
        if capture.key_sums is not None:
            raw_bhk, proxy_bhk, row_bhq = capture.key_sums(kept, self.proxy_eps)
            rows_bh = row_bhq.sum(-1)
        else:
            raw_bhk, proxy_bhk, rows_bh = self._summed_by_blocks(capture, kept)
        queries_k = torch.arange(length, length - kept, -1, device=raw_bhk.device)
        return {
            "importance_raw": raw_bhk / queries_k,
            "importance_proxy": proxy_bhk / queries_k,
            "row_sum": rows_bh / length,
        }

    def _summed_by_blocks(self, capture: LayerCapture, kept: int) -> list[Tensor]:
        sums: list[Tensor] = []
        for start, weights_bhqk in capture.weight_blocks():
            slot_bhq = capture.slot_bhq
            slot_bhq = None if slot_bhq is None else slot_bhq[..., start : start + weights_bhqk.shape[2]]
            block = self._block_sums(weights_bhqk, slot_bhq, start, kept)
            sums = [total + part for total, part in zip(sums, block, strict=True)] if sums else block
        return sums

    def _block_sums(
        self, weights_bhqk: Tensor, slot_bhq: Tensor | None, start: int, kept: int
    ) -> list[Tensor]:
        weights_bhqk = weights_bhqk.float()
        first_bhqk = weights_bhqk[..., :kept].tril(diagonal=start)
        sum_bhq, absolute_bhq = weights_bhqk.sum(-1), weights_bhqk.abs().sum(-1)
        if slot_bhq is not None:
            sum_bhq, absolute_bhq = sum_bhq + slot_bhq, absolute_bhq + slot_bhq.abs()
        proxy_bhqk = first_bhqk.abs() / (absolute_bhq.unsqueeze(-1) + self.proxy_eps)
        return [first_bhqk.sum(-2), proxy_bhqk.sum(-2), sum_bhq.sum(-1)]


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
        sink_total_4_raw, sink_total_4_proxy: the sum of Sink_1 to Sink_4, for each total asked for.
        importance_1_raw, importance_1_proxy: mean of alpha_1 itself.
        sink_slot, importance_slot: the same of the extra slot or the sink token, the paper's Sink_* and
            alpha_*, or of both together; its importance is its mean weight over all queries. They are raw
            alone, also where rows do not sum to 1.
        row_sum: mean sum of a row of A and the slot; where it is nearly 0, the proxy means nothing.

    Lists:
        importance_raw, importance_proxy: [layer][head][key position], the first 64, mean over sequences.
        importance_slot_heads: [layer][head], mean over sequences.
        sink_1_raw_heads, sink_1_proxy_heads, sink_slot_heads: [layer][head], percent of sequences.
    """

    def __init__(
        self, *, eps: Sequence[float], positions: Sequence[int], totals: Sequence[int], proxy_eps: float
    ) -> None:
        self.eps = tuple(eps)
        self.positions = tuple(positions)
        self.totals = tuple(totals)
        self.importance = Importance(POSITIONS_KEPT, proxy_eps)

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to alpha_bhk, raw and proxy, the mean row sum [b, h] and the slot's mean weight [b, h].

        Raises:
            PluginError: the sequences are shorter than a position asked for.
        """
        length = capture.query_bhsd.shape[2]
        for name, largest in (("k", max(self.positions)), ("total", max(self.totals, default=1))):
            if largest > length:
                problem = f"{name} {largest} is beyond the {length} tokens of a probe sequence"
                raise PluginError("metric sink", problem, f"lower {name} or measure longer sequences")
        observation = self.importance.of(capture)
        if capture.slot_bhq is not None:
            observation["importance_slot"] = capture.slot_bhq.mean(dim=-1)
        return observation

    def result(self, layers: Sequence[Observation]) -> Result:
        """Means over sequences, heads and layers."""
        result: Result = {"row_sum": stacked(layers, "row_sum").mean().item()}
        for kind in ("raw", "proxy"):
            alpha_lbhk = stacked(layers, f"importance_{kind}")
            result[f"importance_{kind}"] = alpha_lbhk.mean(dim=1).tolist()
            for k in self.positions:
                result[f"importance_{k}_{kind}"] = alpha_lbhk[..., k - 1].mean().item()
                result |= self._rates(alpha_lbhk[..., k - 1], f"sink_{k}_{kind}")
            for total in self.totals:
                for suffix, eps in self._thresholds():
                    count_lbh = exceeds(alpha_lbhk[..., :total], eps).sum(dim=-1)
                    result[f"sink_total_{total}_{kind}{suffix}"] = 100 * count_lbh.mean().item()
        if "importance_slot" in layers[0]:
            alpha_lbh = stacked(layers, "importance_slot")
            result["importance_slot"] = alpha_lbh.mean().item()
            result["importance_slot_heads"] = alpha_lbh.mean(dim=1).tolist()
            result |= self._rates(alpha_lbh, "sink_slot")
        return result

    def _thresholds(self) -> list[tuple[str, float]]:
        """What is appended to names, and the threshold."""
        return [(f"_eps{eps:g}" if number else "", eps) for number, eps in enumerate(self.eps)]

    def _rates(self, alpha_lbh: Tensor, name: str) -> Result:
        result: Result = {}
        for suffix, eps in self._thresholds():
            percent_lbh = 100 * exceeds(alpha_lbh, eps)
            result[f"{name}{suffix}"] = percent_lbh.mean().item()
            result[f"{name}_heads{suffix}"] = percent_lbh.mean(dim=1).tolist()
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
        hidden_norm_tokens: [layer][position]; key_norm_tokens, value_norm_tokens:
            [layer][kv head][position]; the first 64 tokens.
    """

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to the norms of the first positions and the mean norm of all but the first.

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
            observation[f"{name}_norm_tokens"] = norm_b_s[..., :POSITIONS_KEPT]
            observation[f"{name}_norm_rest"] = norm_b_s[..., 1:].mean(dim=-1)
        return observation

    def result(self, layers: Sequence[Observation]) -> Result:
        """Means over sequences; the ratios of hidden states are not averaged over layers."""
        result: Result = {}
        ratio = {}
        for name in ("hidden", "key", "value"):
            tokens_lb_s = stacked(layers, f"{name}_norm_tokens")
            first_lb = tokens_lb_s[..., 0]
            rest_lb = stacked(layers, f"{name}_norm_rest")
            ratio[name] = (first_lb / rest_lb.clamp_min(SMALLEST_NORM)).mean(dim=1)
            result[f"{name}_norm_first"] = first_lb.mean(dim=1).tolist()
            result[f"{name}_norm_rest"] = rest_lb.mean(dim=1).tolist()
            result[f"{name}_norm_tokens"] = tokens_lb_s.mean(dim=1).tolist()
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
                "these sequences do not mark trigger tokens, as natural ones of bigram_backcopy do that no "
                "transform has changed",
                "name others with --metrics, or drop it from measure.metrics",
            )
        first_bhq = torch.cat([block[..., 0] for _, block in capture.weight_blocks()], dim=-1)
        first_bhq = first_bhq[..., 1:].float()
        trigger_bs = capture.batch["trigger"].to(first_bhq.device)
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
