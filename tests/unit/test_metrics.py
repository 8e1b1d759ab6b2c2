"""The metric plugins against float64 loops written from the formulas."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sinkbench_plugins.metric import sink as plugins

from sinkbench.api import BuildContext, LayerCapture, Metric, Observation, Plugin, PluginError
from sinkbench.config import Config
from sinkbench.measure.observations import Observations, merged
from sinkbench.measure.probe import Probe

LAYERS, SEQUENCES, HEADS, KV_HEADS, LENGTH = 3, 4, 4, 2, 7
EPS = 1e-8


def make_config(**changes: Any) -> Config:
    recipe: dict[str, Any] = {
        "name": "test",
        "model": {
            "num_layers": LAYERS,
            "hidden_size": 8,
            "num_attention_heads": HEADS,
            "num_query_groups": KV_HEADS,
            "ffn": "none",
            "seq_length": 16,
        },
        "data": {"source": "bigram_backcopy"},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "train": {"steps": 1, "global_batch_size": 1},
        "measure": {"length": LENGTH},
    }
    return Config.model_validate({**recipe, **changes})


def build(name: str, **params: Any) -> Metric:
    plugin = find(name)
    config = make_config()
    context = BuildContext(
        num_layers=LAYERS,
        hidden_size=8,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=2,
        seq_length=16,
        num_positions=16,
        vocab_size=65,
        config=config,
    )
    metric = plugin.build(plugin.params(**params), context)
    assert hasattr(metric, "observe")
    return metric  # type: ignore[return-value]


def find(name: str) -> Plugin:
    found: dict[str, Plugin] = {plugin.name: plugin for plugin in plugins.sinkbench_metric()}
    return found[name]


def rows_of(weights_bhqk: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, end: weights_bhqk[:, :, start:end]


def changed(capture: LayerCapture, **tensors: torch.Tensor) -> LayerCapture:
    """The capture with other tensors, the attention weights among them."""
    fields: dict[str, Any] = dict(tensors)
    if "weights_bhqk" in fields:
        fields["weight_rows"] = rows_of(fields.pop("weights_bhqk"))
    return replace(capture, **fields)


def captures(seed: int = 0, signed: bool = False) -> list[LayerCapture]:
    """Random layers; weights are causal, rows sum to anything, and head 0 leans on the first key."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch = {
        "tokens": torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64),
        "trigger": torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.4,
    }
    layers = []
    for layer in range(1, LAYERS + 1):
        weights = draw(SEQUENCES, HEADS, LENGTH, LENGTH)
        weights = weights if signed else weights.abs() * 0.3
        weights[:, 0, :, 0] += 0.5
        layers.append(
            LayerCapture(
                layer=layer,
                weight_rows=rows_of(weights.tril()),
                query_bhsd=draw(SEQUENCES, HEADS, LENGTH, 2),
                key_bhsd=draw(SEQUENCES, KV_HEADS, LENGTH, 2),
                value_bhsd=draw(SEQUENCES, KV_HEADS, LENGTH, 2),
                input_bsn=draw(SEQUENCES, LENGTH, 8),
                output_bsn=draw(SEQUENCES, LENGTH, 8),
                batch=batch,
            )
        )
    return layers


def measure(metric: Metric, layers: list[LayerCapture], batch_size: int = SEQUENCES) -> dict[str, Any]:
    """As the core does: observe batches, join them along the first dimension, then take the result."""
    observations = []
    for capture in layers:
        parts = [
            metric.observe(sequences(capture, slice(start, start + batch_size)))
            for start in range(0, SEQUENCES, batch_size)
        ]
        observations.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    return metric.result(observations)


def sequences(capture: LayerCapture, chosen: slice) -> LayerCapture:
    tensors = ("weights_bhqk", "query_bhsd", "key_bhsd", "value_bhsd", "input_bsn", "output_bsn")
    cut = changed(capture, **{name: getattr(capture, name)[chosen] for name in tensors})
    return replace(cut, batch={key: value[chosen] for key, value in capture.batch.items()})


def alpha_by_loops(weights: np.ndarray, proxy: bool) -> np.ndarray:
    """alpha[b, h, k] of one layer, from the definition with 1-based positions."""
    alpha = np.zeros((SEQUENCES, HEADS, LENGTH))
    for b in range(SEQUENCES):
        for h in range(HEADS):
            for k in range(1, LENGTH + 1):
                total = 0.0
                for i in range(k, LENGTH + 1):
                    weight = weights[b, h, i - 1, k - 1]
                    if proxy:
                        row = sum(abs(weights[b, h, i - 1, j]) for j in range(LENGTH))
                        weight = abs(weight) / (row + EPS)
                    total += weight
                alpha[b, h, k - 1] = total / (LENGTH - k + 1)
    return alpha


