"""Measures a transformers model: metrics over every layer and head on probe sequences."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinkbench import plugins
from sinkbench.api import LayerCapture
from sinkbench.config import Config
from sinkbench.errors import DataError
from sinkbench.measure import inputs as probe_inputs
from sinkbench.measure.hf_attention import NOT_WATCHED, is_watched
from sinkbench.measure.hf_capture import LayerWatcher
from sinkbench.measure.hf_export import is_export
from sinkbench.measure.hf_forwards import OpenForwards, faults_in_one_line, noting
from sinkbench.measure.hf_load import OpenModel
from sinkbench.measure.inputs import Inputs, Tokens
from sinkbench.measure.observations import Observations, merged
from sinkbench.measure.results import Result
from sinkbench.measure.settings import Settings, metric_reference
from sinkbench.model import build_context

Advance = Callable[[int, int], None]
"""Called with sequences done and sequences in all."""


def measure_open_model(
    opened: OpenModel, kinds: Sequence[Inputs], settings: Settings, advance: Advance
) -> Iterator[Result]:
    """Measures a model on each kind of inputs.

    Raises:
        DataError: the model has no attention that can be read, or the texts do not suffice.
        PluginError: a metric is unknown, or cannot be had of these sequences.
    """
    _check_length(opened, settings)
    for kind in kinds:
        tokens, texts = _sequences(opened, kind, settings)
        metrics, left_out = _measure(opened, tokens, settings, advance)
        yield Result(
            target=opened.place.target,
            inputs=kind,
            length=tokens.shape[1],
            count=tokens.shape[0],
            bos=settings.bos,
            texts=texts,
            seed=settings.seed,
            dtype=settings.dtype,
            layers_without_attention=left_out,
            metrics=metrics,
        )


def _check_length(opened: OpenModel, settings: Settings) -> None:
    positions = getattr(opened.config, "max_position_embeddings", None)
    if positions is not None and settings.open_length > positions:
        problem = f"the model has {positions} positions, fewer than {settings.open_length}"
        raise DataError(opened.place.target, problem, "lower --length")


def _sequences(opened: OpenModel, kind: Inputs, settings: Settings) -> tuple[Tokens, str | None]:
    """The probe sequences [count, length], and where their text came from."""
    texts = None
    length = settings.open_length - int(settings.bos)
    count = settings.count or 100
    if kind == "natural" and settings.prompts is not None:
        texts = settings.prompts.name
        tokens = probe_inputs.from_prompts(
            settings.prompts, opened.encode(), length=length, count=settings.count
        )
    elif kind == "natural":
        texts = f"documentation of Python {platform.python_version()}"
        tokens = probe_inputs.from_python_documentation(
            opened.encode(), length=length, count=count, seed=settings.seed
        )
    else:
        draw = probe_inputs.random_tokens if kind == "random" else probe_inputs.repeated_tokens
        tokens = draw(opened.usable_tokens(), length=length, count=count, seed=settings.seed)
    largest, known = int(tokens.max()), opened.config.vocab_size
    if largest >= known:
        problem = f"its tokenizer gives token {largest}, the model's vocab_size is {known}"
        raise DataError(opened.place.target, problem, "copy the model again, with its own tokenizer")
    if settings.bos:
        tokens = np.insert(tokens, 0, opened.bos(), axis=1)
    return tokens, texts


def _measure(
    opened: OpenModel, tokens: Tokens, settings: Settings, advance: Advance
) -> tuple[dict[str, Any], int]:
    """The metrics, and the number of layers without attention."""
    model = opened.model
    built = build_metrics(opened, tokens.shape, settings)
    observations = Observations({name: m for name, m in built.items() if hasattr(m, "observe")})

    def receive(capture: LayerCapture) -> None:
        # A look at the first query is enough to tell a model that sees the future, as only a prefix may.
        first = capture.layer == min(watcher.with_attention)
        if first:
            _check_first(opened, capture.weight_rows(0, 1), prefix=prefix)
        add(capture)

    of_metrics: list[Exception] = []
    add = noting(observations.add, of_metrics)
    prefix = getattr(opened.config, "bidirectional_prefix", 0)
    watcher = LayerWatcher(model, streaming=settings.streaming, receive=receive)
    batches = torch.as_tensor(tokens).split(settings.open_batch_size)
    advance(0, len(tokens))
    with torch.no_grad(), watcher.attached():
        for number, batch in enumerate(batches, start=1):
            watcher.batch = {"tokens": batch.to(model.device)}
            with faults_in_one_line(model, streaming=settings.streaming, others=of_metrics):
                if is_export(model):
                    model(input_ids=watcher.batch["tokens"], use_cache=False, logits_to_keep=1)
                else:
                    model.base_model(input_ids=watcher.batch["tokens"], use_cache=False)
            if not watcher.with_attention:
                raise _no_attention(opened)
            advance(min(number * settings.open_batch_size, len(tokens)), len(tokens))
    found = observations.results()
    forwards = OpenForwards(
        model, torch.as_tensor(tokens), batch_size=settings.open_batch_size, streaming=settings.streaming
    )
    for name, metric in built.items():
        if hasattr(metric, "measure"):
            found[name] = found.get(name, {}) | metric.measure(forwards)
    return merged(found), opened.config.num_hidden_layers - len(watcher.with_attention)


def _check_first(opened: OpenModel, weights: Tensor, *, prefix: int) -> None:
    """
    Args:
        weights: [b, h, 1, k], of the first query in the first layer with attention.
        prefix: tokens that see one another.
    """
    if weights.isnan().any():
        problem = "its attention weights are not numbers"
        raise DataError(opened.place.target, problem, "copy the model again, or give --dtype float32")
    if not prefix and weights[..., 1:].any():
        raise DataError(opened.place.target, "its attention is not causal", "give a causal language model")


def build_metrics(opened: OpenModel, shape: tuple[int, ...], settings: Settings) -> dict[str, Any]:
    """The metrics of an open model by name, built as if a recipe of its sizes had asked for them.

    Raises:
        DataError: the model has no attention.
        PluginError: a metric is unknown, has wrong parameters or does not fit.
    """
    config = _as_recipe(opened, shape, settings)
    chosen = plugins.resolve_metrics(config, plugins.discover())
    assert config.model.vocab_size is not None
    context = build_context(config, config.model.vocab_size)
    return {c.plugin.name: plugins.build(c, context) for c in chosen}


def _no_attention(opened: OpenModel) -> DataError:
    if not is_watched(opened.model) and getattr(opened.config, "num_attention_heads", None):
        return DataError(opened.place.target, *NOT_WATCHED)
    remedy = "give a model with attention layers"
    return DataError(opened.place.target, "no attention was found in its layers", remedy)


def _as_recipe(opened: OpenModel, shape: tuple[int, ...], settings: Settings) -> Config:
    """The sizes of an open model and the measurement, in the form that metric plugins know.

    Raises:
        DataError: the model's configuration has no attention heads, as those of Mamba and RWKV.
    """
    config = opened.config
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise _no_attention(opened)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    count, length = shape
    measure: dict[str, Any] = {"every": 1, "count": count, "length": length}
    if settings.metrics:
        measure["metrics"] = [metric_reference(text) for text in settings.metrics]
    return Config.model_validate(
        {
            "name": "open-model",
            "model": {
                "num_layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_query_groups": kv_heads if heads % kv_heads == 0 else heads,
                "head_size": getattr(config, "head_dim", None) or max(1, config.hidden_size // heads),
                "ffn": "none",
                "seq_length": max(length, getattr(config, "max_position_embeddings", None) or length),
                "vocab_size": config.vocab_size,
            },
            "data": {"source": "indexed", "train": [opened.place.target]},
            "optim": {"lr": 1.0, "warmup_steps": 0},
            "train": {"steps": 1, "global_batch_size": 1},
            "measure": measure,
        }
    )
