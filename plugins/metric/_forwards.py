"""Metrics that run the model again, changed: see ``sinkbench_plugins.metric.forwards``.

Shape suffixes: b sequence, s position, n size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkbench.api import Forwards, PluginError

from ._measures import Result

LEVELS = 127
"""Of symmetric 8-bit integers."""


def perplexity(loss: Tensor) -> float:
    """exp of the mean loss in nats; infinite beyond what a float holds."""
    mean = loss.mean().item()
    return math.exp(mean) if mean < 700 else math.inf


def first_counted(model: Forwards, metric: str, dropped: int = 0) -> int:
    """The first query, from 0, whose loss counts: none of the first ``dropped``, and one that does not see
    what it predicts.

    Raises:
        PluginError: there is none.
    """
    first = max(dropped, model.first_query)
    if model.length < first + 2:
        problem = f"{model.length} tokens leave none to predict after the first {first + 1}"
        raise PluginError(f"metric {metric}", problem, "measure longer sequences")
    return first


class StreamingPerplexity:
    """Perplexity with a key-value cache of fixed size, with and without the first tokens kept in it
    (StreamingLLM, Xiao et al. 2309.17453), over the tokens after the cache is full. What is not in the
    cache is masked in every layer, which is what a cache does; positions stay those of the text, while
    StreamingLLM renumbers them within the cache, so compare at lengths the model was trained for.

    Floats:
        perplexity_full: nothing is dropped.
        perplexity_window: each query sees the ``cache`` newest tokens.
        perplexity_streaming: it sees the ``first`` tokens and the ``cache - first`` newest.
    """

    def __init__(self, *, cache: int | None, first: int) -> None:
        self.cache = cache
        self.first = first

    def measure(self, model: Forwards) -> Result:
        """Three forward passes.

        Raises:
            PluginError: the cache does not fit into the sequences, or the first tokens into the cache.
        """
        cache = self.cache or model.length // 2
        if not self.first < cache < model.length:
            problem = f"a cache of {cache} must exceed first ({self.first}) and be below the length"
            raise PluginError(
                "metric streaming_perplexity",
                f"{problem} ({model.length})",
                "set cache, or measure longer sequences",
            )
        recent = cache - self.first

        def window(query: Tensor, key: Tensor) -> Tensor:
            return query - key < cache

        def streaming(query: Tensor, key: Tensor) -> Tensor:
            return (query - key < recent) | (key < self.first)

        # query `cache` is the first to miss a key
        first = first_counted(model, "streaming_perplexity", cache)
        return {
            "perplexity_full": perplexity(model.losses()[:, first:]),
            "perplexity_window": perplexity(model.losses(visible=window)[:, first:]),
            "perplexity_streaming": perplexity(model.losses(visible=streaming)[:, first:]),
        }


class SinkCut:
    """What the sink is worth to the model: its loss when no later query sees the first tokens, in any
    layer, and the softmax runs over the rest.

    Floats, in nats per token, over the queries after the first ``tokens``:
        loss_full, loss_without_sink, loss_change_without_sink.
    """

    def __init__(self, *, tokens: int) -> None:
        self.tokens = tokens

    def measure(self, model: Forwards) -> Result:
        """Two forward passes.

        Raises:
            PluginError: no query is left to lose sight of them.
        """
        first = first_counted(model, "sink_cut", self.tokens)

        def cut(query: Tensor, key: Tensor) -> Tensor:
            return (key >= self.tokens) | (query < self.tokens)

        full = model.losses()[:, first:].mean().item()
        without = model.losses(visible=cut)[:, first:].mean().item()
        return {"loss_full": full, "loss_without_sink": without, "loss_change_without_sink": without - full}


def fake_quantized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Rounded to 8 bits, symmetric about 0, with one scale for all of ``dims``; a scale of zeros is 1."""
    peak = x.abs().amax(dim=dims, keepdim=True)
    scale = torch.where(peak > 0, peak / LEVELS, torch.ones_like(peak))
    return (x / scale).round() * scale


class W8A8:
    """Damage by simulated 8-bit weights and activations (after Bondarenko et al. 2306.12929): every
    linear map within the layers has its weight rounded with one scale, and its input with one scale per
    sequence (found on the sequence itself); embeddings, norms, attention products and the output head
    stay as they are. Massive activations stretch the scales, and what is small rounds to nothing.

    A weight is a tensor of the model as it is measured. A run has queries, keys and values in one, and gate
    with up, as GPT-NeoX has; LLaMA has a tensor for each, so that a run and its export differ.

    Floats:
        perplexity_exact, perplexity_w8a8, perplexity_change_w8a8.
    """

    def measure(self, model: Forwards) -> Result:
        """Two forward passes.

        Raises:
            PluginError: the sequences are a prefix that sees itself.
        """
        first = first_counted(model, "w8a8")
        exact = perplexity(model.losses()[:, first:])
        rounded = perplexity(model.losses(linear_weight=_weight, linear_input=_input)[:, first:])
        return {
            "perplexity_exact": exact,
            "perplexity_w8a8": rounded,
            "perplexity_change_w8a8": rounded - exact,
        }


def _weight(weight: Tensor) -> Tensor:
    return fake_quantized(weight, tuple(range(weight.dim())))


def _input(x_bsn: Tensor) -> Tensor:
    return fake_quantized(x_bsn, tuple(range(1, x_bsn.dim())))
