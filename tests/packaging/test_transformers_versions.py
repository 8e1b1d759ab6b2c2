"""Exports under other versions of transformers than the one installed here: ``make test-transformers``, which
names interpreters that have the oldest and the newest one allowed in SINKBENCH_TRANSFORMERS_PYTHONS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sinkbench.export import to_hf
from sinkbench.testing import RunDistributed
from tests.distributed.exports import LLAMA, SMALL, check_exports, probe_tokens, rank_writes

PYTHONS = os.environ.get("SINKBENCH_TRANSFORMERS_PYTHONS", "").split()
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHONS, reason="make test-transformers names interpreters"),
]

CASES = {
    "llama": ("LlamaForCausalLM", (LLAMA, "model.num_query_groups=2")),
    "gpt2": (
        "GPT2LMHeadModel",
        (
            "model={linear_bias: all, normalization: layernorm, positional: learned}",
            "model={ffn: gelu_tanh, ffn_hidden_size: 48, tie_embeddings: true}",
        ),
    ),
    "slot": ("SinkbenchForCausalLM", (LLAMA, "model.attention={name: softmax, kv_bias: kv}")),
    "window": (
        "SinkbenchForCausalLM",
        (LLAMA, "model.attention={name: sigmoid, normalize: false, window: 9}"),
    ),
    "alibi": ("SinkbenchForCausalLM", (LLAMA, "model.positional=alibi")),
    "sink_token": ("SinkbenchForCausalLM", (LLAMA, "model.attention={name: softmax, sink_token: true}")),
}


@pytest.fixture(scope="module")
def exports(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name, (class_name, overrides) in CASES.items():
        run = root / "runs" / name
        (logits,) = run_distributed(1, rank_writes, [*SMALL, *overrides], run, None)
        assert to_hf.convert(run / "step_0", root / name) == class_name
        torch.save({"tokens": probe_tokens(), "logits": logits}, root / name / "expected.pt")
    return {name: root / name for name in CASES}


@pytest.mark.parametrize("python", PYTHONS)
def test_exports_compute_the_same(python: str, exports: dict[str, Path], tmp_path: Path) -> None:
    checked = check_exports(list(exports.values()), tmp_path / "cache", python)
    for name, export in exports.items():
        found = checked[str(export)]
        assert found["class"] == CASES[name][0]
        for key in ("logits", "padding", "cache", "checkpointing"):
            assert found[key] < 1e-4, f"{name}, {key}: {found[key]}"
        assert found["saved_again"] == 0
        assert found["generate"], name
