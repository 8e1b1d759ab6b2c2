"""Every parallel layout trains the same model: same losses, same gradient norms, same sink."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sinkbench.testing import RunDistributed
from tests.distributed.runs import DEMO, LAYOUTS, SWIGLU, Run, train
from tests.distributed.token_folder import write_random_text

MODELS = {
    "demo": DEMO,
    "swiglu": SWIGLU,
    "text": ("text.yaml", *DEMO[1:-1], "model.seq_length=64", "data.prepare=null"),
    "mixed": (
        *DEMO,
        "model={num_attention_heads: 4, num_query_groups: 2, tie_embeddings: true}",
        "model={ffn: gelu, ffn_hidden_size: 96, positional: learned, normalization: layernorm}",
    ),
}
ATTENTIONS = {
    "softmax": "softmax",
    "sigmoid normalized": "{name: sigmoid, normalize: true}",
    "sigmoid unnormalized": "{name: sigmoid, normalize: false}",
    "sigmoid learned bias": "{name: sigmoid, normalize: false, bias: learned, bias_init: -1.0}",
}
PAIRS = [(model, attention) for model in ("demo", "swiglu", "text") for attention in list(ATTENTIONS)[:3]]
PAIRS.append(("mixed", "sigmoid learned bias"))

QUICK = {
    ("demo", "softmax", "tensor"),
    ("demo", "softmax", "pipeline"),
    ("demo", "softmax", "data"),
    ("demo", "softmax", "tensor pipeline"),
    ("swiglu", "sigmoid normalized", "sequence"),
    ("swiglu", "sigmoid normalized", "interleaved"),
    ("swiglu", "sigmoid normalized", "context"),
    ("text", "sigmoid unnormalized", "tensor"),
    ("text", "sigmoid unnormalized", "context"),
    ("mixed", "sigmoid learned bias", "sequence"),
    ("mixed", "sigmoid learned bias", "pipeline"),
    ("mixed", "sigmoid learned bias", "context"),
}
"""Each layout and each attention at least once; the rest of the product takes minutes."""

Train = Callable[[str, str, str], Run]


@pytest.fixture(scope="module")
def trained(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``trained(model, attention, layout)``; runs of one process are kept."""
    text = write_random_text(tmp_path_factory.mktemp("data") / "text")
    kept: dict[tuple[str, str], Run] = {}

    def trained(model: str, attention: str, layout: str) -> Run:
        if not layout and (model, attention) in kept:
            return kept[model, attention]
        arguments = (*MODELS[model], f"model.attention={ATTENTIONS[attention]}")
        arguments += (f"data.train={text}",) if model == "text" else ()
        run = train(run_distributed, tmp_path_factory.mktemp("run"), arguments, layout)
        if not layout:
            kept[model, attention] = run
        return run

    return trained


def cases() -> list[Any]:
    return [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.full)
        for model, attention in PAIRS
        for layout in LAYOUTS
        for case in [(model, attention, layout)]
    ]


@pytest.mark.parametrize(("model", "attention", "layout"), cases())
def test_layout_changes_nothing(trained: Train, model: str, attention: str, layout: str) -> None:
    alone, spread = trained(model, attention, ""), trained(model, attention, layout)
    for event, key in (("train", "loss"), ("train", "grad_norm"), ("validation", "loss")):
        assert spread.series(event, key) == pytest.approx(alone.series(event, key), rel=1e-4)
    assert len(alone.series("train", "loss")) == 20
    assert_same_measurement(spread.measured(0), alone.measured(0), 1e-5)
    assert_same_measurement(spread.measured(20), alone.measured(20), 1e-4)


def assert_same_measurement(measured: dict[str, Any], expected: dict[str, Any], relative: float) -> None:
    assert measured.keys() == expected.keys()
    assert {"sink_1_raw", "sink_1_proxy", "importance_raw", "value_drain_heads"} <= expected.keys()
    for key, value in expected.items():
        tolerance = {"rtol": 0, "atol": 0} if key.startswith("sink_") else {"rtol": relative, "atol": 1e-5}
        np.testing.assert_allclose(measured[key], value, err_msg=key, **tolerance)


def test_measurement_has_every_layer_and_head(trained: Train) -> None:
    measured = trained("demo", "softmax", "").measured(20)
    assert np.shape(measured["importance_raw"]) == (4, 2, 64)
    assert np.shape(measured["first_token_attention_trigger_heads"]) == (4, 2)
    assert np.shape(measured["hidden_norm_first"]) == (4,)
    assert 0 < measured["sink_1_raw"] < 100  # a rate that would show a head at the wrong place
    assert np.unique(measured["sink_1_raw_heads"]).size > 2
    assert math.isclose(np.mean(measured["sink_1_raw_heads"]), measured["sink_1_raw"], rel_tol=1e-6)


def test_gqa_has_a_norm_for_each_kv_head(trained: Train) -> None:
    measured = trained("mixed", "sigmoid learned bias", "").measured(20)
    assert np.shape(measured["importance_raw"]) == (4, 4, 64)
    assert np.shape(measured["value_drain_heads"]) == (4, 2)