def numbers(value: Any) -> list[float]:
    return [n for item in value for n in numbers(item)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["raw", "proxy"])
def test_sink_equals_the_formula(kind: str, signed: bool) -> None:
    layers = captures(signed=signed)
    result = measure(build("sink", eps=(0.3, 0.2), k=(1, 2)), layers)
    alpha = np.stack([alpha_by_loops(c.weights_bhqk.double().numpy(), kind == "proxy") for c in layers])

    np.testing.assert_allclose(result[f"importance_{kind}"], alpha.mean(axis=1), rtol=1e-5, atol=1e-6)
    for k in (1, 2):
        at_k = alpha[..., k - 1]
        assert result[f"importance_{k}_{kind}"] == pytest.approx(at_k.mean(), rel=1e-5)
        for eps, suffix in ((0.3, ""), (0.2, "_eps0.2")):
            count = sum(1 for value in at_k.flatten() if value > eps)
            assert result[f"sink_{k}_{kind}{suffix}"] == pytest.approx(100 * count / at_k.size, rel=1e-5)
            by_head = 100 * (at_k > eps).mean(axis=1)
            np.testing.assert_allclose(result[f"sink_{k}_{kind}_heads{suffix}"], by_head, rtol=1e-5)
    assert 0 < result[f"sink_1_{kind}"] < 100, "the case must tell heads with a sink from those without"


def test_total_is_the_sum_over_the_first_positions() -> None:
    result = measure(build("sink", k=(1, 2, 3), total=(3,), eps=(0.3, 0.2)), captures())
    for suffix in ("raw", "proxy", "raw_eps0.2", "proxy_eps0.2"):
        parts = [result[f"sink_{k}_{suffix}"] for k in (1, 2, 3)]
        assert result[f"sink_total_3_{suffix}"] == pytest.approx(sum(parts), rel=1e-5)


def test_slot_has_a_sink_rate_of_its_own_and_counts_in_its_row() -> None:
    layers = captures()
    slots = [torch.rand(SEQUENCES, HEADS, LENGTH) * 0.6 for _ in layers]
    with_slot = [replace(c, slot_bhq=slot) for c, slot in zip(layers, slots, strict=True)]
    result = measure(build("sink"), with_slot)

    alpha = np.stack([slot.double().numpy().mean(axis=-1) for slot in slots])
    assert result["importance_slot"] == pytest.approx(alpha.mean(), rel=1e-5)
    assert result["sink_slot"] == pytest.approx(100 * (alpha > 0.3).mean(), rel=1e-5)
    np.testing.assert_allclose(result["sink_slot_heads"], 100 * (alpha > 0.3).mean(axis=1), rtol=1e-5)
    rows = np.stack([c.weights_bhqk.double().numpy() for c in layers]).sum(axis=-1) + np.stack(slots)
    assert result["row_sum"] == pytest.approx(rows.mean(), rel=1e-5)
    first = np.stack([c.weights_bhqk.double().numpy() for c in layers])[..., 0]
    assert result["importance_1_proxy"] == pytest.approx((first / rows).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["sink", "trigger"])
def test_blocks_of_queries_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(build(name), captures())
    monkeypatch.setattr("sinkbench.api.BLOCK_ELEMENTS", 3 * SEQUENCES * HEADS * LENGTH)
    blocks = measure(build(name), captures())
    for key, value in whole.items():
        assert numbers(blocks[key]) == pytest.approx(numbers(value), rel=1e-5), key


def test_row_sum_is_that_of_the_weights_as_used() -> None:
    layers = captures(signed=True)
    result = measure(build("sink"), layers)
    rows = [
        float(sum(capture.weights_bhqk[b, h, i, j].item() for j in range(LENGTH)))
        for capture in layers
        for b in range(SEQUENCES)
        for h in range(HEADS)
        for i in range(LENGTH)
    ]
    assert result["row_sum"] == pytest.approx(sum(rows) / len(rows), rel=1e-4)


def test_queries_before_the_key_do_not_count() -> None:
    """Under a prefix mask the first query sees the second key; alpha_2 starts at the second query."""
    capture = captures()[0]
    seen = capture.weights_bhqk.clone()
    seen[:, :, 0, 1] = 5.0
    metric = build("sink", k=(2,))
    without, with_prefix = metric.observe(capture), metric.observe(changed(capture, weights_bhqk=seen))
    torch.testing.assert_close(without["importance_raw"], with_prefix["importance_raw"])
    assert (without["row_sum"] < with_prefix["row_sum"]).all()


