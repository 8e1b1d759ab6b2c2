"""The tensors behind the metric plugins of ``sinkbench_plugins.metric.heads``.

Shape suffixes: l layer, b sequence, h head, g kv head, s position, q query position, k key position,
d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sinkbench.api import LayerCapture, Observation, PluginError

from ._measures import SMALLEST_NORM, Result, stacked


class QKSplit:
    """Whether queries attend the first token for its direction or for its norm (the paper's split of
    q.k into an angle and a product of norms, Gu et al. 2410.10781), after rotary. Means over queries
    t > 1 and, for "rest", over the keys 1 < j <= t that each of them sees.

    Floats, mean over layers, heads and sequences:
        qk_cosine_first, qk_cosine_rest: cosine of q_t and k_1; of q_t and k_j.
        qk_norm_ratio: mean |q_t| |k_1| over mean |q_t| |k_j|.

    Lists:
        qk_cosine_first_heads, qk_cosine_rest_heads, qk_norm_first_heads, qk_norm_rest_heads:
            [layer][head]; qk_norm is the product of norms. What the model folds into its queries (OPT
            scales them) is in it.
    """

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to the four means [b, h].

        Raises:
            PluginError: the sequences have only one token.
        """
        query, key = capture.query_bhsd.float(), capture.key_bhsd.float()
        if query.shape[2] < 2:
            raise PluginError("metric qk_split", "a probe sequence has one token", "measure longer sequences")
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        cosine_first, cosine_rest = _pair_means(normalize(query, dim=-1), normalize(key, dim=-1))
        norms = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (query, key))
        norm_first, norm_rest = _pair_means(*norms)
        return {
            "cosine_first": cosine_first,
            "cosine_rest": cosine_rest,
            "norm_first": norm_first,
            "norm_rest": norm_rest,
        }

    def result(self, layers: Sequence[Observation]) -> Result:
        """Means over sequences."""
        mean = {key: stacked(layers, key) for key in layers[0]}
        ratio = mean["norm_first"] / mean["norm_rest"].clamp_min(SMALLEST_NORM)
        result: Result = {f"qk_{key}_heads": value.mean(dim=1).tolist() for key, value in mean.items()}
        return result | {
            "qk_cosine_first": mean["cosine_first"].mean().item(),
            "qk_cosine_rest": mean["cosine_rest"].mean().item(),
            "qk_norm_ratio": ratio.mean().item(),
        }


def _pair_means(query_bhsd: Tensor, key_bhsd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean q_t . k_1 over t > 1, and mean q_t . k_j over 1 < j <= t; by a running sum of the keys, so
    that no [q, k] is made."""
    query = query_bhsd[:, :, 1:]
    first = (query * key_bhsd[:, :, :1]).sum(-1).mean(-1)
    seen = key_bhsd[:, :, 1:].cumsum(dim=2)
    pairs = query.shape[2] * (query.shape[2] + 1) / 2
    return first, (query * seen).sum((-1, -2)) / pairs


class HeadOutput:
    """L2 norm of A V by position, of each head's weighted sum of the tokens' values. What else a head may
    have before the output projection is not in it: the value of an extra slot or of a sink token, an output
    bias (``kv_bias: v``), a gate.

    Floats:
        head_output_norm: mean over positions, heads, layers and sequences.
        head_output_norm_ratio: that of the first position over the mean of the others.

    Lists:
        head_output_norm_first_heads, head_output_norm_rest_heads: [layer][head].
    """

    def observe(self, capture: LayerCapture) -> Observation:
        """Reduce to the norm at the first position and the mean of the others [b, h].

        Raises:
            PluginError: the sequences have only one token.
        """
        if capture.query_bhsd.shape[2] < 2:
            problem = "a probe sequence has one token"
            raise PluginError("metric head_output", problem, "measure longer sequences")
        value_bgsd = capture.value_bhsd.float()
        norms = []
        for _, weights_bhqk in capture.weight_blocks():
            grouped = weights_bhqk.float().unflatten(1, (value_bgsd.shape[1], -1))
            output_bhqd = (grouped @ value_bgsd.unsqueeze(2)).flatten(1, 2)
            norms.append(torch.linalg.vector_norm(output_bhqd, dim=-1))
        norm_bhq = torch.cat(norms, dim=-1)
        return {"first": norm_bhq[..., 0], "rest": norm_bhq[..., 1:].mean(-1), "mean": norm_bhq.mean(-1)}

    def result(self, layers: Sequence[Observation]) -> Result:
        """Means over sequences."""
        first, rest = stacked(layers, "first"), stacked(layers, "rest")
        return {
            "head_output_norm": stacked(layers, "mean").mean().item(),
            "head_output_norm_ratio": (first / rest.clamp_min(SMALLEST_NORM)).mean().item(),
            "head_output_norm_first_heads": first.mean(dim=1).tolist(),
            "head_output_norm_rest_heads": rest.mean(dim=1).tolist(),
        }
