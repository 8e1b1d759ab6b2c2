"""Initial values and defaults of the first-party plugins and of the model, as numbers: from the paper (Gu et
al. 2410.10781) and its code where nothing else is said."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sinkbench import plugins
from sinkbench.plugins import PluginIndex
from tests.unit.test_variants import LENGTH, build

HEAD_SIZE, HIDDEN = 64, 256


@pytest.fixture(scope="module")
def index() -> PluginIndex:
    return plugins.discover()


INITIAL: dict[str, tuple[str, dict[str, Any], dict[str, tuple[float, float]]]] = {
    "kv bias": ("softmax", {"kv_bias": "kv"}, {"key_bias": (0, 0.02), "value_bias": (0, 0.02)}),
    "k bias": ("softmax", {"kv_bias": "k"}, {"key_bias": (0, 0.02)}),
    "v bias": ("softmax", {"kv_bias": "v"}, {"value_bias": (0, 0.02)}),
    "sink logit": ("softmax", {"sink_logit": "learned"}, {"sink_logit": (0, 0)}),  # gpt-oss
    "sigmoid's bias": (  # Ramapuram et al. 2409.04431
        "sigmoid",
        {"bias": "learned"},
        {"score_bias": (-math.log(LENGTH), 0)},
    ),
    # As linear maps: sqrt(2/5/fan_in), here of 64.
    "kernel": ("kernel_mlp", {}, dict.fromkeys(("kernel_1", "kernel_2"), (0, 0.0790569415))),
}


@pytest.mark.parametrize("case", INITIAL)
def test_initial_mean_and_deviation_of_declared_parameters(index: PluginIndex, case: str) -> None:
    name, params, expected = INITIAL[case]
    declared = build(index, "attention", name, HEAD_SIZE, **params).parameters
    assert {key: (p.mean, p.std) for key, p in declared.items()} == {
        key: pytest.approx(pair) for key, pair in expected.items()
    }


def test_initial_values_of_positions(index: PluginIndex) -> None:
    """Learned vectors as token embeddings: sqrt(2/5/hidden size)."""
    bias = build(index, "positional", "t5").score_bias.parameters["bias"]
    assert (bias.shape, bias.mean, bias.std) == (("heads", 32), 0, 0.02)
    torch.manual_seed(0)
    table = build(index, "positional", "learned", HEAD_SIZE).embedding().weight
    assert table.shape == (LENGTH, HIDDEN)
    assert table.std().item() == pytest.approx(0.0395284708, rel=0.05)
    assert abs(table.mean().item()) < 0.004


@pytest.mark.parametrize(
    ("init", "ffn", "name", "expected"),
    [
        ("paper", "swiglu", "embedding.word_embeddings.weight", 0.0395284708),
        ("paper", "swiglu", "embedding.sink_token", 0.0395284708),
        ("paper", "swiglu", "decoder.layers.0.attention.linear_proj.weight", 0.0395284708),
        ("paper", "swiglu", "decoder.layers.0.mlp.linear_fc1.weight", 0.0395284708),
        ("paper", "swiglu", "decoder.layers.0.mlp.linear_fc2.weight", 0.00625),
        ("paper", "geglu", "decoder.layers.0.mlp.linear_fc2.weight", 0.0395284708),
        ("normal", "swiglu", "decoder.layers.0.mlp.linear_fc1.weight", 0.02),
        ("normal", "swiglu", "decoder.layers.0.mlp.linear_fc2.weight", 0.00447213595),
    ],
)
def test_initial_deviation_of_matrices(init: str, ffn: str, name: str, expected: float) -> None:
    """Of 256 inputs and ten layers. paper: sqrt(2/5/fan_in), and 1/(sqrt(fan_in) layers) for the down
    projection of SwiGLU alone; normal: 0.02, over sqrt(2 layers) where a layer writes (GPT-2)."""
    from sinkbench.megatron.initialise import initial_std

    model: Any = SimpleNamespace(init=init, init_std=0.02, num_layers=10, ffn=ffn)
    assert initial_std(name, HIDDEN, model) == pytest.approx(expected)


DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("attention", "softmax"): {"alpha": 1, "sink_logit": "none", "window": None, "kv_bias": "none"},
    ("attention", "softmax_off_by_one"): {"alpha": 1},
    ("attention", "sigmoid"): {"normalize": True, "bias": "none"},
    ("attention", "elu"): {"normalize": True},
    ("attention", "kernel_identity"): {"normalize": True},
    ("attention", "kernel_elu"): {"normalize": True},
    ("attention", "kernel_mlp"): {
        "normalize": True,
        "kv_bias_shared": False,
        "value_norm": 0,
        "value_direction": "first",
        "combine": "concat",
        "sink_token": False,
    },
    ("normalization", "rmsnorm"): {"eps": 1e-5, "location": "pre"},
    ("normalization", "layernorm"): {"eps": 1e-5, "location": "pre"},
    ("positional", "rope"): {"base": 10_000, "fraction": 1},
    ("positional", "absolute"): {"base": 10_000},
    ("positional", "t5"): {"buckets": 32, "max_distance": 128, "init_std": 0.02},
    ("positional", "relative_reference"): {"buckets": 32, "max_distance": 128},
    ("data_transform", "fixed_token"): {"position": 1, "token": 1, "on_probes": True},
    ("data_transform", "random_tokens"): {"start": 1, "end": 2, "on_probes": False},
    ("metric", "sink"): {"eps": None, "k": (1,), "total": (), "proxy_eps": 1e-8},
    ("metric", "massive_activations"): {"absolute": 100, "relative": 1000},  # Sun et al. 2402.17762
    ("metric", "streaming_perplexity"): {"cache": None, "first": 4},  # Xiao et al. 2309.17453
    ("metric", "sink_cut"): {"tokens": 1},
}


@pytest.mark.parametrize(("kind", "name"), DEFAULTS)
def test_defaults(index: PluginIndex, kind: str, name: str) -> None:
    params = index.get(kind, name).plugin.params().model_dump()
    expected = DEFAULTS[kind, name]
    assert {key: params[key] for key in expected} == expected


def test_constants_reach_what_is_built(index: PluginIndex) -> None:
    for name in ("rmsnorm", "layernorm"):
        assert build(index, "normalization", name).norm(8).eps == 1e-5
        assert build(index, "normalization", name, eps=1e-3).norm(8).eps == 1e-3
    for name in ("sigmoid", "elu", "kernel_elu"):
        assert build(index, "attention", name).rule.eps == 1e-8
    rotary = build(index, "positional", "rope").rotary
    assert (rotary.base, rotary.fraction) == (10_000, 1)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert build(index, "data_transform", "fixed_token").transform({"tokens": tokens})["tokens"].tolist() == [
        [1, 0, 0]
    ]
