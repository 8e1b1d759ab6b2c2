"""The model and its measurement against the same in float64, computed from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.reliability import whole_tensors
from sinkbench.api import LayerCapture, Observation
from sinkbench.data.source import open_source
from sinkbench.testing import RunDistributed
from tests.distributed.runs import prepare, train
from tests.unit import brute_force

STEPS = 12
LENGTH, COUNT, EPS = 16, 6, 0.2
TINY = (
    "demo.yaml",
    "name=short",
    "model={num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: 24}",
    f"train={{steps: {STEPS}, global_batch_size: 16, micro_batch_size: null}}",
    "optim.warmup_steps=2",
    "log={every: 1, progress: false}",
    f"measure={{every: {STEPS}, length: {LENGTH}, count: {COUNT}, eps: {EPS}}}",
    f"validation={{every: {STEPS}, sequences: 5}}",
)
LLAMA = "model={ffn: swiglu, ffn_hidden_size: 48, positional: rope, num_query_groups: 2}"
GPT = "model={ffn: gelu, ffn_hidden_size: 48, normalization: layernorm, tie_embeddings: true}"
BARE = "model={ffn: none, positional: none}"
WIDE = "ffn_hidden_size: 48, positional: learned"
MODELS = {
    "softmax": (LLAMA, "model.attention=softmax"),
    "off by one": (BARE, "model.attention=softmax_off_by_one"),
    "sigmoid normalized": (LLAMA, "model.attention={name: sigmoid, normalize: true}"),
    "sigmoid unnormalized": (LLAMA, "model.attention={name: sigmoid, normalize: false}"),
    "sigmoid learned bias": (
        GPT,
        "model.attention={name: sigmoid, normalize: false, bias: learned, bias_init: -1.0}",
    ),
    "post norm": (
        f"model={{ffn: geglu, {WIDE}, normalization: {{name: layernorm, location: post}}}}",
        "model.attention=softmax",
    ),
    "sandwich norm, summed heads": (
        f"model={{ffn: reglu, {WIDE}, normalization: {{name: rmsnorm, location: sandwich}}}}",
        "model.attention={name: softmax, combine: sum}",
    ),
    "sink token": (f"model={{ffn: swish, {WIDE}}}", "model.attention={name: softmax, sink_token: true}"),
    "sink logit": (f"model={{ffn: relu, {WIDE}}}", "model.attention={name: sink_logit, initial: 0.5}"),
    "softpick": (LLAMA, "model.attention=softpick"),
    "gated per element": (LLAMA, "model.attention=gated"),
    "gated per head": (LLAMA, "model.attention={name: gated, per: head}"),
    "value residual": (LLAMA, "model.attention={name: value_residual, own: 0.6}"),
    "normed queries and keys": (LLAMA, "model.attention=qk_norm"),
}


class Kept:
    """A metric that keeps the attention weights."""

    def observe(self, capture: LayerCapture) -> Observation:
        return {"weights": capture.weights_bhqk}

    def result(self, layers: Sequence[Observation]) -> dict[str, float | list[Any]]:
        return {"weights": [layer["weights"].tolist() for layer in layers]}


def rank_measures(
    rank: int, world_size: int, arguments: Sequence[str], checkpoint: Path
) -> dict[str, float | list[Any]]:
    """What ``sinkbench measure`` finds, and the weights that it finds it from."""
    from sinkbench.measure.probe import Probe
    from sinkbench.measure.runs import find_checkpoint, measure_run
    from sinkbench.measure.settings import Settings
    from sinkbench.megatron import parallel, state
    from sinkbench.megatron.single import SingleModel
    from sinkbench.model import build_stages, declare

    found = find_checkpoint(checkpoint, None)
    result = measure_run(str(checkpoint), found, "natural", Settings(device="cpu"))
    assert (result.length, result.count, result.step) == (LENGTH, COUNT, STEPS)
    config, resolved = prepare(arguments)
    source = open_source(config)
    declared = declare(config, resolved, source.vocab_size)
    with parallel.running(config) as layout:
        networks = build_stages(config, declared, layout)
        state.load_weights(networks, checkpoint)
        sequences = source.probe(COUNT, LENGTH)
        kept = Probe({"kept": Kept()}, sequences, SingleModel(networks, layout)).run()
    return {**result.metrics, **kept}


@pytest.mark.parametrize("name", MODELS)
def test_measurement_equals_float64(run_distributed: RunDistributed, tmp_path: Path, name: str) -> None:
    arguments = (*TINY, *MODELS[name])
    run = train(run_distributed, tmp_path, arguments)
    checkpoint = run.checkpoint(STEPS)
    (measured,) = run_distributed(1, rank_measures, arguments, checkpoint)

    config, _ = prepare(arguments)
    source = open_source(config)
    probe = source.probe(COUNT, LENGTH)
    tensors = whole_tensors(checkpoint)
    expected = brute_force.forward(config.model, tensors, probe["tokens"])
    np.testing.assert_allclose(measured.pop("weights"), np.stack(expected.weights_bhqk), atol=1e-5)
    metrics = {
        **brute_force.sink_metrics(expected, EPS),
        **brute_force.norm_metrics(expected),
        **brute_force.trigger_metrics(expected, probe["trigger"]),
    }
    assert metrics.keys() <= measured.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(measured[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    assert run.measured(STEPS) == measured  # as the run itself found after its last step

    held_out = source.validation("held_out").sequences(0, 5)["tokens"]
    losses = brute_force.forward(config.model, tensors, held_out[:, :-1], held_out[:, 1:]).losses_bs
    assert losses is not None
    assert run.series("validation", "loss")[STEPS] == pytest.approx(losses.mean(), rel=1e-5)


def rank_changes_a_token(rank: int, world_size: int, changed: int) -> dict[str, list[torch.Tensor]]:
    """Losses [b, s] before and after the token at a position changes, by name of the model."""
    from sinkbench.megatron import parallel
    from sinkbench.model import build_stages, declare

    found = {}
    for name, overrides in MODELS.items():
        config, resolved = prepare((*TINY, *overrides))
        declared = declare(config, resolved, 65)
        tokens = torch.from_numpy(open_source(config).sequences(0, 3)["tokens"])
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % 65
        with parallel.running(config) as layout, torch.no_grad():
            (network,) = build_stages(config, declared, layout)
            targets = declared.loss.transform({"tokens": tokens})
            inputs = (targets, {**targets, "tokens": other[:, :-1]})
            found[name] = [network(batch) for batch in inputs]
    return found


def test_a_token_changes_nothing_before_it(run_distributed: RunDistributed) -> None:
    (found,) = run_distributed(1, rank_changes_a_token, 10)
    assert found.keys() == MODELS.keys()
    for before, after in found.values():
        assert torch.equal(before[:, :10], after[:, :10])
        assert bool((before[:, 10:] != after[:, 10:]).all())


def test_sdpa_trains_as_eager_does(run_distributed: RunDistributed, tmp_path: Path) -> None:
    runs = [
        train(run_distributed, tmp_path / backend, (*TINY, LLAMA, f"model.backend={backend}"))
        for backend in ("sdpa", "eager")
    ]
    sdpa, eager = (run.series("train", "loss") for run in runs)
    assert sdpa == pytest.approx(eager, rel=1e-5)
    assert runs[0].measured(STEPS)["importance_1_raw"] == pytest.approx(
        runs[1].measured(STEPS)["importance_1_raw"], rel=1e-4
    )
