"""The metrics of heads, activations and further forward passes against the formulas, by loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sinkbench_plugins.metric import activations, forwards, heads
from torch import Tensor

from sinkbench.api import Plugin, PluginError
from tests.unit.test_metrics import (
    HEADS,
    KV_HEADS,
    LAYERS,
    LENGTH,
    SEQUENCES,
    captures,
    changed,
    make_config,
    measure,
    numbers,
)
from tests.unit.test_metrics import build as build_first

PLUGINS: dict[str, Plugin] = {
    plugin.name: plugin for module in (activations, heads, forwards) for plugin in module.sinkbench_metric()
}


def build(name: str, **params: Any) -> Any:
    from sinkbench.api import BuildContext

    context = BuildContext(
        num_layers=LAYERS,
        hidden_size=8,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=2,
        seq_length=16,
        num_positions=16,
        vocab_size=65,
        config=make_config(),
    )
    plugin = PLUGINS[name]
    return plugin.build(plugin.params(**params), context)


def test_qk_split_equals_the_formula() -> None:
    layers = captures()
    found = measure(build("qk_split"), layers)
    names = ("cosine_first", "cosine_rest", "norm_first", "norm_rest")
    expected = {name: np.zeros((LAYERS, SEQUENCES, HEADS)) for name in names}
    for number, capture in enumerate(layers):
        query, key = capture.query_bhsd.double().numpy(), capture.key_bhsd.double().numpy()
        for b in range(SEQUENCES):
            for h in range(HEADS):
                pairs: dict[str, list[float]] = {name: [] for name in names}
                for t in range(1, LENGTH):
                    for j in range(t + 1):
                        q, k = query[b, h, t], key[b, h // (HEADS // KV_HEADS), j]
                        norm = math.sqrt(q @ q) * math.sqrt(k @ k)
                        end = "first" if j == 0 else "rest"
                        pairs[f"cosine_{end}"].append(q @ k / norm)
                        pairs[f"norm_{end}"].append(norm)
                for name in names:
                    expected[name][number, b, h] = np.mean(pairs[name])
    for name in names:
        np.testing.assert_allclose(found[f"qk_{name}_heads"], expected[name].mean(1), rtol=1e-4, atol=1e-6)
    ratio = expected["norm_first"] / expected["norm_rest"]
    assert found["qk_norm_ratio"] == pytest.approx(ratio.mean(), rel=1e-5)


def test_massive_activations_are_found_where_they_are() -> None:
    layers = captures()
    hidden = layers[1].output_bsn.clone()
    hidden[2, 0, 5] = -4000.0
    hidden[0, 3, 1] = 90.0  # above 1000 medians it may be, but not above 100
    layers[1] = changed(layers[1], output_bsn=hidden * 0.1)
    found = measure(build("massive_activations"), layers)
    assert found["massive_dimensions"] == [[], [5], []]
    assert found["massive_positions"] == [[], [1], []]
    assert found["massive_activations"] == pytest.approx(100 / (LAYERS * SEQUENCES))
    assert found["massive_activations_layers"] == pytest.approx([0, 100 / SEQUENCES, 0])
    assert max(found["massive_activation_top_layers"]) == found["massive_activation_top"]


def test_a_diverged_model_has_no_rate_of_massive_activations() -> None:
    layers = captures()
    hidden = layers[1].output_bsn.clone()
    hidden[0, 3, 1] = math.nan
    layers[1] = changed(layers[1], output_bsn=hidden)
    found = measure(build("massive_activations"), layers)
    assert math.isnan(found["massive_activations"])
    assert math.isnan(found["massive_activation_top"])
    first, second, third = found["massive_activations_layers"]
    assert (first, third) == (0, 0), "the other layers are still known"
    assert math.isnan(second)


def test_outliers_of_known_distributions() -> None:
    signs = torch.ones(SEQUENCES, LENGTH, 8)
    signs[..., ::2] = -1
    found = measure(build("outliers"), [changed(c, output_bsn=signs) for c in captures()])
    assert found["kurtosis"] == pytest.approx(1, rel=0.05), "two values of equal weight"
    assert found["max_infinity_norm"] == 1


class Recorded:
    """Forward passes whose losses are given; keeps what it was asked for.

    Args:
        start: queries before it have a loss that would show.
        first_query: as in Forwards.
    """

    def __init__(self, length: int, losses: list[float], start: int = 0, first_query: int = 0) -> None:
        self.length = length
        self.given = iter(losses)
        self.start = start
        self.first_query = first_query
        self.asked: list[dict[str, Callable[..., Tensor]]] = []

    def losses(self, **changes: Callable[..., Tensor]) -> Tensor:
        self.asked.append(changes)
        """The level, which the first query that counts has too much of and the second too little."""
        loss = torch.full((2, self.length - 1), next(self.given))
        loss[:, : self.start] += 100
        loss[:, self.start] += 0.5
        loss[:, self.start + 1] -= 0.5
        return loss

    def seen(self, call: int) -> list[list[int]]:
        """The keys that each query still sees."""
        position = torch.arange(self.length)
        visible = self.asked[call]["visible"](position[:, None], position[None, :])
        visible = visible & (position[:, None] >= position[None, :])
        return [row.nonzero().flatten().tolist() for row in visible]


def test_streaming_perplexity_keeps_first_and_newest_tokens() -> None:
    model = Recorded(8, [1.0, 2.0, 1.5], start=4)
    found = build("streaming_perplexity", cache=4, first=2).measure(model)
    assert model.asked[0] == {}
    assert model.seen(1)[6] == [3, 4, 5, 6]
    assert model.seen(2)[6] == [0, 1, 5, 6]
    assert model.seen(2)[2] == [0, 1, 2]
    assert [len(keys) for keys in model.seen(1)] == [1, 2, 3, 4, 4, 4, 4, 4]
    assert [len(keys) for keys in model.seen(2)] == [1, 2, 3, 4, 4, 4, 4, 4]
    assert found == pytest.approx(
        {"perplexity_full": math.e, "perplexity_window": math.e**2, "perplexity_streaming": math.e**1.5}
    )


@pytest.mark.parametrize(("cache", "first"), [(8, 2), (2, 2), (9, 4)])
def test_streaming_needs_room(cache: int, first: int) -> None:
    with pytest.raises(PluginError, match="must exceed first"):
        build("streaming_perplexity", cache=cache, first=first).measure(Recorded(8, []))


def test_sink_cut_hides_the_first_tokens_from_later_queries() -> None:
    model = Recorded(5, [1.0, 1.25], start=2)
    found = build("sink_cut", tokens=2).measure(model)
    assert model.seen(1) == [[0], [0, 1], [2], [2, 3], [2, 3, 4]]
    assert found == {"loss_full": 1.0, "loss_without_sink": 1.25, "loss_change_without_sink": 0.25}
    with pytest.raises(PluginError, match="leave none to predict"):
        build("sink_cut", tokens=2).measure(Recorded(3, []))


def test_w8a8_rounds_weights_together_and_inputs_by_sequence() -> None:
    model = Recorded(5, [1.0, 2.0])
    found = build("w8a8").measure(model)
    assert found["perplexity_change_w8a8"] == pytest.approx(math.e**2 - math.e)
    change = model.asked[1]
    weight = torch.tensor([[127.0, 0.4], [-3.6, 0.6]])
    torch.testing.assert_close(change["linear_weight"](weight), torch.tensor([[127.0, 0.0], [-4.0, 1.0]]))
    inputs = torch.tensor([[[127.0, 0.4]], [[1.27, 0.004]], [[0.0, 0.0]]])
    expected = torch.tensor([[[127.0, 0.0]], [[1.27, 0.0]], [[0.0, 0.0]]])
    torch.testing.assert_close(change["linear_input"](inputs), expected)


def test_perplexity_of_a_diverged_model_is_infinite() -> None:
    found = build("w8a8").measure(Recorded(4, [1.0, 1e6]))
    assert math.isinf(found["perplexity_w8a8"])


@pytest.mark.parametrize(
    ("name", "params", "dropped", "expected"),
    [
        ("streaming_perplexity", {"cache": 4, "first": 2}, 4, {"full", "window", "streaming"}),
        ("sink_cut", {"tokens": 2}, 2, {"full", "without_sink"}),
        ("w8a8", {}, 0, {"exact", "w8a8"}),
    ],
)
def test_tokens_that_queries_see_do_not_count(
    name: str, params: dict[str, Any], dropped: int, expected: set[str]
) -> None:
    """Those of a prefix that sees itself."""
    metric = build(name, **params)
    for first in (1, 3, 6):
        found = metric.measure(Recorded(12, [1.0] * 3, max(first, dropped), first))
        level = {key.partition("_")[2]: x for key, x in found.items() if "change" not in key}
        assert level == pytest.approx(dict.fromkeys(expected, 1.0 if name == "sink_cut" else math.e))
    with pytest.raises(PluginError, match="12 tokens leave none to predict after the first 12; measure"):
        metric.measure(Recorded(12, [], 0, 11))


def test_tables_know_every_scalar_of_these_metrics() -> None:
    """Which they have columns for or leave out; those of other packages' metrics get one each."""
    from sinkbench.report import columns

    layers = captures()
    with_slot = [replace(c, slot_bhq=torch.rand(SEQUENCES, HEADS, LENGTH)) for c in layers]
    sink = build_first("sink", eps=(0.3, 0.01, 1e-5), k=(1, 2, 7), total=(2, 7))
    found = [measure(sink, with_slot), *(measure(build_first(name), layers) for name in ("norms", "trigger"))]
    for name in PLUGINS:
        metric = build(name)
        forward = hasattr(metric, "measure")
        found.append(metric.measure(Recorded(20, [1.0] * 3)) if forward else measure(metric, layers))
    assert len(found) == 3 + len(PLUGINS)
    assert all(any(columns.is_number(value) for value in results.values()) for results in found)
    assert columns.added((), found) == columns.Added()
    assert columns.added((), [{"sink_rate": 1.0, "sink_1": 1, "many": [1.0], "flag": True}]).columns == (
        columns.Column("sink_rate", "sink_rate", columns._significant),
        columns.Column("sink_1", "sink_1", columns._significant),
    )


@pytest.mark.parametrize("name", ["qk_split", "head_output", "massive_activations", "outliers"])
def test_batches_do_not_change_the_result(name: str) -> None:
    whole, split = (measure(build(name), captures(), batch_size=size) for size in (SEQUENCES, 3))
    assert whole.keys() == split.keys()
    for key, value in whole.items():
        assert numbers(split[key]) == pytest.approx(numbers(value), rel=1e-5), key