def test_defaults_are_those_of_the_paper() -> None:
    result = measure(build("sink"), captures())
    explicit = measure(build("sink", eps=[0.3], k=[1], proxy_eps=1e-8), captures())
    assert result == explicit
    assert {"sink_1_raw", "sink_1_proxy", "importance_1_raw", "importance_1_proxy", "row_sum"} <= set(result)


@pytest.mark.parametrize(
    ("kind", "vectors"), [("hidden", "output_bsn"), ("key", "key_bhsd"), ("value", "value_bhsd")]
)
def test_norms_equal_the_formula(kind: str, vectors: str) -> None:
    layers = captures()
    result = measure(build("norms"), layers)
    first, rest, ratio, by_token = [], [], [], []
    for capture in layers:
        x = (
            getattr(capture, vectors)
            .double()
            .numpy()
            .reshape(SEQUENCES, -1, LENGTH, getattr(capture, vectors).shape[-1])
        )
        norm = np.zeros(x.shape[:3])
        for b, h, t in np.ndindex(*norm.shape):
            norm[b, h, t] = sum(component**2 for component in x[b, h, t]) ** 0.5
        by_token.append(norm.mean(axis=0))
        first.append(norm[..., 0].mean(axis=0))
        rest.append(norm[..., 1:].mean(axis=(0, 2)))
        ratio.append((norm[..., 0] / norm[..., 1:].mean(axis=-1)).mean(axis=0))

    shape = (LAYERS,) if kind == "hidden" else (LAYERS, KV_HEADS)
    for name, expected in (("first", first), ("rest", rest)):
        np.testing.assert_allclose(result[f"{kind}_norm_{name}"], np.reshape(expected, shape), rtol=1e-5)
    scalar, per_layer, reduced = {
        "hidden": ("activation_ratio", "activation_ratio_layers", np.max(ratio)),
        "key": ("key_norm_ratio", "key_norm_ratio_heads", np.mean(ratio)),
        "value": ("value_drain", "value_drain_heads", np.mean(ratio)),
    }[kind]
    assert result[scalar] == pytest.approx(reduced, rel=1e-5)
    np.testing.assert_allclose(result[per_layer], np.reshape(ratio, shape), rtol=1e-5)
    tokens = np.reshape(by_token, (*shape, LENGTH))
    np.testing.assert_allclose(result[f"{kind}_norm_tokens"], tokens, rtol=1e-5)


def test_trigger_attention_equals_the_formula() -> None:
    layers = captures()
    result = measure(build("trigger"), layers)
    for name, wanted in (("trigger", True), ("nontrigger", False)):
        by_head = np.zeros((LAYERS, HEADS))
        for number, capture in enumerate(layers):
            for h in range(HEADS):
                chosen = [
                    capture.weights_bhqk[b, h, i, 0].item()
                    for b in range(SEQUENCES)
                    for i in range(1, LENGTH)
                    if bool(capture.batch["trigger"][b, i]) is wanted
                ]
                by_head[number, h] = sum(chosen) / len(chosen)
        np.testing.assert_allclose(result[f"first_token_attention_{name}_heads"], by_head, rtol=1e-5)
        assert result[f"first_token_attention_{name}"] == pytest.approx(by_head.mean(), rel=1e-5)


def test_trigger_mean_of_no_query_is_absent() -> None:
    layers = [
        replace(c, batch={"trigger": torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)}) for c in captures()
    ]
    result = measure(build("trigger"), layers)
    assert set(result) == {"first_token_attention_nontrigger", "first_token_attention_nontrigger_heads"}


@pytest.mark.parametrize("name", ["sink", "norms", "trigger"])
def test_batches_do_not_change_the_result(name: str) -> None:
    whole = measure(build(name), captures())
    split = measure(build(name), captures(), batch_size=3)
    assert whole.keys() == split.keys()
    for key, value in whole.items():
        assert numbers(split[key]) == pytest.approx(numbers(value), rel=1e-6), key


def _without(capture: LayerCapture, *fields: str) -> LayerCapture:
    return changed(capture, **{field: torch.zeros_like(getattr(capture, field)) for field in fields})


@pytest.mark.parametrize("name", ["sink", "norms", "trigger"])
def test_vanishing_weights_and_vectors_give_no_nan(name: str) -> None:
    zero = [_without(capture, "weights_bhqk", "value_bhsd", "output_bsn") for capture in captures()]
    result = measure(build(name), zero)
    assert all(np.isfinite(numbers(list(result.values()))))
    expected = {"sink": "sink_1_proxy", "norms": "value_drain", "trigger": "first_token_attention_trigger"}
    assert result[expected[name]] == 0


def test_a_diverged_model_has_no_sink_rate() -> None:
    layers = captures()
    layers[1].weights_bhqk[0, 0, 3, 0] = float("nan")
    result = measure(build("sink"), layers)
    assert np.isnan(result["sink_1_raw"])
    assert np.isnan(result["sink_1_proxy"])
    assert np.isfinite(result["sink_1_raw_heads"][0]).all(), "the other layers are still known"


@pytest.mark.parametrize("name", ["sink", "norms", "trigger"])
def test_bfloat16_is_accumulated_in_float32(name: str) -> None:
    def cast(capture: LayerCapture, dtype: torch.dtype) -> LayerCapture:
        fields = ("weights_bhqk", "key_bhsd", "value_bhsd", "output_bsn")
        return changed(capture, **{f: getattr(capture, f).to(torch.bfloat16).to(dtype) for f in fields})

    low = measure(build(name), [cast(c, torch.bfloat16) for c in captures()])
    high = measure(build(name), [cast(c, torch.float32) for c in captures()])
    assert low == high


def test_wrong_captures_are_errors() -> None:
    capture = captures()[0]
    with pytest.raises(PluginError, match=r"do not mark trigger tokens, .*; name others with --metrics"):
        build("trigger").observe(replace(capture, batch={"tokens": capture.batch["tokens"]}))
    with pytest.raises(PluginError, match=f"k 8 is beyond the {LENGTH} tokens"):
        build("sink", k=(8,)).observe(capture)
    with pytest.raises(PluginError, match="no token but the first"):
        build("norms").observe(replace(capture, output_bsn=capture.output_bsn[:, :1]))


@pytest.mark.parametrize(
    "params", [{"eps": []}, {"eps": [0]}, {"k": [0]}, {"proxy_eps": 0}, {"epsilon": 0.3}]
)
def test_wrong_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        find("sink").params(**params)


def test_recipes_that_do_not_fit_are_refused() -> None:
    def problems(name: str, config: Config, **params: Any) -> list[str]:
        plugin = find(name)
        assert plugin.check is not None
        return plugin.check(plugin.params(**params), config)

    short = make_config(measure={"length": 1})
    text = make_config(data={"source": "indexed", "train": "somewhere"})
    assert [problems(name, make_config()) for name in ("sink", "norms", "trigger")] == [[], [], []]
    assert "above measure.length 7" in problems("sink", make_config(), k=(3, 9))[0]
    assert "measure.length to 2" in problems("norms", short)[0]
    assert "data.source indexed" in problems("trigger", text)[0]


def test_metrics_whose_results_share_a_key_are_refused() -> None:
    observations = Observations({"norms": build("norms"), "mine": build("norms")})
    for capture in captures():
        observations.add(capture)
    found = observations.results()
    with pytest.raises(PluginError) as caught:
        merged(found)
    assert str(caught.value) == (
        "metric mine: its result 'hidden_norm_first' would overwrite that of the metric norms; "
        "rename it in one of the two, or drop mine"
    )
    assert merged({"norms": found["norms"], "mine": {"own": 1.0}}) == found["norms"] | {"own": 1.0}
    for key in ("loss", "loss/code", "step"):
        with pytest.raises(PluginError, match=f"'{key}' has the name of one of the run's own numbers"):
            merged({"mine": {key: 1.0}})


class Same:
    """A metric with a result of one key."""

    def observe(self, capture: LayerCapture) -> Observation:
        return {}

    def result(self, layers: Sequence[Observation]) -> dict[str, float | list[Any]]:
        return {"same": 1.0}


def test_probes_refuse_metrics_whose_results_share_a_key() -> None:
    pipeline = SimpleNamespace(size=lambda: 1)
    layout: Any = SimpleNamespace(groups=SimpleNamespace(pp=pipeline), device=torch.device("cpu"))
    model: Any = SimpleNamespace(networks=[], layout=layout, forward=lambda micro_batches: None)
    sequences = {"tokens": np.zeros((2, 4), dtype=np.int64)}
    assert Probe({"first": Same()}, sequences, model).run() == {"same": 1.0}
    with pytest.raises(PluginError, match=r"^metric second: its result 'same' .* of the metric first; "):
        Probe({"first": Same(), "second": Same()}, sequences, model).run()


def test_listing_does_not_import_torch() -> None:
    code = (
        "import sys; from sinkbench_plugins.metric import sink; sink.sinkbench_metric();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=200, check=False).returncode == 0
